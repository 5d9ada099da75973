//! The agent against a coordinator that the test plays: real gRPC, real files, a simulated engine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod fake;

use actor::Scope;
use domain::data::{ContentHash, Reference};
use domain::metric::MetricPoint;
use domain::trial::TrialConfig;
use domain::{Clock, DeviceId, SystemClock, Timestamp};
use fake::{Fake, Heard, assign};
use gpu_agent::engine::pack::Pack;
use gpu_agent::engine::simulated::Simulated;
use gpu_agent::engine::{Admission, Engine, Event, How};
use gpu_agent::spool::Spool;
use gpu_agent::wire::Saying;
use gpu_agent::{Agent, Assignment, DeviceOptions, EngineHost, Engines, Options, SHUTDOWN_GRACE};
use prost::Message;
use proto::status::RpcError;
use proto::v1::session_request::Message as Up;
use proto::v1::session_response::Message as Down;
use proto::v1::{self, StopReason};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Code, Status};

/// More steps than a test waits for.
const ENDLESS: u32 = 10_000_000;

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

/// Panics at the first step of a pack that holds a trial with seed 666.
struct Fragile(Pack<Simulated>, bool);

impl Engine for Fragile {
    fn admit(&mut self, admission: Admission) {
        self.1 |= admission.config.seed == 666;
        self.0.admit(admission);
    }
    fn stop(&mut self, assignment: &Assignment, how: How) {
        self.0.stop(assignment, how);
    }
    fn step(&mut self, emit: &mut dyn FnMut(Event)) {
        if self.1 {
            panic!("on purpose");
        }
        self.0.step(emit);
    }
    fn is_idle(&self) -> bool {
        self.0.is_idle()
    }
}

fn engines() -> Engines {
    Arc::new(|_| {
        Box::new(|| {
            let simulated = Simulated::stepping(Duration::from_micros(200), clock());
            Box::new(Fragile(Pack::new(simulated, u64::MAX, clock()), false))
        })
    })
}

/// A coordinator and an agent.
struct Stage {
    coordinator: Fake,
    agent: Agent,
    agent_scope: Scope,
    scope: Scope,
    dir: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Self {
        Self::set_in(tempfile::tempdir().unwrap()).await
    }

    async fn set_in(dir: tempfile::TempDir) -> Self {
        let scope = Scope::new();
        let agent_scope = scope.child();
        let coordinator = Fake::start(&scope).await;
        let device = DeviceOptions {
            id: DeviceId::new("cpu"),
            accelerator: "CPU".into(),
            memory_bytes: 1_000_000_000,
            max_pack_size: 4,
            price_per_hour: 0.0,
            price_from: None,
            compute_capability: None,
            host: EngineHost::Thread,
        };
        let options = Options {
            coordinator: coordinator.endpoint.clone().into(),
            data_dir: dir.path().into(),
            devices: vec![device],
            labels: BTreeMap::new(),
            cache_limit: gpu_agent::cache::DEFAULT_LIMIT,
            clock: clock(),
        };
        let agent = gpu_agent::start_with(options, engines(), agent_scope.clone()).await.unwrap();
        Self { coordinator, agent, agent_scope, scope, dir }
    }

    /// Files that are left of trials and in the spool.
    fn left(&self) -> Vec<PathBuf> {
        let list = |dir: &Path| std::fs::read_dir(dir).map(|d| d.map(|e| e.unwrap().path()).collect());
        let mut left: Vec<PathBuf> = list(&self.dir.path().join("trials")).unwrap_or_default();
        left.extend(list(&self.dir.path().join("spool")).unwrap_or_default());
        left
    }

    fn end(self) {
        self.scope.cancel();
    }
}

fn config(max_steps: u32) -> TrialConfig {
    TrialConfig {
        pretrained_model_id: "base".into(),
        dataset_name: "rows".into(),
        max_steps: Some(max_steps),
        ..TrialConfig::default()
    }
}

#[tokio::test]
async fn hello_says_who_speaks() {
    let mut stage = Stage::set().await;
    let (_connection, hello) = stage.coordinator.accept().await;
    let agent = hello.agent.unwrap();
    assert_eq!(agent.id, stage.agent.id.as_str());
    assert_eq!(agent.devices.len(), 1);
    assert_eq!((agent.devices[0].id.as_str(), agent.devices[0].max_pack_size), ("cpu", 4));
    assert_eq!(hello.holdings, Vec::new());
    stage.end();
}

/// A trial from its assignment to its last word.
struct Life {
    what: &'static str,
    config: TrialConfig,
    stop: Option<StopReason>,
    ending: &'static str,
    message: &'static str,
    /// Steps of its points, where they are known.
    steps: Option<Vec<u64>>,
    /// The step of its last upload, where it is known; `Some(None)` for no upload.
    uploaded: Option<Option<u64>>,
}

fn life(what: &'static str, config: TrialConfig, ending: &'static str) -> Life {
    Life { what, config, stop: None, ending, message: "", steps: None, uploaded: None }
}

fn lives() -> Vec<Life> {
    vec![
        Life {
            steps: Some((0..=8).collect()),
            uploaded: Some(Some(8)),
            ..life("all steps", config(8), "completed")
        },
        Life {
            steps: Some(vec![0, 4, 8]),
            ..life("every fourth", TrialConfig { logging_steps: 4, ..config(8) }, "completed")
        },
        Life { steps: Some(vec![0]), uploaded: Some(Some(0)), ..life("no steps", config(0), "completed") },
        Life {
            uploaded: Some(Some(400)),
            ..life("many checkpoints", TrialConfig { save_steps: 1, ..config(400) }, "completed")
        },
        Life { stop: Some(StopReason::Search), ..life("stopped by the search", config(ENDLESS), "stopped") },
        Life { stop: Some(StopReason::Cancelled), ..life("cancelled", config(ENDLESS), "stopped") },
        Life { stop: Some(StopReason::Release), ..life("drained", config(ENDLESS), "released") },
        Life {
            message: "loss is NaN at step 5",
            steps: Some((0..=4).collect()),
            uploaded: Some(Some(4)),
            ..life("diverged", TrialConfig { learning_rate: 7.0, ..config(ENDLESS) }, "diverged")
        },
        Life {
            message: "lora_rank",
            steps: Some(vec![]),
            uploaded: Some(None),
            ..life("a wrong parameter", TrialConfig { lora_rank: 0, ..config(8) }, "failed user")
        },
        Life {
            message: "on purpose",
            uploaded: Some(None),
            ..life("a panic", TrialConfig { seed: 666, ..config(ENDLESS) }, "failed infrastructure")
        },
    ]
}

#[tokio::test]
async fn lives_of_trials() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    for (i, life) in lives().into_iter().enumerate() {
        let trial = Assignment::new(format!("sweep/{}", i + 1), 1);
        let mut heard = Heard::default();
        connection.assign(&trial, &life.config).await;
        if let Some(reason) = life.stop {
            connection.hear_points(&trial, &mut heard).await;
            connection.stop(&trial, reason).await;
        }
        connection.hear_out(&trial, &mut heard).await;
        let what = life.what;
        assert_eq!(heard.ending(), life.ending, "{what}: {}", heard.message());
        assert!(heard.message().contains(life.message), "{what}: {}", heard.message());
        assert!(heard.steps.is_sorted_by(|a, b| a < b), "{what}: {:?}", heard.steps);
        if let Some(steps) = life.steps {
            assert_eq!(heard.steps, steps, "{what}");
        }
        let uploads = stage.coordinator.uploaded_steps(&trial);
        assert!(uploads.is_sorted_by(|a, b| a < b), "{what}: {uploads:?}");
        match life.uploaded {
            Some(last) => assert_eq!(uploads.last().copied(), last, "{what}"),
            None => assert!(!uploads.is_empty(), "{what}"),
        }
        if life.ending == "completed" {
            let started = heard.started.unwrap();
            assert_eq!(started.start_step, 0, "{what}");
            assert!(started.digests.unwrap().base_model.starts_with("simulated:"), "{what}");
        }
        connection.until_held(&[]).await;
        assert_eq!(stage.left(), Vec::<PathBuf>::new(), "{what}: nothing is left behind");
    }
    stage.end();
}

/// Uploaded data is here before its trial begins; others train meanwhile.
#[tokio::test]
async fn uploaded_data_is_fetched_first() {
    let mut stage = Stage::set().await;
    let data = b"{\"text\": \"a\"}\n";
    let [tree, later] =
        [&data[..], b""].map(|data| stage.coordinator.shelf.lock().unwrap().add("rows.jsonl", data));
    let named = |tree: ContentHash| {
        let reference = Reference { tree, name: "rows.jsonl".into(), is_directory: false };
        TrialConfig { dataset_name: reference.to_string(), ..config(4) }
    };
    let refuse = |stage: &Stage, times: usize| {
        stage.coordinator.shelf.lock().unwrap().data_refusals = vec![Code::Unavailable; times].into();
    };
    let [other, fetched, unknown, waiting] = [1, 2, 3, 4].map(|n| Assignment::new(format!("sweep/{n}"), 1));
    let mut connection = stage.coordinator.welcome().await;
    connection.assign(&other, &config(ENDLESS)).await;
    connection.hear_points(&other, &mut Heard::default()).await;

    // Not at the first try.
    refuse(&stage, 1);
    let mut heard = Heard::default();
    connection.assign(&fetched, &named(tree)).await;
    connection.hear_out(&fetched, &mut heard).await;
    assert_eq!(heard.ending(), "completed", "{}", heard.message());
    let path = stage.dir.path().join(format!("cache/{tree}/data/rows.jsonl"));
    assert_eq!(std::fs::read(path).unwrap(), data);

    let mut heard = Heard::default();
    connection.assign(&unknown, &named(ContentHash::of(b"never"))).await;
    connection.hear_out(&unknown, &mut heard).await;
    assert_eq!(heard.ending(), "failed user");
    assert!(heard.message().contains("submit the sweep again"), "{}", heard.message());

    // Ended while it waits for its data.
    refuse(&stage, 1000);
    let mut heard = Heard::default();
    connection.assign(&waiting, &named(later)).await;
    // Its log says why it does not train.
    connection.hear(&waiting, &mut heard).await;
    let said = heard.notes.iter().map(|note| note.message.as_str()).collect::<Vec<_>>();
    assert!(
        matches!(said[..], [said] if said.starts_with("its data is not here; trying again: ")),
        "{said:?}"
    );
    connection.until_held(&[&other, &waiting]).await;
    connection.stop(&waiting, StopReason::Cancelled).await;
    connection.hear_out(&waiting, &mut heard).await;
    assert_eq!((heard.ending().as_str(), heard.message()), ("stopped", "stopped before it went on"));
    connection.until_held(&[&other]).await;
    stage.end();
}

/// What a trial in the queue will need is here before the trial is.
#[tokio::test]
async fn uploaded_data_is_fetched_ahead() {
    let mut stage = Stage::set().await;
    let data = b"{\"text\": \"a\"}\n";
    let tree = stage.coordinator.shelf.lock().unwrap().add("rows.jsonl", data);
    let named = Reference { tree, name: "rows.jsonl".into(), is_directory: false }.to_string();
    let never = Reference { tree: ContentHash::of(b"never"), name: "base".into(), is_directory: true };
    let [other, next] = [1, 2].map(|n| Assignment::new(format!("sweep/{n}"), 1));
    let mut connection = stage.coordinator.welcome().await;
    connection.assign(&other, &config(ENDLESS)).await;
    connection.hear_points(&other, &mut Heard::default()).await;
    // What is no name, and what nobody has, keeps nothing else from coming.
    let hint = vec!["rows.jsonl".into(), never.to_string(), named.clone()];
    connection.send(Down::Prefetch(v1::Prefetch { data: hint })).await;
    let whole = stage.dir.path().join(format!("cache/{tree}/tree"));
    let mut heartbeats = 0..200;
    while !whole.exists() {
        heartbeats.next().expect("it is fetched");
        connection.heartbeat().await;
    }
    // Nothing is left to be asked for.
    stage.coordinator.shelf.lock().unwrap().data_refusals = vec![Code::Unavailable; 1000].into();
    let mut heard = Heard::default();
    connection.assign(&next, &TrialConfig { dataset_name: named, ..config(4) }).await;
    connection.hear_out(&next, &mut heard).await;
    assert_eq!((heard.ending().as_str(), heard.notes.len()), ("completed", 0), "{}", heard.message());
    connection.until_held(&[&other]).await;
    stage.end();
}

#[tokio::test]
async fn assignments_that_cannot_be_read() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let trial = |n: u32| Assignment::new("sweep/1", n);
    let unknown_key = {
        let mut assign = assign(&trial(1), &config(1));
        let fields = &mut assign.config.as_mut().unwrap().fields;
        let value = fields["lora_rank"].clone();
        fields.insert("lora_rnk".into(), value);
        assign
    };
    let elsewhere = v1::Assign { device_id: "cuda:0".into(), ..assign(&trial(2), &config(1)) };
    for (assign, ending, message) in
        [(unknown_key, "failed user", "lora_rnk"), (elsewhere, "failed infrastructure", "no device cuda:0")]
    {
        let trial = Assignment::new(assign.trial_id.clone(), assign.attempt);
        let mut heard = Heard::default();
        connection.send(Down::Assign(assign)).await;
        connection.hear_out(&trial, &mut heard).await;
        assert_eq!(heard.ending(), ending);
        assert!(heard.message().contains(message), "{}", heard.message());
    }
    stage.end();
}

#[tokio::test]
async fn a_lost_stream_loses_nothing() {
    let mut stage = Stage::set().await;
    let trial = Assignment::new("sweep/1", 1);
    let mut first = stage.coordinator.welcome().await;
    first.assign(&trial, &config(60)).await;
    // Acknowledge some, see others, then be gone.
    let mut heard = Heard::default();
    first.hear_points(&trial, &mut heard).await;
    for _ in 0..3 {
        first.next().await;
    }
    drop(first);

    let (mut second, hello) = stage.coordinator.accept().await;
    let held: Vec<_> = hello.holdings.iter().map(|h| (h.trial_id.as_str(), h.attempt)).collect();
    assert_eq!(held, vec![("sweep/1", 1)]);
    second.welcome(Vec::new()).await;
    second.hear_out(&trial, &mut heard).await;
    assert_eq!(heard.ending(), "completed");
    assert_eq!(heard.steps, (0..=60).collect::<Vec<_>>());
    stage.end();
}

/// An agent that was given one coordinator's address is not left without one while another leads.
#[tokio::test]
async fn a_coordinator_that_stands_by_is_left_for_the_one_that_leads() {
    let mut stage = Stage::set().await;
    let trial = Assignment::new("sweep/1", 1);
    let mut first = stage.coordinator.welcome().await;
    first.assign(&trial, &config(ENDLESS)).await;
    let mut heard = Heard::default();
    first.hear_points(&trial, &mut heard).await;

    let mut leads = Fake::start(&stage.scope).await;
    stage.coordinator.shelf.lock().unwrap().leader = Some(leads.endpoint.clone());
    drop(first);
    for _ in 0..2 {
        let (connection, hello) = leads.accept().await;
        assert_eq!(hello.holdings.len(), 1);
        connection.welcome(Vec::new()).await;
        drop(connection);
    }
    let mut connection = leads.welcome().await;
    connection.stop(&trial, StopReason::Cancelled).await;
    connection.hear_out(&trial, &mut heard).await;
    assert_eq!(heard.ending(), "stopped");
    assert!(!leads.uploaded_steps(&trial).is_empty(), "its last checkpoint is there too");
    stage.end();
}

#[tokio::test]
async fn what_is_not_current_is_dropped_without_a_word() {
    let mut stage = Stage::set().await;
    let old = Assignment::new("sweep/1", 1);
    let mut heard = Heard::default();
    let mut connection = stage.coordinator.welcome().await;

    // By a stop.
    connection.assign(&old, &config(ENDLESS)).await;
    connection.hear_points(&old, &mut heard).await;
    connection.stop(&old, StopReason::Fenced).await;
    connection.until_held(&[]).await;

    // By a newer attempt.
    let [second, third] = [2, 3].map(|attempt| Assignment::new("sweep/1", attempt));
    connection.assign(&second, &config(ENDLESS)).await;
    connection.until_held(&[&second]).await;
    connection.assign(&third, &config(ENDLESS)).await;
    connection.until_held(&[&third]).await;
    // A repetition and an older attempt change nothing.
    connection.assign(&third, &config(ENDLESS)).await;
    connection.assign(&old, &config(ENDLESS)).await;

    // By a welcome.
    drop(connection);
    let (mut connection, hello) = stage.coordinator.accept().await;
    assert_eq!(hello.holdings.iter().map(|h| h.attempt).collect::<Vec<_>>(), vec![3]);
    connection.welcome(hello.holdings).await;
    connection.until_held(&[]).await;

    // By an upload.
    let fourth = Assignment::new("sweep/1", 4);
    stage.coordinator.shelf.lock().unwrap().refusals.push_back(Code::Aborted);
    connection.assign(&fourth, &TrialConfig { save_steps: 5, ..config(ENDLESS) }).await;
    connection.hear_points(&fourth, &mut Heard::default()).await;
    connection.until_held(&[]).await;

    assert_eq!(heard.last, None);
    assert!(stage.coordinator.shelf.lock().unwrap().uploads.is_empty());

    // After its last word: a coordinator that has written it down may call it not current before it acknowledges.
    let fifth = Assignment::new("sweep/1", 5);
    connection.assign(&fifth, &config(3)).await;
    loop {
        match connection.next().await {
            Up::Event(v1::TrialEvent { event: Some(v1::trial_event::Event::Finished(_)), .. }) => break,
            message => connection.acknowledge(&message).await,
        }
    }
    connection.stop(&fifth, StopReason::Fenced).await;
    connection.until_held(&[]).await;

    // The engine hears of it at its next step.
    let mut heartbeats = 0..200;
    while !stage.left().is_empty() {
        heartbeats.next().unwrap_or_else(|| panic!("{:?} stay", stage.left()));
        connection.heartbeat().await;
    }
    stage.end();
}

#[tokio::test]
async fn uploads_are_tried_again_and_the_last_word_waits_for_them() {
    let mut stage = Stage::set().await;
    let trial = Assignment::new("sweep/1", 1);
    stage.coordinator.shelf.lock().unwrap().refusals.extend([Code::Unavailable, Code::DataLoss]);
    let mut connection = stage.coordinator.welcome().await;
    connection.assign(&trial, &config(3)).await;
    let mut heard = Heard::default();
    connection.hear_out(&trial, &mut heard).await;
    assert_eq!(heard.ending(), "completed");
    assert_eq!(stage.coordinator.uploaded_steps(&trial), vec![3]);
    // Its log has the first failure, and not each that follows.
    let [note] = &heard.notes[..] else { panic!("{:?}", heard.notes) };
    assert_eq!((note.number, note.severity()), (1, v1::Severity::Warning));
    let said = "the upload of the checkpoint of step 3 failed; trying again: ";
    assert!(note.message.starts_with(said), "{note:?}");

    let refused = Assignment::new("sweep/2", 1);
    stage.coordinator.shelf.lock().unwrap().refusals.push_back(Code::InvalidArgument);
    connection.assign(&refused, &config(3)).await;
    let mut heard = Heard::default();
    connection.hear_out(&refused, &mut heard).await;
    assert_eq!(heard.ending(), "failed infrastructure");
    assert!(heard.message().contains("checkpoint of step 3"), "{}", heard.message());
    stage.end();
}

#[tokio::test]
async fn a_coordinator_of_an_earlier_version_is_told_nothing_that_ends_its_stream() {
    let mut stage = Stage::set().await;
    let trial = Assignment::new("sweep/1", 1);
    stage.coordinator.shelf.lock().unwrap().refusals.push_back(Code::Unavailable);
    let (mut connection, hello) = stage.coordinator.accept().await;
    assert_eq!(hello.agent.unwrap().understands, ["evaluations", "prefetch"]);
    connection.welcome_as(Vec::new(), &[]).await;
    connection.assign(&trial, &config(3)).await;
    // Every number comes, the note's too, and is acknowledged.
    let mut heard = Heard::default();
    connection.hear_out(&trial, &mut heard).await;
    assert_eq!(heard.ending(), "completed");
    assert_eq!(stage.coordinator.uploaded_steps(&trial), vec![3], "after a failure that would be noted");
    assert_eq!(heard.notes, []);
    connection.until_held(&[]).await;
    stage.end();
}

#[tokio::test]
async fn a_trial_goes_on_from_its_checkpoint() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let first = Assignment::new("sweep/1", 1);
    let mut heard = Heard::default();
    connection.assign(&first, &config(ENDLESS)).await;
    connection.hear_points(&first, &mut heard).await;
    connection.stop(&first, StopReason::Release).await;
    connection.hear_out(&first, &mut heard).await;
    let step = *stage.coordinator.uploaded_steps(&first).last().unwrap();
    let digests = heard.started.unwrap().digests.unwrap();

    let goes_on = |attempt, resume_step, digests: &v1::Digests| v1::Assign {
        resume_step: Some(resume_step),
        digests: Some(digests.clone()),
        ..assign(&Assignment::new("sweep/1", attempt), &config(step as u32 + 3))
    };
    let mut heard = Heard::default();
    connection.send(Down::Assign(goes_on(2, step, &digests))).await;
    connection.hear_out(&Assignment::new("sweep/1", 2), &mut heard).await;
    assert_eq!((heard.ending().as_str(), heard.message()), ("completed", ""));
    assert_eq!(heard.started.unwrap().start_step, step);
    assert_eq!(heard.steps, vec![step + 1, step + 2, step + 3]);

    let other = v1::Digests { dataset: "simulated:other".into(), ..digests.clone() };
    let mut heard = Heard::default();
    connection.send(Down::Assign(goes_on(3, step, &other))).await;
    connection.hear_out(&Assignment::new("sweep/1", 3), &mut heard).await;
    assert_eq!(heard.ending(), "failed user");
    assert!(heard.message().contains("data set"), "{}", heard.message());
    stage.end();
}

/// Signs of life, which leases depend on, wait for no disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_stalls_costs_no_lease() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let (trial, other) = (Assignment::new("sweep/1", 1), Assignment::new("sweep/2", 1));
    connection.assign(&trial, &config(ENDLESS)).await;
    connection.hear_points(&trial, &mut Heard::default()).await;

    let spool = stage.agent.spool.clone();
    let (writes, is_writing) = tokio::sync::oneshot::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let of = other.clone();
    let writer = std::thread::spawn(move || {
        let message = |number| {
            writes.send(()).unwrap();
            goes_on.recv().unwrap();
            Saying::Released { reason: "a test".into() }.request(&of, number).encode_to_vec()
        };
        spool.append(&of, true, message).unwrap();
    });
    is_writing.await.unwrap();
    // Some may have been under way before; what an agent of so many stalled tasks says then is said meanwhile.
    let mut held_for = 0.0;
    for _ in 0..40 {
        let holdings = connection.heartbeat().await.holdings;
        let held: Vec<_> = holdings.iter().map(|h| Assignment::new(h.trial_id.clone(), h.attempt)).collect();
        assert_eq!(held, std::slice::from_ref(&trial));
        let seconds = holdings[0].held_seconds.unwrap();
        assert!(seconds > held_for, "{seconds} s after {held_for} s");
        held_for = seconds;
    }
    go_on.send(()).unwrap();
    writer.join().unwrap();
    let mut said = Heard::default();
    connection.hear_out(&other, &mut said).await;
    assert_eq!((said.ending().as_str(), said.message()), ("released", "a test"));
    connection.stop(&trial, StopReason::Cancelled).await;
    connection.until_held(&[]).await;
    stage.end();
}

/// A device is not held, and paid for, for a checkpoint that no try will bring.
#[tokio::test]
async fn a_checkpoint_that_cannot_be_read_gives_the_trial_back() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let first = Assignment::new("sweep/1", 1);
    let mut heard = Heard::default();
    connection.assign(&first, &config(ENDLESS)).await;
    connection.hear_points(&first, &mut heard).await;
    connection.stop(&first, StopReason::Release).await;
    connection.hear_out(&first, &mut heard).await;
    let step = *stage.coordinator.uploaded_steps(&first).last().unwrap();
    let digests = heard.started.unwrap().digests;

    let damaged = || RpcError::DataLoss("`resume` is damaged".into()).into();
    for (attempt, refusals, message, notes) in [
        (2, vec![damaged()], "`resume` is damaged", 0),
        (3, vec![RpcError::Internal("`resume/manifest.json`".into()).into()], "manifest.json", 0),
        (
            4,
            vec![RpcError::NotFound("checkpoint", "resume".into()).into()],
            "there is no checkpoint resume",
            0,
        ),
        (5, vec![Status::unavailable("for now"), damaged()], "`resume` is damaged", 1),
    ] {
        stage.coordinator.shelf.lock().unwrap().download_refusals = refusals.into();
        let trial = Assignment::new("sweep/1", attempt);
        let goes_on = v1::Assign {
            resume_step: Some(step),
            digests: digests.clone(),
            ..assign(&trial, &config(step as u32 + 3))
        };
        let mut heard = Heard::default();
        connection.send(Down::Assign(goes_on)).await;
        connection.hear_out(&trial, &mut heard).await;
        assert_eq!(
            (heard.ending().as_str(), heard.notes.len()),
            ("failed infrastructure", notes),
            "{message}"
        );
        let said = heard.message();
        assert!(said.starts_with("the checkpoint to go on from: ") && said.contains(message), "{said}");
        connection.until_held(&[]).await;
    }
    assert!(stage.coordinator.shelf.lock().unwrap().download_refusals.is_empty(), "each was asked for");
    stage.end();
}

#[tokio::test]
async fn trials_of_a_device_train_together() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let long = Assignment::new("sweep/1", 1);
    let short = Assignment::new("sweep/2", 1);
    let other_base = Assignment::new("sweep/3", 1);
    let mut heard = Heard::default();
    connection.assign(&long, &config(ENDLESS)).await;
    connection.hear_points(&long, &mut heard).await;
    connection.assign(&short, &config(4)).await;
    let mut heard_short = Heard::default();
    connection.hear_out(&short, &mut heard_short).await;
    let Some(v1::trial_event::Event::Finished(finished)) = &heard_short.last else { panic!("it finished") };
    let summary = finished.summary.clone().unwrap();
    assert!(summary.packed);
    assert_eq!(summary.predicted_peak_memory_bytes, Some(1_000));

    // Another base waits until nobody needs this one.
    let elsewhere = TrialConfig { pretrained_model_id: "other".into(), ..config(4) };
    connection.assign(&other_base, &elsewhere).await;
    connection.until_held(&[&long, &other_base]).await;
    assert_eq!(connection.heartbeat().await.resident_bases["cpu"], "base");
    connection.stop(&long, StopReason::Search).await;
    let mut heard_other = Heard::default();
    connection.hear_out(&other_base, &mut heard_other).await;
    assert_eq!(heard_other.ending(), "completed");
    connection.until_held(&[]).await;
    assert_eq!(connection.heartbeat().await.resident_bases["cpu"], "other");
    stage.end();
}

#[tokio::test]
async fn an_agent_that_ends_gives_its_trials_back() {
    let mut stage = Stage::set().await;
    let mut connection = stage.coordinator.welcome().await;
    let trials = [Assignment::new("sweep/1", 1), Assignment::new("sweep/2", 1)];
    for trial in &trials {
        connection.assign(trial, &config(ENDLESS)).await;
    }
    for trial in &trials {
        connection.hear_points(trial, &mut Heard::default()).await;
    }
    let scope = stage.agent_scope.clone();
    scope.cancel();
    let mut given_back = 0;
    while given_back < trials.len() {
        let message = connection.next().await;
        connection.acknowledge(&message).await;
        if let Up::Event(v1::TrialEvent { event: Some(v1::trial_event::Event::Released(r)), .. }) = message {
            assert_eq!(r.reason, "the agent shuts down");
            given_back += 1;
        }
    }
    assert!(scope.finish(SHUTDOWN_GRACE).await, "and then it ends");
    for trial in &trials {
        assert!(!stage.coordinator.uploaded_steps(trial).is_empty(), "{trial}");
    }
    stage.end();
}

#[tokio::test]
async fn an_agent_started_again_says_what_was_left_unsaid() {
    let dir = tempfile::tempdir().unwrap();
    let trial = Assignment::new("sweep/1", 4);
    {
        let spool = Spool::open(&dir.path().join("spool")).unwrap();
        let points = (1..=3).map(|step| MetricPoint { step, time: Timestamp(1), values: vec![] }).collect();
        let said = Saying::Points(points);
        spool.append(&trial, false, |n| said.request(&trial, n).encode_to_vec()).unwrap();
    }
    let mut stage = Stage::set_in(dir).await;
    let (mut connection, hello) = stage.coordinator.accept().await;
    assert_eq!(hello.holdings.len(), 1);
    connection.welcome(Vec::new()).await;
    let mut heard = Heard::default();
    connection.hear_out(&trial, &mut heard).await;
    assert_eq!((heard.steps.as_slice(), heard.ending().as_str()), (&[1, 2, 3][..], "failed infrastructure"));
    assert!(heard.message().contains("started again"), "{}", heard.message());
    connection.until_held(&[]).await;
    stage.end();
}
