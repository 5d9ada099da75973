//! The session: one stream to the coordinator. While it is down, training goes on and the spool grows; when
//! it is up again, everything unacknowledged is sent again.

use super::device::{Command, Device, SHUTS_DOWN, Status};
use crate::beginning::Stopwatch;
use crate::engine::How;
use crate::find::{FindError, Finder};
use crate::home::Home;
use crate::spool::Spool;
use crate::transfer::Transfers;
use crate::wire::{self, Saying};
use crate::{Assignment, DeviceOptions, SHUTDOWN_GRACE};
use actor::Scope;
use domain::data::Reference;
use domain::fleet::Feature;
use domain::trial::{Failure, FailureClass};
use domain::{AgentId, DeviceId};
use prost::Message;
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;
use telemetry::grpc::Traced;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use v1::session_response::Message as Response;

/// Messages that may wait for the network.
const OUTGOING: usize = 32;
/// Messages of a trial that may be sent before the first of them is acknowledged.
const WINDOW: u64 = 64;
/// The coordinator's time to take the stream and to answer `Hello`.
const WELCOME_LIMIT: Duration = Duration::from_secs(10);
/// The pause before the first try to connect again; it doubles with each.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two tries to connect, and the parts of a lease that it is at most: who is away for longer loses
/// what it holds.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const PAUSES: u32 = 4;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("cannot connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] tonic::Status),
    #[error("the coordinator did not answer `Hello` with `Welcome`")]
    NoWelcome,
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("the spool: {0}")]
    Spool(#[from] std::io::Error),
}

/// Who the agent is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its id.
    pub id: AgentId,
    /// The machine's name.
    pub hostname: String,
    /// Its devices.
    pub devices: Vec<DeviceOptions>,
    /// What is said of it.
    pub labels: BTreeMap<String, String>,
    /// How long its first training step takes to come.
    pub stopwatch: Stopwatch,
}

/// The control stream's actor.
pub struct Session {
    identity: Identity,
    finder: Finder,
    transfers: Transfers,
    /// What trials will need that are not this agent's yet.
    ahead: watch::Sender<Vec<Reference>>,
    devices: Vec<Device>,
    spool: Spool,
    home: Home,
    pause: Duration,
    longest_pause: Duration,
    connected: watch::Sender<bool>,
}

impl Session {
    /// Starts the session's actor. When the scope is cancelled, it ends once the devices have ended and the
    /// spool is empty, or [`SHUTDOWN_GRACE`] is over. Answers with whether it is connected.
    pub fn start(
        identity: Identity,
        (finder, transfers, ahead): (Finder, Transfers, watch::Sender<Vec<Reference>>),
        devices: Vec<Device>,
        spool: Spool,
        home: Home,
        scope: &Scope,
    ) -> watch::Receiver<bool> {
        let over = over(scope.clone(), devices.iter().map(|d| d.status.clone()).collect(), spool.clone());
        let (connected, seen) = watch::channel(false);
        let session = Self {
            identity,
            finder,
            transfers,
            ahead,
            devices,
            spool,
            home,
            pause: SHORTEST_PAUSE,
            longest_pause: LONGEST_PAUSE,
            connected,
        };
        scope.spawn("session", async move {
            tokio::select! {
                never = session.run() => match never {},
                () = over => {}
            }
        });
        seen
    }

    async fn run(mut self) -> Infallible {
        loop {
            let Err(error) = self.serve().await;
            if let SessionError::Status(status) = &error {
                self.finder.refused(status);
            }
            let error = security::explain(&error).unwrap_or_else(|| error.to_string());
            self.connected.send_replace(false);
            telemetry::metrics::SESSIONS_LOST.add(1.0, &[]);
            tracing::warn!(%error, pause = ?self.pause, "not connected to the coordinator; training goes on");
            tokio::time::sleep(jittered(self.pause)).await;
            self.pause = (self.pause * 2).min(self.longest_pause);
        }
    }

    /// One connection, from `Hello` to its end.
    async fn serve(&mut self) -> Result<Infallible, SessionError> {
        let endpoint = self.finder.find().await?;
        self.transfers.follow(endpoint.uri());
        let line = self.finder.line(endpoint.connect().await?).map_err(FindError::from)?;
        let mut client = AgentServiceClient::new(Traced::client(line, endpoint.uri()));
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        // There is room: the channel is new.
        let _ = outgoing.try_send(self.hello());
        let opened = async {
            let mut incoming = client.session(ReceiverStream::new(requests)).await?.into_inner();
            let first = incoming.message().await?;
            Ok::<_, tonic::Status>((first, incoming))
        };
        let opened = tokio::time::timeout(WELCOME_LIMIT, opened).await;
        let (first, incoming) = opened.map_err(|_| SessionError::NoWelcome)??;
        let Some(v1::SessionResponse { message: Some(Response::Welcome(welcome)) }) = first else {
            return Err(SessionError::NoWelcome);
        };
        tracing::info!(version = welcome.version, "connected to the coordinator");
        self.finder.welcomed();
        self.pause = SHORTEST_PAUSE;
        self.longest_pause = longest_pause(welcome.lease_seconds);
        self.identity.stopwatch.joined();
        self.connected.send_replace(true);
        for old in welcome.drop {
            self.drop_assignment(&wire::held(old)).await;
        }

        let interval = heartbeat_interval(welcome.heartbeat_seconds);
        let understands = Feature::known(&welcome.understands);
        // A sign of life waits for no disk, whatever else does.
        tokio::select! {
            ended = self.beat(interval, &outgoing) => ended,
            ended = self.talk(incoming, &outgoing, &understands) => ended,
        }
    }

    /// Says what is held, again and again.
    async fn beat(
        &self,
        interval: Duration,
        outgoing: &mpsc::Sender<v1::SessionRequest>,
    ) -> Result<Infallible, SessionError> {
        let mut heartbeat = tokio::time::interval(interval);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            heartbeat.tick().await;
            let permit = outgoing.reserve().await.map_err(|_| SessionError::Closed)?;
            permit.send(self.heartbeat());
        }
    }

    /// Sends what is spooled, and does what is told.
    async fn talk(
        &self,
        mut incoming: Streaming<v1::SessionResponse>,
        outgoing: &mpsc::Sender<v1::SessionRequest>,
        understands: &BTreeSet<Feature>,
    ) -> Result<Infallible, SessionError> {
        let mut changes = self.spool.changes();
        let mut sent = BTreeMap::new();
        let mut next = None;
        loop {
            if next.is_none() {
                changes.mark_unchanged();
                next = self.unsent(&mut sent, understands).await?;
            }
            tokio::select! {
                permit = outgoing.reserve(), if next.is_some() => {
                    let permit = permit.map_err(|_| SessionError::Closed)?;
                    if let Some(message) = next.take() {
                        permit.send(message);
                    }
                }
                message = incoming.message() => match message?.ok_or(SessionError::Closed)?.message {
                    Some(message) => self.hear(message).await?,
                    None => tracing::warn!("the coordinator said something that this version does not know"),
                },
                _ = changes.changed(), if next.is_none() => {}
            }
        }
    }

    fn statuses(&self) -> Vec<(&DeviceId, Status)> {
        self.devices.iter().map(|device| (&device.id, device.status.borrow().clone())).collect()
    }

    /// What the devices hold, and what is held only by words that are not acknowledged yet.
    fn holdings(&self, statuses: &[(&DeviceId, Status)]) -> Vec<v1::Holding> {
        let spooled = self.spool.holdings().into_iter().map(|(assignment, held)| (assignment, (0, held)));
        let mut holdings: BTreeMap<_, _> = spooled.collect();
        let held = statuses.iter().flat_map(|(_, status)| status.holdings.clone());
        holdings.extend(held.map(|(assignment, step, since)| (assignment, (step, Some(since.elapsed())))));
        holdings.iter().map(|(assignment, (step, held))| wire::holding(assignment, *step, *held)).collect()
    }

    fn hello(&self) -> v1::SessionRequest {
        let statuses = self.statuses();
        let resident = |id: &DeviceId| {
            statuses
                .iter()
                .find(|(other, _)| *other == id)
                .and_then(|(_, status)| status.resident_base.clone())
        };
        let devices = self.identity.devices.iter().map(|d| wire::device(d, resident(&d.id))).collect();
        let agent = v1::Agent {
            id: self.identity.id.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            hostname: self.identity.hostname.clone(),
            devices,
            labels: self.identity.labels.clone().into_iter().collect(),
            understands: proto::convert::understood(Feature::OF_AGENTS),
            ..v1::Agent::default()
        };
        wire::hello(agent, self.holdings(&statuses))
    }

    fn heartbeat(&self) -> v1::SessionRequest {
        let statuses = self.statuses();
        wire::heartbeat(
            self.holdings(&statuses),
            self.identity.stopwatch.read(),
            statuses.iter().map(|(id, status)| (*id, status)),
        )
    }

    /// The next message of the spool, noted as sent on this connection, to a coordinator that understands so much.
    async fn unsent(
        &self,
        sent: &mut BTreeMap<Assignment, u64>,
        understands: &BTreeSet<Feature>,
    ) -> Result<Option<v1::SessionRequest>, SessionError> {
        let of_connection = sent.clone();
        let next = self.spool.aside(move |spool| spool.next(&of_connection, WINDOW)).await?;
        let Some(unsent) = next else { return Ok(None) };
        sent.insert(unsent.assignment, unsent.sequence);
        let message = v1::SessionRequest::decode(unsent.payload.as_slice());
        Ok(Some(wire::understandable(message.map_err(std::io::Error::other)?, understands)))
    }

    async fn hear(&self, message: Response) -> Result<(), SessionError> {
        match message {
            Response::Welcome(_) => {}
            Response::Assign(assign) => self.assign(assign).await?,
            Response::Stop(stop) => {
                let how = wire::how(stop.reason());
                let assignment = Assignment::new(stop.trial_id, stop.attempt);
                match how {
                    How::Drop => self.drop_assignment(&assignment).await,
                    How::Stop | How::Release => self.tell_all(&assignment, how).await,
                }
            }
            Response::Prefetch(prefetch) => {
                // What cannot be read is no more than not fetched ahead.
                let data = prefetch.data.iter().filter_map(|name| name.parse().ok()).collect();
                self.ahead.send_replace(data);
            }
            Response::Acknowledge(ack) => {
                let assignment = Assignment::new(ack.trial_id, ack.attempt);
                let of = assignment.clone();
                if self.spool.aside(move |spool| spool.acknowledge(&of, ack.sequence)).await? {
                    self.home.remove_work_dir(&assignment);
                }
            }
        }
        Ok(())
    }

    async fn assign(&self, assign: v1::Assign) -> Result<(), SessionError> {
        let (assignment, device_id, command) = wire::assign(assign);
        let device = self.devices.iter().find(|device| device.id == device_id);
        let said = match (device, command) {
            (Some(device), Ok(assign)) => {
                if device.mailbox.tell(Command::Assign(Box::new(assign))).await.is_ok() {
                    return Ok(());
                }
                // The agent shuts down, and that device has nothing left to give back.
                Saying::Released { reason: SHUTS_DOWN.into() }
            }
            (None, _) => Saying::Failed(Failure {
                class: FailureClass::Infrastructure,
                message: format!("agent {} has no device {device_id}", self.identity.id),
            }),
            (_, Err(error)) => {
                Saying::Failed(Failure { class: FailureClass::User, message: error.to_string() })
            }
        };
        let known = self.spool.assignments().contains(&assignment);
        if !known {
            let encode = move |of: &Assignment, n| said.request(of, n).encode_to_vec();
            let append = move |spool: &Spool| spool.append(&assignment, true, |n| encode(&assignment, n));
            self.spool.aside(append).await?;
        }
        Ok(())
    }

    async fn tell_all(&self, assignment: &Assignment, how: How) {
        for device in &self.devices {
            let _ = device.mailbox.tell(Command::Stop(assignment.clone(), how)).await;
        }
    }

    /// Drops what is not current: from the devices, and what the spool still has to say of it.
    async fn drop_assignment(&self, assignment: &Assignment) {
        self.tell_all(assignment, How::Drop).await;
        let of = assignment.clone();
        if self.spool.aside(move |spool| Ok(spool.forget(&of))).await.unwrap_or(false) {
            // Its device had let go of it.
            self.home.remove_work_dir(assignment);
        }
    }
}

/// Between half of a pause and all of it, so that a fleet that lost its coordinator does not come back all at once.
fn jittered(pause: Duration) -> Duration {
    let [random, ..] = uuid::Uuid::new_v4().into_bytes();
    pause.mul_f64(0.5 + 0.5 * f64::from(random) / 255.0)
}

/// The coordinator's wish, kept within what makes sense.
fn heartbeat_interval(seconds: f64) -> Duration {
    let seconds = if seconds.is_finite() { seconds.clamp(0.01, 60.0) } else { 1.0 };
    Duration::from_secs_f64(seconds)
}

/// The longest pause between two tries to connect, of whoever has leases of that length.
fn longest_pause(lease_seconds: f64) -> Duration {
    let lease = Duration::try_from_secs_f64(lease_seconds).ok().filter(|lease| !lease.is_zero());
    lease.map_or(LONGEST_PAUSE, |lease| (lease / PAUSES).clamp(SHORTEST_PAUSE, LONGEST_PAUSE))
}

/// Returns when the agent is told to end and has nothing left to say, or the grace is over.
async fn over(scope: Scope, devices: Vec<watch::Receiver<Status>>, spool: Spool) {
    scope.cancelled().await;
    let said = async {
        for mut device in devices {
            while device.changed().await.is_ok() {}
        }
        spool.drained().await;
    };
    if tokio::time::timeout(SHUTDOWN_GRACE, said).await.is_err() {
        tracing::warn!("the coordinator has not acknowledged everything; the rest is sent at the next start");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_short_leases_is_not_away_for_long() {
        for (lease, wanted) in
            [(10.0, 2.5), (3.0, 0.75), (60.0, 5.0), (0.1, 0.1), (0.0, 5.0), (f64::NAN, 5.0)]
        {
            assert_eq!(longest_pause(lease).as_secs_f64(), wanted, "{lease}");
        }
    }
}
