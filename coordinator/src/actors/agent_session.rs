//! One agent's control stream. What the agent sends is acknowledged once it is durable: metrics in the history,
//! events in the trial's record. A message about an attempt that is not current is answered with a stop.

use super::directory::Directory;
use super::dispatcher::{Dispatcher, SessionId};
use super::message::{FromAgent, Numbered, Outbox, StopReason, ToAgent, TrialEvent, Unreachable};
use super::sweep::Standing;
use crate::error::{CoordinatorError, Result};
use crate::history::History;
use actor::{Gone, Scope};
use domain::AgentId;
use domain::fleet::Holding;
use domain::metric::MetricPoint;
use futures::{Stream, StreamExt};
use std::pin::pin;
use std::time::Duration;

/// What a session works with.
#[derive(Clone)]
pub struct Desk {
    /// The sweeps.
    pub directory: Directory,
    /// Leases and devices.
    pub dispatcher: Dispatcher,
    /// Metric history.
    pub history: History,
    /// Silence after which a stream counts as dead.
    pub lease: Duration,
}

/// Serves a stream from `Hello` to its end: the agent closes it, falls silent for a lease, opens another, says
/// what it must not, or `scope` is cancelled.
pub async fn serve(
    desk: Desk,
    incoming: impl Stream<Item = Result<FromAgent>>,
    outbox: Outbox,
    scope: Scope,
) {
    let mut incoming = pin!(incoming);
    let hello = tokio::select! {
        () = scope.cancelled() => return,
        hello = tokio::time::timeout(desk.lease, incoming.next()) => hello,
    };
    let (agent, holdings) = match hello {
        Ok(Some(Ok(FromAgent::Hello(agent, holdings)))) => (agent, holdings),
        Ok(Some(Err(error))) => return outbox.refuse(error),
        Ok(Some(Ok(_))) => return outbox.refuse(CoordinatorError::invalid("hello", "must come first")),
        Ok(None) | Err(_) => return,
    };
    let id = agent.id.clone();
    tracing::info!(agent = %id, holdings = holdings.len(), "connected");
    let Ok(session) = desk.dispatcher.connect(agent, holdings, outbox.clone()).await else { return };
    let talk = Session { desk: &desk, agent: &id, session, outbox: &outbox };
    let end = tokio::select! {
        () = scope.cancelled() => End::Closed,
        () = outbox.closed() => End::Closed,
        end = talk.talk(incoming) => end,
    };
    match end {
        End::Closed => tracing::info!(agent = %id, "disconnected"),
        End::Silent => tracing::warn!(agent = %id, "silent for a whole lease; closing its stream"),
        End::Replaced => tracing::info!(agent = %id, "its stream was replaced by a newer one"),
        End::Error(error) => {
            tracing::warn!(agent = %id, %error, "closing its stream");
            outbox.refuse(error);
        }
    }
    // A dispatcher that is gone knows no agents.
    let _ = desk.dispatcher.disconnect(id, session).await;
}

/// Why a session ended.
enum End {
    Closed,
    Silent,
    Replaced,
    Error(CoordinatorError),
}

impl From<Unreachable> for End {
    fn from(_: Unreachable) -> Self {
        Self::Closed
    }
}

impl From<Gone> for End {
    fn from(gone: Gone) -> Self {
        Self::Error(gone.into())
    }
}

struct Session<'a> {
    desk: &'a Desk,
    agent: &'a AgentId,
    session: SessionId,
    outbox: &'a Outbox,
}

impl Session<'_> {
    async fn talk(&self, mut incoming: impl Stream<Item = Result<FromAgent>> + Unpin) -> End {
        loop {
            match tokio::time::timeout(self.desk.lease, incoming.next()).await {
                Err(_) => return End::Silent,
                Ok(None) => return End::Closed,
                Ok(Some(Err(error))) => return End::Error(error),
                Ok(Some(Ok(message))) => {
                    if let Err(end) = self.hear(message).await {
                        return end;
                    }
                }
            }
        }
    }

    async fn hear(&self, message: FromAgent) -> std::result::Result<(), End> {
        match message {
            FromAgent::Hello(..) => {
                Err(End::Error(CoordinatorError::invalid("hello", "may come first only")))
            }
            FromAgent::Heartbeat { holdings, resident_bases } => {
                let beat = self.desk.dispatcher.heartbeat(self.agent, self.session, holdings, resident_bases);
                for Holding { trial, attempt, .. } in beat.await?.ok_or(End::Replaced)? {
                    self.outbox.send(ToAgent::Stop(trial, attempt, StopReason::Fenced))?;
                }
                Ok(())
            }
            FromAgent::Metrics(batch) => {
                let done = self.metrics(&batch).await;
                self.answer(batch, done)
            }
            FromAgent::Event(event) => {
                let done = self.event(&event).await;
                self.answer(event, done)
            }
        }
    }

    async fn metrics(&self, batch: &Numbered<Vec<MetricPoint>>) -> Result<()> {
        let Numbered { trial, attempt, body: points, .. } = batch;
        if self.desk.directory.standing(trial, *attempt).await? == Standing::Over {
            return Ok(());
        }
        self.desk.history.append(trial, *attempt, points.clone()).await?;
        self.desk.directory.metrics(trial, *attempt, points.clone()).await
    }

    async fn event(&self, event: &Numbered<TrialEvent>) -> Result<()> {
        self.desk.directory.event(&event.trial, event.attempt, event.body.clone()).await
    }

    /// Acknowledges what is durable; stops what is not current.
    fn answer<T>(&self, message: Numbered<T>, done: Result<()>) -> std::result::Result<(), End> {
        let Numbered { trial, attempt, sequence, .. } = message;
        match done {
            Ok(()) => self.outbox.send(ToAgent::Acknowledge(trial, attempt, sequence))?,
            Err(CoordinatorError::Fenced { .. } | CoordinatorError::NotFound { .. }) => {
                tracing::info!(agent = %self.agent, %trial, %attempt, "refusing an attempt that is not current");
                self.outbox.send(ToAgent::Stop(trial, attempt, StopReason::Fenced))?;
            }
            Err(error) => return Err(End::Error(error)),
        }
        Ok(())
    }
}
