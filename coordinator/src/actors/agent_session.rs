//! One agent's control stream. What the agent sends is acknowledged once it is durable: metrics in the history,
//! events in the trial's record. A message about an attempt that is not current is answered with a stop.
//!
//! Trials do not wait for each other: each has a lane, in which its messages are taken in order, one at a time,
//! and metrics that wait there are taken together. Signs of life wait for nobody, so that leases outlast a disk
//! that is slow or full.

use super::directory::Directory;
use super::dispatcher::{Dispatcher, SessionId};
use super::message::{FromAgent, Numbered, Outbox, StopReason, ToAgent, TrialEvent, Unreachable};
use super::sweep::Standing;
use crate::access::Caller;
use crate::artifacts::Artifacts;
use crate::error::{CoordinatorError, Result};
use crate::history::History;
use crate::owners::Owners;
use crate::trouble::{RETRY, Storage, Trouble};
use crate::uploads::Uploads;
use actor::{Gone, Scope};
use domain::fleet::{Beginning, Holding};
use domain::metric::MetricPoint;
use domain::trial::ItemScores;
use domain::{AgentId, Attempt, DeviceId, TrialId};
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt};
use proto::limits;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::time::Duration;
use tokio::time::Instant;

/// What a session works with.
#[derive(Clone)]
pub struct Desk {
    /// The sweeps.
    pub directory: Directory,
    /// Leases and devices.
    pub dispatcher: Dispatcher,
    /// Metric history.
    pub history: History,
    /// What lies in the object store.
    pub artifacts: Artifacts,
    /// Which token an agent belongs to.
    pub owners: Owners,
    /// For whom data was uploaded.
    pub uploads: Uploads,
    /// What cannot be written now.
    pub trouble: Trouble,
    /// Silence after which a stream counts as dead.
    pub lease: Duration,
}

impl Desk {
    /// Removes what was stored for a trial and came too late for its record, so that no record can come to point at it. One
    /// may already, if the same was stored before: the durable one says so, of which nobody knows here how far it is behind.
    pub async fn discard(&self, trial: &TrialId, paths: impl IntoIterator<Item = String>) {
        let used = match self.directory.store().trial(trial).await {
            Ok(record) => record.map(|record| record.paths()).unwrap_or_default(),
            // It goes at the next start.
            Err(error) => return tracing::warn!(%trial, %error, "what no record names stays for now"),
        };
        self.artifacts.discard(trial, paths.into_iter().filter(|path| !used.contains(path))).await;
    }
}

/// Messages of one agent, each with its points and their values, that may wait before its stream is not read on: some
/// tens of MB.
const MOST_WAITING: usize = 1 << 18;

/// Serves a stream from `Hello` to its end: the agent closes it, falls silent for a lease, opens another, says
/// what it must not, or `scope` is cancelled.
pub async fn serve(
    desk: Desk,
    incoming: impl Stream<Item = Result<FromAgent>>,
    outbox: Outbox,
    caller: Caller,
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
    let _stay = match desk.owners.claim(&id, &caller).await {
        Ok(stay) => stay,
        Err(error) => {
            tracing::warn!(agent = %id, %error, "not let in");
            return outbox.refuse(error);
        }
    };
    tracing::info!(agent = %id, holdings = holdings.len(), "connected");
    let Ok(session) = desk.dispatcher.connect(agent, holdings, outbox.clone()).await else { return };
    let talk = Session { desk: &desk, agent: &id, session, outbox: &outbox };
    let end = tokio::select! {
        biased;
        () = scope.cancelled() => End::Closed,
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
        let mut lanes = Lanes::default();
        let mut working = FuturesUnordered::new();
        let mut silent_at = Instant::now() + self.desk.lease;
        let end = loop {
            let has_room = lanes.waiting < MOST_WAITING;
            // In this order: what comes is heard before answers are given, until there is no room for more.
            tokio::select! {
                biased;
                () = self.outbox.closed() => break End::Closed,
                message = incoming.next(), if has_room => {
                    silent_at = Instant::now() + self.desk.lease;
                    let next = match message {
                        None => break End::Closed,
                        Some(Err(error)) => break End::Error(error),
                        Some(Ok(FromAgent::Hello(..))) => {
                            break End::Error(CoordinatorError::invalid("hello", "may come first only"));
                        }
                        Some(Ok(FromAgent::Heartbeat { holdings, resident_bases, beginning })) => {
                            match self.heartbeat(holdings, resident_bases, beginning).await {
                                Ok(()) => None,
                                Err(end) => break end,
                            }
                        }
                        Some(Ok(FromAgent::Metrics(batch))) => lanes.add(batch.map(Body::Metrics)),
                        Some(Ok(FromAgent::Event(event))) => lanes.add(event.map(|e| Body::Event(Box::new(e)))),
                    };
                    working.extend(next.map(|next| self.work(next)));
                }
                Some((message, done)) = working.next() => {
                    let next = lanes.next(&message);
                    if let Err(end) = self.answer(message, done) {
                        break end;
                    }
                    working.extend(next.map(|next| self.work(next)));
                }
                () = tokio::time::sleep_until(silent_at), if has_room => break End::Silent,
            }
        };
        // Points may be durable by now, or become so: their trial's record must hear of them, whoever still listens.
        while working.next().await.is_some() {}
        end
    }

    async fn heartbeat(
        &self,
        holdings: Vec<Holding>,
        resident_bases: HashMap<DeviceId, String>,
        beginning: Beginning,
    ) -> std::result::Result<(), End> {
        let desk = &self.desk.dispatcher;
        let beat = desk.heartbeat(self.agent, self.session, holdings, resident_bases, beginning);
        for Holding { trial, attempt, .. } in beat.await?.ok_or(End::Replaced)? {
            self.outbox.send(ToAgent::Stop(trial, attempt, StopReason::Fenced))?;
        }
        Ok(())
    }

    /// Takes one message to where it is durable.
    async fn work(&self, message: Numbered<Body>) -> (Numbered<()>, Result<()>) {
        let Numbered { trial, attempt, sequence, body } = message;
        let done = match body {
            Body::Metrics(points) => self.metrics(&trial, attempt, points).await,
            Body::Event(event) => self.event(&trial, attempt, *event).await,
        };
        (Numbered { trial, attempt, sequence, body: () }, done)
    }

    async fn metrics(&self, trial: &TrialId, attempt: Attempt, points: Vec<MetricPoint>) -> Result<()> {
        loop {
            // The attempt may be current and another agent's. What is over here had its points before, or is over without them:
            // while a disk refuses them, a lease may end. So it is asked before each try.
            match self.desk.directory.standing(trial, attempt, Some(self.agent)).await? {
                Standing::Over => return Ok(()),
                Standing::Current { steps } => self.admissible(trial, attempt, &points, steps)?,
            }
            match self.desk.history.append(trial, attempt, points.clone()).await {
                Ok(_) => break,
                Err(error) if !error.is_storage() => return Err(error.into()),
                Err(error) => self.desk.trouble.failed(Storage::History, &error),
            }
            tokio::time::sleep(RETRY).await;
        }
        self.desk.trouble.succeeded(Storage::History);
        self.desk.directory.metrics(trial, attempt, points).await
    }

    /// Refuses what no trial has, so that one agent cannot fill the memory in which curves lie: points of steps that its trial
    /// does not make, and names without end. What is measured once all steps are made may be told of the step after the last.
    fn admissible(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        points: &[MetricPoint],
        steps: Option<u64>,
    ) -> Result<()> {
        let most = steps.map_or(limits::STEPS, |steps| steps.min(limits::STEPS)).saturating_add(1);
        if let Some(point) = points.iter().find(|point| point.step > most) {
            let what = format!("is {}; trial {trial} makes {} steps", point.step, most - 1);
            return Err(CoordinatorError::invalid("metrics.points.step", what));
        }
        let (kinds, most) = (self.desk.history.kinds(trial, attempt, points), limits::KINDS_OF_POINTS);
        if kinds > most {
            let what = format!("make {kinds} different sets of names for trial {trial}, above {most}");
            return Err(CoordinatorError::invalid("metrics.points.values.name", what));
        }
        Ok(())
    }

    /// Takes an event to the trial's record, and what it says of single documents to where the record points then.
    async fn event(&self, trial: &TrialId, attempt: Attempt, mut event: TrialEvent) -> Result<()> {
        let mut kept = None;
        if let TrialEvent::Finished { summary, .. } = &mut event {
            let items = std::mem::take(&mut summary.item_scores);
            if !items.is_empty() {
                kept = self.keep(trial, attempt, summary.steps, &items).await?;
                summary.items.clone_from(&kept);
            }
        }
        let done = self.desk.directory.event(trial, attempt, self.agent, event).await;
        // While it was kept the attempt may have ended, or been heard of already: then the event is taken as a repetition.
        if kept.is_some()
            && let Ok(()) | Err(CoordinatorError::Fenced { .. } | CoordinatorError::NotFound { .. }) = &done
        {
            self.desk.discard(trial, kept).await;
        }
        done
    }

    /// Where what single documents made of a trial is kept; nothing of one that is over. What cannot be kept for another
    /// reason than the store's is no reason to lose the trial.
    async fn keep(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        step: u64,
        items: &[ItemScores],
    ) -> Result<Option<String>> {
        loop {
            if self.desk.directory.standing(trial, attempt, Some(self.agent)).await? == Standing::Over {
                return Ok(None);
            }
            let kept = self.desk.artifacts.keep_items(trial, attempt, step, items).await;
            match kept.map_err(CoordinatorError::from) {
                Ok(path) => {
                    self.desk.trouble.succeeded(Storage::Artifacts);
                    return Ok(Some(path));
                }
                Err(error) if error.is_storage() => self.desk.trouble.failed(Storage::Artifacts, &error),
                Err(error) => {
                    tracing::warn!(%trial, %error, "what single documents made of it is not kept");
                    return Ok(None);
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Acknowledges what is durable; stops what is not current.
    fn answer(&self, message: Numbered<()>, done: Result<()>) -> std::result::Result<(), End> {
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

/// What a message about a trial says.
enum Body {
    Metrics(Vec<MetricPoint>),
    Event(Box<TrialEvent>),
}

impl Body {
    /// How much it holds: itself, its points and their values, or its documents' scores, of which 64 are as much as one.
    fn weight(&self) -> usize {
        match self {
            Self::Metrics(points) => weight(points),
            Self::Event(event) => match event.as_ref() {
                TrialEvent::Finished { summary, .. } => {
                    1 + summary.item_scores.iter().map(ItemScores::bytes).sum::<usize>() / 64
                }
                _ => 1,
            },
        }
    }
}

/// That of a message with these points.
fn weight(points: &[MetricPoint]) -> usize {
    1 + points.iter().map(|point| 1 + point.values.len()).sum::<usize>()
}

/// The messages that wait for an earlier one of their trial. A lane is there while one of its messages is being
/// taken.
#[derive(Default)]
struct Lanes {
    lanes: HashMap<TrialId, Lane>,
    /// The weight of what is not answered yet.
    waiting: usize,
}

/// A trial's messages.
#[derive(Default)]
struct Lane {
    /// The weight of what was taken.
    taken: usize,
    waiting: VecDeque<Numbered<Body>>,
}

impl Lanes {
    /// Takes a message in; it comes back at once if nothing of its trial is before it.
    fn add(&mut self, message: Numbered<Body>) -> Option<Numbered<Body>> {
        let weight = message.body.weight();
        self.waiting += weight;
        match self.lanes.entry(message.trial.clone()) {
            Entry::Vacant(lane) => {
                lane.insert(Lane { taken: weight, waiting: VecDeque::new() });
                Some(message)
            }
            Entry::Occupied(mut lane) => {
                lane.get_mut().waiting.push_back(message);
                None
            }
        }
    }

    /// What comes after a message that was taken: the metrics that wait next together, or one event.
    fn next(&mut self, taken: &Numbered<()>) -> Option<Numbered<Body>> {
        let lane = self.lanes.get_mut(&taken.trial)?;
        self.waiting -= std::mem::take(&mut lane.taken);
        let Some(mut first) = lane.waiting.pop_front() else {
            self.lanes.remove(&taken.trial);
            return None;
        };
        lane.taken = first.body.weight();
        while let Body::Metrics(points) = &mut first.body
            && let Some(Numbered { attempt, sequence, body: Body::Metrics(more), .. }) =
                lane.waiting.front_mut()
            && *attempt == first.attempt
        {
            lane.taken += weight(more);
            points.append(more);
            first.sequence = *sequence;
            lane.waiting.pop_front();
        }
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Timestamp;

    fn metrics(trial: &str, attempt: u32, sequence: u64) -> Numbered<Body> {
        let point = MetricPoint { step: sequence, time: Timestamp(0), values: Vec::new() };
        let body = Body::Metrics(vec![point]);
        Numbered { trial: TrialId::new(trial), attempt: Attempt(attempt), sequence, body }
    }

    fn event(trial: &str, attempt: u32, sequence: u64) -> Numbered<Body> {
        Numbered { body: Body::Event(Box::new(TrialEvent::Released)), ..metrics(trial, attempt, sequence) }
    }

    /// Attempt, sequence and points of each message as it comes out, `None` for an event's points.
    fn drain(lanes: &mut Lanes, trial: &str) -> Vec<(u32, u64, Option<usize>)> {
        let taken = Numbered { trial: TrialId::new(trial), attempt: Attempt(1), sequence: 0, body: () };
        let mut out = Vec::new();
        while let Some(next) = lanes.next(&taken) {
            let points = match &next.body {
                Body::Metrics(points) => Some(points.len()),
                Body::Event(_) => None,
            };
            out.push((next.attempt.0, next.sequence, points));
        }
        out
    }

    #[test]
    fn a_trials_messages_keep_their_order_and_its_metrics_come_together() {
        let mut lanes = Lanes::default();
        assert!(lanes.add(event("s/1", 1, 1)).is_some(), "nothing is before it");
        assert!(lanes.add(event("s/2", 1, 1)).is_some(), "another trial waits for nobody");
        let waiting = [
            metrics("s/1", 1, 2),
            metrics("s/1", 1, 3),
            event("s/1", 1, 4),
            metrics("s/1", 1, 5),
            metrics("s/1", 2, 1),
            metrics("s/1", 2, 2),
        ];
        for message in waiting {
            assert!(lanes.add(message).is_none());
        }
        assert_eq!(
            lanes.waiting,
            5 * 2 + 3,
            "a message and its point, five times, and events, two of them taken"
        );
        let out = drain(&mut lanes, "s/1");
        assert_eq!(out, [(1, 3, Some(2)), (1, 4, None), (1, 5, Some(1)), (2, 2, Some(2))]);
        assert_eq!(drain(&mut lanes, "s/2"), []);
        assert_eq!((lanes.waiting, lanes.lanes.len()), (0, 0), "nothing is kept of what is done");
    }
}
