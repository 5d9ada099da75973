//! What a sweep asks of its trials, read once for all of them, and what their base alone has answered.

use super::candle::failure;
use super::sources::{self, Sources};
use domain::sweep::Evaluations;
use domain::trial::{Failure, FailureClass, ItemScores, TaskScore, TrialConfig};
use eval::EvalError;
use eval::exam::{self, Exam, Sitting};
use eval::run::Model;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use trainer::run::{Loaded, Run};

/// Tokens of a pass, or one longer text: as many as a step of the trial's training has, within these bounds. Less, and
/// what questions share, such as examples, would be computed for each. It keeps nothing for a backward pass.
const FEWEST_TOKENS: u64 = 2048;
const MOST_TOKENS: u64 = 4096;

/// Tokens of a pass in which a trial is asked, at most.
pub fn pass_tokens(config: &TrialConfig) -> u64 {
    let of_a_step = u64::from(config.batch_size) * u64::from(config.max_sequence_length);
    of_a_step.clamp(FEWEST_TOKENS, MOST_TOKENS)
}

/// The questions of the sweeps whose trials are here.
#[derive(Debug, Default)]
pub(super) struct Exams {
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    evaluations: Evaluations,
    /// What its files were like when they were read.
    files: Vec<Seen>,
    exam: Arc<Exam>,
    /// What the base alone has answered so far.
    base: Sitting,
}

/// What a trial is asked, and has answered so far.
#[derive(Debug)]
pub(super) struct Asked {
    exam: Arc<Exam>,
    sitting: Sitting,
}

impl Asked {
    /// The digest of what is asked.
    pub(super) fn digest(&self) -> &str {
        self.exam.digest()
    }
}

impl Exams {
    /// What a sweep asks, where it lies on this machine.
    pub(super) fn of(
        &mut self,
        evaluations: Evaluations,
        loaded: &Loaded,
        sources: &mut Sources,
    ) -> Result<Asked, Failure> {
        for path in evaluations.sources() {
            sources::absolute(path)?;
        }
        let files = seen(&evaluations);
        let is_it = |known: &&Known| known.evaluations == evaluations && known.files == files;
        let known = self.known.iter().find(is_it);
        let exam = match known {
            Some(known) => Arc::clone(&known.exam),
            None => {
                let of_hub = &mut |task: &eval::task::Task| sources.documents(task).map_err(Unasked);
                let exam = Arc::new(
                    Exam::load::<Unasked>(&evaluations, of_hub).map_err(|Unasked(failure)| failure)?,
                );
                // What no trial is asked any more goes.
                self.known.retain(|known| Arc::strong_count(&known.exam) > 1);
                let base = Sitting::default();
                self.known.push(Known { evaluations, files, exam: Arc::clone(&exam), base });
                exam
            }
        };
        exam.fits(&loaded.base.config).map_err(|error| Unasked::from(error).0)?;
        Ok(Asked { exam, sitting: Sitting::default() })
    }

    /// Another base answers anew.
    pub(super) fn forget_answers(&mut self) {
        self.known.iter_mut().for_each(|known| known.base = Sitting::default());
    }

    /// Asks the base the next questions, or, if it has answered them all, the trial. True once there are no more.
    pub(super) fn ask(&mut self, loaded: &Loaded, run: &Run, asked: &mut Asked) -> Result<bool, Failure> {
        let Some(tokenizer) = &loaded.tokenizer else { return Err(no_tokenizer(loaded)) };
        let Some(known) = self.known.iter_mut().find(|known| Arc::ptr_eq(&known.exam, &asked.exam)) else {
            return Ok(true);
        };
        let alone = Model { base: &loaded.base, adapter: None, tokenizer };
        let tokens = pass_tokens(run.config()) as usize;
        let done = match known.exam.is_over(&known.base) {
            false => known.exam.ask(alone, &mut known.base, tokens).map(|_| false),
            true => {
                let adapted = Model { adapter: Some(run.adapter()), ..alone };
                known.exam.ask(adapted, &mut asked.sitting, tokens)
            }
        };
        done.map_err(|error| Unasked::from(error).0)
    }

    /// What came of it, also document by document; nothing before the trial has answered everything.
    pub(super) fn scores(&self, asked: &Asked) -> (Vec<TaskScore>, Vec<ItemScores>) {
        let known = self.known.iter().find(|known| Arc::ptr_eq(&known.exam, &asked.exam));
        match known {
            Some(known) if asked.exam.is_over(&asked.sitting) => (
                asked.exam.scores(&asked.sitting, &known.base),
                asked.exam.item_scores(&asked.sitting, &known.base),
            ),
            _ => Default::default(),
        }
    }
}

/// A file, its length and when it was last written.
type Seen = (PathBuf, u64, Option<SystemTime>);

/// The files that a sweep's documents may be in: those that it names, and those of the directories that it names and of
/// their folders.
fn seen(evaluations: &Evaluations) -> Vec<Seen> {
    let mut seen = Vec::new();
    let mut left: Vec<(PathBuf, u32)> = evaluations.sources().map(|path| (path.into(), 2)).collect();
    while let Some((path, deep)) = left.pop() {
        // What cannot be read says so when it is.
        let Ok(about) = path.metadata() else { continue };
        if about.is_dir() && deep > 0 {
            let entries = path.read_dir().into_iter().flatten().flatten();
            left.extend(entries.map(|entry| (entry.path(), deep - 1)));
        } else if about.is_file() {
            seen.push((path, about.len(), about.modified().ok()));
        }
    }
    seen.sort();
    seen
}

/// A model whose directory has no tokenizer reads no questions.
pub(super) fn no_tokenizer(loaded: &Loaded) -> Failure {
    let message = format!(
        "evaluations: {} holds neither tokenizer.json nor tokenizer.model; copy one of them there",
        loaded.dir.display()
    );
    Failure { class: FailureClass::User, message }
}

/// Why something cannot be asked.
struct Unasked(Failure);

impl From<EvalError> for Unasked {
    fn from(error: EvalError) -> Self {
        Self(match error {
            EvalError::Trainer(error) => failure(error),
            EvalError::Io { .. } | EvalError::Task { .. } | EvalError::Document { .. } => {
                Failure { class: FailureClass::User, message: format!("evaluations: {error}") }
            }
        })
    }
}

/// The failure of a task whose documents lie nowhere.
pub(super) fn no_documents(task: &eval::task::Task) -> Failure {
    let message = format!("evaluations: {}", exam::no_documents(task, "evaluations.task_data"));
    Failure { class: FailureClass::User, message }
}
