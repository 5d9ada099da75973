//! Who owns what. An actor is a handle, a command enum and a run loop in one file.
//!
//! | actor | owns |
//! |---|---|
//! | [`directory`] | which sweeps run; submission |
//! | [`sweep`] | one running sweep, its trials, its search |
//! | [`dispatcher`] | agents, their devices, the queue, which device holds which trial and until when |
//! | [`agent_session`] | one agent's control stream |
//!
//! Calls go one way, so that bounded mailboxes cannot wait for each other in a ring:
//! gRPC and sessions → directory → sweeps → dispatcher. What comes back comes as a reply, as a one-shot that
//! the caller left behind, or through an agent's [`message::Outbox`], which never waits.

pub mod agent_session;
mod deletion;
pub mod directory;
pub mod dispatcher;
pub mod message;
mod meter;
pub mod sweep;
