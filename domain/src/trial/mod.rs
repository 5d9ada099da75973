//! A trial: one fine-tuning run of a sweep.

mod config;
mod record;
mod state;

pub use config::{
    EvalSplit, LrSchedulerType, PARAMETER_MEANINGS, PARAMETER_NAMES, PrecisionMode, TargetModules, Task,
    TrialConfig,
};
pub use record::{Digests, Failure, FailureClass, Throughput, Trial, TrialSummary};
pub use state::{IllegalTransition, TrialState};
