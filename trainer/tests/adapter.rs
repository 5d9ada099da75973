//! Which layers a `target_modules` means, and adapters on disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{CPU, flat, tiny_base};
use domain::trial::TargetModules;
use trainer::adapter_file::{self, PeftConfig, WEIGHTS_FILE, resolve, written_targets};
use trainer::files::Outlives;
use trainer::lora::Adapter;
use trainer::model::Base;

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

fn pattern(pattern: &str) -> TargetModules {
    TargetModules::Pattern(pattern.into())
}

/// The tiny model with a tied head.
fn tied_base() -> Base {
    let mut base = tiny_base();
    base.head.weight = base.embedding.clone().into();
    base.config.tie_word_embeddings = true;
    base
}

fn of(targets: &TargetModules) -> PeftConfig {
    PeftConfig { target_modules: targets.clone(), ..PeftConfig::default() }
}

/// The number of layers, and the last of them; or what the message says.
fn check(base: &Base, targets: &TargetModules, want: Result<(usize, &str), &str>) {
    let got = resolve(base, &of(targets)).map_err(|e| e.to_string());
    let got = got.map(|t| (t.targets.len(), t.targets[t.targets.len() - 1].module.path.clone()));
    let want = want.map(|(count, last)| (count, last.to_string())).map_err(ToString::to_string);
    assert_eq!(got, want, "{targets:?}");
}

#[test]
fn target_modules_are_pefts() {
    let (base, tied) = (tiny_base(), tied_base());
    let last = "model.layers.1.mlp.down_proj";
    let known = "this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj";
    check(&base, &TargetModules::default(), Ok((14, last)));
    check(&base, &names(&["q_proj", "mlp.down_proj"]), Ok((4, last)));
    check(&base, &names(&["model.layers.0.self_attn.q_proj"]), Ok((1, "model.layers.0.self_attn.q_proj")));
    check(&base, &names(&["q_proj", "lm_head"]), Ok((3, "lm_head")));
    check(&base, &pattern(".*(q|v)_proj"), Ok((4, "model.layers.1.self_attn.v_proj")));
    check(&base, &pattern("lm_head|.*down_proj"), Ok((3, "lm_head")));
    check(&base, &pattern(r"^(?!.*o_proj).*_proj$"), Ok((12, last)));
    check(
        &base,
        &pattern(r"model\.layers\.(?P<layer>0)\..*(?<=q)_proj"),
        Ok((1, "model.layers.0.self_attn.q_proj")),
    );
    check(&tied, &TargetModules::default(), Ok((14, last)));

    let head = ", and the head lm_head";
    let unknown = |word: &str, has: &str| {
        format!(
            "target_modules: \"{word}\" matches no linear layer; {known}{has}; all-linear means all but the head"
        )
    };
    check(&base, &names(&["q_proj", "c_attn"]), Err(&unknown("c_attn", head)));
    check(&tied, &names(&["c_attn"]), Err(&unknown("c_attn", "")));
    for (text, remedy) in [
        (
            "q_proj",
            "write a list, [q_proj] (among choices [[q_proj]]), or a pattern of whole paths, .*q_proj",
        ),
        (
            "q_proj, v_proj",
            "write a list, [q_proj, v_proj] (among choices [[q_proj, v_proj]]), or a pattern of whole paths, .*(q_proj|v_proj)",
        ),
        ("(q|v)_proj", "a text is a regular expression of whole paths, such as .*q_proj"),
        ("", "a text is a regular expression of whole paths, such as .*q_proj"),
    ] {
        let message =
            format!("target_modules: no linear layer's whole path is {text:?}; {remedy}; {known}{head}");
        check(&base, &pattern(text), Err(&message));
    }
    // What exactly is wrong with it, the parser says.
    for text in ["(q_proj", "q_proj)|(v_proj", "[q_proj", "\\p{Nonsense}", "(?<q", "*_proj"] {
        let message = resolve(&base, &of(&pattern(text))).unwrap_err().to_string();
        let start = format!("target_modules: {text:?} is no regular expression: ");
        assert!(message.starts_with(&start) && message.lines().count() == 1, "{message}");
        assert!(message.ends_with("; give all-linear, a list of names, or a pattern of whole module paths"));
        println!("{message}");
    }
    let reason = "target_modules: lm_head is tied: this model's head is its embedding, which takes no adapter; \
                  leave lm_head out";
    check(&tied, &names(&["q_proj", "lm_head"]), Err(reason));
    check(&tied, &pattern(".*"), Err(reason));
}

#[test]
fn an_adapter_of_the_head_comes_back_from_its_files() {
    let (base, dir) = (tiny_base(), tempfile::tempdir().unwrap());
    let targets = names(&["q_proj", "lm_head"]);
    let config = PeftConfig {
        base_model_name_or_path: "model".into(),
        r: 4,
        lora_alpha: 8.0,
        target_modules: written_targets(&base, &targets),
        ..PeftConfig::default()
    };
    let modules = resolve(&base, &config).unwrap();
    let adapter = Adapter::new(&base, &modules, 0.0, 1).unwrap();
    adapter_file::save(dir.path(), &adapter, &config, Outlives::Process).unwrap();
    let (written, loaded) = adapter_file::load(dir.path(), &modules, 1, &CPU).unwrap();
    assert_eq!((written, flat(&loaded)), (config.clone(), flat(&adapter)));
    let file = dir.path().join(WEIGHTS_FILE);
    let tensors = candle_core::safetensors::load(&file, &CPU).unwrap();
    assert_eq!(tensors["base_model.model.lm_head.lora_A.weight"].dims(), [4, 16]);
    assert_eq!(tensors["base_model.model.lm_head.lora_B.weight"].dims(), [40, 4]);

    // As PEFT writes it: with the frozen weights of head and embedding.
    let mut peft = tensors.clone();
    peft.insert("base_model.model.lm_head.base_layer.weight".into(), base.head.weight.to_float32().unwrap());
    peft.insert("base_model.model.model.embed_tokens.weight".into(), base.embedding.clone());
    candle_core::safetensors::save(&peft, &file).unwrap();
    assert_eq!(flat(&adapter_file::load(dir.path(), &modules, 1, &CPU).unwrap().1), flat(&adapter));
    peft.insert("base_model.model.model.norm.weight".into(), base.norm.clone());
    candle_core::safetensors::save(&peft, &file).unwrap();
    assert!(adapter_file::load(dir.path(), &modules, 1, &CPU).is_err());
}
