//! Schedules the trials of sweeps onto agents, and keeps what they send.

pub mod artifacts;
pub mod history;
pub mod report;
pub mod search;
