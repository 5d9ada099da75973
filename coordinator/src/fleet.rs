//! One of a fleet's coordinators: it stands by while another leads, and says who; when it leads, it serves; when it leads no
//! more and nobody is known to, it tells what it last knew.
//!
//! | file | holds |
//! |---|---|
//! | `fleet.rs` | a turn: standing by, being elected, taking over |
//! | `fleet/post.rs` | [`Post`]: the port, and what answers there meanwhile |
//! | `fleet/retired.rs` | what a leader that lost etcd's majority still answers |
//!
//! The state is in a registry that all of them reach (etcd). Metrics and checkpoints lie in an object store, where a
//! leader that is replaced while its process lives on can do no harm ([`crate::history`], [`crate::artifacts`]); or in a
//! directory that all of them see. Its lock is held by the one that serves, until nothing of it can write there any more
//! ([`History::hold`]), so that the files of a leader that is replaced are not touched before.

mod post;
mod retired;

pub use post::Post;
pub use retired::{Leader, Stale};

pub(crate) use post::{Face, Say};

use crate::Options;
use crate::error::Result;
use crate::history::History;
use crate::place::Place;
use crate::store::Store;
use actor::Scope;
use futures::future::{BoxFuture, FutureExt};
use registry::{DirectoryLock, Leadership, Registry, RegistryError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The pause between two looks at who leads, and between two tries to take the directory.
const PAUSE: Duration = Duration::from_millis(250);

/// The fleet that a coordinator is one of.
#[derive(Clone)]
pub struct Fleet {
    /// The state.
    pub registry: Arc<dyn Registry>,
    /// The state as it was last known, to be read by a leader that reaches it no more.
    pub last_known: Arc<dyn Registry>,
    /// Says who is of the fleet.
    pub leadership: Arc<dyn Leadership>,
    /// Says who was of the fleet, as far as that was last known.
    pub last_members: Arc<dyn Leadership>,
    /// Where metrics and checkpoints lie, for all of them.
    pub place: Place,
}

/// Who leads, if one does, or why that is not known: as a coordinator that does not lead last heard it.
type Found = std::result::Result<Option<String>, String>;

/// Stands by at its post until this coordinator leads, then goes on with what is under way, on the fleet's state and in its
/// place, which is not `options.data_dir`, and serves.
///
/// # Errors
/// What is kept cannot be read; `Gone` if `scope` is cancelled before it leads.
pub fn start<'a>(
    options: Options,
    fleet: Fleet,
    post: &'a Post,
    scope: &'a Scope,
) -> BoxFuture<'a, Result<Leader>> {
    // Boxed here, so that all of the server is compiled once and not again into every program that starts one.
    async move {
        tokio::select! {
            led = led(options, fleet, post, scope) => led,
            () = scope.cancelled() => Err(actor::Gone.into()),
        }
    }
    .boxed()
}

async fn led(options: Options, fleet: Fleet, post: &Post, scope: &Scope) -> Result<Leader> {
    let Fleet { registry, last_known, leadership, last_members, place } = fleet;
    post.stand_by();
    let store = Store::lead(registry, post.advertised()).await?;
    let progress = post.take_over();
    tracing::info!(advertise = post.advertised(), "this coordinator leads");
    let lock = match &place {
        Place::Objects(_) => None,
        Place::Directory(dir) => {
            progress.send_replace("waiting for the last leader to let go of the directory");
            let lock = take(dir).await?;
            History::refuse_newer(&dir.join("history"))?;
            Some(lock)
        }
    };
    // How many there are is for those alone who show a token.
    progress.send_replace("loading sweeps");
    let (services, health) = crate::lead(options, place, store, Some(leadership), lock, scope).await?;
    post.lead(services.clone(), health, scope)?;
    Ok(Leader { services, last_known, last_members })
}

/// Takes the directory as soon as the last leader's process has let go of it.
async fn take(dir: &Path) -> Result<DirectoryLock> {
    let mut said = false;
    loop {
        match DirectoryLock::acquire(dir) {
            Err(error @ RegistryError::InUse { .. }) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%error, "waiting for the last leader's process to end");
                }
                tokio::time::sleep(PAUSE).await;
            }
            other => return Ok(other?),
        }
    }
}
