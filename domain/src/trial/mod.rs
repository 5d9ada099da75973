//! A trial: one fine-tuning run of a sweep.

mod config;
mod record;
mod state;

pub use config::{
    BaseModel, ComputeDtype, EvalSplit, GradientCheckpointing, InitLoraWeights, LrSchedulerType,
    PARAMETER_MEANINGS, PARAMETER_NAMES, Precision, PrecisionMode, StoppingStrategy, TargetModules, Task,
    TrialConfig,
};
pub use record::{Digests, Failure, FailureClass, SIMULATED, Throughput, Trial, TrialSummary};
pub use state::{IllegalTransition, TrialState};
