//! Runs from files to files: the reference's runs on real text, resuming, packs, divergence.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{device, flat, json_file, shared, tiny_run, write_texts, write_tokenizer};
use domain::SystemClock;
use domain::metric::REPORTED;
use domain::trial::{
    GradientCheckpointing, InitLoraWeights, LrSchedulerType, PrecisionMode, StoppingStrategy, Throughput,
    TrialConfig,
};
use std::collections::HashMap;
use std::path::Path;
use trainer::data::Dataset;
use trainer::files::Outlives;
use trainer::lora::Adapter;
use trainer::pack::{self, Member, Row};
use trainer::run::{Loaded, Run, Stepped, step_pack};
use trainer::{data, preflight};

fn load(config: &TrialConfig) -> Loaded {
    Loaded::load(Path::new(&config.pretrained_model_id), config.base_model().precision, device()).unwrap()
}

fn steps(loaded: &Loaded, run: &mut Run, count: u64) -> Vec<Stepped> {
    let clock = SystemClock::new();
    (0..count).map(|_| step_pack(loaded, &mut [&mut *run], &clock).unwrap().remove(0)).collect()
}

/// One of the reference's runs on the pretrained 260K-parameter model, and how closely ours is to follow it: the
/// reference's own figures say how fast each run makes rounding grow.
struct Stories {
    name: &'static str,
    rank: u32,
    learning_rate: f64,
    /// Steps whose loss agrees within 1e-4 and gradient norm within 1e-3 of its size.
    close: usize,
    /// How far every step's loss may be off, and the final `eval/loss`.
    loss: f64,
    eval: f64,
}

const STORIES: [Stories; 7] = [
    Stories { name: "r4_lr1e-3", rank: 4, learning_rate: 1e-3, close: 200, loss: 1e-4, eval: 1e-4 },
    Stories { name: "r16_lr1e-3", rank: 16, learning_rate: 1e-3, close: 200, loss: 1e-4, eval: 1e-4 },
    Stories { name: "r4_lr5e-3", rank: 4, learning_rate: 5e-3, close: 50, loss: 1e-3, eval: 1e-3 },
    Stories { name: "r16_lr5e-3", rank: 16, learning_rate: 5e-3, close: 50, loss: f64::INFINITY, eval: 0.02 },
    Stories {
        name: "r16_lr5e-3_completion",
        rank: 16,
        learning_rate: 5e-3,
        close: 50,
        loss: f64::INFINITY,
        eval: 0.002,
    },
    // Unstable on purpose: only how it begins can be compared, and that it ends badly.
    Stories {
        name: "r4_lr2e-2",
        rank: 4,
        learning_rate: 2e-2,
        close: 10,
        loss: f64::INFINITY,
        eval: f64::INFINITY,
    },
    Stories {
        name: "r16_lr2e-2",
        rank: 16,
        learning_rate: 2e-2,
        close: 10,
        loss: f64::INFINITY,
        eval: f64::INFINITY,
    },
];

impl Stories {
    fn completion(&self) -> bool {
        self.name.ends_with("completion")
    }

    fn config(&self, dir: &Path) -> Option<TrialConfig> {
        let (model, data) =
            (shared("data/models/stories260K-hf")?, shared("data/instruct/instruct_500_guanaco.jsonl")?);
        let init = shared(&format!("reference/stories260k/init_r{}", self.rank))?;
        // The reference's batches run on over the end of its 450 training rows, where ours would end the epoch
        // with a smaller one: they are written out, all 200.
        let text = std::fs::read_to_string(data).unwrap();
        let rows: Vec<_> = text.lines().collect();
        let write = |name: &str, rows: &mut dyn Iterator<Item = &str>| {
            std::fs::write(dir.join(name), rows.fold(String::new(), |text, row| text + row + "\n")).unwrap();
            dir.join(name).display().to_string()
        };
        Some(TrialConfig {
            pretrained_model_id: model.display().to_string(),
            dataset_name: write("train.jsonl", &mut (0..800).map(|i| rows[i % 450])),
            eval_dataset_name: Some(write("eval.jsonl", &mut rows[450..].iter().copied())),
            shuffle: false,
            assistant_only_loss: self.completion(),
            batch_size: 4,
            max_sequence_length: 256,
            lora_rank: self.rank,
            init_adapter: Some(init.display().to_string()),
            learning_rate: self.learning_rate,
            lr_scheduler_type: LrSchedulerType::ConstantWithWarmup,
            warmup_steps: 10,
            max_steps: Some(200),
            ..TrialConfig::default()
        })
    }

    /// Holds ten steps against the reference's log, with `LORAFLEET_FULL` all 200 and the final `eval/loss`, which
    /// it answers with.
    fn check(&self) -> Option<f64> {
        let dir = tempfile::tempdir().unwrap();
        let (config, name) = (self.config(dir.path())?, self.name);
        let want = json_file(&shared(&format!("reference/stories260k/{name}.json"))?);
        let loaded = load(&config);
        let mut run = Run::new(&loaded, config).unwrap();
        let base = if self.completion() { 4.650969 } else { 5.063520 };
        let got = run.base_eval(&loaded).unwrap().unwrap();
        assert!((got - base).abs() < 1e-5, "{name}: base eval/loss {got}, reference {base}");
        let full = std::env::var_os("LORAFLEET_FULL").is_some();
        let stepped = steps(&loaded, &mut run, if full { 200 } else { 10 });
        let (mut first, mut all, mut norms) = (0f64, 0f64, 0f64);
        for (step, stepped) in stepped.iter().enumerate() {
            let point = stepped.point.as_ref().unwrap();
            assert_eq!(point.step, step as u64 + 1);
            assert_eq!(point.get("tokens"), want["tokens"][step].as_f64(), "{name} step {step}");
            let pair =
                |ours: &str, theirs: &str| (point.get(ours).unwrap(), want[theirs][step].as_f64().unwrap());
            let (rate, wanted) = pair("learning_rate", "lr");
            assert!((rate - wanted).abs() <= 1e-9 * wanted, "{name} step {step}: {rate}, not {wanted}");
            let ((loss, wanted_loss), (norm, wanted_norm)) =
                (pair("loss", "loss"), pair("grad_norm", "grad_norm"));
            let (off, norm_off) = ((loss - wanted_loss).abs(), (norm / wanted_norm - 1.0).abs());
            assert!(off <= self.loss, "{name} step {step}: loss {loss}, not {wanted_loss}");
            all = all.max(off);
            if step < self.close {
                assert!(off <= 1e-4, "{name} step {step}: loss {loss}, not {wanted_loss}");
                assert!(norm_off <= 1e-3, "{name} step {step}: gradient norm {norm}, not {wanted_norm}");
                (first, norms) = (first.max(off), norms.max(norm_off));
            }
        }
        print!(
            "{name}: base eval/loss off by {:.1e}; of the first {} steps, ",
            (got - base).abs(),
            self.close
        );
        println!("loss by {first:.1e}, gradient norm by {norms:.1e} of it; of all, loss by {all:.1e}");
        let key = if self.completion() { "eval/loss_completion" } else { "eval/loss" };
        let (got, want) =
            (stepped.get(199)?.point.as_ref().unwrap().get("eval/loss").unwrap(), &want["final"][key]);
        let off = (got - want.as_f64().unwrap()).abs();
        println!("{name}: final eval/loss {got}, reference {want}, off by {off:.1e}");
        assert!(off <= self.eval, "{name}: final eval/loss {got}, reference {want}");
        Some(got)
    }
}

#[test]
fn runs_on_real_text_are_the_references() {
    let last: HashMap<_, _> = STORIES.iter().filter_map(|run| Some((run.name, run.check()?))).collect();
    if last.len() == STORIES.len() {
        let order = ["r16_lr1e-3", "r16_lr5e-3", "r4_lr5e-3", "r4_lr1e-3"].map(|name| last[name]);
        assert!(
            order.is_sorted() && order[3] < last["r4_lr2e-2"] && order[3] < last["r16_lr2e-2"],
            "{last:?}"
        );
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    for mode in
        [PrecisionMode::Float32, PrecisionMode::Bfloat16, PrecisionMode::Float16, PrecisionMode::FourBit]
    {
        check_resume(&|config| config.precision_mode = mode);
    }
    check_resume(&|config| config.init_lora_weights = InitLoraWeights::PissaNiter(4));
    let names = ["lm_head", "embed_tokens", "norm"];
    check_resume(&|config| config.use_dora = true);
    check_resume(&|config| {
        config.interleave_datasets = Some(vec![config.dataset_name.clone()]);
        config.interleave_probabilities = Some(vec![3.0, 1.0]);
        config.stopping_strategy = StoppingStrategy::AllExhausted;
    });
    check_resume(&|config| config.modules_to_save = Some(names.map(String::from).into()));
}

fn check_resume(change: &dyn Fn(&mut TrialConfig)) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_run(dir.path());
    change(&mut config);
    let loaded = load(&config);
    let mut whole = Run::new(&loaded, config.clone()).unwrap();
    let all = steps(&loaded, &mut whole, 20);

    let (adapter, resume) = (dir.path().join("adapter"), dir.path().join("resume"));
    let mut first = Run::new(&loaded, config.clone()).unwrap();
    steps(&loaded, &mut first, 7);
    let snapshot = first.snapshot().unwrap();
    // It is written when the run has gone on, which changes neither of them.
    steps(&loaded, &mut first, 13);
    assert_eq!(flat(first.adapter()), flat(whole.adapter()));
    snapshot.write(&adapter, &resume, Outlives::Process).unwrap();
    // What is computed twice may change on the way: it changes no number.
    let config = TrialConfig { gradient_checkpointing: GradientCheckpointing::On, ..config };
    let mut second = Run::resume(&load(&config), config.clone(), &adapter, &resume).unwrap();
    assert_eq!((second.step(), second.recomputed_layers()), (7, 2));
    let rest = steps(&loaded, &mut second, 13);

    assert!(whole.is_done() && second.is_done());
    assert_eq!(flat(whole.adapter()), flat(second.adapter()));
    for (a, b) in all[7..].iter().zip(&rest) {
        let (a, b) = (a.point.as_ref().unwrap(), b.point.as_ref().unwrap());
        assert_eq!(a.step, b.step);
        for name in ["loss", "grad_norm", "learning_rate", "tokens", "eval/loss"] {
            assert_eq!(a.get(name), b.get(name), "step {} {name}", a.step);
        }
    }
    // What a sweep can compare trials by.
    let last = all[19].point.as_ref().unwrap();
    let missing: Vec<_> = REPORTED.iter().filter(|name| last.get(name).is_none()).collect();
    assert!(missing.is_empty(), "not reported: {missing:?}");
    let (a, b) = (whole.summary(&loaded).unwrap(), second.summary(&loaded).unwrap());
    assert_eq!((a.steps, a.loss, a.eval_loss), (b.steps, b.loss, b.eval_loss));
    assert_eq!(a.throughput, Throughput::Solo);
    let magnitudes = if config.use_dora { 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16) } else { 0 };
    let saved = if config.modules_to_save.is_some() { 2 * 40 * 16 + 5 * 16 } else { 0 };
    assert_eq!(a.trainable_parameters, 4 * 2 * (32 + 24 + 24 + 32 + 40 + 40 + 40) + saved + magnitudes);
}

/// What is said to the sample prompt on the way: after evaluations, before the end, and once, however often the run goes on from a
/// checkpoint.
#[test]
fn texts_on_the_way_are_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = TrialConfig {
        dataset_name: at("texts.jsonl").display().to_string(),
        max_sequence_length: 32,
        eval_steps: 4,
        learning_rate: 5e-2,
        ..tiny_run(dir.path())
    };
    write_tokenizer(&at("model"), 40);
    write_texts(&at("texts.jsonl"), 24);
    let loaded = load(&config);
    let whole = |config: &TrialConfig| {
        let mut run = Run::new(&loaded, config.clone()).unwrap();
        steps(&loaded, &mut run, 20);
        run.summary(&loaded).unwrap()
    };
    let all = whole(&config);
    let told: Vec<_> = all.texts().map(|(step, _)| step).collect();
    assert_eq!(told, [0, 4, 8, 12, 16, 20]);
    // Each is how what the run would have said at its end there begins.
    for sample in &all.samples {
        let mut run = Run::new(&loaded, config.clone()).unwrap();
        steps(&loaded, &mut run, sample.step);
        let there = run.summary(&loaded).unwrap();
        let said = there.sample_after.as_ref().unwrap();
        assert!(said.starts_with(&sample.text) && sample.text.len() <= 80, "{said}");
        assert!(
            there.texts().map(|(step, _)| step).eq(told.iter().copied().filter(|step| *step <= sample.step))
        );
    }
    assert_ne!(all.samples[0].text, all.samples[3].text);
    for from in [3, 4, 10] {
        let mut first = Run::new(&loaded, config.clone()).unwrap();
        steps(&loaded, &mut first, from);
        first.save(&at("adapter"), &at("resume"), Outlives::Process).unwrap();
        steps(&loaded, &mut first, 7);
        let mut second = Run::resume(&loaded, config.clone(), &at("adapter"), &at("resume")).unwrap();
        steps(&loaded, &mut second, 20 - from);
        assert_eq!(second.summary(&loaded).unwrap().samples, all.samples, "from step {from}");
    }
    // Not more often than it is evaluated, and not more texts than a record may have.
    let of = |eval_steps| whole(&TrialConfig { eval_steps, ..config.clone() }).samples;
    assert_eq!(of(0), []);
    assert_eq!(of(1).iter().map(|sample| sample.step).collect::<Vec<_>>(), [5, 10, 15]);
}

/// A step whose gradients overflow is left out, and the next one tries with half the scale.
#[test]
fn an_overflow_in_float16_costs_a_step_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (precision_mode, max_steps) = (PrecisionMode::Float16, Some(60));
    let config = TrialConfig { precision_mode, max_steps, ..tiny_run(dir.path()) };
    let loaded = load(&config);
    let (adapter, resume) = (dir.path().join("adapter"), dir.path().join("resume"));
    let mut run = Run::new(&loaded, config.clone()).unwrap();
    steps(&loaded, &mut run, 3);
    run.save(&adapter, &resume, Outlives::Process).unwrap();
    // As if the scale had grown until the gradients overflow.
    let file = resume.join("resume.json");
    let mut saved = json_file(&file);
    assert_eq!(saved["loss_scaler"]["scale"], 65_536.0);
    saved["loss_scaler"]["scale"] = serde_json::json!(2f32.powi(70));
    std::fs::write(&file, saved.to_string()).unwrap();
    let mut run = Run::resume(&loaded, config, &adapter, &resume).unwrap();
    let before = flat(run.adapter());
    let mut left_out = 0;
    while flat(run.adapter()) == before {
        let stepped = steps(&loaded, &mut run, 1).remove(0);
        assert_eq!(stepped.diverged, None);
        left_out += 1;
        assert!(left_out < 40, "it goes on once the scale is small enough");
    }
    assert!(left_out > 1 && run.step() == 3 + left_out, "steps count as steps: {left_out}");
    assert!(flat(run.adapter()).iter().all(|x| x.is_finite()));
}

/// Where memory is short, layers are computed again, as few as that takes.
#[test]
fn a_run_fits_itself_to_the_memory_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_run(dir.path());
    let loaded = load(&config);
    let run = || Run::new(&loaded, config.clone()).unwrap();
    let whole = run().fit(&loaded, u64::MAX).total();
    // (bytes, layers computed again)
    for (memory, layers) in [(whole, 0), (whole - 1, 1), (1, 2)] {
        let mut run = run();
        let held = run.fit(&loaded, memory).total();
        assert_eq!(run.recomputed_layers(), layers, "{memory} of {whole}");
        assert!(layers == 0 || held < whole);
        steps(&loaded, &mut run, 2);
        let counted = run.summary(&loaded).unwrap().peak_memory_bytes.unwrap();
        assert!(counted as f64 <= 1.01 * held as f64, "{layers} layers: {counted} counted, {held} predicted");
    }
    let never = TrialConfig { gradient_checkpointing: GradientCheckpointing::Off, ..config.clone() };
    let mut never = Run::new(&loaded, never).unwrap();
    assert_eq!((never.fit(&loaded, 1).total(), never.recomputed_layers()), (whole, 0));
}

/// A checkpoint that is being written holds the state that it is of, which counts for as long.
#[test]
fn what_a_checkpoint_on_its_way_holds_counts() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrialConfig { save_steps: 1, eval_steps: 0, ..tiny_run(dir.path()) };
    let loaded = load(&config);
    if !loaded.base.device().is_cpu() {
        return;
    }
    // Every step's pass takes as much.
    let rows = (0..12).map(|r| Row::whole((0..16).map(|i| (7 * i + r) % 40).collect())).collect();
    let data = Dataset { train: rows, ..Dataset::default() };
    let [without, with] = [false, true].map(|is_slow| {
        let mut run = Run::with_data(&loaded, config.clone(), data.clone()).unwrap();
        steps(&loaded, &mut run, 1);
        let snapshot = run.snapshot().unwrap();
        let on_its_way = is_slow.then_some(snapshot);
        // The run lets go of its moments with the next step, and of its adapter with the one after.
        let counted = [1, 1, 1, 2].map(|more| {
            steps(&loaded, &mut run, more);
            run.summary(&loaded).unwrap().peak_memory_bytes.unwrap()
        });
        drop(on_its_way);
        let predicted = run.predicted_peak_bytes(&loaded).total();
        assert!(counted[3] as f64 <= 1.01 * predicted as f64, "{counted:?} counted, {predicted} predicted");
        (counted, 4 * run.adapter().parameters())
    });
    let ((without, of_the_adapter), (with, _)) = (without, with);
    let more: Vec<_> = with.iter().zip(without).map(|(with, without)| with - without).collect();
    assert_eq!(more, [0, 2, 3, 3].map(|times| times * of_the_adapter));
}

/// Of the tokens that steps compute on real rows, in a pack too, and an evaluation, all are the rows' own. Beside them
/// stands what batches would have that are padded to their longest row. Three steps and as many batches of an evaluation
/// are computed; with `LORAFLEET_FULL` an epoch.
#[test]
fn no_computed_token_is_padding() {
    const STEPS: u64 = 3;
    for file in ["instruct_500_guanaco.jsonl", "oasst_guanaco_multilingual.jsonl"] {
        let model = shared("data/models/stories260K-hf");
        let Some((model, rows)) = model.zip(shared(&format!("data/instruct/{file}"))) else { return };
        let config = TrialConfig {
            pretrained_model_id: model.display().to_string(),
            dataset_name: rows.display().to_string(),
            batch_size: 4,
            max_sequence_length: 512,
            num_train_epochs: Some(1.0),
            ..TrialConfig::default()
        };
        let loaded = load(&config);
        let base = &loaded.base;
        let rows = preflight::data(&config, loaded.tokenizer.as_ref(), &base.config).unwrap();
        let targets = preflight::check(&config, base).unwrap();
        let fresh = |seed| Adapter::new(base, &targets, 0.0, seed).unwrap();
        let (mut one, mut other) = (fresh(1), fresh(2));
        let epoch = config.total_steps(rows.train.len() as u64);
        let steps = if std::env::var_os("LORAFLEET_FULL").is_some() { epoch } else { 2 * STEPS };
        let (mut real, mut computed, mut padded) = (0, 0, 0);
        for step in 0..steps {
            let batches = data::step_batches(&config, rows.train.len(), step);
            for batch in batches {
                let batch: Vec<Row> = batch.into_iter().map(|row| rows.train[row].clone()).collect();
                let lengths = || batch.iter().map(|row| row.input_ids.len() as u64);
                real += lengths().sum::<u64>();
                padded += lengths().max().unwrap_or(0) * batch.len() as u64;
                if step >= STEPS {
                    computed += pack::evaluate(base, Some(&one), &batch).unwrap().tokens;
                    continue;
                }
                let mut members = [Member::new(&mut one, &batch, 1), Member::new(&mut other, &batch, 1)];
                let outcomes = pack::forward_backward(base, &mut members).unwrap();
                assert_eq!(outcomes[0].tokens, outcomes[1].tokens);
                computed += outcomes[0].tokens;
            }
        }
        let percent = |of: u64| 100.0 * real as f64 / of as f64;
        println!(
            "{file}, {steps} of {epoch} steps of 4 rows: {real} real of {computed} computed tokens, {:.1} %; padded to \
             the longest of each batch {:.1} %",
            percent(computed),
            percent(padded)
        );
        assert!(percent(computed) >= 95.0, "{file}");
        assert!(padded > real, "{file}: rows of one length show nothing");
    }
}
