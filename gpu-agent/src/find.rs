//! Where the coordinator is: at an address, or wherever the fleet's leader is now. A coordinator at an address that stands by
//! names the leader, and is followed there.

use crate::AgentError;
use proto::status::{LEADER, STANDBY_REASON};
use registry::{Leadership, RegistryError};
use security::client::{AddressError, Token};
use security::{Client, Line};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_types::StatusExt;

/// Silence after which a sign of life is asked of the other side, and the time to answer that. Together they are less than the
/// lease of trials that coordinators give unless told otherwise: whose coordinator stands still has to notice, and be at the
/// next one before its lease there ends.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(4);
/// The same of a connection over which checkpoints are uploaded.
const KEEP_ALIVE_OF_UPLOADS: Duration = Duration::from_secs(10);
const ANSWER_OF_UPLOADS: Duration = Duration::from_secs(20);
/// How long etcd is waited for where it is known who led last.
const ASKING: Duration = Duration::from_secs(3);
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

/// Finds the coordinator. Clones remember the same.
#[derive(Clone)]
pub struct Finder {
    coordinator: Coordinator,
    /// The leader that was found, or named, last.
    last: Arc<Mutex<Option<String>>>,
    /// Whether the last that was tried is the leader which a coordinator at an address named.
    followed: Arc<AtomicBool>,
}

impl Finder {
    /// Finds that coordinator.
    ///
    /// # Errors
    /// The address, or a file that belongs to it, cannot be read.
    pub fn new(coordinator: Coordinator) -> Result<Self, AgentError> {
        if let Place::At(address) = &coordinator.place {
            at(address, &coordinator.client)?;
        }
        Ok(Self { coordinator, last: Arc::default(), followed: Arc::default() })
    }

    fn last(&self) -> MutexGuard<'_, Option<String>> {
        // Nothing that can panic is done while it is held.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the leader is. While etcd does not say, it may be where it was: one that leads no more says so.
    async fn leading(&self, leadership: &dyn Leadership) -> Result<String, FindError> {
        let last = self.last().clone();
        let found = match last {
            None => leadership.leader().await,
            Some(last) => match timeout(ASKING, leadership.leader()).await {
                Ok(Ok(found)) => Ok(found),
                Ok(Err(error)) => {
                    tracing::warn!(%error, last, "it is not known who leads; trying the one that led last");
                    return Ok(last);
                }
                Err(_) => {
                    tracing::warn!(last, "etcd does not say who leads; trying the one that led last");
                    return Ok(last);
                }
            },
        };
        let leader = found?.ok_or(FindError::Nobody)?;
        *self.last() = Some(leader.clone());
        Ok(leader)
    }

    /// A coordinator did not take the agent in. If it stands by and names the leader, that is tried next.
    pub fn refused(&self, status: &Status) {
        let Place::At(_) = &self.coordinator.place else { return };
        let details = status.get_details_error_info().filter(|info| info.reason == STANDBY_REASON);
        let Some(leader) = details.and_then(|mut info| info.metadata.remove(LEADER)) else { return };
        match at(&leader, &self.coordinator.client) {
            Ok(_) => {
                tracing::info!(leader, "this coordinator stands by; trying the one that leads");
                *self.last() = Some(leader);
                self.followed.store(false, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::warn!(leader, %error, "the leader that a coordinator names cannot be connected to")
            }
        }
    }

    /// The one that was found last took the agent in: if that ends, it is the first to be tried again.
    pub fn welcomed(&self) {
        self.followed.store(false, Ordering::Relaxed);
    }

    /// The leader that was named and the address that was given, in turn.
    fn next(&self, address: &str) -> String {
        let named = self.last().clone().filter(|_| !self.followed.load(Ordering::Relaxed));
        self.followed.store(named.is_some(), Ordering::Relaxed);
        named.unwrap_or_else(|| address.into())
    }

    /// Where the coordinator is now. Certificates are read anew.
    ///
    /// # Errors
    /// It is not known, or cannot be connected to.
    pub async fn find(&self) -> Result<Endpoint, FindError> {
        let address = match &self.coordinator.place {
            Place::At(address) => self.next(address),
            Place::Leading(leadership) => self.leading(&**leadership).await?,
        };
        Ok(at(&address, &self.coordinator.client)?)
    }

    /// Calls over a connection to it, with the agent's token.
    ///
    /// # Errors
    /// The token's file cannot be read.
    pub fn line(&self, channel: Channel) -> Result<Line, AddressError> {
        // It may be another than at the last connection, and no log may show it.
        let client = &self.coordinator.client;
        let token = client.secret()?;
        if let Some(token) = &token {
            telemetry::secrets::keep(token.expose());
        }
        Client { token: token.map(Token::Given), ..client.clone() }.line(channel)
    }

    /// The same coordinator once more, by another connection with certificates that are read anew.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn again(&self, coordinator: &Uri) -> Result<Endpoint, AddressError> {
        let endpoint = at(&coordinator.to_string(), &self.coordinator.client)?;
        // What is asked waits behind what is uploaded, on a narrow line for long.
        Ok(endpoint.http2_keep_alive_interval(KEEP_ALIVE_OF_UPLOADS).keep_alive_timeout(ANSWER_OF_UPLOADS))
    }
}

fn at(address: &str, client: &Client) -> Result<Endpoint, AddressError> {
    let endpoint = client.endpoint(address)?;
    Ok(endpoint
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(ANSWER)
        .keep_alive_while_idle(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::{BoxFuture, FutureExt};
    use proto::status::RpcError;
    use registry::{Member, Result};

    /// Says what it is told to say; nothing at all while it is told nothing.
    #[derive(Default)]
    struct Said(Mutex<Option<Result<Option<String>>>>);

    impl Leadership for Said {
        fn leader(&self) -> BoxFuture<'_, Result<Option<String>>> {
            let said = self.0.lock().unwrap().clone();
            async move {
                match said {
                    Some(said) => said,
                    None => std::future::pending().await,
                }
            }
            .boxed()
        }

        fn members(&self) -> BoxFuture<'_, Result<Vec<Member>>> {
            std::future::ready(Ok(Vec::new())).boxed()
        }
    }

    /// What a session made of the address that was found.
    enum Met {
        Nobody,
        Welcome,
        StandsBy(Option<&'static str>),
    }

    #[tokio::test]
    async fn who_stands_by_names_the_leader() {
        use Met::{Nobody, StandsBy, Welcome};
        let finder = Finder::new(Coordinator::from("http://127.0.0.1:1".to_string())).unwrap();
        for (i, (port, met)) in [
            (1, StandsBy(None)),
            (1, StandsBy(Some("http://127.0.0.1:2"))),
            (2, Welcome),
            // Its connection broke; now it is gone, and so is the first, for a while.
            (2, Nobody),
            (1, Nobody),
            (2, Nobody),
            (1, StandsBy(Some("http://127.0.0.1:3"))),
            (3, StandsBy(Some("http://127.0.0.1:4"))),
            (4, Welcome),
            // No address, and one that needs what this agent has not.
            (4, StandsBy(Some("nowhere at all"))),
            (1, Welcome),
            (4, Nobody),
            (1, Welcome),
        ]
        .into_iter()
        .enumerate()
        {
            let found = finder.clone().find().await.unwrap();
            assert_eq!(found.uri().port_u16(), Some(port), "{i}");
            match met {
                Nobody => finder.refused(&Status::unavailable("nobody")),
                Welcome => finder.welcomed(),
                StandsBy(leader) => {
                    finder.refused(&RpcError::Standby(Ok(leader.map(String::from))).into());
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_is_remembered_while_etcd_is_away() {
        let said = Arc::new(Said::default());
        let finder = Finder::new(Coordinator::leading(said.clone())).unwrap();
        let away = || Some(Err(RegistryError::Unavailable("away".into())));
        let leads = |port: u16| Some(Ok(Some(format!("http://127.0.0.1:{port}"))));
        for (what, says, port) in [
            ("nobody was found yet", away(), Err("it is not known who leads: away")),
            ("the first", leads(1), Ok(1)),
            ("it refuses", away(), Ok(1)),
            ("it says nothing", None, Ok(1)),
            ("nobody leads", Some(Ok(None)), Err("no coordinator leads")),
            ("another", leads(2), Ok(2)),
            ("it refuses again", away(), Ok(2)),
        ] {
            *said.0.lock().unwrap() = says;
            let found = finder.clone().find().await;
            let found = found.map(|endpoint| endpoint.uri().port_u16().unwrap());
            assert_eq!(found.map_err(|error| error.to_string()), port.map_err(String::from), "{what}");
        }
    }
}
