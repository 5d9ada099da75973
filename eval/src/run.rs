//! A model on a task.

use crate::data::Data;
use crate::encode::Encoder;
use crate::filter::{Judge, NO_FILTER};
use crate::generate::{self, Writer};
use crate::metric::{self, Figure, Gold, Measure, Score};
use crate::prompt::{Item, Prompts};
use crate::task::{Chosen, OutputType, Task};
use crate::{EvalError, Result};
use domain::data::ContentHash;
use domain::sweep::FewshotOrder;
use rayon::prelude::*;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use trainer::lora::Adapter;
use trainer::model::{Base, ModelConfig};
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
    /// Whose order documents are asked in, and examples drawn.
    pub fewshot_order: FewshotOrder,
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
        Self {
            num_fewshot: None,
            fewshot_order: FewshotOrder::default(),
            limit: None,
            batch_tokens: 4096,
            max_length: None,
            add_bos: true,
        }
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
    /// The document's number, from 0, where its file has it.
    pub index: usize,
    /// Of each choice, or of the whole text.
    pub loglikelihoods: Vec<f64>,
    /// Whether each is what the model itself would say.
    pub is_greedy: Vec<bool>,
    /// The answer, if it was to be generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated: Option<String>,
    /// What each of the task's filters made of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub filtered_resps: BTreeMap<String, String>,
    /// What each metric makes of it.
    #[serde(serialize_with = "by_name")]
    pub metrics: Vec<(Measure, Score)>,
    /// The windows in which a whole text was read, in their order.
    #[serde(skip)]
    pub windows: Vec<Window>,
}

/// A part of a text that was read at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// The natural logarithm of the probability of its tokens.
    pub log_likelihood: f64,
    /// Its tokens, those that it begins with for their context alone left out.
    pub tokens: usize,
}

fn by_name<S: Serializer>(
    metrics: &[(Measure, Score)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(metrics.len()))?;
    for (measure, score) in metrics {
        map.serialize_entry(measure, score)?;
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
    /// The texts whose likelihood was asked, or that were generated.
    pub requests: usize,
}

/// Refuses a task whose answers alone are as long as what a model reads: what can be said of it before either is loaded.
///
/// # Errors
/// It is such a task.
pub fn fits(task: &Task, config: &ModelConfig, options: &Options) -> Result<()> {
    match task.output_type {
        OutputType::GenerateUntil => generate::room(task, config, options.max_length).map(drop),
        _ => Ok(()),
    }
}

/// Documents whose tokens are counted, to tell about how many all have.
const SAMPLE: usize = 50;

/// Bytes of a task's prompts: they are made beforehand, and kept.
const MOST_BYTES: usize = 1 << 30;

/// A task with its documents as they are asked. Every prompt is made beforehand: each draws its examples where the one
/// before left off, and what a document lacks is found before the first is asked.
#[derive(Debug, Clone)]
pub struct Paper {
    /// The task.
    pub task: Task,
    /// Examples before each document.
    pub num_fewshot: usize,
    /// The documents that there are.
    pub documents: usize,
    path: PathBuf,
    /// The documents' numbers with what is asked, in that order.
    items: Vec<(usize, Item)>,
    judge: Judge,
}

/// What a model makes of some documents, in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answers {
    /// What came of each.
    pub samples: Vec<Sample>,
    /// The texts whose likelihood was asked, or that were generated.
    pub requests: usize,
}

impl Paper {
    /// The prompts of a task's documents.
    ///
    /// # Errors
    /// A document lacks what the task asks of it; there are too few examples; the prompts are too long together.
    pub fn new(chosen: &Chosen, data: &Data, options: &Options) -> Result<Self> {
        let (task, num_fewshot) = (chosen.task.clone(), options.examples(chosen));
        let judge = task.judge()?;
        let rolling = task.output_type == OutputType::LoglikelihoodRolling;
        let examples = if rolling { 0 } else { num_fewshot };
        let mut prompts = Prompts::new(&task, data, examples, options.fewshot_order)?;
        let numbers: Vec<_> =
            prompts.asked().iter().copied().take(options.limit.unwrap_or(usize::MAX)).collect();
        let text = |context| Item { context, choices: Vec::new(), gold: Gold::Choice(0) };
        let mut item = |index| match rolling {
            true => prompts.text(index).map(text),
            false => prompts.item(index),
        };
        let (mut items, mut bytes): (Vec<(usize, Item)>, _) = (Vec::new(), 0);
        for number in numbers {
            let item = item(number)?;
            bytes += item.bytes();
            items.push((number, item));
            if bytes > MOST_BYTES {
                let problem = format!(
                    "the prompts of its first {} documents have more than {MOST_BYTES} bytes",
                    items.len()
                );
                return Err(EvalError::task(
                    &task.task,
                    problem,
                    "ask for fewer examples (num_fewshot) or documents (limit)",
                ));
            }
        }
        Ok(Self { num_fewshot, documents: data.documents.len(), path: data.path.clone(), items, judge, task })
    }

    /// The end of the next documents that are asked together: `most` at most, and no more bytes than that, but one in any
    /// case. An answer that is generated takes long enough for itself.
    pub fn part(&self, from: usize, most: usize, bytes: usize) -> usize {
        let most = if self.task.output_type == OutputType::GenerateUntil { 1 } else { most };
        let mut sum = 0;
        let fitting = self.items[from..].iter().take(most).take_while(|(_, item)| {
            sum += item.bytes();
            sum <= bytes
        });
        self.items.len().min(from + fitting.count().max(1))
    }

    /// The SHA-256 of what is asked, in that order, and of what is right.
    pub fn digest(&self) -> ContentHash {
        let mut all = self.task.task.clone().into_bytes();
        for (number, item) in &self.items {
            all.extend(ContentHash::of(&item.told(*number)).0);
        }
        ContentHash::of(&all)
    }

    /// The documents that are asked.
    pub fn asked(&self) -> usize {
        self.items.len()
    }

    /// About how many tokens its documents are, their prompts and choices: what some of them have a byte, for all. Answers that
    /// are generated are none of them.
    ///
    /// # Errors
    /// The tokenizer fails on a text.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<u64> {
        let generates = self.task.output_type == OutputType::GenerateUntil;
        let texts = |item: &'_ Item| -> Vec<String> {
            let choices = item.choices.iter().filter(|_| !generates);
            choices.chain([&item.context]).cloned().collect()
        };
        let (mut tokens, mut bytes) = (0, 0);
        for (_, item) in self.items.iter().step_by(self.items.len().div_ceil(SAMPLE).max(1)) {
            for text in texts(item) {
                tokens += tokenizer.encode_as_it_is(&text)?.ids.len();
                bytes += text.len();
            }
        }
        let all: usize = self.items.iter().flat_map(|(_, item)| texts(item)).map(|text| text.len()).sum();
        Ok((tokens as f64 * all as f64 / bytes.max(1) as f64).ceil() as u64)
    }

    /// Asks some of the documents. `watch` is told how many of how many questions are answered.
    ///
    /// # Errors
    /// A document is longer than the model reads; the device runs out of memory.
    pub fn ask(
        &self,
        model: Model,
        documents: Range<usize>,
        options: &Options,
        watch: &mut dyn FnMut(usize, usize),
    ) -> Result<Answers> {
        let max_length = options.max_length.unwrap_or(model.base.config.max_position_embeddings);
        let encoder = Encoder::new(model.tokenizer, max_length, options.add_bos);
        let items = &self.items[documents];
        if self.task.output_type == OutputType::GenerateUntil {
            let writer = Writer::new(model, &self.task, options.max_length)?;
            return self.write(&writer, &encoder, items, watch);
        }
        let encode = |(number, item): &(usize, Item)| self.questions(*number, item, &encoder);
        let encoded: Vec<Vec<Question>> = items.par_iter().map(encode).collect::<Result<_>>()?;
        let (mut questions, mut asked) = (Vec::new(), Vec::with_capacity(items.len()));
        for of_item in encoded {
            let start = questions.len();
            questions.extend(of_item);
            asked.push(start..questions.len());
        }
        let total = questions.len();
        let answers =
            pack::score(model.base, model.adapter, &questions, options.batch_tokens, &mut |done| {
                watch(done, total)
            })?;
        let sample = |((number, item), asked): (&(usize, Item), Range<usize>)| {
            sample(&self.task, *number, item, &questions[asked.clone()], &answers[asked])
        };
        let samples = items.iter().zip(asked).map(sample).collect();
        Ok(Answers { samples, requests: total })
    }

    /// Generates the answers, one after the other.
    fn write(
        &self,
        writer: &Writer,
        encoder: &Encoder,
        items: &[(usize, Item)],
        watch: &mut dyn FnMut(usize, usize),
    ) -> Result<Answers> {
        let (names, measures) = (self.task.filter_names(), self.task.measures());
        let mut samples = Vec::with_capacity(items.len());
        for (number, item) in items {
            let wrong = |problem: &str, remedy: &str| EvalError::Document {
                path: self.path.clone(),
                place: format!("document {}", number + 1),
                problem: problem.into(),
                remedy: remedy.into(),
            };
            let generated = writer.answer(encoder, &item.context)?;
            let generated =
                generated.ok_or_else(|| wrong("its prompt has no tokens", "give doc_to_text a text"))?;
            let filtered = self
                .judge
                .of(&generated, &item.choices)
                .map_err(|problem| wrong(&problem, "write the expression so that it needs fewer tries"))?;
            let right = filtered.iter().map(|filtered| Score::Value(f64::from(filtered.is_right)));
            samples.push(Sample {
                task: self.task.task.clone(),
                index: *number,
                loglikelihoods: Vec::new(),
                is_greedy: Vec::new(),
                metrics: measures.iter().cloned().zip(right).collect(),
                generated: Some(generated),
                filtered_resps: names
                    .iter()
                    .map(|name| name.unwrap_or(NO_FILTER).to_owned())
                    .zip(filtered.into_iter().map(|filtered| filtered.text))
                    .collect(),
                windows: Vec::new(),
            });
            watch(samples.len(), items.len());
        }
        Ok(Answers { requests: samples.len(), samples })
    }

    /// The questions of each choice, or of the whole text.
    fn questions(&self, index: usize, item: &Item, encoder: &Encoder) -> Result<Vec<Question>> {
        if self.task.output_type == OutputType::LoglikelihoodRolling {
            return Ok(encoder.windows(&item.context)?);
        }
        let delimiter = &self.task.target_delimiter;
        let delimited: Vec<_> = item.choices.iter().map(|choice| format!("{delimiter}{choice}")).collect();
        let question = |(choice, pair): (usize, (Vec<u32>, Vec<u32>))| {
            let length = pair.1.len();
            encoder.question(pair).ok_or_else(|| EvalError::Document {
                path: self.path.clone(),
                place: format!("document {}", index + 1),
                problem: format!("choice {} has {length} tokens", choice + 1),
                remedy: "give it one at least, and no more than the model reads".into(),
            })
        };
        encoder.pairs(&item.context, &delimited)?.into_iter().enumerate().map(question).collect()
    }

    /// What comes of all its documents' answers.
    pub fn outcome(&self, answers: Answers) -> Outcome {
        let Answers { samples, requests } = answers;
        let figure = |(place, measure): (usize, &Measure)| {
            let scores: Vec<_> = samples.iter().map(|sample| sample.metrics[place].1).collect();
            metric::aggregate(measure, &scores)
        };
        let figures = self.task.measures().iter().enumerate().map(figure).collect();
        let (num_fewshot, documents) = (self.num_fewshot, self.documents);
        Outcome { task: self.task.clone(), num_fewshot, documents, samples, figures, requests }
    }
}

/// Runs a task. `watch` is told how many of how many questions are answered.
///
/// # Errors
/// Those of [`Paper::new`] and [`Paper::ask`].
pub fn evaluate(
    model: Model,
    chosen: &Chosen,
    data: &Data,
    options: &Options,
    watch: &mut dyn FnMut(usize, usize),
) -> Result<Outcome> {
    let paper = Paper::new(chosen, data, options)?;
    let answers = paper.ask(model, 0..paper.asked(), options, watch)?;
    Ok(paper.outcome(answers))
}

fn sample(task: &Task, index: usize, item: &Item, questions: &[Question], answers: &[Answer]) -> Sample {
    let mut loglikelihoods: Vec<_> = answers.iter().map(|answer| answer.log_likelihood).collect();
    let mut is_greedy: Vec<_> = answers.iter().map(|answer| answer.is_greedy).collect();
    let rolling = task.output_type == OutputType::LoglikelihoodRolling;
    let window = |(question, answer): (&Question, &Answer)| Window {
        log_likelihood: answer.log_likelihood,
        tokens: question.asked,
    };
    let windows = questions.iter().zip(answers).filter(|_| rolling).map(window).collect();
    if rolling {
        loglikelihoods = vec![loglikelihoods.iter().sum()];
        is_greedy = vec![is_greedy.iter().all(|greedy| *greedy)];
    }
    let score = |measure: Measure| {
        let score = match rolling {
            true => metric::of_text(measure.metric, &item.context, loglikelihoods[0]),
            false => metric::of_choices(measure.metric, &item.gold, &item.choices, &loglikelihoods),
        };
        (measure, score)
    };
    Sample {
        task: task.task.clone(),
        index,
        metrics: task.measures().into_iter().map(score).collect(),
        loglikelihoods,
        is_greedy,
        generated: None,
        filtered_resps: BTreeMap::new(),
        windows,
    }
}
