//! Which token an agent belongs to: the first that it came with. Another token cannot speak for it, and so neither
//! report on its trials nor read or write their checkpoints.
//!
//! An agent that comes without a token, to a server that asks for none, belongs to nobody.

use crate::access::Caller;
use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Owner, Store};
use domain::AgentId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Agents that a token may have had at most. Each start on an empty folder is another one.
const MOST: usize = 1000;

/// Who owns which agent. Clones share it.
#[derive(Clone)]
pub struct Owners {
    store: Store,
    known: Arc<Mutex<HashMap<AgentId, String>>>,
    /// Held by a new claim until it is durable, so that of two who come at once one is the first. Nobody else waits for it.
    claiming: Arc<tokio::sync::Mutex<()>>,
}

impl Owners {
    /// Reads what is kept.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn open(store: Store) -> Result<Self> {
        let known = store.owners().await?.into_iter().map(|Owner { agent, token }| (agent, token)).collect();
        Ok(Self { store, known: Arc::new(Mutex::new(known)), claiming: Arc::default() })
    }

    fn known(&self) -> MutexGuard<'_, HashMap<AgentId, String>> {
        // Nothing that can panic is done while it is held.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an agent for the caller's. Durable when it returns.
    ///
    /// # Errors
    /// It is another's, who has a token still, or it cannot be written.
    pub async fn claim(&self, agent: &AgentId, caller: &Caller) -> Result<()> {
        let Some(name) = caller.name() else { return Ok(()) };
        if self.known().get(agent).is_some_and(|owner| owner == name) {
            return Ok(());
        }
        let _claiming = self.claiming.lock().await;
        {
            let known = self.known();
            match known.get(agent) {
                Some(owner) if owner == name => return Ok(()),
                Some(owner) if caller.knows(owner) => return Err(not_yours(agent, owner, name)),
                // Whose token is gone owns nothing.
                _ => {}
            }
            if known.values().filter(|owner| *owner == name).count() >= MOST {
                return Err(CoordinatorError::Denied(format!(
                    "the token {name} has had {MOST} agents; keep the data directories of agents, or use another token"
                )));
            }
        }
        let mut batch = Batch::default();
        batch.own(&Owner { agent: agent.clone(), token: name.into() });
        self.store.commit(batch).await?;
        self.known().insert(agent.clone(), name.into());
        Ok(())
    }

    /// Refuses a caller who is not the one that an agent belongs to.
    ///
    /// # Errors
    /// It is another's.
    pub fn check(&self, agent: &AgentId, caller: &Caller) -> Result<()> {
        let Some(name) = caller.name() else { return Ok(()) };
        match self.known().get(agent) {
            Some(owner) if owner == name => Ok(()),
            owner => Err(not_yours(agent, owner.map_or("nobody", String::as_str), name)),
        }
    }
}

fn not_yours(agent: &AgentId, owner: &str, name: &str) -> CoordinatorError {
    CoordinatorError::Denied(format!(
        "{agent} belongs to the token {owner}, and not to {name}; give each agent its own data directory, and each \
         machine its own token"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::tokens::{self, Principal, Role, Tokens};
    use futures::future::BoxFuture;
    use registry::{Entries, Fence, MemoryRegistry, Registry, Write};
    use security::FileError;
    use security::watched::Watched;
    use tokio::sync::Semaphore;

    /// A registry that commits as often as it is let.
    struct Slow(MemoryRegistry, Semaphore);

    type Answer<'a, T> = BoxFuture<'a, registry::Result<T>>;

    impl Registry for Slow {
        fn lead(&self, holder: &str) -> Answer<'_, Fence> {
            self.0.lead(holder)
        }

        fn commit(&self, fence: Fence, batch: Vec<Write>) -> Answer<'_, ()> {
            Box::pin(async move {
                self.1.acquire().await.unwrap().forget();
                self.0.commit(fence, batch).await
            })
        }

        fn get(&self, key: &str) -> Answer<'_, Option<Vec<u8>>> {
            self.0.get(key)
        }

        fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Answer<'_, Entries> {
            self.0.list(prefix, after, limit)
        }
    }

    fn callers<const N: usize>(names: [&str; N]) -> [Caller; N] {
        let add =
            |known: Tokens, name: &&str| known.with(Principal::new(*name, Role::Agent), tokens::hash(name));
        let known = names.iter().fold(Tokens::default(), add);
        let watched = Watched::open(vec![], move || Ok::<_, FileError>(known.clone())).unwrap();
        let watched = Arc::new(watched);
        names.map(|name| Caller::known(watched.current().find(name).unwrap().clone(), watched.clone()))
    }

    /// While a claim is written, what is owned is looked up all the same, and the second of two who claim waits.
    #[tokio::test]
    async fn nobody_waits_for_the_disk_but_who_claims() {
        let slow = Arc::new(Slow(MemoryRegistry::new(), Semaphore::new(1)));
        let owners = Owners::open(Store::lead(slow.clone(), "me").await.unwrap()).await.unwrap();
        let [one, other] = callers(["one", "other"]);
        let (old, new) = (AgentId::new("old"), AgentId::new("new"));
        owners.claim(&old, &one).await.unwrap();

        let mut first = std::pin::pin!(owners.claim(&new, &one));
        let mut second = std::pin::pin!(owners.claim(&new, &other));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        owners.check(&old, &one).unwrap();
        owners.claim(&old, &one).await.unwrap();
        assert!(owners.check(&new, &one).is_err(), "not before it is durable");
        slow.1.add_permits(1);
        first.await.unwrap();
        assert!(second.await.unwrap_err().to_string().contains("belongs to the token one"));
        owners.check(&new, &one).unwrap();
    }
}
