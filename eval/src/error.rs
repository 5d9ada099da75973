//! What can go wrong in an evaluation.

use std::path::PathBuf;
use trainer::TrainError;

/// Errors of an evaluation. Each names the file or task and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A task is unknown, or its file says what cannot be.
    #[error("{task}: {problem}; {remedy}")]
    Task {
        /// The task's name or file.
        task: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A document does not give what its task asks of it.
    #[error("{}: {place}: {problem}; {remedy}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// Which of its documents, in words.
        place: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The model or a data file cannot be used.
    #[error(transparent)]
    Trainer(#[from] TrainError),
}

/// An evaluation's result.
pub type Result<T> = std::result::Result<T, EvalError>;

impl EvalError {
    /// A task that cannot be used.
    pub fn task(task: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Task { task: task.into(), problem: problem.into(), remedy: remedy.into() }
    }
}
