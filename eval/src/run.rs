//! A model on a task.

use crate::data::Data;
use crate::encode::Encoder;
use crate::metric::{self, Figure, Metric, Score};
use crate::prompt::{Item, Prompts};
use crate::task::{Chosen, OutputType, Task};
use crate::{EvalError, Result};
use rayon::prelude::*;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::ops::Range;
use trainer::lora::Adapter;
use trainer::model::Base;
use trainer::pack::{self, Answer, Question};
use trainer::tokenizer::Tokenizer;

/// A model with its tokenizer.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The frozen base.
    pub base: &'a Base,
    /// An adapter of it.
    pub adapter: Option<&'a Adapter>,
    /// The base's tokenizer.
    pub tokenizer: &'a Tokenizer,
}

/// How a task is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Examples before each document where neither preset nor task pin their number.
    pub num_fewshot: Option<usize>,
    /// Only the first documents.
    pub limit: Option<usize>,
    /// Tokens of a pass at most.
    pub batch_tokens: usize,
    /// The most tokens that the model reads, if not those that it knows.
    pub max_length: Option<usize>,
    /// Whether the tokenizer may put BOS in front.
    pub add_bos: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { num_fewshot: None, limit: None, batch_tokens: 4096, max_length: None, add_bos: true }
    }
}

impl Options {
    /// Examples before each document of a task.
    pub fn examples(&self, chosen: &Chosen) -> usize {
        let fixed = chosen.task.num_fewshot.filter(|number| *number == 0);
        fixed.or(chosen.num_fewshot).or(self.num_fewshot).or(chosen.task.num_fewshot).unwrap_or(0)
    }
}

/// What a model makes of a document.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// The task's name.
    pub task: String,
    /// The document's number, from 0.
    pub index: usize,
    /// Of each choice, or of the whole text.
    pub loglikelihoods: Vec<f64>,
    /// Whether each is what the model itself would say.
    pub is_greedy: Vec<bool>,
    /// What each metric makes of it.
    #[serde(serialize_with = "by_name")]
    pub metrics: Vec<(Metric, Score)>,
}

fn by_name<S: Serializer>(
    metrics: &[(Metric, Score)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(metrics.len()))?;
    for (metric, score) in metrics {
        map.serialize_entry(metric, score)?;
    }
    map.end()
}

/// What a model makes of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The task.
    pub task: Task,
    /// Examples before each document.
    pub num_fewshot: usize,
    /// The documents that there are.
    pub documents: usize,
    /// What came of those that were asked, in order.
    pub samples: Vec<Sample>,
    /// What comes of all of them.
    pub figures: Vec<Figure>,
    /// The texts whose likelihood was asked.
    pub requests: usize,
}

/// A task's documents as questions.
struct Asked {
    item: Item,
    /// The questions of each choice, or of the whole text, among all.
    questions: Range<usize>,
}

/// Runs a task. `watch` is told how many of how many questions are answered.
///
/// # Errors
/// A document lacks what the task asks of it or is longer than the model reads; there are too few examples; the device
/// runs out of memory.
pub fn evaluate(
    model: Model,
    chosen: &Chosen,
    data: &Data,
    options: &Options,
    watch: &mut dyn FnMut(usize, usize),
) -> Result<Outcome> {
    let (task, num_fewshot) = (&chosen.task, options.examples(chosen));
    let max_length = options.max_length.unwrap_or(model.base.config.max_position_embeddings);
    let encoder = Encoder::new(model.tokenizer, max_length, options.add_bos);
    let count = options.limit.unwrap_or(usize::MAX).min(data.documents.len());
    let (asked, questions) = match task.output_type {
        OutputType::MultipleChoice => choices(task, data, num_fewshot, count, &encoder)?,
        OutputType::LoglikelihoodRolling => texts(task, data, count, &encoder)?,
    };
    let total = questions.len();
    let answers = pack::score(model.base, model.adapter, &questions, options.batch_tokens, &mut |done| {
        watch(done, total)
    })?;
    let sample = |(index, asked): (usize, Asked)| {
        let answers = &answers[asked.questions.clone()];
        sample(task, index, &asked.item, answers)
    };
    let samples: Vec<_> = asked.into_iter().enumerate().map(sample).collect();
    let figure = |(place, metric): (usize, &Metric)| {
        let scores: Vec<_> = samples.iter().map(|sample: &Sample| sample.metrics[place].1).collect();
        metric::aggregate(*metric, &scores)
    };
    let figures = task.metrics.iter().enumerate().map(figure).collect();
    let requests = total;
    let documents = data.documents.len();
    Ok(Outcome { task: task.clone(), num_fewshot, documents, samples, figures, requests })
}

type Questions = (Vec<Asked>, Vec<Question>);

fn choices(task: &Task, data: &Data, examples: usize, count: usize, encoder: &Encoder) -> Result<Questions> {
    let mut prompts = Prompts::new(task, data, examples)?;
    let items: Vec<_> = (0..count).map(|index| prompts.item(index)).collect::<Result<_>>()?;
    let encode = |item: &Item| {
        let delimited: Vec<_> =
            item.choices.iter().map(|c| format!("{}{c}", task.target_delimiter)).collect();
        encoder.pairs(&item.context, &delimited)
    };
    let pairs: Vec<_> = items.par_iter().map(encode).collect::<trainer::Result<_>>()?;
    let (mut asked, mut questions) = (Vec::with_capacity(count), Vec::new());
    for (index, (item, pairs)) in items.into_iter().zip(pairs).enumerate() {
        let start = questions.len();
        for (choice, pair) in pairs.into_iter().enumerate() {
            let length = pair.1.len();
            questions.push(encoder.question(pair).ok_or_else(|| EvalError::Document {
                path: data.path.clone(),
                place: format!("document {}", index + 1),
                problem: format!("choice {} has {length} tokens", choice + 1),
                remedy: "give it one at least, and no more than the model reads".into(),
            })?);
        }
        asked.push(Asked { item, questions: start..questions.len() });
    }
    Ok((asked, questions))
}

fn texts(task: &Task, data: &Data, count: usize, encoder: &Encoder) -> Result<Questions> {
    let prompts = Prompts::new(task, data, 0)?;
    let (mut asked, mut questions) = (Vec::with_capacity(count), Vec::new());
    for index in 0..count {
        let context = prompts.text(index)?;
        let start = questions.len();
        questions.extend(encoder.windows(&context)?);
        let item = Item { context, choices: Vec::new(), gold: metric::Gold::Choice(0) };
        asked.push(Asked { item, questions: start..questions.len() });
    }
    Ok((asked, questions))
}

fn sample(task: &Task, index: usize, item: &Item, answers: &[Answer]) -> Sample {
    let mut loglikelihoods: Vec<_> = answers.iter().map(|answer| answer.log_likelihood).collect();
    let mut is_greedy: Vec<_> = answers.iter().map(|answer| answer.is_greedy).collect();
    let rolling = task.output_type == OutputType::LoglikelihoodRolling;
    if rolling {
        loglikelihoods = vec![loglikelihoods.iter().sum()];
        is_greedy = vec![is_greedy.iter().all(|greedy| *greedy)];
    }
    let score = |metric: &Metric| match rolling {
        true => metric::of_text(*metric, &item.context, loglikelihoods[0]),
        false => metric::of_choices(*metric, &item.gold, &item.choices, &loglikelihoods),
    };
    let metrics = task.metrics.iter().map(|metric| (*metric, score(metric))).collect();
    Sample { task: task.task.clone(), index, loglikelihoods, is_greedy, metrics }
}
