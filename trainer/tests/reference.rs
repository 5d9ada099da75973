//! The engine's numbers beside PEFT's and transformers' (the figures that `../shared/reference` documents).
//! Where those figures are not on the machine, each test says so and checks nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::Tensor;
use common::{device, shared};
use domain::trial::{Precision, PrecisionMode};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use trainer::adapter_file::{self, PeftConfig, resolve};
use trainer::lora::{Adapter, LoraMatrix};
use trainer::model::{Base, ModelConfig};
use trainer::optim::{AdamW, AdamWConfig};
use trainer::pack::{self, Member, Outcome, Row};
use trainer::quant::Nf4;
use trainer::weight::Weight;

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// An adapter from a PEFT directory.
fn adapter(base: &Base, dir: PathBuf) -> Adapter {
    let targets = resolve(base, &PeftConfig::load(&dir).unwrap()).unwrap();
    adapter_file::load(&dir, &targets, 0, device()).unwrap().1
}

/// A micro-batch of `batches.json`: padding dropped, `labels` or `labels_completion` as targets.
fn rows(batch: &Value, labels: &str) -> Vec<Row> {
    let ids: Vec<Vec<u32>> = numbers(&batch["input_ids"]);
    let mask: Vec<Vec<u8>> = numbers(&batch["attention_mask"]);
    let labels: Vec<Vec<i64>> = numbers(&batch[labels]);
    let row = |i: usize| {
        let length = mask[i].iter().filter(|m| **m == 1).count();
        let targets = (0..length).map(|t| t > 0 && labels[i][t] != -100).collect();
        Row { input_ids: ids[i][..length].to_vec(), targets }
    };
    (0..ids.len()).map(row).collect()
}

fn close(what: &str, got: f64, want: f64, relative: f64) {
    assert!((got - want).abs() <= relative * want.abs().max(1e-12), "{what}: {got}, reference {want}");
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat(a).iter().zip(flat(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn frobenius(t: &Tensor) -> f64 {
    f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// The logits of `probe`'s real tokens against the reference's `[2, 16, vocab]`.
fn check_probe(base: &Base, adapter: Option<&Adapter>, probe: &Value, want: &Tensor) {
    let ids: Vec<Vec<u32>> = numbers(&probe["input_ids"]);
    let mask: Vec<Vec<u8>> = numbers(&probe["attention_mask"]);
    for (i, ids) in ids.iter().enumerate() {
        let length = mask[i].iter().filter(|m| **m == 1).count();
        let got = pack::logits(base, adapter, &ids[..length]).unwrap();
        let want = want.get(i).unwrap().narrow(0, 0, length).unwrap();
        let difference = largest_difference(&got, &want);
        assert!(difference < 1e-4, "probe row {i}: logits differ by {difference}");
    }
}

#[derive(Clone, Copy)]
struct Run {
    name: &'static str,
    precision: Precision,
    labels: &'static str,
    accumulation: usize,
    /// Whether micro-batch means are averaged (transformers before 4.46) rather than tokens.
    mean_of_means: bool,
    max_grad_norm: f64,
}

/// A 4-bit base with the reference's nested codes, of which bitsandbytes takes some for their neighbours, and with
/// what its CPU kernel makes of awkward rows.
fn as_bitsandbytes_has_it(base: &mut Base, gqa: &Path) {
    let theirs = candle_core::safetensors::load(gqa.join("base_nf4_dq.safetensors"), device()).unwrap();
    for linear in base.layers.iter_mut().flat_map(|layer| &mut layer.linears) {
        let Weight::Nf4(matrix) = &mut linear.weight else { continue };
        if let (codes, Some(_)) = matrix.parts().unwrap() {
            let of = |part: &str| theirs[&format!("{}.{part}", linear.path)].flatten_all().unwrap();
            let absmax: Vec<f32> = of("nested_absmax").to_vec1().unwrap();
            let offset = of("offset").to_vec1::<f32>().unwrap()[0];
            let nested = (of("absmax_u8").to_vec1().unwrap(), absmax, offset);
            let parts = Nf4::from_parts(matrix.dims(), codes, Some(nested), Vec::new()).unwrap();
            *matrix = parts.to_device(device()).unwrap();
        }
        if let Some(dense) = common::bitsandbytes_on_a_cpu(matrix) {
            linear.weight = dense.to_device(device()).unwrap().into();
        }
    }
}

/// Trains 50 steps as the reference did and holds each against its log, the end against its files.
fn check_run(run: &Run) {
    let (Some(gqa), Some(batches)) = (shared("reference/gqa"), shared("reference/batches.json")) else {
        return;
    };
    let (batches, log) = (json(batches), json(gqa.join(run.name).join("log.json")));
    let mut base = Base::load(&gqa.join("base"), run.precision, device()).unwrap();
    as_bitsandbytes_has_it(&mut base, &gqa);
    let mut adapter = adapter(&base, gqa.join("adapter_init"));
    let config = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        loraplus_lr_ratio: 1.0,
        weight_decay: 0.01,
        max_grad_norm: run.max_grad_norm,
    };
    let mut optimizer = AdamW::new(&adapter, config).unwrap();
    let schedule = trainer::schedule::Schedule {
        kind: domain::trial::LrSchedulerType::Linear,
        peak: 1e-3,
        warmup_steps: 5,
        total_steps: 50,
    };
    for (step, want) in log["steps"].as_array().unwrap().iter().enumerate() {
        let mut outcomes = Vec::new();
        let mut scaled: Vec<(Tensor, Tensor)> = Vec::new();
        for micro in 0..run.accumulation {
            let batch = rows(&batches["micro_batches"][step * run.accumulation + micro], run.labels);
            let mut members = [Member::new(&mut adapter, &batch, 0)];
            let outcome = pack::forward_backward(&base, &mut members).unwrap()[0];
            outcomes.push(outcome);
            if run.mean_of_means {
                // Each micro-batch's gradient is divided by its own targets before they are averaged.
                let weight = 1.0 / (outcome.targets as f64 * run.accumulation as f64);
                for (i, module) in adapter.modules.iter_mut().enumerate() {
                    let a = (module.grad_a.take().unwrap() * weight).unwrap();
                    let b = (module.grad_b.take().unwrap() * weight).unwrap();
                    match scaled.get_mut(i) {
                        None => scaled.push((a, b)),
                        Some((sa, sb)) => (*sa, *sb) = ((&*sa + a).unwrap(), (&*sb + b).unwrap()),
                    }
                }
            }
        }
        for (module, (a, b)) in adapter.modules.iter_mut().zip(scaled) {
            (module.grad_a, module.grad_b) = (Some(a), Some(b));
        }
        let targets: u64 = outcomes.iter().map(|o| o.targets).sum();
        let mean = |o: &Outcome| o.nll / o.targets as f64;
        let (loss, divisor) = if run.mean_of_means {
            (outcomes.iter().map(mean).sum::<f64>() / run.accumulation as f64, 1.0)
        } else {
            (outcomes.iter().map(|o| o.nll).sum::<f64>() / targets as f64, targets as f64)
        };
        if step == 0
            && let Some(file) =
                Some(gqa.join(run.name).join("grads_step0.safetensors")).filter(|f| f.exists())
        {
            check_gradients(&adapter, &candle_core::safetensors::load(file, device()).unwrap(), divisor);
        }
        let what = |field: &str| format!("{} step {step} {field}", run.name);
        close(&what("loss"), loss, want["loss"].as_f64().unwrap(), 1e-4);
        let learning_rate = schedule.learning_rate(step as u64);
        let norm = optimizer.step(&mut adapter, learning_rate, divisor).unwrap();
        close(&what("grad_norm"), norm, want["grad_norm_before_clip"].as_f64().unwrap(), 1e-4);
        assert_eq!(targets, want["tokens"].as_u64().unwrap(), "{}", what("tokens"));
        close(&what("lr"), learning_rate, want["lr"].as_f64().unwrap(), 1e-4);
    }
    let want =
        candle_core::safetensors::load(gqa.join(run.name).join("probe_logits_final.safetensors"), device());
    check_probe(&base, Some(&adapter), &batches["probe"], &want.unwrap()["logits"]);
    let reference = self::adapter(&base, gqa.join(run.name).join("adapter_final"));
    for (got, want) in adapter.modules.iter().zip(&reference.modules) {
        let delta = |m: &LoraMatrix| (m.b.matmul(&m.a).unwrap() * m.scaling).unwrap();
        let (got_delta, want_delta) = (delta(got), delta(want));
        let error = frobenius(&(&got_delta - &want_delta).unwrap()) / frobenius(&want_delta);
        assert!(error < 1e-3, "{} {}: ΔW differs by {error} relative", run.name, got.path);
    }
}

fn check_gradients(adapter: &Adapter, want: &HashMap<String, Tensor>, targets: f64) {
    let find = |path: &str, part: &str| {
        let key = want.keys().find(|k| k.contains(&format!("{path}.lora_{part}")));
        want[key.unwrap_or_else(|| panic!("the reference has no gradient of {path}.lora_{part}"))].clone()
    };
    for module in &adapter.modules {
        for (part, gradient) in [("A", &module.grad_a), ("B", &module.grad_b)] {
            let got = (gradient.as_ref().unwrap() / targets).unwrap();
            let want = find(&module.path, part);
            let error = frobenius(&(&got - &want).unwrap());
            assert!(error <= 1e-4 * frobenius(&want) + 1e-7, "{} {part}: off by {error}", module.path);
        }
    }
}

#[test]
fn fifty_steps_are_pefts() {
    let run = Run {
        name: "lora_full",
        precision: Precision::default(),
        labels: "labels",
        accumulation: 1,
        mean_of_means: false,
        max_grad_norm: 1.0,
    };
    check_run(&run);
    check_run(&Run { name: "lora_completion", labels: "labels_completion", ..run });
    check_run(&Run { name: "lora_accum2_token", accumulation: 2, ..run });
    check_run(&Run { name: "lora_accum2_mean", accumulation: 2, mean_of_means: true, ..run });
    check_run(&Run { name: "lora_clip_mixed", max_grad_norm: 2.5, ..run });
    for (name, double_quant) in [("qlora_sq", false), ("qlora_dq", true)] {
        let precision = Precision { mode: PrecisionMode::FourBit, compute_dtype: None, double_quant };
        check_run(&Run { name, precision, ..run });
    }
}

/// The same steps with the base, and on a GPU the activations, in 16 bits: the losses stay near float32's. On a GPU machine
/// `tests/gpu` measures how near PEFT's own stay in bfloat16 and gives that as `LORAFLEET_PEFT_BFLOAT16`; without it the
/// tolerances are a few roundings in such numbers.
#[test]
fn fifty_steps_in_16_bits_stay_near_float32s() {
    let (Some(gqa), Some(batches)) = (shared("reference/gqa"), shared("reference/batches.json")) else {
        return;
    };
    let (batches, log) = (json(batches), json(gqa.join("lora_full/log.json")));
    let peft = std::env::var("LORAFLEET_PEFT_BFLOAT16").map_or(0.01, |text| text.parse().unwrap());
    for (mode, loss_scale, tolerance) in
        [(PrecisionMode::Bfloat16, 1.0, peft), (PrecisionMode::Float16, 1024.0, 0.002)]
    {
        let precision = Precision { mode, ..Precision::default() };
        let base = Base::load(&gqa.join("base"), precision, device()).unwrap();
        let mut adapter = adapter(&base, gqa.join("adapter_init"));
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            loraplus_lr_ratio: 1.0,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
        };
        let mut optimizer = AdamW::new(&adapter, config).unwrap();
        let mut furthest = 0f64;
        for (step, want) in log["steps"].as_array().unwrap().iter().enumerate() {
            let batch = rows(&batches["micro_batches"][step], "labels");
            let member = Member { loss_scale, ..Member::new(&mut adapter, &batch, 0) };
            let outcome = pack::forward_backward(&base, &mut [member]).unwrap()[0];
            let (loss, want_loss) = (outcome.nll / outcome.targets as f64, want["loss"].as_f64().unwrap());
            furthest = furthest.max((loss - want_loss).abs() / want_loss);
            let divisor = outcome.targets as f64 * f64::from(loss_scale);
            let norm = optimizer.step(&mut adapter, want["lr"].as_f64().unwrap(), divisor).unwrap();
            assert!(norm.is_finite(), "{mode:?} step {step}: the step is left out");
        }
        println!("{mode:?}: losses within {furthest:.2e} of float32's");
        assert!(furthest <= tolerance, "{mode:?}: {furthest} off");
    }
}

#[test]
fn rope_variants_are_transformers() {
    let (Some(gqa), Some(batches)) = (shared("reference/gqa"), shared("reference/batches.json")) else {
        return;
    };
    let batches = json(batches);
    for name in ["rope_base_longprobe", "rope_500k", "rope_llama3"] {
        let dir = gqa.join(name);
        let config = ModelConfig::load(&dir).unwrap();
        let mut base = Base::load(&gqa.join("base"), Precision::default(), device()).unwrap();
        base.inverse_frequencies = config.inverse_frequencies();
        base.config = config;
        let want = candle_core::safetensors::load(dir.join("probe_logits.safetensors"), device()).unwrap();
        let frequencies = Tensor::new(base.inverse_frequencies.as_slice(), device()).unwrap();
        assert!(largest_difference(&frequencies, &want["inv_freq"]) < 1e-6, "{name}: frequencies");
        check_probe(&base, None, &batches["probe"], &want["logits"]);
        let long = json(dir.join("long_probe.json"));
        let long = long.get("input_ids").unwrap_or(&long);
        let long: Vec<Vec<u32>> = numbers(long);
        let got = pack::logits(&base, None, &long[0]).unwrap();
        let at = Tensor::new(&[0u32, 63, 127, 199], device()).unwrap();
        let got = got.index_select(&at, 0).unwrap();
        let want = want["long_probe_logits_at_0_63_127_199"].get(0).unwrap();
        let difference = largest_difference(&got, &want);
        assert!(difference < 1e-4, "{name}: long probe differs by {difference}");
    }
}

/// Row `i` of the tokens that the reference trained and evaluated on, whole text as target.
fn stories_rows() -> Option<Vec<Row>> {
    let file = shared("reference/stories260k/tokens.safetensors")?;
    let tensors = candle_core::safetensors::load(file, device()).unwrap();
    let ids: Vec<Vec<u32>> = tensors["input_ids"].to_vec2().unwrap();
    let lengths: Vec<u32> = tensors["length"].to_vec1().unwrap();
    Some(ids.iter().zip(lengths).map(|(ids, n)| Row::whole(ids[..n as usize].to_vec())).collect())
}

#[test]
fn the_pretrained_base_has_transformers_loss() {
    let (Some(dir), Some(rows)) = (shared("data/models/stories260K-hf"), stories_rows()) else { return };
    let base = Base::load(&dir, Precision::default(), device()).unwrap();
    let outcome = pack::evaluate(&base, None, &rows[450..]).unwrap();
    assert_eq!(outcome.targets, 11_237);
    let loss = outcome.nll / outcome.targets as f64;
    assert!((loss - 5.063520).abs() < 1e-5, "eval/loss {loss}");
}

/// A pretrained base with tied embeddings: the first steps of the reference's runs, and with
/// `LORAFLEET_FULL` all 200 and the final loss.
#[test]
fn steps_on_real_text_are_pefts() {
    let (Some(dir), Some(rows)) = (shared("data/models/stories260K-hf"), stories_rows()) else { return };
    let Some(reference) = shared("reference/stories260k") else { return };
    let full = std::env::var_os("LORAFLEET_FULL").is_some();
    let base = Base::load(&dir, Precision::default(), device()).unwrap();
    for (name, init, peak) in [("r4_lr1e-3", "init_r4", 1e-3), ("r16_lr1e-3", "init_r16", 1e-3)] {
        let want = json(reference.join(format!("{name}.json")));
        let mut adapter = adapter(&base, reference.join(init));
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            loraplus_lr_ratio: 1.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let mut optimizer = AdamW::new(&adapter, config).unwrap();
        let schedule = trainer::schedule::Schedule {
            kind: domain::trial::LrSchedulerType::ConstantWithWarmup,
            peak,
            warmup_steps: 10,
            total_steps: 200,
        };
        for step in 0..if full { 200 } else { 20 } {
            let batch: Vec<Row> = (0..4).map(|j| rows[(4 * step + j) % 450].clone()).collect();
            let mut members = [Member::new(&mut adapter, &batch, 0)];
            let outcome = pack::forward_backward(&base, &mut members).unwrap()[0];
            let learning_rate = schedule.learning_rate(step as u64);
            let norm = optimizer.step(&mut adapter, learning_rate, outcome.targets as f64).unwrap();
            let loss = outcome.nll / outcome.targets as f64;
            close(&format!("{name} step {step} loss"), loss, want["loss"][step].as_f64().unwrap(), 1e-4);
            close(&format!("{name} step {step} norm"), norm, want["grad_norm"][step].as_f64().unwrap(), 1e-3);
        }
        if full {
            let outcome = pack::evaluate(&base, Some(&adapter), &rows[450..]).unwrap();
            let want = want["final"]["eval/loss"].as_f64().or(want["final"]["eval_loss"].as_f64()).unwrap();
            close(&format!("{name} final eval/loss"), outcome.nll / outcome.targets as f64, want, 1e-4);
        }
    }
}

#[test]
fn learning_rates_are_transformers() {
    use domain::trial::LrSchedulerType::*;
    let Some(file) = shared("reference/lr_schedules.json") else { return };
    let file = json(file);
    for (name, kind) in [
        ("linear", Linear),
        ("cosine", Cosine),
        ("constant", Constant),
        ("constant_with_warmup", ConstantWithWarmup),
    ] {
        let schedule = trainer::schedule::Schedule { kind, peak: 1e-3, warmup_steps: 5, total_steps: 50 };
        for (step, want) in numbers::<Vec<f64>>(&file[name]).into_iter().enumerate() {
            let got = schedule.learning_rate(step as u64);
            assert!((got - want).abs() < 1e-12, "{name} step {step}: {got}, reference {want}");
        }
    }
}
