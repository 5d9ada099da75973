//! Which token an agent belongs to: the first that it came with. Another token cannot speak for it, and so neither
//! report on its trials nor read or write their checkpoints.
//!
//! An agent that comes without a token, to a server that asks for none, belongs to nobody.
//!
//! Machines that come and go, each with an empty folder, are a new agent each time. So those that are gone and hold nothing any
//! more are forgotten once their token has as many as it may.

use crate::access::Caller;
use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Owner, Store};
use domain::AgentId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Agents that a token may have at most. Each start on an empty folder is another one.
const MOST: usize = 1000;

/// Time without a session after which an agent may be forgotten: longer than any lease, so that it holds nothing. What was
/// there before this coordinator began counts as seen then.
const GONE: Duration = Duration::from_secs(2 * 3600);

/// Agents that are forgotten at a time, in one transaction.
const AT_A_TIME: usize = 32;

/// An agent's owner.
struct Owned {
    token: String,
    /// Its open sessions.
    sessions: u32,
    /// When the last of them opened or ended.
    seen: Instant,
}

type Known = Arc<Mutex<HashMap<AgentId, Owned>>>;

/// Who owns which agent. Clones share it.
#[derive(Clone)]
pub struct Owners {
    store: Store,
    known: Known,
    /// Held by a new claim until it is durable, so that of two who come at once one is the first. Nobody else waits for it.
    claiming: Arc<tokio::sync::Mutex<()>>,
}

impl Owners {
    /// Reads what is kept.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn open(store: Store) -> Result<Self> {
        let seen = Instant::now();
        let owned = |Owner { agent, token }| (agent, Owned { token, sessions: 0, seen });
        let known = store.owners().await?.into_iter().map(owned).collect();
        Ok(Self { store, known: Arc::new(Mutex::new(known)), claiming: Arc::default() })
    }

    /// Takes an agent for the caller's. Durable when it returns. It has a session for as long as the answer lives.
    ///
    /// # Errors
    /// It is another's, who has a token still, its token has as many as it may, or it cannot be written.
    pub async fn claim(&self, agent: &AgentId, caller: &Caller) -> Result<Option<Stay>> {
        let Some(name) = caller.name() else { return Ok(None) };
        if let Some(stay) = self.stay(agent, name) {
            return Ok(Some(stay));
        }
        let _claiming = self.claiming.lock().await;
        if let Some(stay) = self.stay(agent, name) {
            return Ok(Some(stay));
        }
        let gone = {
            let known = of(&self.known);
            match known.get(agent) {
                Some(owner) if caller.knows(&owner.token) => {
                    return Err(not_yours(agent, &owner.token, name));
                }
                // Whose token is gone owns nothing.
                _ => {}
            }
            let (has, gone) = gone(&known, name);
            if has >= MOST && gone.is_empty() {
                return Err(CoordinatorError::Denied(format!(
                    "the token {name} has {MOST} agents that were here in the last {} hours; keep the data directories of \
                     agents, or use another token",
                    GONE.as_secs() / 3600
                )));
            }
            if has >= MOST { gone } else { Vec::new() }
        };
        let mut batch = Batch::default();
        gone.iter().for_each(|gone| batch.disown(gone));
        batch.own(&Owner { agent: agent.clone(), token: name.into() });
        self.store.commit(batch).await?;
        let owned = Owned { token: name.into(), sessions: 1, seen: Instant::now() };
        let mut known = of(&self.known);
        // One that came back meanwhile stays, and claims anew after the next start of a coordinator.
        gone.iter().for_each(|gone| {
            if known.get(gone).is_some_and(|owned| owned.sessions == 0) {
                known.remove(gone);
            }
        });
        known.insert(agent.clone(), owned);
        drop(known);
        if !gone.is_empty() {
            tracing::info!(token = name, agents = gone.len(), "forgot agents that are gone");
        }
        Ok(Some(Stay { known: self.known.clone(), agent: agent.clone() }))
    }

    /// A session of an agent that is the caller's.
    fn stay(&self, agent: &AgentId, name: &str) -> Option<Stay> {
        let mut known = of(&self.known);
        let owned = known.get_mut(agent).filter(|owned| owned.token == name)?;
        (owned.sessions, owned.seen) = (owned.sessions + 1, Instant::now());
        Some(Stay { known: self.known.clone(), agent: agent.clone() })
    }

    /// Refuses a caller who is not the one that an agent belongs to.
    ///
    /// # Errors
    /// It is another's.
    pub fn check(&self, agent: &AgentId, caller: &Caller) -> Result<()> {
        let Some(name) = caller.name() else { return Ok(()) };
        match of(&self.known).get(agent) {
            Some(owner) if owner.token == name => Ok(()),
            owner => Err(not_yours(agent, owner.map_or("nobody", |owner| owner.token.as_str()), name)),
        }
    }
}

fn of(known: &Known) -> MutexGuard<'_, HashMap<AgentId, Owned>> {
    // Nothing that can panic is done while it is held.
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many agents a token has, and of those that are gone the first to go.
fn gone(known: &HashMap<AgentId, Owned>, name: &str) -> (usize, Vec<AgentId>) {
    let own = || known.iter().filter(|(_, owned)| owned.token == name);
    let is_gone = |owned: &Owned| owned.sessions == 0 && owned.seen.elapsed() >= GONE;
    let mut gone: Vec<_> = own().filter(|(_, owned)| is_gone(owned)).collect();
    gone.sort_by_key(|(agent, owned)| (owned.seen, *agent));
    (own().count(), gone.into_iter().take(AT_A_TIME).map(|(agent, _)| agent.clone()).collect())
}

/// A session of an agent that belongs to a token.
pub struct Stay {
    known: Known,
    agent: AgentId,
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Some(owned) = of(&self.known).get_mut(&self.agent) {
            (owned.sessions, owned.seen) = (owned.sessions.saturating_sub(1), Instant::now());
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
        drop(owners.claim(&old, &one).await.unwrap());

        let mut first = std::pin::pin!(owners.claim(&new, &one));
        let mut second = std::pin::pin!(owners.claim(&new, &other));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        owners.check(&old, &one).unwrap();
        drop(owners.claim(&old, &one).await.unwrap());
        assert!(owners.check(&new, &one).is_err(), "not before it is durable");
        slow.1.add_permits(1);
        let _here = first.await.unwrap();
        assert!(second.await.err().unwrap().to_string().contains("belongs to the token one"));
        owners.check(&new, &one).unwrap();
    }

    /// Spot machines come with empty folders for as long as a fleet lives.
    #[tokio::test(start_paused = true)]
    async fn a_token_is_not_used_up_by_agents_that_are_gone() {
        let registry = Arc::new(MemoryRegistry::new());
        let owners = Owners::open(Store::lead(registry.clone(), "me").await.unwrap()).await.unwrap();
        let [one, other] = callers(["one", "other"]);
        let agent = |number: usize| AgentId::new(format!("agent-{number:04}"));
        // One stays all the time; those that leave do so in the order of their numbers.
        let stays = owners.claim(&agent(0), &one).await.unwrap();
        let _others = owners.claim(&AgentId::new("other"), &other).await.unwrap();
        for number in 1..MOST {
            drop(owners.claim(&agent(number), &one).await.unwrap());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        let refused = owners.claim(&agent(MOST), &one).await.err().unwrap().to_string();
        assert!(refused.contains("has 1000 agents that were here in the last 2 hours"), "{refused}");
        // Another token has its own, and one that is known comes back whenever it likes.
        drop(owners.claim(&AgentId::new("another"), &other).await.unwrap());
        drop(owners.claim(&agent(1), &one).await.unwrap());

        tokio::time::advance(GONE).await;
        drop(owners.claim(&agent(2), &one).await.unwrap());
        let _new = owners.claim(&agent(MOST), &one).await.unwrap();
        // The first to go, of which two came back.
        for (number, known) in [(0, true), (1, true), (2, true), (3, false), (34, false), (35, true)] {
            assert_eq!(owners.check(&agent(number), &one).is_ok(), known, "{number}");
        }
        owners.check(&AgentId::new("other"), &other).unwrap();
        // And so after a restart, when each counts as seen at its start.
        drop(stays);
        let again = Owners::open(Store::lead(registry, "me").await.unwrap()).await.unwrap();
        for (number, known) in [(0, true), (3, false), (34, false), (35, true), (MOST, true)] {
            assert_eq!(again.check(&agent(number), &one).is_ok(), known, "{number}");
        }
    }
}
