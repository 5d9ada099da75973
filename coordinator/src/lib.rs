//! Schedules the trials of sweeps onto agents, and keeps what they send.

pub mod report;
pub mod search;
