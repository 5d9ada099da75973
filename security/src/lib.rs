//! The safe way between the programs of a fleet.
//!
//! | module | holds |
//! |---|---|
//! | [`server`] | a server's side: connections in TLS 1.3 or 1.2, with certificates of clients on demand |
//! | [`client`] | a client's side: what it trusts and what it shows |
//! | [`explain`] | what a connection that failed wants of a person |
//! | [`secret`] | a text that nobody may read by accident |
//! | [`watched`] | what files say, read again when they change |
//! | [`pem`] | certificates and keys in files |
//! | [`args`] | the flags of all programs |
//!
//! TLS is rustls on ring. Nothing here knows what is called; who may call what is the coordinator's.

pub mod args;
pub mod client;
pub mod explain;
pub mod pem;
pub mod secret;
pub mod server;
pub mod watched;

pub use client::{Client, Line};
pub use explain::{Flags, explain, explain_for};
pub use secret::Secret;
pub use server::{Connection, ServerTls, incoming};

use std::path::PathBuf;
use tokio_rustls::rustls::crypto::ring;

/// Makes ring what clients of TLS use in this process that choose nothing themselves, such as those of object stores.
/// Before the first of them is made.
pub fn use_ring() {
    // It was said before.
    let _ = ring::default_provider().install_default();
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it, and what to do.
    pub problem: String,
}

impl FileError {
    /// This is wrong with that file.
    pub fn new(path: impl Into<PathBuf>, problem: impl std::fmt::Display) -> Self {
        Self { path: path.into(), problem: problem.to_string() }
    }
}
