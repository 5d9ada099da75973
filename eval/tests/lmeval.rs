//! Log-likelihoods and metrics beside lm-evaluation-harness's (the figures that `../shared/reference` documents).
//! Where those figures are not on the machine, each test says so and checks nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../trainer/tests/common/mod.rs"]
mod common;

use common::{device, json_file, shared};
use domain::trial::Precision;
use eval::data::{self, Data};
use eval::encode::Encoder;
use eval::metric::{Metric, Score};
use eval::prompt::Prompts;
use eval::run::{self, Model, Options, Sample};
use eval::task::{self, Chosen, FewshotConfig, Sampler};
use serde::Deserialize;
use serde_json::Value;
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
    let data = data::load(&task, &documents, None, reference.num_fewshot > 0).unwrap();
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
        for (metric, score) in &sample.metrics {
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
    let mut prompts = Prompts::new(&chosen.task, &data, reference.num_fewshot).unwrap();
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
