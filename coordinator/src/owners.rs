//! Which token an agent belongs to: the first that it came with. Another token cannot speak for it, and so neither
//! report on its trials nor read or write their checkpoints.
//!
//! An agent that comes without a token, to a server that asks for none, belongs to nobody.

use crate::access::Caller;
use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Owner, Store};
use domain::AgentId;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Mutex;

/// Agents that a token may have had at most. Each start on an empty folder is another one.
const MOST: usize = 1000;

/// Who owns which agent. Clones share it.
#[derive(Clone)]
pub struct Owners {
    store: Store,
    known: Arc<Mutex<HashMap<AgentId, String>>>,
}

impl Owners {
    /// Reads what is kept.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn open(store: Store) -> Result<Self> {
        let known = store.owners().await?.into_iter().map(|Owner { agent, token }| (agent, token)).collect();
        Ok(Self { store, known: Arc::new(Mutex::new(known)) })
    }

    /// Takes an agent for the caller's. Durable when it returns.
    ///
    /// # Errors
    /// It is another's, who has a token still, or it cannot be written.
    pub async fn claim(&self, agent: &AgentId, caller: &Caller) -> Result<()> {
        let Some(name) = caller.name() else { return Ok(()) };
        // Held while it is written, so that of two who come at once one is the first.
        let mut known = self.known.lock().await;
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
        let mut batch = Batch::default();
        batch.own(&Owner { agent: agent.clone(), token: name.into() });
        self.store.commit(batch).await?;
        known.insert(agent.clone(), name.into());
        Ok(())
    }

    /// Refuses a caller who is not the one that an agent belongs to.
    ///
    /// # Errors
    /// It is another's.
    pub async fn check(&self, agent: &AgentId, caller: &Caller) -> Result<()> {
        let Some(name) = caller.name() else { return Ok(()) };
        match self.known.lock().await.get(agent) {
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
