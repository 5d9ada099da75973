//! The two hosts of an engine, a thread and a process, with the real trainer on the CPU: both keep the same contract,
//! and a process that dies takes its own trials and nothing else.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{PATIENCE, Sandbox, engines, soon};
use domain::SystemClock;
use domain::trial::{EvalSplit, FailureClass, GradientCheckpointing, TrialConfig};
use gpu_agent::Assignment;
use gpu_agent::engine::candle::Candle;
use gpu_agent::engine::host::Host;
use gpu_agent::engine::pack::Pack;
use gpu_agent::engine::process::{self, Launch};
use gpu_agent::engine::{Admission, CheckpointDirs, Command, Ending, Event, Happening, How};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

/// Bytes that trials may use.
const MEMORY: u64 = 1_000_000_000;

fn thread(_: &actor::Scope) -> Host {
    let factory = || -> Box<dyn gpu_agent::engine::Engine> {
        let clock = Arc::new(SystemClock::new());
        let candle = Candle::new(trainer::Device::Cpu, clock.clone());
        Box::new(Pack::new(candle, MEMORY, clock))
    };
    Host::start("engine", Box::new(factory)).unwrap()
}

fn child(scope: &actor::Scope) -> Host {
    child_with(scope, MEMORY)
}

/// The memory tells the children of different tests apart.
fn child_with(scope: &actor::Scope, memory: u64) -> Host {
    child_armed(scope, memory, None)
}

/// One in which something fails, as `domain::crash` has it.
fn child_armed(scope: &actor::Scope, memory: u64, armed: Option<&str>) -> Host {
    let launch = Launch {
        device: "cpu".into(),
        program: env!("CARGO_BIN_EXE_lorafleet").into(),
        arguments: ["engine-host", "--device", "cpu", "--memory-bytes", &memory.to_string()]
            .map(Into::into)
            .into(),
        variables: armed.map(|armed| (domain::crash::VARIABLE.into(), armed.into())).into_iter().collect(),
        first_pause: Duration::from_millis(1),
    };
    process::start(launch, scope)
}

/// A host under test.
struct Bench {
    host: Host,
    scope: actor::Scope,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(start: impl Fn(&actor::Scope) -> Host) -> Self {
        let scope = actor::Scope::new();
        Self { host: start(&scope), scope, dir: tempfile::tempdir().unwrap() }
    }

    async fn tell(&self, command: Command) {
        self.host.commands.send(command).await.unwrap();
    }

    async fn admit(&self, name: &str, config: &TrialConfig, resume: Option<CheckpointDirs>) {
        let admission = Admission {
            work_dir: self.work_dir(name),
            belongs: None,
            assignment: Assignment::new(name, 1),
            config: config.clone(),
            resume,
            digests: None,
            evaluations: None,
            places: Default::default(),
            cache: None,
        };
        self.tell(Command::Admit(Box::new(admission))).await;
    }

    fn work_dir(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    async fn stop(&self, name: &str, how: How) {
        self.tell(Command::Stop(Assignment::new(name, 1), how)).await;
    }

    /// The next that happens to a trial.
    async fn next(&mut self) -> (String, Happening) {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.host.events.recv()).await;
            let event = event.expect("waited in vain for an event").expect("the host lives");
            if let Event::Trial(assignment, happening) = event {
                return (assignment.trial.to_string(), happening);
            }
        }
    }

    /// Waits until a trial has trained, and answers with the step.
    async fn trained(&mut self, name: &str) -> u64 {
        loop {
            match self.next().await {
                (trial, Happening::Points(points)) if trial == name && points[0].step > 0 => {
                    return points[0].step;
                }
                (trial, happening) => assert!(!happening.is_last(), "{trial}: {happening:?}"),
            }
        }
    }

    /// All that happens to a trial up to its end, while others train.
    async fn story(&mut self, name: &str) -> Vec<Happening> {
        let mut story = Vec::new();
        loop {
            let (trial, happening) = self.next().await;
            if trial == name {
                let last = happening.is_last();
                story.push(happening);
                if last {
                    return story;
                }
            }
        }
    }

    /// Ends the host. Nothing of it is left then.
    async fn end(mut self) {
        drop(self.host.commands);
        let ends = async { while self.host.events.recv().await.is_some() {} };
        tokio::time::timeout(PATIENCE, ends).await.expect("the host ends");
        assert!(self.scope.finish(Duration::from_secs(60)).await);
    }
}

fn config(steps: u32) -> TrialConfig {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    TrialConfig {
        pretrained_model_id: format!("{quickstart}/base"),
        dataset_name: format!("{quickstart}/instruct.jsonl"),
        eval_size: 2.0,
        eval_split: EvalSplit::Last,
        max_sequence_length: 32,
        batch_size: 1,
        max_steps: Some(steps),
        save_steps: 3,
        lora_rank: 4,
        lora_dropout: 0.1,
        ..TrialConfig::default()
    }
}

/// Steps and losses, to the last bit.
fn curve(story: &[Happening]) -> Vec<(u64, u64)> {
    let points = story.iter().filter_map(|happening| match happening {
        Happening::Points(points) => Some(points),
        _ => None,
    });
    points.flatten().filter_map(|p| Some((p.step, p.get(domain::metric::LOSS)?.to_bits()))).collect()
}

/// The contract of a host. Answers with curves, to be compared between hosts.
async fn check(start: impl Fn(&actor::Scope) -> Host) -> Vec<Vec<(u64, u64)>> {
    let mut bench = Bench::new(start);

    // A trial goes from its start to its end, with checkpoints that are there when they are said to be.
    bench.admit("whole", &config(7), None).await;
    let whole = bench.story("whole").await;
    assert!(matches!(&whole[0], Happening::Started { total_steps: 7, start_step: 0, .. }), "{:?}", whole[0]);
    let checkpoints: Vec<_> = whole
        .iter()
        .filter_map(|happening| match happening {
            Happening::Checkpoint(checkpoint) => Some(checkpoint),
            _ => None,
        })
        .collect();
    assert_eq!(checkpoints.iter().map(|c| c.step).collect::<Vec<_>>(), [3, 6, 7]);
    assert!(checkpoints.iter().all(|c| c.dirs.adapter.is_dir() && c.dirs.resume.is_dir()));
    let Some(Happening::Finished { ending: Ending::Completed, summary, .. }) = whole.last() else {
        panic!("{whole:?}")
    };
    assert!(summary.steps == 7 && summary.peak_memory_bytes.is_some(), "{summary:?}");

    // One goes on from a checkpoint as if it had not been interrupted.
    bench.admit("resumed", &config(7), Some(checkpoints[0].dirs.clone())).await;
    let resumed = bench.story("resumed").await;
    assert_eq!(curve(&resumed), curve(&whole)[3..]);

    // What is wrong with a trial is said of that trial.
    let missing = TrialConfig { dataset_name: "/no/such/rows.jsonl".into(), ..config(7) };
    bench.admit("wrong", &missing, None).await;
    let wrong = bench.story("wrong").await;
    let [Happening::Failed(failure)] = &wrong[..] else { panic!("{wrong:?}") };
    assert!(failure.class == FailureClass::User && failure.message.contains("rows.jsonl"), "{failure:?}");

    // Each way to be ended, while another trains on.
    let endless = config(1_000_000);
    for name in ["dropped", "released", "stopped"] {
        bench.admit(name, &endless, None).await;
    }
    let mut training = BTreeSet::from(["dropped", "released", "stopped"].map(String::from));
    while !training.is_empty() {
        if let (trial, Happening::Points(points)) = bench.next().await
            && points[0].step > 3
        {
            training.remove(&trial);
        }
    }
    assert!(bench.work_dir("dropped").exists());
    bench.stop("dropped", How::Drop).await;
    bench.stop("released", How::Release).await;
    let released = bench.story("released").await;
    let [.., Happening::Checkpoint(kept), Happening::Released] = &released[..] else {
        panic!("{released:?}")
    };
    assert!(kept.dirs.resume.is_dir());
    assert!(!bench.work_dir("dropped").exists(), "what is dropped is dropped before the next is ended");
    bench.stop("stopped", How::Stop).await;
    let stopped = bench.story("stopped").await;
    let Some(Happening::Finished { ending: Ending::Stopped, summary, .. }) = stopped.last() else {
        panic!("{stopped:?}")
    };
    assert!(summary.steps > 3);

    // One that never began, and one that nobody knows.
    bench
        .admit("late", &TrialConfig { pretrained_model_id: "/no/such/base".into(), ..config(7) }, None)
        .await;
    bench.stop("late", How::Release).await;
    bench.stop("unknown", How::Stop).await;
    assert_eq!(bench.story("late").await.len(), 1);

    let curves = vec![curve(&whole), curve(&resumed)];
    // It ends with its commands, in the middle of a trial.
    bench.admit("cut", &endless, None).await;
    bench.trained("cut").await;
    bench.end().await;
    curves
}

#[tokio::test]
async fn both_hosts_keep_the_contract_and_train_the_same() {
    assert_eq!(check(thread).await, check(child).await);
}

#[tokio::test]
async fn a_killed_process_gives_its_trials_back_and_another_trains() {
    let memory = MEMORY + 1;
    let mut bench = Bench::new(|scope| child_with(scope, memory));
    let endless = config(1_000_000);
    bench.admit("a", &endless, None).await;
    bench.admit("b", &endless, None).await;
    bench.trained("b").await;
    let [first] = engines(std::process::id(), Some(memory))[..] else { panic!("one child expected") };
    tests::signal(first, "KILL");
    let mut failed = BTreeSet::new();
    while failed.len() < 2 {
        let (trial, happening) = bench.next().await;
        if happening.is_last() {
            let Happening::Failed(failure) = happening else { panic!("{trial}: {happening:?}") };
            assert_eq!(failure.class, FailureClass::Infrastructure);
            assert!(failure.message.contains("signal: 9"), "{}", failure.message);
            failed.insert(trial);
        }
    }
    assert_eq!(failed, BTreeSet::from(["a", "b"].map(String::from)));
    assert!(!Path::new(&format!("/proc/{first}")).exists(), "the dead are waited for");

    bench.admit("c", &config(3), None).await;
    let story = bench.story("c").await;
    assert!(matches!(story.last(), Some(Happening::Finished { ending: Ending::Completed, .. })), "{story:?}");
    let [second] = engines(std::process::id(), Some(memory))[..] else { panic!("one child expected") };
    assert_ne!(first, second);
    bench.end().await;
    assert!(!Path::new(&format!("/proc/{second}")).exists());
}

/// A device that runs out of memory in a step fails the trial that was one too many. The other trains on without a gap, in
/// the same process, which takes the next.
#[tokio::test]
async fn a_process_without_memory_fails_one_trial() {
    let memory = MEMORY + 3;
    let mut bench = Bench::new(|scope| child_armed(scope, memory, Some("step/memory:1000:fail")));
    // It may not compute layers again instead.
    let gradient_checkpointing = GradientCheckpointing::Off;
    let endless = TrialConfig { gradient_checkpointing, save_steps: 0, ..config(1_000_000) };
    bench.admit("a", &endless, None).await;
    bench.admit("b", &endless, None).await;
    let (mut steps, mut failed_at) = (Vec::new(), None);
    while failed_at.is_none_or(|at| steps.len() < at + 10) {
        match bench.next().await {
            (trial, Happening::Points(points)) if trial == "a" => steps.extend(points.iter().map(|p| p.step)),
            (trial, Happening::Failed(failure)) => {
                assert_eq!((trial.as_str(), failure.class), ("b", FailureClass::OutOfMemory));
                assert!(failure.message.contains("out of memory"), "{}", failure.message);
                failed_at = Some(steps.len());
            }
            (trial, happening) => assert!(!happening.is_last(), "{trial}: {happening:?}"),
        }
    }
    assert_eq!(steps, (0..steps.len() as u64).collect::<Vec<_>>(), "gap-free");
    let [first] = engines(std::process::id(), Some(memory))[..] else { panic!("one child expected") };
    bench.admit("c", &config(3), None).await;
    let story = bench.story("c").await;
    assert!(matches!(story.last(), Some(Happening::Finished { ending: Ending::Completed, .. })), "{story:?}");
    assert_eq!(engines(std::process::id(), Some(memory)), [first]);
    bench.end().await;
}

/// Ctrl-C and a service manager's SIGTERM go to every process of an agent; its engines end when it has them end.
#[tokio::test]
async fn a_process_ends_when_its_agent_says_so() {
    let memory = MEMORY + 2;
    let mut bench = Bench::new(|scope| child_with(scope, memory));
    bench.admit("a", &config(1_000_000), None).await;
    bench.trained("a").await;
    let [pid] = engines(std::process::id(), Some(memory))[..] else { panic!("one child expected") };
    for name in ["INT", "TERM", "HUP"] {
        tests::signal(pid, name);
    }
    bench.trained("a").await;
    bench.stop("a", How::Release).await;
    assert_eq!(bench.story("a").await.last(), Some(&Happening::Released));
    bench.end().await;
}

/// The program by itself: what ends it, and how.
#[test]
fn the_verb() {
    let sandbox = Sandbox::new("");
    // (arguments, input, exit code, what it says)
    for (device, input, code, said) in [
        ("cpu", "", 0, ""),
        ("cpu", "\"Shutdown\"\n", 0, ""),
        ("cpu", "Shutdown\n", 1, "Shutdown"),
        ("tpu", "", 2, "tpu"),
    ] {
        let mut command = sandbox.command(&["engine-host", "--device", device, "--memory-bytes", "1000"]);
        std::fs::write(sandbox.path().join("input"), input).unwrap();
        command.stdin(std::fs::File::open(sandbox.path().join("input")).unwrap());
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{device} {input:?}: {error}");
        assert!(error.contains(said) && output.stdout.is_empty(), "{device} {input:?}: {error}");
    }
}

/// A sweep's trials on the quickstart's base, four of them.
fn sweep(max_steps: u32, more: &str) -> Sandbox {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    Sandbox::new(&format!(
        "name: small
pretrained_model_id: {quickstart}/base
dataset_name: {quickstart}/instruct.jsonl
eval_size: 2
batch_size: 1
max_sequence_length: 32
max_steps: {max_steps}
save_steps: 10
search: {{ algorithm: grid }}
parameters: {{ lora_rank: [2, 4], learning_rate: [1.0e-3, 5.0e-3] }}
{more}"
    ))
}

/// Runs it with its engine in a process, `submitted` once it is submitted: what was said, and the trials.
fn run(
    sandbox: &Sandbox,
    variables: &[(&str, &str)],
    submitted: impl Fn(u32),
) -> (String, Vec<serde_json::Value>) {
    let mut command = sandbox.command(&["run", "sweep.yaml", "-o", "json"]);
    command.env("LORAFLEET_ENGINE_HOST", "process").envs(variables.iter().copied());
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    for line in BufReader::new(run.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.starts_with("submitted ") {
            submitted(run.id());
        }
        said += &(line + "\n");
    }
    let output = run.wait_with_output().unwrap();
    assert!(output.status.success(), "{said}");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    (said, result["trials"].as_array().unwrap().clone())
}

/// Expects a trial to be completed, with a curve that is gap-free and single-valued.
#[track_caller]
fn expect_completed(sandbox: &Sandbox, trial: &serde_json::Value, max_steps: u64) {
    assert_eq!(trial["state"], "completed", "{trial:#}");
    assert_eq!(steps(sandbox, trial), (0..=max_steps).collect::<Vec<_>>());
}

/// The steps of a trial's curve.
fn steps(sandbox: &Sandbox, trial: &serde_json::Value) -> Vec<u64> {
    let curve = sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]);
    curve.as_array().unwrap().iter().map(|p| p["step"].as_u64().unwrap()).collect()
}

/// Trials whose engine is killed while they train: the sweep comes to its end, and no point is lost or doubled.
#[test]
fn a_sweep_outlives_its_engine() {
    let sandbox = sweep(300, "");
    let (said, trials) = run(&sandbox, &[], |agent| kill_engine_when_training(&sandbox, agent));
    assert!(said.contains("an engine process is gone"), "{said}");
    let again = trials.iter().any(|trial| trial["attempt"].as_u64() > Some(1));
    assert!(trials.len() == 4 && again, "{trials:#?}");
    trials.iter().for_each(|trial| expect_completed(&sandbox, trial, 300));
}

/// A device that runs out of memory ends one trial of the sweep, and neither its agent nor the trials beside it.
#[test]
fn a_sweep_outlives_a_trial_without_memory() {
    for (fault, evaluates) in [("step/memory:40:fail", false), ("evaluate/memory:1:fail", true)] {
        // It may not compute layers again instead.
        let sandbox = sweep(100, "gradient_checkpointing: false\neval_steps: 55\n");
        let (said, trials) = run(&sandbox, &[(domain::crash::VARIABLE, fault)], |_| ());
        assert!(!said.contains("an engine process is gone"), "{said}");
        let (failed, others): (Vec<_>, Vec<_>) = trials.iter().partition(|trial| trial["state"] == "failed");
        let [failed] = failed[..] else { panic!("one fails: {trials:#?}") };
        assert_eq!(failed["failure"]["class"], "out_of_memory", "{failed:#}");
        assert_eq!(failed["attempt"], 1, "{failed:#}");
        assert_eq!(others.len(), 3);
        others.into_iter().for_each(|trial| expect_completed(&sandbox, trial, 100));
        if evaluates {
            // The step before is made, told of and kept.
            assert!(failed["adapter"].as_str().unwrap().ends_with("/adapter-a1-s55"), "{failed:#}");
            assert_eq!(steps(&sandbox, failed), (0..=55).collect::<Vec<_>>());
        }
        assert!(sandbox.lorafleet(&["fsck", "lorafleet-data"]).status.success(), "{fault}");
    }
}

/// Kills the engine of a sweep that has made some steps.
fn kill_engine_when_training(sandbox: &Sandbox, run: u32) {
    let made = || {
        let sweeps = sandbox.json(&["list"]);
        let trials = sandbox.json(&["trials", "list", sweeps[0]["id"].as_str().unwrap()]);
        trials.as_array().unwrap().iter().map(|trial| trial["step"].as_u64().unwrap()).sum::<u64>()
    };
    soon("some steps", || (made() >= 12).then_some(()));
    let [engine] = engines(run, None)[..] else { panic!("one engine expected") };
    tests::signal(engine, "KILL");
}
