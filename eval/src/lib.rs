//! Evaluation as lm-evaluation-harness 0.4 defines it: the same prompts, tokens, log-likelihoods, metrics and
//! standard errors.
//!
//! | module | holds |
//! |---|---|
//! | [`task`] | a task as data; those that ship, those of users; presets |
//! | [`data`] | a task's documents and the examples for its prompts |
//! | [`prompt`] | a document to a context with its choices |
//! | `template` | the expressions and templates of task files |
//! | [`python_random`] | CPython's random numbers: which examples stand in a prompt |
//! | [`encode`] | texts to the tokens that are asked for |
//! | [`generate`] | answers that a model writes, and where they end |
//! | [`filter`] | what is made of them, and whether that is right |
//! | `pattern` | Python's regular expressions |
//! | [`metric`] | from log-likelihoods and answers to figures with standard errors |
//! | [`run`] | a model on a task |
//! | [`exam`] | models on all the tasks of a sweep, a few documents at a time |
//! | [`results`] | what came out, in the harness's layout |
//!
//! It is a crate of its own because it knows what neither of its neighbours should: the trainer, which answers how
//! likely a text is, needs no tasks, and whoever only trains needs no evaluation.

pub mod data;
pub mod encode;
mod error;
pub mod exam;
pub mod filter;
pub mod generate;
pub mod metric;
mod pattern;
pub mod prompt;
pub mod python_random;
pub mod results;
pub mod run;
pub mod task;
mod template;

pub use error::{EvalError, Result};
