//! Where the coordinator is: at an address, or wherever the fleet's leader is now.

use crate::AgentError;
use registry::{Leadership, RegistryError};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Endpoint;

/// The pause between signs of life of an idle connection, and the time to answer one.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The time in which a connection is made: a machine that is gone does not answer at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Where an agent's coordinator is.
#[derive(Clone)]
pub enum Coordinator {
    /// At an address, as `http://host:port`.
    At(String),
    /// Where the leader of a fleet's coordinators is.
    Leading(Arc<dyn Leadership>),
}

impl From<String> for Coordinator {
    fn from(endpoint: String) -> Self {
        Self::At(endpoint)
    }
}

/// Why nothing was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// There is a fleet, and at the moment nobody leads it.
    #[error("no coordinator leads")]
    Nobody,
    /// The registry does not say.
    #[error("it is not known who leads: {0}")]
    Registry(#[from] RegistryError),
    /// What the leader calls itself is no address.
    #[error("the leader's address is none: {0}")]
    Address(String),
}

/// Finds the coordinator.
#[derive(Clone)]
pub struct Finder(Where);

#[derive(Clone)]
enum Where {
    At(Box<Endpoint>),
    Leading(Arc<dyn Leadership>),
}

impl Finder {
    /// Finds that coordinator.
    ///
    /// # Errors
    /// The address cannot be read.
    pub fn new(coordinator: Coordinator) -> Result<Self, AgentError> {
        match coordinator {
            Coordinator::At(endpoint) => match at(&endpoint) {
                Ok(found) => Ok(Self(Where::At(Box::new(found)))),
                Err(problem) => Err(AgentError::Endpoint { endpoint, problem }),
            },
            Coordinator::Leading(leadership) => Ok(Self(Where::Leading(leadership))),
        }
    }

    /// Where the coordinator is now.
    ///
    /// # Errors
    /// It is not known.
    pub async fn find(&self) -> Result<Endpoint, FindError> {
        match &self.0 {
            Where::At(endpoint) => Ok(Endpoint::clone(endpoint)),
            Where::Leading(leadership) => {
                let leader = leadership.leader().await?.ok_or(FindError::Nobody)?;
                at(&leader).map_err(|problem| FindError::Address(format!("{leader}: {problem}")))
            }
        }
    }
}

fn at(address: &str) -> Result<Endpoint, String> {
    let endpoint = Endpoint::from_shared(address.to_string()).map_err(|error| error.to_string())?;
    Ok(endpoint
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}
