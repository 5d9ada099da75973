//! A leader that etcd does not confirm any more, for want of a majority: it tells what it last knew, and says that it is old. It
//! acts no more: its actors have ended, what it reads the state from can be read alone, and calls that change something are
//! refused before anything is read.

use super::Post;
use super::post::Say;
use crate::actors::agent_session::Desk;
use crate::actors::directory::Directory;
use crate::actors::dispatcher::Dispatcher;
use crate::error::Result;
use crate::grpc::Services;
use crate::store::Store;
use proto::status::RpcError;
use registry::{Leadership, Registry};
use std::sync::Arc;
use tokio::time::Instant;

/// How old what a coordinator tells is, and why.
#[derive(Clone)]
pub struct Stale {
    /// When it was known to be current.
    pub(crate) since: Instant,
    pub(super) say: Say,
}

impl Stale {
    /// What is said to whoever wants something changed.
    pub(crate) fn refusal(&self) -> RpcError {
        (self.say)()
    }
}

impl std::fmt::Debug for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stale").field("since", &self.since).finish_non_exhaustive()
    }
}

/// A coordinator that leads.
pub struct Leader {
    pub(super) services: Services,
    pub(super) last_known: Arc<dyn Registry>,
    pub(super) last_members: Arc<dyn Leadership>,
}

impl Leader {
    /// Leads no more, as its lease was renewed at `since` for the last time: from now on it tells what was known then, until
    /// another is known to lead. To be called while its actors are there, which are to be ended then.
    ///
    /// # Errors
    /// Its actors have ended.
    pub async fn retire(self, post: &Post, since: Instant) -> Result<()> {
        let Self { services, last_known, last_members } = self;
        let agents = services.desk.dispatcher.agents().await?;
        post.retire(since, |stale, scope| {
            let store = Store::read_in(last_known).beside(services.desk.artifacts.clone());
            let desk = Desk {
                directory: Directory::retired(store),
                dispatcher: Dispatcher::retired(agents, &scope),
                // Whoever writes it ends with the leadership.
                history: services.desk.history.for_reading(),
                ..services.desk
            };
            Services { desk, leadership: Some(last_members), stale: Some(stale), scope, ..services }
        })
    }
}
