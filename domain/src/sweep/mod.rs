//! A sweep: a search over fine-tuning configurations.

mod record;
mod spec;

pub use record::{Sweep, SweepState};
pub use spec::{
    Algorithm, Budget, Constraint, Distribution, Goal, Problem, Resources, SearchSpec, SweepSpec,
};
