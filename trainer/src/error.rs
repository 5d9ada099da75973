//! What can go wrong while a model is loaded or trained.

use std::path::{Path, PathBuf};

/// Errors of the trainer. Each names the file or value and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A model file is missing, cut off, or says something that cannot be trained.
    #[error("{}: {problem}; {remedy}", path.display())]
    Model {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A data file is missing or has rows that cannot be read.
    #[error("{}: {problem}; {remedy}", path.display())]
    Data {
        /// The file, with a line number behind a colon where there is one.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A parameter has a value that cannot be used with this model or data.
    #[error("{key}: {problem}; {remedy}")]
    Parameter {
        /// The parameter, under its name in sweep files.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A tensor operation failed: a defect, or memory that ran out.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The trainer's result.
pub type Result<T> = std::result::Result<T, TrainError>;

impl TrainError {
    /// A model error.
    pub fn model(path: &Path, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Model { path: path.into(), problem: problem.into(), remedy: remedy.into() }
    }

    /// A data error.
    pub fn data(path: &Path, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Data { path: path.into(), problem: problem.into(), remedy: remedy.into() }
    }

    /// A parameter error.
    pub fn parameter(key: &'static str, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Parameter { key, problem: problem.into(), remedy: remedy.into() }
    }

    /// A failed read or write.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.into(), source }
    }
}
