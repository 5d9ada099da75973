//! Where the coordinator is: at an address, or wherever the fleet's leader is now.

use crate::AgentError;
use registry::{Leadership, RegistryError};
use security::client::{AddressError, Token};
use security::{Client, Line};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// The pause between signs of life of an idle connection, and the time to answer one.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The time in which a connection is made: a machine that is gone does not answer at all.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Where an agent's coordinator is, and how it is talked to.
#[derive(Clone)]
pub struct Coordinator {
    place: Place,
    client: Client,
}

#[derive(Clone)]
enum Place {
    /// At an address, as `https://host:port`.
    At(String),
    /// Where the leader of a fleet's coordinators is.
    Leading(Arc<dyn Leadership>),
}

impl From<String> for Coordinator {
    fn from(address: String) -> Self {
        Self { place: Place::At(address), client: Client::default() }
    }
}

impl Coordinator {
    /// The one that leads a fleet.
    pub fn leading(leadership: Arc<dyn Leadership>) -> Self {
        Self { place: Place::Leading(leadership), client: Client::default() }
    }

    /// The same, talked to with these certificates.
    pub fn with(self, client: Client) -> Self {
        Self { client, ..self }
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
    /// It cannot be connected to.
    #[error(transparent)]
    Address(#[from] AddressError),
}

/// Finds the coordinator.
#[derive(Clone)]
pub struct Finder(Coordinator);

impl Finder {
    /// Finds that coordinator.
    ///
    /// # Errors
    /// The address, or a file that belongs to it, cannot be read.
    pub fn new(coordinator: Coordinator) -> Result<Self, AgentError> {
        if let Place::At(address) = &coordinator.place {
            at(address, &coordinator.client)?;
        }
        Ok(Self(coordinator))
    }

    /// Where the coordinator is now. Certificates are read anew.
    ///
    /// # Errors
    /// It is not known, or cannot be connected to.
    pub async fn find(&self) -> Result<Endpoint, FindError> {
        let address = match &self.0.place {
            Place::At(address) => address.clone(),
            Place::Leading(leadership) => leadership.leader().await?.ok_or(FindError::Nobody)?,
        };
        Ok(at(&address, &self.0.client)?)
    }

    /// Calls over a connection to it, with the agent's token.
    ///
    /// # Errors
    /// The token's file cannot be read.
    pub fn line(&self, channel: Channel) -> Result<Line, AddressError> {
        // It may be another than at the last connection, and no log may show it.
        let token = self.0.client.secret()?;
        if let Some(token) = &token {
            telemetry::secrets::keep(token.expose());
        }
        Client { token: token.map(Token::Given), ..self.0.client.clone() }.line(channel)
    }

    /// The same coordinator once more, by another connection with certificates that are read anew.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn again(&self, coordinator: &Uri) -> Result<Endpoint, AddressError> {
        at(&coordinator.to_string(), &self.0.client)
    }
}

fn at(address: &str, client: &Client) -> Result<Endpoint, AddressError> {
    let endpoint = client.endpoint(address)?;
    Ok(endpoint
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}
