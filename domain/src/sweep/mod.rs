//! A sweep: a search over fine-tuning configurations.
//!
//! | file | holds |
//! |---|---|
//! | `spec` | the types |
//! | `document` | a document (a sweep file as JSON) to a checked [`SweepSpec`], and back |
//! | `distribution` | the forms in which a parameter's values are written |
//! | `parameter` | what each parameter may be |
//! | `constraint`, `parse` | the language of constraints between parameters |
//! | `check` | what must hold between a sweep's parts |
//! | `problem` | what is wrong, where, and what to do |
//! | `evaluations` | what its models are asked |
//! | `record` | what the coordinator keeps of a sweep |

mod check;
mod constraint;
mod distribution;
mod document;
mod evaluations;
mod parameter;
mod parse;
mod problem;
mod record;
mod spec;

pub use check::{in_force, values_of, with_values};
pub use constraint::{Expression, Operator};
pub use evaluations::{Evaluations, FewshotOrder};
pub use parameter::{LARGEST_WHOLE, check_config, check_parameter};
pub use parse::ConstraintError;
pub use problem::{Problem, is_within};
pub use record::{DEFAULT_NAMESPACE, StateCounts, Sweep, SweepState};
pub use spec::{
    Algorithm, Budget, Constraint, Distribution, Goal, Replicates, Resources, SearchSpec, SweepSpec,
};
