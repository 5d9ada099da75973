//! A sweep: a search over fine-tuning configurations.
//!
//! | file | holds |
//! |---|---|
//! | `spec` | the types |
//! | `document` | a document (a sweep file as JSON) to a checked [`SweepSpec`], and back |
//! | `distribution` | the forms in which a parameter's values are written |
//! | `parameter` | what each parameter may be |
//! | `constraint` | the language of constraints between parameters |
//! | `check` | what must hold between a sweep's parts |
//! | `problem` | what is wrong, where, and what to do |
//! | `record` | what the coordinator keeps of a sweep |

mod check;
mod constraint;
mod distribution;
mod document;
mod parameter;
mod problem;
mod record;
mod spec;

pub use check::with_values;
pub use constraint::{ConstraintError, Expression, Operator, in_force};
pub use parameter::{LARGEST_WHOLE, check_config, check_parameter};
pub use problem::Problem;
pub use record::{Sweep, SweepState};
pub use spec::{Algorithm, Budget, Constraint, Distribution, Goal, Resources, SearchSpec, SweepSpec};
