//! What a sweep asks of its models: all its tasks, a few documents at a time, so that whoever asks can do something else
//! in between.

use crate::data::{self, Data};
use crate::metric::{self, Score};
use crate::results::{self, Mean};
use crate::run::{self, Answers, Model, Options, Outcome, Paper, Sample, Window};
use crate::task::{self, Chosen, OutputType, Preset, Selection, Task};
use crate::{EvalError, Result};
use domain::data::ContentHash;
use domain::metric::MEAN;
use domain::sweep::Evaluations;
use domain::trial::{ItemScores, TaskScore, TextScores};
use std::collections::BTreeMap;
use std::path::PathBuf;
use trainer::model::ModelConfig;
use trainer::tokenizer::Tokenizer;

/// Documents that are asked at a time at most, and the bytes of their prompts, if it is more than one.
const PART: usize = 32;
const PART_BYTES: usize = 64 << 10;

/// Where a task's documents lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// A file, or a directory of files called after splits.
    pub documents: PathBuf,
    /// Where its examples lie, if not there.
    pub fewshot: Option<PathBuf>,
}

/// All tasks of a sweep, with their prompts.
#[derive(Debug)]
pub struct Exam {
    papers: Vec<Paper>,
    /// What each of them asks, as one text tells it from others.
    digests: Vec<String>,
    presets: Vec<Preset>,
    options: Options,
    digest: String,
}

/// A model's answers so far.
#[derive(Debug, Default)]
pub struct Sitting {
    /// Of the tasks that are through.
    outcomes: Vec<Outcome>,
    /// Of the one that is not.
    answers: Answers,
}

impl Exam {
    /// Reads what a sweep asks. `of_hub` says where the documents of a task lie that the sweep names no place for.
    ///
    /// # Errors
    /// A task is unknown or says what cannot be; its documents cannot be read, or lack what it asks of them.
    pub fn load<E: From<EvalError>>(
        evaluations: &Evaluations,
        of_hub: &mut dyn FnMut(&Task) -> std::result::Result<PathBuf, E>,
    ) -> std::result::Result<Self, E> {
        let (selection, options) = (select(evaluations)?, options(evaluations));
        let mut papers = Vec::with_capacity(selection.tasks.len());
        for chosen in &selection.tasks {
            let name = &chosen.task.task;
            let documents = match evaluations.task_data.get(name) {
                Some(path) => path.into(),
                None => of_hub(&chosen.task)?,
            };
            let places = Places { documents, fewshot: evaluations.fewshot_data.get(name).map(PathBuf::from) };
            papers.push(Paper::new(chosen, &read(chosen, &places, &options)?, &options)?);
        }
        let of_papers: Vec<_> = papers.iter().map(Paper::digest).collect();
        let all: Vec<_> = of_papers.iter().flat_map(|digest| digest.0).collect();
        let digest = format!("sha256:{}", ContentHash::of(&all));
        let digests = of_papers.iter().map(ToString::to_string).collect();
        Ok(Self { papers, digests, presets: selection.presets, options, digest })
    }

    /// `sha256:<hex>` of what is asked: the prompts of every task and what is right, whatever files they come from.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether a model can be asked all of it, as far as is known before it is.
    ///
    /// # Errors
    /// Those of [`run::fits`].
    pub fn fits(&self, config: &ModelConfig) -> Result<()> {
        self.papers.iter().try_for_each(|paper| run::fits(&paper.task, config, &self.options))
    }

    /// About how many tokens a model reads to answer all of it, answers that are generated left out, and in how many documents.
    ///
    /// # Errors
    /// The tokenizer fails on a text.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<(u64, u64)> {
        let documents: usize = self.papers.iter().map(Paper::asked).sum();
        let tokens = self.papers.iter().map(|paper| paper.tokens(tokenizer)).sum::<Result<u64>>()?;
        Ok((tokens, documents as u64))
    }

    /// Whether a model generates some of its answers.
    pub fn generates(&self) -> bool {
        self.papers.iter().any(|paper| paper.task.output_type == OutputType::GenerateUntil)
    }

    /// Asks a model the next documents. True once there are no more.
    ///
    /// # Errors
    /// A document is longer than the model reads; the device runs out of memory.
    pub fn ask(&self, model: Model, sitting: &mut Sitting, batch_tokens: usize) -> Result<bool> {
        let Some(paper) = self.papers.get(sitting.outcomes.len()) else { return Ok(true) };
        let options = Options { batch_tokens, ..self.options.clone() };
        let from = sitting.answers.samples.len();
        let to = paper.part(from, PART, PART_BYTES);
        let answers = paper.ask(model, from..to, &options, &mut |_, _| ())?;
        // A sweep keeps what is counted; the texts would be many.
        let counted = |sample| Sample { generated: None, filtered_resps: BTreeMap::new(), ..sample };
        sitting.answers.samples.extend(answers.samples.into_iter().map(counted));
        sitting.answers.requests += answers.requests;
        if to == paper.asked() {
            sitting.outcomes.push(paper.outcome(std::mem::take(&mut sitting.answers)));
        }
        Ok(self.is_over(sitting))
    }

    /// Whether a model was asked everything.
    pub fn is_over(&self, sitting: &Sitting) -> bool {
        sitting.outcomes.len() == self.papers.len()
    }

    /// What comes of a model's answers beside those of the base alone: each metric of each task, and each preset's mean.
    pub fn scores(&self, sitting: &Sitting, base: &Sitting) -> Vec<TaskScore> {
        let pairs: Vec<_> = sitting.outcomes.iter().zip(&base.outcomes).collect();
        let mut scores: Vec<_> = pairs.iter().flat_map(|(outcome, base)| of_task(outcome, base)).collect();
        let means = self.presets.iter().filter_map(|preset| {
            let (with, without) = (&sitting.outcomes, &base.outcomes);
            Some(of_preset(preset, &scores, results::mean(preset, with)?, results::mean(preset, without)))
        });
        scores.extend(means.collect::<Vec<_>>());
        // A text that a model finds impossible has no perplexity, and a record is JSON, which has no infinity.
        scores.retain(|score| score.value.is_finite());
        for score in &mut scores {
            let errors = [&mut score.stderr, &mut score.base_stderr, &mut score.difference_stderr];
            errors.into_iter().for_each(|error| *error = error.filter(|error| error.is_finite()));
        }
        scores
    }

    /// What single documents make of them, beside those of the base: of each metric of each task, and of each
    /// preset's mean which metrics it is of. Those that would be too many together are left out.
    pub fn item_scores(&self, sitting: &Sitting, base: &Sitting) -> Vec<ItemScores> {
        let outcomes = sitting.outcomes.iter().zip(&base.outcomes).zip(&self.digests);
        let of_tasks = outcomes.flat_map(|((with, base), asked)| of_items(with, base, asked));
        // Those of a mean are no bytes, so that they always fit.
        ItemScores::fitting(of_tasks.chain(self.presets.iter().filter_map(Preset::item_scores)))
    }
}

/// The tasks of a sweep, without a look at their documents.
///
/// # Errors
/// A task is unknown or says what cannot be; a place is that of a task that is not asked.
pub fn select(evaluations: &Evaluations) -> Result<Selection> {
    let selection = task::of_sweep(&evaluations.tasks)?;
    known(&selection, "task_data", &evaluations.task_data)?;
    known(&selection, "fewshot_data", &evaluations.fewshot_data)?;
    Ok(selection)
}

/// How the tasks of a sweep are run.
pub fn options(evaluations: &Evaluations) -> Options {
    Options {
        num_fewshot: evaluations.num_fewshot.map(|number| number as usize),
        fewshot_order: evaluations.fewshot_order.unwrap_or_default(),
        limit: evaluations.limit.map(|limit| limit as usize),
        ..Options::default()
    }
}

/// Refuses places of tasks that are not asked.
fn known(selection: &Selection, key: &str, places: &BTreeMap<String, String>) -> Result<()> {
    let is_asked = |name: &String| selection.tasks.iter().any(|chosen| chosen.task.task == *name);
    match places.keys().find(|name| !is_asked(name)) {
        None => Ok(()),
        Some(name) => {
            let asked: Vec<_> = selection.tasks.iter().map(|chosen| chosen.task.task.as_str()).collect();
            let remedy = format!("the tasks are {}", asked.join(", "));
            Err(EvalError::task(name, format!("has a place in {key}, and is not asked"), remedy))
        }
    }
}

/// The documents of a task, and its examples if it shows any.
///
/// # Errors
/// They are not there or cannot be read.
pub fn read(chosen: &Chosen, places: &Places, options: &Options) -> Result<Data> {
    let shows = options.examples(chosen) > 0;
    data::load(&chosen.task, &places.documents, places.fewshot.as_deref(), shows, options.fewshot_order)
}

/// The error of a task whose documents lie nowhere. `where_to` says how to give their place.
pub fn no_documents(task: &Task, where_to: &str) -> EvalError {
    let of = task.dataset_path.as_ref().map_or(String::new(), |set| format!(" of the data set {set}"));
    let remedy = format!("say where the file or directory{of} is with {where_to}");
    EvalError::task(&task.task, "no documents are given", remedy)
}

fn of_task(outcome: &Outcome, base: &Outcome) -> Vec<TaskScore> {
    let score = |place: usize| {
        let (figure, alone) = (&outcome.figures[place], &base.figures[place]);
        TaskScore {
            task: outcome.task.task.clone(),
            metric: figure.measure.to_string(),
            value: figure.value,
            stderr: figure.stderr,
            base_value: Some(alone.value).filter(|value| value.is_finite()),
            base_stderr: alone.stderr,
            difference_stderr: paired(outcome, base, place),
            num_fewshot: outcome.num_fewshot as u32,
            documents: outcome.samples.len() as u64,
        }
    };
    (0..outcome.figures.len()).map(score).collect()
}

/// What each document makes of a task's metrics.
fn of_items(outcome: &Outcome, base: &Outcome, asked: &str) -> Vec<ItemScores> {
    let bytes = |outcome: &Outcome, place: usize| {
        let byte = |sample: &Sample| match sample.metrics[place].1 {
            Score::Value(value) => Some(ItemScores::byte(value)),
            Score::Weighted(..) => None,
        };
        outcome.samples.iter().map(byte).collect::<Option<Vec<_>>>()
    };
    let of_metric = |place: usize| {
        let metric = outcome.figures[place].measure.to_string();
        let items = ItemScores {
            metric: domain::metric::of_task(&outcome.task.task, &metric),
            asked: asked.to_owned(),
            ..ItemScores::default()
        };
        match bytes(outcome, place).zip(bytes(base, place)) {
            Some((scores, base)) => Some(ItemScores { scores, base, ..items }),
            None => Some(ItemScores { texts: Some(of_texts(outcome, base, place)?), ..items }),
        }
    };
    (0..outcome.figures.len()).filter_map(of_metric).collect()
}

/// What each text makes of a perplexity, or, of a single one, each of the windows in which it was read; `None` if that was
/// but one, or one is impossible.
fn of_texts(outcome: &Outcome, base: &Outcome, place: usize) -> Option<TextScores> {
    let texts = |outcome: &Outcome| {
        let text = |sample: &Sample| match sample.metrics[place].1 {
            Score::Weighted(log_likelihood, weight) => {
                Some((log_likelihood as f32, u32::try_from(weight).ok()?))
            }
            Score::Value(_) => None,
        };
        match outcome.samples.as_slice() {
            [single] => of_windows(&single.windows, text(single)?.1),
            samples => samples.iter().map(text).collect::<Option<Vec<_>>>(),
        }
    };
    let (with, weights) = texts(outcome)?.into_iter().unzip();
    let without = texts(base)?.into_iter().map(|(log_likelihood, _)| log_likelihood).collect();
    TextScores::new(with, without, weights)
}

/// What each window makes of a perplexity. A window ends within a word, so that each has as many of the text's words, or
/// bytes, as its share of the tokens.
fn of_windows(windows: &[Window], weight: u32) -> Option<Vec<(f32, u32)>> {
    let all: usize = windows.iter().map(|window| window.tokens).sum();
    let (mut tokens, mut before) = (0, 0);
    let of_window = |window: &Window| {
        tokens += window.tokens;
        let until = u128::from(weight) * tokens as u128 / all as u128;
        let of = u32::try_from(until).ok()? - std::mem::replace(&mut before, u32::try_from(until).ok()?);
        Some((window.log_likelihood as f32, of))
    };
    windows.iter().map(of_window).collect()
}

/// The standard error of the mean of the documents' differences. What is no mean of documents has none.
fn paired(outcome: &Outcome, base: &Outcome, place: usize) -> Option<f64> {
    let pairs = outcome.samples.iter().zip(&base.samples);
    let difference = pairs.map(|(with, without)| match (with.metrics[place].1, without.metrics[place].1) {
        (Score::Value(with), Score::Value(without)) => Some(with - without),
        _ => None,
    });
    metric::standard_error(&difference.collect::<Option<Vec<_>>>()?)
}

/// A mean of tasks, with an adapter and of the base.
fn of_preset(preset: &Preset, scores: &[TaskScore], with: Mean, without: Option<Mean>) -> TaskScore {
    let of = |entry: &task::PresetTask| {
        let metric = entry.metric.to_string();
        scores.iter().find(|score| score.task == entry.task && score.metric == metric)
    };
    let parts: Vec<_> = preset.tasks.iter().filter_map(of).collect();
    let differences = parts.iter().map(|score| Some((score.difference_stderr?, score.documents)));
    let differences: Option<Vec<_>> = differences.collect();
    TaskScore {
        task: preset.preset.clone(),
        metric: MEAN.into(),
        value: with.value,
        stderr: with.stderr,
        base_value: without.map(|mean| mean.value).filter(|value| value.is_finite()),
        base_stderr: without.and_then(|mean| mean.stderr),
        difference_stderr: differences.and_then(|differences| preset.stderr(&differences)),
        num_fewshot: 0,
        documents: with.documents,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_share_a_texts_words() {
        for (tokens, weight, want) in [
            (&[][..], 9, &[][..]),
            (&[64], 50, &[50]),
            (&[64, 64, 22], 150, &[64, 64, 22]),
            // Whole words, of which none is lost or counted twice.
            (&[64, 64, 22], 100, &[42, 43, 15]),
            (&[1, 1, 1], u32::MAX, &[1_431_655_765; 3]),
            (&[3, 3], 1, &[0, 1]),
        ] {
            let window = |(place, tokens): (usize, &usize)| Window {
                log_likelihood: -(place as f64) - 0.5,
                tokens: *tokens,
            };
            let windows: Vec<_> = tokens.iter().enumerate().map(window).collect();
            let (likelihoods, weights): (Vec<_>, Vec<_>) =
                of_windows(&windows, weight).unwrap().into_iter().unzip();
            assert_eq!(weights, want, "{tokens:?} {weight}");
            assert!(likelihoods.iter().enumerate().all(|(place, l)| *l == -(place as f32) - 0.5));
        }
    }
}
