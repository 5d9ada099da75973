//! The quickstart's files under `config/quickstart` are what the program that makes them says, and do what
//! they are for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../examples/make_quickstart/instruct.rs"]
mod instruct;
#[path = "../examples/make_quickstart/stories.rs"]
mod stories;
#[path = "../examples/make_quickstart/world.rs"]
mod world;

use domain::SystemClock;
use domain::trial::Precision;
use domain::trial::{EvalSplit, LrSchedulerType, TrialConfig};
use std::path::PathBuf;
use trainer::model::Base;
use trainer::run::{self, Loaded, Run};
use trainer::tokenizer::Tokenizer;
use trainer::{Device, pack};

fn quickstart(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../config/quickstart").join(path)
}

#[test]
fn the_instructions_are_the_programs() {
    let text = std::fs::read_to_string(quickstart("instruct.jsonl")).unwrap();
    let rows = instruct::rows(instruct::SEED);
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(lines.iter().map(|l| l["text"].as_str().unwrap()).eq(rows.iter().map(String::as_str)));
}

#[test]
fn every_row_is_in_guanaco_form() {
    for row in instruct::rows(7) {
        assert!(row.starts_with("### Human: "), "{row}");
        let turns = row.matches("### ").count();
        assert!(turns == 2 || turns == 4, "{row}");
        assert_eq!(row.matches("### Assistant: ").count() * 2, turns, "{row}");
    }
}

#[test]
fn stories_repeat_and_hold_no_assistant() {
    for index in 0..2000 {
        let story = stories::document(1, index);
        assert_eq!(story, stories::document(1, index));
        assert!(!story.contains("Assistant") && !story.contains("Human"), "{story}");
    }
}

#[test]
fn the_base_is_small_and_whole() {
    let bytes: u64 =
        std::fs::read_dir(quickstart("base")).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 2_000_000, "{bytes} bytes");
    let base = Base::load(&quickstart("base"), Precision::default(), &Device::Cpu).unwrap();
    let tokenizer = Tokenizer::load(&quickstart("base")).unwrap();
    assert!(tokenizer.vocab_size() <= base.config.vocab_size);
    assert!(tokenizer.eos().is_some());
    for row in instruct::rows(instruct::SEED) {
        let ids = tokenizer.encode(&row).unwrap().ids;
        // Shorter than any length that a sweep would set, so that no quickstart row is cut.
        assert!(ids.len() < 128, "{} tokens: {row}", ids.len());
        assert_eq!(tokenizer.decode(&ids).unwrap(), row);
    }
}

#[test]
fn the_base_tells_stories() {
    let base = Base::load(&quickstart("base"), Precision::default(), &Device::Cpu).unwrap();
    let tokenizer = Tokenizer::load(&quickstart("base")).unwrap();
    let prompt = tokenizer.encode("One day, Tom went for a walk.").unwrap().ids;
    let said = pack::generate(&base, None, &prompt, 40, tokenizer.eos()).unwrap();
    let said = tokenizer.decode(&said).unwrap();
    println!("{said}");
    // Its animals live where the world says.
    assert!(world::ANIMALS.iter().any(|a| said.contains(a.name) && said.contains(a.home)), "{said}");
}

#[test]
fn fine_tuning_makes_it_answer() {
    let text = |path| quickstart(path).to_str().unwrap().to_string();
    let config = TrialConfig {
        pretrained_model_id: text("base"),
        dataset_name: text("instruct.jsonl"),
        eval_split: EvalSplit::Last,
        eval_size: 50.0,
        lora_rank: 8,
        learning_rate: 5e-3,
        lr_scheduler_type: LrSchedulerType::ConstantWithWarmup,
        warmup_steps: 5,
        batch_size: 8,
        max_steps: Some(60),
        ..TrialConfig::default()
    };
    let loaded = Loaded::load(&quickstart("base"), Precision::default(), &Device::Cpu).unwrap();
    let mut run = Run::new(&loaded, config).unwrap();
    let clock = SystemClock::new();
    let base = run.base_eval(&loaded).unwrap().unwrap();
    while !run.is_done() {
        run::step_pack(&loaded, &mut [&mut run], &clock).unwrap();
    }
    let summary = run.summary(&loaded).unwrap();
    let (before, after) = (summary.sample_before.unwrap(), summary.sample_after.unwrap());
    println!("{before}\n{after}\n{base} {:?}", summary.eval_loss);
    assert!(summary.eval_loss.unwrap() < base / 4.0);
    assert_ne!(before, after);
    // A story before, an answer in the assistant's words after.
    assert!(!before.trim_start().starts_with("The owl "), "{before}");
    assert!(after.trim_start().starts_with("The owl "), "{after}");
}
