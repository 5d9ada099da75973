//! The variants of LoRA (`fixtures/variants/make.py` made them) and the kin of Llama (`fixtures/families/make.py`)
//! beside PEFT's own steps on a tiny model: the losses, the gradients, what is trained, the logits, the files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{FAMILIES, device, family, fixture, json_file};
use domain::trial::{InitLoraWeights, Precision, PrecisionMode, TargetModules, TrialConfig};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use trainer::adapter_file::{self, PeftConfig, WEIGHTS_FILE, resolve};
use trainer::files::Outlives;
use trainer::lora::{Adapter, LoraMatrix, Target};
use trainer::merge::{Merge, MergeInto};
use trainer::model::Base;
use trainer::new_model::SHARD_BYTES;
use trainer::optim::{AdamW, AdamWConfig};
use trainer::pack::{self, Member, Row};
use trainer::{Tensor, preflight};

fn fixtures() -> PathBuf {
    fixture("variants")
}

fn base() -> Base {
    Base::load(&fixtures().join("base"), Precision::default(), device()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest number of `want`.
fn off(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30f32, |largest, x| largest.max(x.abs()));
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn batch(base: &Base, rows: &Value, step: usize) -> Vec<Row> {
    let ids: Vec<Vec<u32>> = serde_json::from_value(rows[step].clone()).unwrap();
    let known = |id: u32| id % base.config.vocab_size as u32;
    ids.into_iter().map(|row| Row::whole(row.into_iter().map(known).collect())).collect()
}

/// An adapter of PEFT's, what it says of itself, and what it is trained to.
fn read(base: &Base, dir: &Path) -> (PeftConfig, Adapter) {
    let targets = resolve(base, &PeftConfig::load(dir).unwrap()).unwrap();
    adapter_file::load(dir, &targets, 0, device()).unwrap()
}

/// An adapter of a base, both directories; `rows.json` is in the folder above the adapter's.
/// `dropout` may be one that drops nothing: the way through is another than without.
fn check(dir: &Path, base_dir: &Path, dropout: f64) {
    let name = dir.file_name().unwrap().to_str().unwrap();
    let base = Base::load(base_dir, Precision::default(), device()).unwrap();
    let (log, rows) = (json_file(&dir.join("log.json")), json_file(&dir.join("../rows.json")));
    let (mut config, mut adapter) = read(&base, &dir.join("init"));
    if let Some(how) = log.get("init_lora_weights") {
        config.init_lora_weights = serde_json::from_value(how.clone()).unwrap();
        adapter = fresh(name, &base, &config, &adapter);
    }
    adapter.dropout = dropout;
    let of = |key: &str| log[key].as_f64().unwrap();
    let settings = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        loraplus_lr_ratio: of("loraplus_lr_ratio"),
        weight_decay: of("weight_decay"),
        max_grad_norm: of("max_grad_norm"),
    };
    let mut optimizer = AdamW::new(&adapter, settings).unwrap();
    let steps = log["steps"].as_array().unwrap();
    let (mut furthest, mut weights) = (0f64, 0f32);
    for (step, want) in steps.iter().enumerate() {
        let rows = batch(&base, &rows, step);
        let member = Member { recomputed_layers: step % 3, ..Member::new(&mut adapter, &rows, 0) };
        let outcome = pack::forward_backward(&base, &mut [member]).unwrap()[0];
        let targets = outcome.targets as f64;
        let file = dir.join("gradients.safetensors");
        if step == 0 && file.exists() {
            gradients(name, &adapter, targets, &candle_core::safetensors::load(file, device()).unwrap());
        }
        let norm = optimizer.step(&mut adapter, of("learning_rate"), targets).unwrap();
        let mut close = |what: &str, got: f64| {
            let want = want[what].as_f64().unwrap();
            furthest = furthest.max((got - want).abs() / want);
            assert!((got - want).abs() < 1e-4 * want, "{name} step {step} {what}: {got}, PEFT {want}");
        };
        close("loss", outcome.nll / targets);
        close("grad_norm", norm);
    }
    let (written, want) = read(&base, &dir.join("final"));
    assert_eq!(written, config.as_written(), "{name}");
    for (got, want) in adapter.modules.iter().zip(&want.modules) {
        assert_eq!(got.path, want.path);
        assert!((got.scaling / want.scaling - 1.0).abs() < 1e-15, "{name} {}", got.path);
        for (parameter, got_value, want_value) in comparable(got, want) {
            let off = off(&values(&got_value), &values(&want_value));
            weights = weights.max(off);
            assert!(off < 1e-3, "{name} {} {parameter}: off by {off}", got.path);
        }
    }
    assert_eq!(adapter.saved.len(), want.saved.len(), "{name}");
    for (got, want) in adapter.saved.iter().zip(&want.saved) {
        assert_eq!((&got.path, got.kind), (&want.path, want.kind));
        for ((parameter, got_value), (_, want_value)) in got.parameters().zip(want.parameters()) {
            let off = off(&values(got_value), &values(want_value));
            weights = weights.max(off);
            assert!(off < 1e-3, "{name} {} {parameter}: off by {off}", got.path);
        }
    }
    let probe = &batch(&base, &rows, steps.len())[0].input_ids;
    let logits: Vec<Vec<f32>> = serde_json::from_value(log["logits"].clone()).unwrap();
    let got = values(&pack::logits(&base, Some(&want), probe).unwrap());
    let most = got.iter().zip(logits.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{name}: losses and norms within {furthest:.1e}, weights {weights:.1e}, logits {most:.1e}");
    assert!(most < 1e-4, "{name}: logits differ by {most}");

    // What is trained here is on the whole base what it is beside what it began with.
    let own = values(&pack::logits(&base, Some(&adapter), probe).unwrap());
    let dir_of_ours = tempfile::tempdir().unwrap();
    adapter_file::save(dir_of_ours.path(), &adapter, &config, Outlives::Process).unwrap();
    let again = values(&pack::logits(&base, Some(&read(&base, dir_of_ours.path()).1), probe).unwrap());
    assert!(off(&again, &own) < 1e-5, "{name}: logits differ by {} once written", off(&again, &own));

    // Its files again: the same names, shapes and numbers, and a configuration that means the same.
    let to = tempfile::tempdir().unwrap();
    adapter_file::save(to.path(), &want, &written, Outlives::Process).unwrap();
    let files = |dir: &Path| candle_core::safetensors::load(dir.join(WEIGHTS_FILE), device()).unwrap();
    let (ours, theirs) = (files(to.path()), files(&dir.join("final")));
    // PEFT adds the head's frozen weight where the head is adapted.
    let theirs: BTreeMap<_, _> = theirs.into_iter().filter(|(key, _)| !key.contains("base_layer")).collect();
    let keys: BTreeMap<_, _> = ours.iter().collect();
    assert!(keys.keys().copied().eq(theirs.keys()), "{name}: {:?} and {:?}", keys.keys(), theirs.keys());
    for (key, want) in &theirs {
        assert_eq!((ours[key].dims(), values(&ours[key])), (want.dims(), values(want)), "{name} {key}");
    }
    let (again, read_back) = read(&base, to.path());
    assert_eq!(again, written);
    assert_eq!(read_back.parameters(), want.parameters());

    // Merged, it is the same model.
    let merged = tempfile::tempdir().unwrap();
    let target = merged.path().join("merged");
    let merge = Merge {
        base: base_dir,
        adapter: to.path(),
        to: &target,
        into: MergeInto::Original,
        shard_bytes: SHARD_BYTES,
        overwrite: false,
    };
    merge.run(&mut || false).unwrap();
    let whole = Base::load(&target, Precision::default(), device()).unwrap();
    let off = off(&values(&pack::logits(&whole, None, probe).unwrap()), &got);
    assert!(off < 1e-5, "{name}: merged logits differ by {off}");
    let own: Vec<Vec<f32>> = own.chunks(base.config.vocab_size).map(<[f32]>::to_vec).collect();
    keep(name, dir_of_ours.path(), &own);
}

/// A fresh adapter that begins as a part of the weights, beside PEFT's: vectors may have the other sign, so that
/// products are compared.
fn fresh(name: &str, base: &Base, config: &PeftConfig, want: &Adapter) -> Adapter {
    let targets = resolve(base, config).unwrap();
    let adapter = Adapter::new(base, &targets, 0.0, 5).unwrap();
    let mut most = 0f32;
    for (got, want) in adapter.modules.iter().zip(&want.modules) {
        let product = |m: &LoraMatrix| values(&(m.b.matmul(&m.a).unwrap() * m.scaling).unwrap());
        let off = off(&product(got), &product(want));
        most = most.max(off);
        assert!(off < 1e-4, "{name} {}: begins {off} off", got.path);
    }
    println!("{name}: begins within {most:.1e}");
    adapter
}

/// What of two adapters of a layer must be the same: the parameters, or where one began as a part of the weight the
/// changes of the weight, and magnitudes.
fn comparable(got: &LoraMatrix, want: &LoraMatrix) -> Vec<(&'static str, Tensor, Tensor)> {
    let pairs = got.parameters().zip(want.parameters());
    if got.initial.is_none() {
        return pairs.map(|((name, got), (_, want))| (name, got.clone(), want.clone())).collect();
    }
    let change = |m: &LoraMatrix| {
        let [a, b] = m.on_whole_weight().unwrap();
        b.matmul(&a).unwrap()
    };
    let magnitudes = got.magnitude.iter().zip(&want.magnitude);
    let magnitudes = magnitudes.map(|(got, want)| ("magnitudes", got.clone(), want.clone()));
    magnitudes.chain([("change", change(got), change(want))]).collect()
}

/// PEFT's gradients are by the mean loss.
fn gradients(name: &str, adapter: &Adapter, targets: f64, want: &HashMap<String, Tensor>) {
    let (mut count, mut most) = (0, 0f32);
    for module in &adapter.modules {
        for ((parameter, _), gradient) in module.parameters().zip(module.gradients()) {
            let path =
                format!("base_model.model.{}.{}.weight", module.path, parameter.trim_end_matches(".weight"));
            let want = &want[&path];
            let got = (gradient / targets).unwrap();
            let off = off(&values(&got), &values(want));
            assert!(off < 1e-4, "{name} {path}: gradients differ by {off}");
            (count, most) = (count + 1, most.max(off));
        }
    }
    println!("{name}: gradients within {most:.1e}");
    assert_eq!(count, want.len(), "{name}: gradients");
}

/// Leaves what was written where `LORAFLEET_KEEP_ADAPTERS` says, for PEFT to load (`make.py --load`).
fn keep(name: &str, from: &Path, logits: &[Vec<f32>]) {
    let Some(dir) = std::env::var_os("LORAFLEET_KEEP_ADAPTERS") else { return };
    let dir = PathBuf::from(dir).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    std::fs::write(dir.join("logits.json"), json!(logits).to_string()).unwrap();
}

#[test]
fn variants_are_pefts() {
    for name in [
        "rslora",
        "dora",
        "dora_head",
        "loraplus",
        "patterns",
        "one_layer",
        "pissa",
        "pissa_niter",
        "pissa_dora",
        "saved",
        "saved_layers",
    ] {
        check(&fixtures().join(name), &fixtures().join("base"), 0.0);
    }
    for name in ["rslora", "dora", "dora_head", "pissa", "pissa_dora"] {
        check(&fixtures().join(name), &fixtures().join("base"), 1e-15);
    }
    // Its head is tied.
    check(&fixtures().join("saved_tied"), &family("qwen2").join("base"), 0.0);
}

/// Biases, norms of heads, windows: each on a base that has them. Alone it has transformers' logits; and what PEFT
/// makes of `all-linear` is what we make of it.
#[test]
fn families_are_transformers_and_pefts() {
    for name in FAMILIES {
        let dir = family(name);
        let base = Base::load(&dir.join("base"), Precision::default(), device()).unwrap();
        let probe = &batch(&base, &json_file(&dir.join("../rows.json")), 8)[0].input_ids;
        let want: Vec<Vec<f32>> =
            serde_json::from_value(json_file(&dir.join("log.json"))["base_logits"].clone()).unwrap();
        let got = values(&pack::logits(&base, None, probe).unwrap());
        let off = off(&got, &want.concat());
        println!("{name}: logits of the base within {off:.1e}");
        assert!(off < 1e-5, "{name}: logits of the base differ by {off}");
        let mut ours: Vec<_> = base.linear_modules().into_iter().map(|module| module.path).collect();
        let mut theirs: Vec<_> =
            read(&base, &dir.join("init")).1.modules.into_iter().map(|m| m.path).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "{name}");
        check(&dir, &dir.join("base"), 0.0);

        // A text read token by token is the text read at once.
        let new = pack::generate(&base, None, probe, 6, None).unwrap();
        let mut text = probe.clone();
        for token in new {
            let last = pack::logits(&base, None, &text).unwrap().get(text.len() - 1).unwrap();
            assert_eq!(token, last.argmax(0).unwrap().to_scalar::<u32>().unwrap(), "{name}");
            text.push(token);
        }
    }
}

/// A fresh adapter of each kind, and what PEFT makes of the same numbers at the start.
#[test]
fn fresh_adapters_begin_as_the_base() {
    let base = base();
    let probe = [3, 1, 4, 1, 5, 9];
    let alone = values(&pack::logits(&base, None, &probe).unwrap());
    for (init, use_dora) in [
        (InitLoraWeights::Default, false),
        (InitLoraWeights::Gaussian, false),
        (InitLoraWeights::Gaussian, true),
        (InitLoraWeights::Pissa, false),
        (InitLoraWeights::PissaNiter(4), true),
    ] {
        let config = PeftConfig { r: 8, use_dora, init_lora_weights: init, ..PeftConfig::default() };
        let targets = resolve(&base, &config).unwrap();
        let adapter = Adapter::new(&base, &targets, 0.0, 5).unwrap();
        let off = off(&values(&pack::logits(&base, Some(&adapter), &probe).unwrap()), &alone);
        assert!(off < 2e-6, "{init:?} {use_dora}: {off}");
        let a: Vec<f32> = adapter.modules.iter().flat_map(|m| values(&m.a)).collect();
        let variance = a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / a.len() as f64;
        let want = match init {
            // Uniform in ±1/√n has variance 1/(3n); the layers are 32 wide but for the last, which is 48.
            InitLoraWeights::Default => {
                (6.0 * 32.0 / (3.0 * 32.0) + 48.0 / (3.0 * 48.0)) / (6.0 * 32.0 + 48.0)
            }
            InitLoraWeights::Gaussian => 1.0 / 64.0,
            // `fresh` and the module's own tests see to these.
            InitLoraWeights::Pissa | InitLoraWeights::PissaNiter(_) => variance,
        };
        assert!((variance / want - 1.0).abs() < 0.1, "{init:?}: variance {variance}, not {want}");
        let counts = (targets.parameters(), targets.initial_parameters());
        assert_eq!((adapter.parameters(), adapter.initial_parameters()), counts);
    }
}

/// What each module gets: `layer kind: rank, scaling`; or what the message says.
#[test]
fn patterns_and_layers_are_pefts() {
    let base = base();
    let names = |names: &[&str]| TargetModules::Names(names.iter().map(ToString::to_string).collect());
    let config = TrialConfig {
        lora_rank: 4,
        lora_alpha: Some(8.0),
        target_modules: names(&["q_proj", "v_proj"]),
        ..TrialConfig::default()
    };
    let check = |change: &dyn Fn(&mut TrialConfig), want: Result<&[&str], &str>| {
        let mut config = config.clone();
        change(&mut config);
        let got = resolve(&base, &PeftConfig::of(&config)).map_err(|e| e.to_string());
        let show = |target: &Target| {
            let path: Vec<_> = target.module.path.split('.').collect();
            format!("{} {}: {}, {}", path[2], path[4], target.rank, target.scaling)
        };
        let got = got.map(|trainable| trainable.targets.iter().map(show).collect::<Vec<_>>());
        let want = want.map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(got, want.map_err(ToString::to_string));
    };
    let ranks = |pairs: &[(&str, u32)]| pairs.iter().map(|(k, r)| (k.to_string(), *r)).collect();
    check(&|_| (), Ok(&["0 q_proj: 4, 2", "0 v_proj: 4, 2", "1 q_proj: 4, 2", "1 v_proj: 4, 2"]));
    check(&|c| c.exclude_modules = Some(names(&["v_proj"])), Ok(&["0 q_proj: 4, 2", "1 q_proj: 4, 2"]));
    check(&|c| c.layers_to_transform = Some(vec![1]), Ok(&["1 q_proj: 4, 2", "1 v_proj: 4, 2"]));
    check(
        &|c| c.use_rslora = true,
        Ok(&["0 q_proj: 4, 4", "0 v_proj: 4, 4", "1 q_proj: 4, 4", "1 v_proj: 4, 4"]),
    );
    check(
        &|c| c.rank_pattern = ranks(&[("layers.0.self_attn.q_proj", 2), ("v_proj", 8)]),
        Ok(&["0 q_proj: 2, 4", "0 v_proj: 8, 1", "1 q_proj: 4, 2", "1 v_proj: 8, 1"]),
    );
    check(
        &|c| c.rank_pattern = ranks(&[("q_proj", 2), (".*0.*q_proj", 3)]),
        Err(
            "rank_pattern: \".*0.*q_proj\" and \"q_proj\" both match model.layers.0.self_attn.q_proj; let one of them \
             leave it out",
        ),
    );
    check(
        &|c| c.rank_pattern = ranks(&[("o_proj", 2)]),
        Err(
            "rank_pattern: \"o_proj\" matches no adapted layer; write the end of a layer's path, such as q_proj",
        ),
    );
    check(
        &|c| c.exclude_modules = Some(names(&["w_proj"])),
        Err(
            "exclude_modules: \"w_proj\" matches no linear layer; name layers that the model has, or leave it out",
        ),
    );
    check(
        &|c| c.exclude_modules = Some(names(&["v_proj", "q_proj"])),
        Err(
            "target_modules: no linear layer is left to adapt; let exclude_modules, layers_to_transform and \
             modules_to_save leave one",
        ),
    );
    check(
        &|c| c.layers_to_transform = Some(vec![0, 2]),
        Err("layers_to_transform: names layer 2, but the model has 2, counted from 0; name layers up to 1"),
    );
    check(
        &|c| {
            c.layers_to_transform = Some(vec![0]);
            c.target_modules = TargetModules::Pattern(".*q_proj".into());
        },
        Err(
            "layers_to_transform: does not go with a pattern in target_modules; give target_modules as a list, or \
             write the layers into the pattern",
        ),
    );

    // PiSSA's parts of the weights are written as an adapter of twice the rank on the whole ones.
    for use_rslora in [false, true] {
        let config = TrialConfig {
            use_rslora,
            rank_pattern: ranks(&[("layers.0.self_attn.q_proj", 2)]),
            alpha_pattern: [("v_proj".to_string(), 3.0)].into(),
            init_lora_weights: InitLoraWeights::Pissa,
            ..config.clone()
        };
        let config = PeftConfig::of(&config);
        let [trained, written] = [&config, &config.as_written()].map(|c| resolve(&base, c).unwrap());
        for (trained, written) in trained.targets.iter().zip(&written.targets) {
            assert_eq!((2 * trained.rank, &trained.module), (written.rank, &written.module));
            assert!((trained.scaling / written.scaling - 1.0).abs() < 1e-15, "{written:?}");
        }
    }
}

/// What `modules_to_save` matches, in model order, and how many layers have adapters then; or what the message says.
#[test]
fn modules_to_save_are_pefts() {
    let base = base();
    let check = |names: &[&str], change: &dyn Fn(&mut PeftConfig), want: Result<(&[&str], usize), &str>| {
        let names = names.iter().map(ToString::to_string).collect();
        let mut config = PeftConfig { modules_to_save: Some(names), ..PeftConfig::default() };
        change(&mut config);
        let got = resolve(&base, &config).map_err(|e| e.to_string());
        let got = got.map(|t| (t.saved.into_iter().map(|m| m.path).collect::<Vec<_>>(), t.targets.len()));
        let want =
            want.map(|(paths, count)| (paths.iter().map(ToString::to_string).collect::<Vec<_>>(), count));
        assert_eq!(got, want.map_err(ToString::to_string));
    };
    let same = |_: &mut PeftConfig| ();
    check(&["lm_head", "embed_tokens"], &same, Ok((&["model.embed_tokens", "lm_head"], 14)));
    let norms = [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ];
    check(&["norm"], &same, Ok((&norms, 14)));
    check(&["model.norm"], &same, Ok((&norms[4..], 14)));
    let values = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"];
    check(&["v_proj"], &same, Ok((&values, 12)));
    check(&["layers.1.self_attn.v_proj"], &same, Ok((&values[1..], 13)));
    check(
        &["lm_head"],
        &|c| c.target_modules = TargetModules::Names(vec!["lm_head".into(), "q_proj".into()]),
        Ok((&["lm_head"], 2)),
    );
    check(
        &["self_attn"],
        &same,
        Err(
            "modules_to_save: \"self_attn\" matches model.layers.0.self_attn, which is made of several modules; name \
             those of them that are to be trained",
        ),
    );
    check(
        &["score"],
        &same,
        Err(
            "modules_to_save: \"score\" matches no module; this model has down_proj, embed_tokens, gate_proj, \
             input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj",
        ),
    );
    check(
        &["proj"],
        &same,
        Err(
            "modules_to_save: matches model.layers.0.self_attn.q_proj, which has an adapter; name it q_proj, or leave \
             it out of target_modules",
        ),
    );
    let four_bits = TrialConfig { precision_mode: PrecisionMode::FourBit, ..TrialConfig::default() };
    let quantised = Base::load(&fixtures().join("base"), four_bits.base_model().precision, device()).unwrap();
    let saved = |names: &[&str]| PeftConfig {
        modules_to_save: Some(names.iter().map(ToString::to_string).collect()),
        ..PeftConfig::default()
    };
    assert_eq!(resolve(&quantised, &saved(&["lm_head", "norm"])).unwrap().saved.len(), 6);
    let message = resolve(&quantised, &saved(&["v_proj"])).unwrap_err().to_string();
    let start =
        "modules_to_save: \"v_proj\" matches model.layers.0.self_attn.v_proj, which precision_mode 4bit";
    assert!(message.starts_with(start), "{message}");
}

/// PiSSA needs weights that are numbers of their own, and begins anew.
#[test]
fn pissa_is_refused_where_there_is_nothing_to_begin_with() {
    let four_bits = TrialConfig {
        init_lora_weights: InitLoraWeights::Pissa,
        precision_mode: PrecisionMode::FourBit,
        ..TrialConfig::default()
    };
    let adapter = TrialConfig {
        init_lora_weights: InitLoraWeights::PissaNiter(8),
        init_adapter: Some("adapter".into()),
        ..TrialConfig::default()
    };
    for (config, start) in [
        (four_bits, "init_lora_weights: is pissa with precision_mode 4bit"),
        (adapter, "init_lora_weights: is pissa_niter_8 with init_adapter"),
    ] {
        let base = Base::load(&fixtures().join("base"), config.base_model().precision, device()).unwrap();
        let message = preflight::check(&config, &base).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
}

/// A variant that is not computed is refused by name, never left out.
#[test]
fn unknown_variants_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let plain = json_file(&fixtures().join("rslora/final/adapter_config.json"));
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("bias", json!("all")),
        ("use_qalora", json!(true)),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
        ("trainable_token_indices", json!([1])),
        ("ensure_weight_tying", json!(true)),
        ("rank_pattern", json!([1])),
        ("layers_to_transform", json!("all")),
    ] {
        let mut config = plain.clone();
        config[key] = value;
        if key == "ensure_weight_tying" {
            config["modules_to_save"] = json!(["lm_head"]);
        }
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        let message = PeftConfig::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("adapter_config.json") && message.contains(key), "{message}");
    }
}
