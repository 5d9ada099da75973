//! What a sweep asks of its models, checked before anything is trained: tasks, metrics, documents.

use crate::Failure;
use crate::download::Downloads;
use ::eval::exam::{self, Exam, Places, no_documents};
use ::eval::run::Paper;
use ::eval::task::{Chosen, Selection, Task};
use ::eval::{EvalError, data};
use config::sweep_file::Loaded;
use domain::metric;
use domain::sweep::Evaluations;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use trainer::model::ModelConfig;
use trainer::{TrainError, locate, preflight};

/// Where a sweep says what its models are asked.
const TASKS: &str = "evaluations.tasks";

/// Refuses tasks that there are not, and a metric that is none of theirs.
pub(crate) fn known(loaded: &Loaded) -> Result<(), Failure> {
    let Some(evaluations) = &loaded.spec.evaluations else { return Ok(()) };
    let selection = select(loaded, evaluations)?;
    let lies_nowhere = |chosen: &&Chosen| {
        !evaluations.task_data.contains_key(&chosen.task.task) && !chosen.task.asks_shipped_data()
    };
    if let Some(chosen) = selection.tasks.iter().find(lies_nowhere) {
        return Err(told(loaded, no_documents(&chosen.task, "evaluations.task_data")));
    }
    let metric = &loaded.spec.search.metric;
    let metrics = selection.metrics();
    if metric::task_and_metric(metric).is_none() || metrics.contains(metric) {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "{}: search.metric: {metric} is measured by none of the tasks that are asked; these measure {}",
        loaded.locate("search.metric"),
        metrics.join(", ")
    )))
}

/// Reads every document that is asked and makes its prompt; what comes from the hub is downloaded. Each of the `models` has
/// room for what it is asked. `None` if nothing is.
pub(crate) fn documents<'a>(
    loaded: &Loaded,
    mut models: impl Iterator<Item = &'a ModelConfig>,
    downloads: &mut Downloads,
) -> Result<Option<Exam>, Failure> {
    let Some(evaluations) = &loaded.spec.evaluations else { return Ok(None) };
    let place = loaded.locate(TASKS);
    let of_hub = &mut |task: &Task| match task.asks_shipped_data() {
        true => downloads.documents(task, &format!("{place}: {}", task.task)).map_err(Unread::Download),
        false => Err(Unread::Eval(no_documents(task, "evaluations.task_data"))),
    };
    match Exam::load::<Unread>(evaluations, of_hub) {
        Ok(exam) => {
            let fit = models.try_for_each(|model| exam.fits(model));
            fit.map(|()| Some(exam)).map_err(|error| told(loaded, error))
        }
        Err(Unread::Download(failure)) => Err(failure),
        Err(Unread::Eval(error)) => Err(told(loaded, error)),
    }
}

/// What answering all that a sweep asks takes, as far as is known before anything is answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// Tokens of all prompts and choices.
    pub(crate) tokens: u64,
    /// Documents.
    pub(crate) documents: u64,
}

/// What a model reads to answer an exam; `None` of one without a tokenizer, which is refused once it is asked.
pub(crate) fn reading(
    loaded: &Loaded,
    exam: &Exam,
    model: &str,
    shape: &ModelConfig,
) -> Result<Option<Reading>, Failure> {
    let tokenizer = locate::model(model).and_then(|dir| preflight::tokenizer(&dir, shape));
    let tokenizer = tokenizer.map_err(|error| told(loaded, error.into()))?;
    let Some(tokenizer) = tokenizer else { return Ok(None) };
    let (tokens, documents) = exam.tokens(&tokenizer).map_err(|error| told(loaded, error))?;
    Ok(Some(Reading { tokens, documents }))
}

/// Names of each task's documents that are here the folder that holds them, where a sweep names a directory of several:
/// what is uploaded has no folders.
pub(crate) fn folders(loaded: &mut Loaded) -> Result<(), Failure> {
    let Some(evaluations) = &loaded.spec.evaluations else { return Ok(()) };
    let selection = select(loaded, evaluations)?;
    let Some(section) = loaded.document.get_mut("evaluations") else { return Ok(()) };
    for key in ["task_data", "fewshot_data"] {
        let places = section.get_mut(key).and_then(Value::as_object_mut);
        for (name, place) in places.into_iter().flatten() {
            let chosen = selection.tasks.iter().find(|chosen| chosen.task.task == *name);
            let dir = place.as_str().map(Path::new).filter(|path| path.is_dir());
            if let (Some(chosen), Some(dir)) = (chosen, dir) {
                *place = data::folder(&chosen.task, dir).to_string_lossy().into();
            }
        }
    }
    Ok(())
}

fn select(loaded: &Loaded, evaluations: &Evaluations) -> Result<Selection, Failure> {
    exam::select(evaluations).map_err(|error| told(loaded, error))
}

/// Makes the prompts of the documents that lie on this machine, to find what is wrong with them before they are uploaded.
pub(crate) fn documents_here(loaded: &Loaded) -> Result<(), Failure> {
    let Some(evaluations) = &loaded.spec.evaluations else { return Ok(()) };
    let options = exam::options(evaluations);
    for chosen in &select(loaded, evaluations)?.tasks {
        let name = &chosen.task.task;
        let path = |places: &BTreeMap<String, String>| places.get(name).map(PathBuf::from);
        let (documents, fewshot) = (path(&evaluations.task_data), path(&evaluations.fewshot_data));
        let Some(documents) = documents.filter(|path| path.exists()) else { continue };
        if fewshot.as_ref().is_some_and(|path| !path.exists()) {
            continue;
        }
        let data = exam::read(chosen, &Places { documents, fewshot }, &options);
        let paper = data.and_then(|data| Paper::new(chosen, &data, &options));
        paper.map_err(|error| told(loaded, error))?;
    }
    Ok(())
}

fn told(loaded: &Loaded, error: EvalError) -> Failure {
    let message = format!("{}: evaluations: {error}", loaded.locate(TASKS));
    match error {
        EvalError::Trainer(TrainError::Tensor(_)) => Failure::failed(message),
        _ => Failure::invalid(message),
    }
}

/// Why documents cannot be read.
enum Unread {
    Download(Failure),
    Eval(EvalError),
}

impl From<EvalError> for Unread {
    fn from(error: EvalError) -> Self {
        Self::Eval(error)
    }
}

/// The documents of a task, by where a person says that they lie, else from its data set on the hub.
pub(crate) fn place(
    task: &Task,
    named: Option<&PathBuf>,
    downloads: &mut Downloads,
) -> Result<PathBuf, Failure> {
    match named {
        Some(path) => Ok(path.clone()),
        None if task.dataset_path.is_some() => downloads.documents(task, &format!("--tasks {}", task.task)),
        None => {
            let flag = format!("--task-data {}=PATH", task.task);
            Err(Failure::invalid(no_documents(task, &flag)))
        }
    }
}
