//! The agent's actors.
//!
//! | module | owns |
//! |---|---|
//! | [`device`] | what is held on one device: its engine, its assignments, their checkpoints on the way |
//! | [`session`] | the control stream to the coordinator |
//! | [`ahead`] | what is fetched before its trial is here |
//! | `traced` | what a device tells of an attempt: spans and metrics |

pub mod ahead;
pub mod device;
pub mod session;
mod traced;
