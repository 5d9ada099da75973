//! The engine on the real trainer: stories260K and real instruction rows. It runs on the device that
//! `LORAFLEET_TEST_DEVICE` names, by default the CPU.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use domain::metric;
use domain::trial::{
    Digests, EvalSplit, FailureClass, GradientCheckpointing, PrecisionMode, TrialConfig, TrialSummary,
};
use domain::{Clock, SystemClock};
use gpu_agent::Assignment;
use gpu_agent::cache::Cache;
use gpu_agent::cache::quantised::Room;
use gpu_agent::engine::candle::Candle;
use gpu_agent::engine::pack::Pack;
use gpu_agent::engine::process::{self, Launch};
use gpu_agent::engine::{
    Admission, Checkpoint, CheckpointDirs, Command, Ending, Engine, Event, FourBits, Happening, How, Phase,
    Work,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(120);

fn device() -> trainer::Device {
    let name = std::env::var("LORAFLEET_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    trainer::device::open(&name).unwrap()
}

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LORAFLEET_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("not checked: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

fn config(steps: u32) -> Option<TrialConfig> {
    let text = |path: PathBuf| path.to_str().unwrap().to_string();
    Some(TrialConfig {
        pretrained_model_id: text(shared("data/models/stories260K-hf")?),
        dataset_name: text(shared("data/instruct/instruct_500_guanaco.jsonl")?),
        eval_size: 8.0,
        eval_split: EvalSplit::Last,
        max_sequence_length: 64,
        max_steps: Some(steps),
        learning_rate: 1e-3,
        lora_rank: 4,
        lora_dropout: 0.1,
        ..TrialConfig::default()
    })
}

/// What one trial said.
#[derive(Default)]
struct Said {
    start_step: Option<u64>,
    digests: Option<Digests>,
    losses: Vec<(u64, f64)>,
    base_loss: Option<f64>,
    checkpoints: Vec<Checkpoint>,
    notes: Vec<String>,
    /// Whether a base in 4 bits was read from the cache, or quantised.
    read_quantised: Option<bool>,
    /// How the base came to be in 4 bits.
    four_bits: Option<FourBits>,
    last: Option<Happening>,
}

impl Said {
    fn summary(&self, wanted: Ending) -> &TrialSummary {
        match &self.last {
            Some(Happening::Finished { ending, summary, .. }) if *ending == wanted => summary,
            other => panic!("{wanted:?} expected, but {other:?}"),
        }
    }
}

/// A trial that begins, with its files in a folder of `dir`.
fn admission(dir: &Path, name: &str, config: &TrialConfig) -> Admission {
    Admission {
        work_dir: dir.join(name),
        belongs: None,
        assignment: Assignment::new(name, 1),
        config: config.clone(),
        resume: None,
        digests: None,
        evaluations: None,
        places: Default::default(),
        cache: None,
    }
}

/// An engine, and a folder for its trials.
struct Bench {
    engine: Pack<Candle>,
    dir: tempfile::TempDir,
    /// The agent's cache, if bases in 4 bits are to be kept; what the engine says of them is answered as an agent does.
    cache: Option<Cache>,
}

impl Bench {
    fn new() -> Self {
        Self::with_memory(u64::MAX)
    }

    fn with_memory(bytes: u64) -> Self {
        Self::on(device(), bytes)
    }

    fn on(device: trainer::Device, bytes: u64) -> Self {
        let clock = Arc::new(SystemClock::new());
        let candle = Candle::new(device, clock.clone());
        Self { engine: Pack::new(candle, bytes, clock), dir: tempfile::tempdir().unwrap(), cache: None }
    }

    fn admit(&mut self, name: &str, config: &TrialConfig, resume: Option<CheckpointDirs>) -> Assignment {
        let cache = self.cache.as_ref().map(|cache| cache.root().into());
        let admission = Admission { resume, cache, ..admission(self.dir.path(), name, config) };
        let assignment = admission.assignment.clone();
        self.engine.admit(admission);
        assignment
    }

    /// Steps until everything is done, and listens to one trial; once it has made `stop_at` steps, it is
    /// ended in that way.
    fn run(&mut self, trial: &Assignment, stop_at: Option<(u64, How)>) -> Said {
        let mut said = Said::default();
        let mut stop = stop_at;
        while !self.engine.is_idle() {
            let mut quantised = None;
            self.engine.step(&mut |event| match event {
                Event::Trial(about, happening) if about == *trial => listen(&mut said, happening),
                Event::Quantised { key, bytes } => quantised = Some((key, bytes)),
                Event::Phase(about, Phase { work: Work::Load, four_bits, .. }) if about == *trial => {
                    said.four_bits = four_bits;
                }
                _ => {}
            });
            if let (Some((key, bytes)), Some(cache)) = (quantised, &self.cache) {
                said.read_quantised = Some(bytes.is_none());
                let room = bytes.and_then(|bytes| cache.room(key, bytes));
                if let Some(draft) = room.as_ref().map(Room::draft) {
                    self.engine.keep(draft);
                    // It is written, or given up, whatever the engine does meanwhile.
                    let clock = SystemClock::new();
                    while draft.data(cache.root()).exists() {
                        assert!(clock.monotonic() < PATIENCE, "waited in vain for a base to be written");
                        std::thread::yield_now();
                    }
                }
            }
            if let Some((step, how)) = stop
                && said.losses.last().is_some_and(|(made, _)| *made >= step)
            {
                self.engine.stop(trial, how);
                stop = None;
            }
        }
        said
    }
}

fn listen(said: &mut Said, happening: Happening) {
    match happening {
        Happening::Started { start_step, digests, .. } => {
            said.start_step = Some(start_step);
            said.digests = Some(digests);
        }
        Happening::Points(points) => {
            for point in points {
                match point.get(metric::LOSS) {
                    Some(loss) => said.losses.push((point.step, loss)),
                    None => said.base_loss = point.get(metric::EVAL_LOSS),
                }
            }
        }
        Happening::Checkpoint(checkpoint) => said.checkpoints.push(checkpoint),
        Happening::Note(_, message) => said.notes.push(message),
        last => said.last = Some(last),
    }
}

fn adapter(checkpoint: &Checkpoint) -> Vec<u8> {
    std::fs::read(checkpoint.dirs.adapter.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_trial_trains_and_goes_on_bit_for_bit() {
    let Some(config) = config(6) else { return };
    let mut bench = Bench::new();

    let whole = bench.admit("whole", &config, None);
    let whole = bench.run(&whole, None);
    let summary = whole.summary(Ending::Completed);
    assert_eq!(whole.losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=6).collect::<Vec<_>>());
    assert_eq!(summary.base_eval_loss, whole.base_loss);
    assert!(summary.eval_loss.unwrap() < whole.base_loss.unwrap(), "training helps");
    assert!(summary.sample_after.is_some() && summary.device_seconds > 0.0);
    let last = whole.checkpoints.last().unwrap();
    assert!(last.step == 6 && last.dirs.adapter.join("adapter_config.json").exists());

    let first = bench.admit("first", &config, None);
    let first = bench.run(&first, Some((3, How::Release)));
    assert_eq!(first.last, Some(Happening::Released));
    let checkpoint = first.checkpoints.last().unwrap();
    assert_eq!(checkpoint.step, 3);

    let second = bench.admit("second", &config, Some(checkpoint.dirs.clone()));
    let second = bench.run(&second, None);
    second.summary(Ending::Completed);
    assert_eq!((second.start_step, second.base_loss), (Some(3), None), "the base is not measured again");
    assert_eq!(second.digests, whole.digests);
    assert_eq!([first.losses, second.losses].concat(), whole.losses);
    assert!(adapter(second.checkpoints.last().unwrap()) == adapter(last), "the same bytes");
}

#[test]
fn a_trial_runs_on_a_device_that_it_is_predicted_to_fit() {
    let Some(config) = config(2) else { return };
    let mut bench = Bench::new();
    let whole = bench.admit("whole", &config, None);
    let whole = bench.run(&whole, None);
    let predicted = whole.summary(Ending::Completed).predicted_peak_memory_bytes.unwrap();
    // The base alone is 1 MB: the first is refused before it is loaded, the second when its data is known. One that
    // may compute layers again fits where it would not otherwise.
    let (auto, off) = (GradientCheckpointing::Auto, GradientCheckpointing::Off);
    for (memory, gradient_checkpointing, fits) in [
        (500_000, auto, false),
        (1_500_000, auto, false),
        (predicted - 1, off, false),
        (predicted - 1, auto, true),
        (predicted, off, true),
    ] {
        let mut bench = Bench::with_memory(memory);
        let config = TrialConfig { gradient_checkpointing, ..config.clone() };
        let trial = bench.admit("trial", &config, None);
        match bench.run(&trial, None).last {
            Some(Happening::Finished { ending: Ending::Completed, summary, .. }) => {
                let measured = summary.peak_memory_bytes.unwrap();
                assert!(fits && measured <= memory + memory / 50, "{memory}: {measured} measured");
            }
            Some(Happening::Failed(failure)) => {
                assert_eq!((fits, failure.class), (false, FailureClass::OutOfMemory));
                assert!(failure.message.starts_with("does not fit: needs 0.0"), "{}", failure.message);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_trial_is_not_changed_by_those_beside_it() {
    let Some(config) = config(4) else { return };
    let mut bench = Bench::new();
    let solo = bench.admit("solo", &config, None);
    let solo = bench.run(&solo, None);

    let beside = bench.admit("beside", &config, None);
    bench.admit("hot", &TrialConfig { learning_rate: 1e30, max_steps: Some(9), ..config.clone() }, None);
    bench.admit("short", &TrialConfig { lora_rank: 2, max_steps: Some(2), seed: 7, ..config }, None);
    let beside = bench.run(&beside, None);
    for ((step, alone), (_, together)) in solo.losses.iter().zip(&beside.losses) {
        assert!((alone - together).abs() <= 1e-5 * alone, "step {step}: {alone} alone, {together} together");
    }
    assert_eq!(beside.losses.len(), solo.losses.len());
    beside.summary(Ending::Completed);
}

/// The quickstart's base, which any machine has, in a folder of its own.
fn four_bit(dir: &Path) -> TrialConfig {
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/quickstart");
    let model = dir.join("base");
    std::fs::create_dir(&model).unwrap();
    for file in files(&quickstart.join("base")) {
        std::fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    TrialConfig {
        pretrained_model_id: model.display().to_string(),
        dataset_name: quickstart.join("instruct.jsonl").display().to_string(),
        precision_mode: PrecisionMode::FourBit,
        eval_size: 4.0,
        max_sequence_length: 64,
        max_steps: Some(3),
        ..TrialConfig::default()
    }
}

#[test]
fn a_base_is_quantised_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = four_bit(dir.path());
    let (home, clock) = (dir.path().join("cache"), Arc::new(SystemClock::new()));
    let open = |limit| Cache::open(&home, limit, clock.clone()).unwrap();
    let train = |config: &TrialConfig, limit| {
        let mut bench = Bench::new();
        bench.cache = Some(open(limit));
        let trial = bench.admit("trial", config, None);
        let said = bench.run(&trial, None);
        said.summary(Ending::Completed);
        // Its files go with the bench.
        let trained = adapter(said.checkpoints.last().unwrap());
        (said, trained)
    };
    let told = |said: &Said| {
        said.notes.iter().any(|note| note.starts_with("base read from the quantised cache in "))
    };
    let all = 1_000_000_000;

    let (none, _) = train(&config, 1000);
    assert_eq!((none.read_quantised, files(&home).len()), (Some(false), 0), "there is no room");
    let (first, trained) = train(&config, all);
    assert!(first.read_quantised == Some(false) && !told(&first));
    let Some(FourBits::Quantised(quantising)) = first.four_bits else { panic!("{:?}", first.four_bits) };
    // Of 3 layers 7 matrices each.
    assert!(quantising.matrices == 21 && quantising.bytes > 0, "{quantising:?}");
    assert!(quantising.busy <= quantising.took, "{quantising:?}");
    let (second, again) = train(&config, all);
    assert!(second.read_quantised == Some(true) && told(&second), "{:?}", second.notes);
    assert_eq!(second.four_bits, Some(FourBits::Cached));
    // It is the same base, to the last bit of every step.
    assert_eq!((&first.losses, first.base_loss), (&second.losses, second.base_loss));
    assert_eq!(first.digests, second.digests);
    assert!(trained == again);

    // Other numbers, and other files, are other bases; other trials of this one are not.
    let (single, _) = train(&TrialConfig { double_quant: false, ..config.clone() }, all);
    assert_eq!(single.read_quantised, Some(false));
    assert_eq!(train(&TrialConfig { lora_rank: 2, ..config.clone() }, all).0.read_quantised, Some(true));
    let (plain, _) = train(&TrialConfig { precision_mode: PrecisionMode::Float32, ..config.clone() }, all);
    assert_eq!((plain.read_quantised, plain.four_bits), (None, None));
    let written = Path::new(&config.pretrained_model_id).join("config.json");
    let text = std::fs::read_to_string(&written).unwrap();
    std::fs::write(&written, text + "\n").unwrap();
    let (changed, _) = train(&config, all);
    assert_eq!((changed.read_quantised, &changed.losses), (Some(false), &first.losses));

    // One that is damaged is quantised anew, and then it is right again.
    for kept in files(&home) {
        let weights = kept.join("data/model.safetensors");
        let bytes = std::fs::read(&weights).unwrap();
        std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    }
    for read in [false, true] {
        let (said, _) = train(&config, all);
        assert_eq!((said.read_quantised, &said.losses), (Some(read), &first.losses));
    }
}

#[test]
fn how_trials_end_badly() {
    let Some(config) = config(40) else { return };
    let mut bench = Bench::new();

    let hot = bench.admit("hot", &TrialConfig { learning_rate: 1e30, ..config.clone() }, None);
    let hot = bench.run(&hot, None);
    let steps = hot.summary(Ending::Diverged).steps;
    assert_eq!(hot.checkpoints.last().map(|c| c.step), Some(steps), "the last good state is kept");

    let rows = [
        ("no model", TrialConfig { pretrained_model_id: "/nowhere".into(), ..config.clone() }, "/nowhere"),
        (
            "no data",
            TrialConfig { dataset_name: "/nowhere.jsonl".into(), ..config.clone() },
            "/nowhere.jsonl",
        ),
        ("wide rank", TrialConfig { lora_rank: 4096, ..config.clone() }, "lora_rank"),
        ("no column", TrialConfig { instruct_column_in_dataset: "txt".into(), ..config }, "txt"),
    ];
    for (what, config, message) in rows {
        let trial = bench.admit(what, &config, None);
        let said = bench.run(&trial, None);
        let Some(Happening::Failed(failure)) = &said.last else { panic!("{what}: it fails") };
        assert_eq!(failure.class, FailureClass::User, "{what}: {}", failure.message);
        assert!(failure.message.contains(message), "{what}: {}", failure.message);
        assert!(said.checkpoints.is_empty(), "{what}");
    }
}

/// All of a GPU's memory but so many GB, for as long as this lives.
fn all_but(gigabytes: usize, device: &trainer::Device) -> Vec<trainer::Tensor> {
    let gigabyte = || trainer::Tensor::rand(0f32, 1f32, 250_000_000, device);
    let mut taken: Vec<_> = std::iter::from_fn(|| gigabyte().ok()).collect();
    taken.truncate(taken.len().saturating_sub(gigabytes));
    taken
}

/// A trial of a million tokens a step, some 14 GB, whose rows are written to a directory.
fn large(config: &TrialConfig, dir: &Path) -> TrialConfig {
    let row = format!("{{\"input_ids\": {:?}}}\n", (0..512).map(|i| 3 + i % 500).collect::<Vec<_>>());
    let rows = dir.join("rows.jsonl");
    std::fs::write(&rows, row.repeat(2048)).unwrap();
    TrialConfig {
        dataset_name: rows.display().to_string(),
        eval_size: 0.0,
        batch_size: 2048,
        max_sequence_length: 512,
        gradient_checkpointing: GradientCheckpointing::Off,
        ..config.clone()
    }
}

/// A trial that asks a GPU for more than is left ends by that, and the one beside it trains on to the losses that it has
/// alone. Other tests show the same with an engine that plays it; here the driver refuses.
#[test]
fn running_out_of_a_gpus_memory_ends_one_trial() {
    let device = device();
    let Some(config) = config(3).filter(|_| device.is_cuda()) else { return };
    let mut alone = Bench::on(device.clone(), u64::MAX);
    let solo = alone.admit("solo", &config, None);
    let solo = alone.run(&solo, None);

    let taken = all_but(2, &device);
    let mut bench = Bench::on(device, u64::MAX);
    let beside = bench.admit("beside", &config, None);
    let large = large(&config, bench.dir.path());
    let large = bench.admit("large", &large, None);
    let (mut said, mut refused) = (Said::default(), Said::default());
    while !bench.engine.is_idle() {
        bench.engine.step(&mut |event| match event {
            Event::Trial(about, happening) if about == beside => listen(&mut said, happening),
            Event::Trial(about, happening) if about == large => listen(&mut refused, happening),
            _ => {}
        });
    }
    drop(taken);
    expect_one_to_end(&said, &refused, &solo);
}

#[track_caller]
fn expect_one_to_end(said: &Said, refused: &Said, solo: &Said) {
    let Some(Happening::Failed(failure)) = &refused.last else { panic!("{:?}", refused.last) };
    assert_eq!(failure.class, FailureClass::OutOfMemory, "{}", failure.message);
    said.summary(Ending::Completed);
    assert_eq!(said.losses, solo.losses, "steps that were begun again are the same steps");
}

/// The same with the engine in a process of its own, as an agent has it: the process outlives it, and takes the next
/// trial. `LORAFLEET_PROGRAM` names the program.
#[tokio::test]
async fn running_out_of_memory_in_a_process_ends_one_trial() {
    let device = device();
    let Some(config) = config(3).filter(|_| device.is_cuda()) else { return };
    let Some(program) = std::env::var_os("LORAFLEET_PROGRAM") else {
        println!("not checked: LORAFLEET_PROGRAM does not name the program whose engine runs out of memory");
        return;
    };
    let mut alone = Bench::on(device.clone(), u64::MAX);
    let solo = alone.admit("solo", &config, None);
    let solo = alone.run(&solo, None);
    drop(alone);

    // The process has a context beside this one's.
    let taken = all_but(3, &device);
    let name = std::env::var("LORAFLEET_TEST_DEVICE").unwrap();
    let arguments = ["engine-host", "--device", &name, "--memory-bytes", &u64::MAX.to_string()];
    let launch = Launch {
        device: name.clone(),
        program: program.into(),
        arguments: arguments.map(Into::into).into(),
        variables: Vec::new(),
        first_pause: Duration::from_secs(1),
    };
    let scope = actor::Scope::new();
    let (mut host, dir) = (process::start(launch, &scope), tempfile::tempdir().unwrap());
    let large = large(&config, dir.path());
    let mut said: BTreeMap<_, Said> = BTreeMap::new();
    for together in [&[("beside", &config), ("large", &large)][..], &[("next", &config)]] {
        for (name, config) in together {
            let admission = admission(dir.path(), name, config);
            said.insert(admission.assignment.clone(), Said::default());
            host.commands.send(Command::Admit(Box::new(admission))).await.unwrap();
        }
        let to_their_ends = async {
            while said.values().any(|said| said.last.is_none()) {
                if let Event::Trial(about, happening) = host.events.recv().await.expect("the host lives") {
                    listen(said.get_mut(&about).unwrap(), happening);
                }
            }
        };
        tokio::time::timeout(PATIENCE, to_their_ends).await.expect("all trials end");
    }
    drop(taken);
    let of = |name| &said[&Assignment::new(name, 1)];
    expect_one_to_end(of("beside"), of("large"), &solo);
    assert_eq!(of("next").losses, solo.losses);
    of("next").summary(Ending::Completed);
    drop(host.commands);
    while host.events.recv().await.is_some() {}
    assert!(scope.finish(Duration::from_secs(60)).await);
}

#[test]
fn a_checkpoint_that_is_not_whole_is_refused() {
    let Some(config) = config(4) else { return };
    let mut bench = Bench::new();
    let first = bench.admit("first", &config, None);
    let first = bench.run(&first, Some((2, How::Release)));
    let dirs = &first.checkpoints.last().unwrap().dirs;
    for file in files(&dirs.resume) {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        let second = bench.admit("second", &config, Some(dirs.clone()));
        let second = bench.run(&second, None);
        assert!(matches!(second.last, Some(Happening::Failed(_))), "{}: {:?}", file.display(), second.last);
        std::fs::write(&file, bytes).unwrap();
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}
