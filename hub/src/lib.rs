//! Models and data sets of the Hugging Face hub, kept in its cache on disk, where other tools find them too.
//!
//! | module | holds |
//! |---|---|
//! | `id` | `organisation/name@revision`, and what a name in a configuration means |
//! | `settings` | the environment: cache, endpoint, token, offline |
//! | `cache` | the cache's folders: blobs, refs, snapshots |
//! | `client` | requests to the hub, and what its refusals mean |
//! | `files` | which of a repository's files are needed |
//! | `fetch` | a whole snapshot: files that are missing are downloaded, resumed and verified |
//! | `page` | any text on the web by its address |

mod cache;
mod client;
mod error;
mod fetch;
mod files;
mod id;
mod page;
mod settings;

pub use error::{HubError, Result};
pub use fetch::Hub;
pub use files::{COMPANIONS, of_model};
pub use id::{Kind, Located, RepoId, locate};
pub use page::page;
pub use settings::Settings;

/// Hears how a download gets on.
pub trait Progress {
    /// A file's download begins, or goes on behind its first `done` of `total` bytes.
    fn file(&mut self, name: &str, done: u64, total: u64);
    /// So many bytes more of that file are on disk.
    fn bytes(&mut self, count: u64);
    /// The file is whole.
    fn finished(&mut self);
}
