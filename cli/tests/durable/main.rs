//! Nothing is lost: the real program, killed at every durable write and at drawn moments, ends with what it would
//! have ended with. The real trainer trains; curves are compared to the last bit.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod full;
mod kills;
mod models;
mod points;
mod refusals;
mod server;
