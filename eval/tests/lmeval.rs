//! Log-likelihoods and metrics beside lm-evaluation-harness's (the figures that `../shared/reference` documents).
//! Where those figures are not on the machine, each test says so and checks nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../trainer/tests/common/mod.rs"]
mod common;

use common::{device, json_file, shared};
use domain::sweep::FewshotOrder;
use domain::trial::Precision;
use eval::data::{self, Data};
use eval::encode::Encoder;
use eval::metric::{Gold, Metric, Score};
use eval::prompt::{Item, Prompts};
use eval::run::{self, Model, Options, Sample};
use eval::task::{self, Chosen, FewshotConfig, Sampler, Task};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use trainer::adapter_file::{self, PeftConfig, resolve};
use trainer::model::Base;
use trainer::tokenizer::Tokenizer;

/// How far a log-likelihood may be from the harness's; nearer scores are a tie.
const TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Reference {
    task: String,
    source: String,
    num_fewshot: usize,
    #[serde(default)]
    shots: Option<Vec<serde_json::Map<String, Value>>>,
    items: Vec<Value>,
}

struct Loaded {
    base: Base,
    tokenizer: Tokenizer,
}

impl Loaded {
    fn new() -> Option<Self> {
        let dir = shared("data/models/stories260K-hf")?;
        let base = Base::load(&dir, Precision::default(), device()).unwrap();
        Some(Self { base, tokenizer: Tokenizer::load(&dir).unwrap() })
    }
}

/// A reference with its task and documents.
fn reference(name: &str) -> Option<(Reference, Chosen, Data)> {
    let path = shared(&format!("reference/lmeval/{name}.json"))?;
    let mut reference: Reference = serde_json::from_value(json_file(&path)).unwrap();
    let mut task = task::find(reference.task.trim_end_matches("_2shot")).unwrap();
    if let Some(samples) = reference.shots.take() {
        task.fewshot_config = FewshotConfig { sampler: Sampler::FirstN, samples: Some(samples) };
    }
    let documents = shared(&format!("data/eval/{}", reference.source))?;
    let order = FewshotOrder::default();
    let data = data::load(&task, &documents, None, reference.num_fewshot > 0, order).unwrap();
    let num_fewshot = Some(reference.num_fewshot);
    Some((reference, Chosen { task, num_fewshot }, data))
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// Whether a metric's choice hangs on less than the tolerance: its two best scores lie that close.
fn is_tie(metric: Metric, likelihoods: &[f64], choices: &[String]) -> bool {
    let scaled = likelihoods.iter().zip(choices).map(|(l, choice)| match metric {
        Metric::AccNorm => l / (choice.chars().count() - 1) as f64,
        _ => *l,
    });
    let mut scores: Vec<f64> = scaled.collect();
    scores.sort_by(|a, b| b.total_cmp(a));
    scores.len() > 1 && scores[0] - scores[1] < TOLERANCE
}

/// Holds samples against a reference's items in one of its modes (`""`, `_nobos`, `_maxlen256`).
fn check_items(name: &str, mode: &str, samples: &[Sample], items: &[Value]) {
    let (mut furthest, mut ties, mut requests) = (0f64, 0, 0);
    assert_eq!(samples.len(), items.len(), "{name}{mode}");
    for (sample, item) in samples.iter().zip(items) {
        let want: Vec<f64> = numbers(&item[format!("loglikelihood{mode}")]);
        assert_eq!(sample.loglikelihoods.len(), want.len(), "{name}{mode} item {}", sample.index);
        requests += want.len();
        for (got, want) in sample.loglikelihoods.iter().zip(&want) {
            furthest = furthest.max((got - want).abs());
            let close = (got - want).abs() < TOLERANCE;
            assert!(close, "{name}{mode} item {}: {got}, reference {want}", sample.index);
        }
        if let Some(greedy) = item.get(format!("is_greedy{mode}")) {
            assert_eq!(sample.is_greedy, numbers::<Vec<bool>>(greedy), "{name}{mode} item {}", sample.index);
        }
        let continuations: Vec<String> = numbers(&item["continuations"]);
        for (measure, score) in &sample.metrics {
            let metric = &measure.metric;
            let Score::Value(got) = score else { panic!("{metric} is a value") };
            let want = item[format!("metrics{mode}")][metric.to_string()].as_f64().unwrap();
            let tie = is_tie(*metric, &want_of(item, mode), &continuations);
            ties += usize::from(tie);
            let same = (got - want).abs() < TOLERANCE;
            assert!(same || tie, "{name}{mode} item {}: {metric} {got}, reference {want}", sample.index);
        }
    }
    println!(
        "{name}{mode}: {requests} requests, {} items, furthest {furthest:.1e}, {ties} ties",
        items.len()
    );
}

fn want_of(item: &Value, mode: &str) -> Vec<f64> {
    numbers(&item[format!("loglikelihood{mode}")])
}

fn check(name: &str) {
    let (Some(loaded), Some((reference, chosen, data))) = (Loaded::new(), reference(name)) else { return };
    let Loaded { base, tokenizer } = &loaded;
    // The prompts, and the tokens with and without BOS.
    let mut prompts = Prompts::new(&chosen.task, &data, reference.num_fewshot, FewshotOrder::V0_4).unwrap();
    let with = Encoder::new(tokenizer, 512, true);
    let without = Encoder::new(tokenizer, 512, false);
    for (index, item) in reference.items.iter().enumerate() {
        let got = prompts.item(index).unwrap();
        assert_eq!(got.context, item["context"].as_str().unwrap(), "{name} item {index}");
        let choices: Vec<_> = got.choices.iter().map(|choice| format!(" {choice}")).collect();
        assert_eq!(choices, numbers::<Vec<String>>(&item["continuations"]), "{name} item {index}");
        let context: Vec<u32> = numbers(&item["context_ids"]);
        let continuations: Vec<Vec<u32>> = numbers(&item["continuation_ids"]);
        for (encoder, context) in [(&with, &context[..]), (&without, &context[1..])] {
            let pairs = encoder.pairs(&got.context, &choices).unwrap();
            for ((before, after), want) in pairs.iter().zip(&continuations) {
                assert_eq!((before.as_slice(), after), (context, want), "{name} item {index}");
            }
        }
    }
    // The log-likelihoods and metrics: as the model is, without BOS, with a shorter window, in small passes.
    let model = Model { base, adapter: None, tokenizer };
    let usual = Options::default();
    for (mode, options) in [
        ("", usual.clone()),
        ("", Options { batch_tokens: 700, ..usual.clone() }),
        ("_nobos", Options { add_bos: false, ..usual.clone() }),
        ("_maxlen256", Options { max_length: Some(256), ..usual }),
    ] {
        let outcome = run::evaluate(model, &chosen, &data, &options, &mut |_, _| ()).unwrap();
        check_items(name, mode, &outcome.samples, &reference.items);
    }
}

#[test]
fn arc_challenge() {
    check("arc_challenge");
}

#[test]
fn arc_challenge_with_two_examples() {
    check("arc_challenge_2shot");
}

#[test]
fn hellaswag() {
    check("hellaswag");
}

#[test]
fn truthfulqa_mc1() {
    check("truthfulqa_mc1");
}

#[test]
fn truthfulqa_mc2() {
    check("truthfulqa_mc2");
}

/// A reference's first items with a trained adapter. The harness's figures have none, so `adapter.json` has what a plain
/// float64 Llama in NumPy makes of the reference's tokens, with the adapter added to its weights (without it, that one
/// meets the harness's figures to 2e-4).
#[test]
fn with_an_adapter() {
    let (Some(loaded), Some(dir)) = (Loaded::new(), shared("reference/stories260k/final_r16_lr5e-3")) else {
        return;
    };
    let Loaded { base, tokenizer } = &loaded;
    let targets = resolve(base, &PeftConfig::load(&dir).unwrap()).unwrap();
    let (_, adapter) = adapter_file::load(&dir, &targets, 0, device()).unwrap();
    let all: Value = serde_json::from_str(include_str!("fixtures/adapter.json")).unwrap();
    for (name, items) in all.as_object().unwrap() {
        let Some((_, chosen, data)) = reference(name) else { return };
        let items = items.as_array().unwrap();
        let options = Options { limit: Some(items.len()), ..Options::default() };
        let model = Model { base, adapter: Some(&adapter), tokenizer };
        let outcome = run::evaluate(model, &chosen, &data, &options, &mut |_, _| ()).unwrap();
        let mut furthest = 0f64;
        for (sample, item) in outcome.samples.iter().zip(items) {
            let want: Vec<f64> = numbers(&item["loglikelihood"]);
            let apart = sample.loglikelihoods.iter().zip(&want).map(|(got, want)| (got - want).abs());
            furthest = apart.fold(furthest, f64::max);
            assert!(furthest < TOLERANCE, "{name} item {}: {sample:?}, not {want:?}", sample.index);
            assert_eq!(
                sample.is_greedy,
                numbers::<Vec<bool>>(&item["is_greedy"]),
                "{name} item {}",
                sample.index
            );
        }
        println!("{name} with an adapter: {} items, furthest {furthest:.1e}", items.len());
    }
}

/// The examples before each document, beside those that lm_eval 0.4.13's samplers choose (`fewshot.json`): documents
/// `i` modulo `same_every`, which are among the examples if `held`.
#[test]
fn examples_are_the_harnesss() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("fixtures/fewshot.json")).unwrap();
    for case in &cases {
        let (pool, examples): (u64, usize) = (numbers(&case["pool"]), numbers(&case["examples"]));
        let same_every = case["same_every"].as_u64().unwrap();
        let mut task = numbered();
        task.fewshot_config.sampler = numbers(&case["sampler"]);
        let row = |i: u64| numbered_row(i % same_every);
        let chosen: Vec<Vec<u64>> = numbers(&case["chosen"]);
        let data = Data {
            path: "rows".into(),
            documents: (0..chosen.len() as u64).map(row).collect(),
            examples: (0..pool).map(row).collect(),
            examples_hold_documents: numbers(&case["held"]),
        };
        let mut prompts = Prompts::new(&task, &data, examples, FewshotOrder::V0_4).unwrap();
        for (index, chosen) in chosen.iter().enumerate() {
            let before: String = chosen.iter().map(|example| format!("{example} yes\n\n")).collect();
            let context = format!("{before}{}", index as u64 % same_every);
            let want = Item { context, choices: vec!["yes".into()], gold: Gold::Choice(0) };
            assert_eq!(prompts.item(index).unwrap(), want, "{examples} of {pool}, document {index}");
        }
    }
}

/// A task whose documents are numbers.
fn numbered() -> Task {
    let mut task = task::find("arc_easy").unwrap();
    task.document.clear();
    task.doc_to_text = "{{i}}".into();
    task.doc_to_choice = serde_json::json!(["yes"]);
    task.doc_to_target = 0.into();
    task
}

fn numbered_row(i: u64) -> serde_json::Map<String, Value> {
    serde_json::Map::from_iter([("i".to_owned(), i.into())])
}

/// The order in which lm_eval 0.3 asked documents, and the examples before each (`fewshot_v03.json`): drawn from `pool`
/// training documents, or from the documents themselves, which are alike modulo `same_every`.
#[test]
fn documents_and_examples_are_in_the_older_harnesss_order() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("fixtures/fewshot_v03.json")).unwrap();
    for case in &cases {
        let (documents, same_every): (u64, u64) = (numbers(&case["documents"]), numbers(&case["same_every"]));
        let (pool, examples): (Option<u64>, usize) = (numbers(&case["pool"]), numbers(&case["examples"]));
        let rows: Vec<_> = (0..documents).map(|i| numbered_row(i % same_every)).collect();
        let data = Data {
            path: "rows".into(),
            examples: pool.map_or_else(|| rows.clone(), |pool| (0..pool).map(numbered_row).collect()),
            documents: rows,
            examples_hold_documents: pool.is_none(),
        };
        let (asked, chosen): (Vec<usize>, Vec<Vec<u64>>) =
            (numbers(&case["asked"]), numbers(&case["chosen"]));
        let task = numbered();
        let mut prompts = Prompts::new(&task, &data, examples, FewshotOrder::V0_3).unwrap();
        assert_eq!(prompts.asked()[..asked.len()], asked, "{documents} documents");
        for (number, chosen) in asked.into_iter().zip(chosen) {
            let before: String = chosen.iter().map(|example| format!("{example} yes\n\n")).collect();
            let context = format!("{before}{}", number as u64 % same_every);
            assert_eq!(prompts.item(number).unwrap().context, context, "document {number} of {documents}");
        }
    }
}

/// Whether a document may be among its examples goes by whether a task has training documents, in the older harness.
#[test]
fn the_older_harness_draws_one_more_without_training_documents() {
    let dir = tempfile::tempdir().unwrap();
    for split in ["train", "validation"] {
        std::fs::write(dir.path().join(format!("{split}.jsonl")), "{\"i\": 1}\n").unwrap();
    }
    let hold = |task: &Task, path: &Path, order| {
        data::load(task, path, None, true, order).unwrap().examples_hold_documents
    };
    let file = dir.path().join("validation.jsonl");
    let mut task = task::find("hellaswag").unwrap();
    assert!(hold(&task, dir.path(), FewshotOrder::V0_4) && !hold(&task, dir.path(), FewshotOrder::V0_3));
    assert!(hold(&task, &file, FewshotOrder::V0_3));
    task.training_split = None;
    assert!(hold(&task, dir.path(), FewshotOrder::V0_3));
    // The first examples are shown, or given ones, and none is drawn: there need be no more.
    let mut first = task.clone();
    first.fewshot_config.sampler = Sampler::FirstN;
    task.fewshot_config.samples = Some(vec![numbered_row(1)]);
    for task in [first, task] {
        assert!(!hold(&Task { fewshot_split: Some("train".into()), ..task }, dir.path(), FewshotOrder::V0_3));
    }
}

/// MMLU's five examples are all that there are, in either order.
#[test]
fn mmlu_has_as_many_examples_as_it_shows() {
    let dir = tempfile::tempdir().unwrap();
    for (split, rows) in [("test", 2), ("dev", 5)] {
        let row = |i: u64| serde_json::json!({ "question": format!("q{i}"), "choices": ["a", "b", "c", "d"], "answer": 0 });
        let rows: String = (0..rows).map(|i| format!("{}\n", row(i))).collect();
        std::fs::write(dir.path().join(format!("{split}.jsonl")), rows).unwrap();
    }
    let task = task::find("mmlu_college_biology").unwrap();
    for order in [FewshotOrder::V0_3, FewshotOrder::V0_4] {
        let data = data::load(&task, dir.path(), None, true, order).unwrap();
        let mut prompts = Prompts::new(&task, &data, 5, order).unwrap();
        let context = prompts.item(0).unwrap().context;
        let places: Vec<_> = (0..5).map(|i| context.find(&format!("q{i}\n")).unwrap()).collect();
        assert!(places.is_sorted(), "{context}");
        assert_eq!(context.matches("Answer:").count(), 6, "{context}");
    }
}

/// MMLU's prompt, as lm_eval 0.4.13 writes it.
#[test]
fn a_prompt_of_mmlu() {
    let task = task::find("mmlu_college_biology").unwrap();
    let row = |question: &str, answer: u64| {
        let row =
            serde_json::json!({ "question": question, "choices": ["a", "b", "c", "d"], "answer": answer });
        row.as_object().unwrap().clone()
    };
    let data = Data {
        path: "rows".into(),
        documents: vec![row(" Why? ", 1)],
        examples: vec![row("How?", 2), row("When?", 0)],
        examples_hold_documents: false,
    };
    let item = Prompts::new(&task, &data, 1, FewshotOrder::V0_4).unwrap().item(0).unwrap();
    let about = "The following are multiple choice questions (with answers) about college biology.\n\n";
    let choices = "\nA. a\nB. b\nC. c\nD. d\nAnswer:";
    assert_eq!(item.context, format!("{about}How?{choices} C\n\nWhy?{choices}"));
    assert_eq!((item.choices.join(""), item.gold), ("ABCD".into(), Gold::Choice(1)));
}

/// GSM8K's prompt, by the harness's definition of it, and what is counted.
#[test]
fn a_prompt_of_gsm8k() {
    let task = task::find("gsm8k").unwrap();
    let row = |question: &str, answer: &str| {
        serde_json::json!({ "question": question, "answer": answer }).as_object().unwrap().clone()
    };
    let data = Data {
        path: "rows".into(),
        documents: vec![row("Two and two?", "It is 4.\n#### 4")],
        examples: vec![row("One and one?", "It is 2.\n#### 2")],
        examples_hold_documents: false,
    };
    let item = Prompts::new(&task, &data, 1, FewshotOrder::V0_4).unwrap().item(0).unwrap();
    let example = "Question: One and one?\nAnswer: It is 2.\n#### 2\n\n";
    assert_eq!(item.context, format!("{example}Question: Two and two?\nAnswer:"));
    assert_eq!(item.choices, ["It is 4.\n#### 4"]);
    let measures: Vec<_> = task.measures().iter().map(ToString::to_string).collect();
    assert_eq!(measures, ["exact_match,strict-match", "exact_match,flexible-extract"]);
    assert_eq!((task.num_fewshot, task.dataset_name.as_deref()), (Some(5), Some("main")));
}
