//! A trial: one fine-tuning run of a sweep.

mod attempts;
mod config;
mod items;
mod note;
mod record;
mod shortage;
mod state;

pub use config::{
    BaseModel, ComputeDtype, EvalSplit, GradientCheckpointing, InitLoraWeights, LrSchedulerType,
    PARAMETER_MEANINGS, PARAMETER_NAMES, Precision, PrecisionMode, StoppingStrategy, TargetModules, Task,
    TrialConfig, serialize_differing,
};
pub use items::{ItemScores, TextScores};
pub use note::{Note, Severity};
pub use record::{
    Digests, Failure, FailureClass, SIMULATED, SampleText, Stretch, TaskScore, Throughput, Trial,
    TrialDevice, TrialPlacement, TrialSummary,
};
pub use shortage::Shortage;
pub use state::{IllegalTransition, TrialState};
