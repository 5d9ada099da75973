//! Pure types and rules of LoraFleet: no I/O, no async, nothing of ours below it.
//!
//! | module | holds |
//! |---|---|
//! | [`footprint`] | parameters, adapter size, operations of a trial from the shape of its model |
//! | [`data`] | uploaded data: what it consists of, and how a sweep names it |
//! | [`ids`] | names of sweeps, trials, agents; the attempt number |
//! | [`sweep`] | what a sweep file asks for, checked; a sweep's record |
//! | [`trial`] | a trial's full configuration, its record, its states and their legal transitions |
//! | [`fleet`] | agents, devices, what an agent holds |
//! | [`machine`] | machine types that can be rented |
//! | [`metric`] | metric names and what each number means (the only place where it is defined) |
//! | [`rng`] | counter-based random numbers |
//! | [`clock`] | the one source of time |
//! | [`crash`] | places at which a test can end the process |

pub mod clock;
pub mod crash;
pub mod data;
pub mod fleet;
pub mod footprint;
pub mod ids;
pub mod machine;
pub mod metric;
pub mod rng;
pub mod sweep;
pub mod trial;

pub use clock::{Clock, SystemClock, Timestamp};
pub use ids::{AgentId, Attempt, DeviceId, SweepId, TrialId};
