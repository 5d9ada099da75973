//! The dispatcher's actor.

mod hints;
mod lacking;
mod placing;
mod quotas;

use super::super::message::{Outbox, StopReason, ToAgent};
use super::super::meter::Meter;
use super::{AgentView, CAPACITY, Charged, Command, Request, SessionId, Terms, Used};
use crate::placement::Waiting;
use actor::Scope;
use config::limits::Limits;
use domain::data::Reference;
use domain::fleet::{Agent, Beginning, Holding};
use domain::{AgentId, Attempt, Clock, DeviceId, SweepId, Timestamp, TrialId};
use quotas::Usage;
use security::watched::Watched;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use telemetry::metrics::{self, Part};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Time for which an agent that is gone is listed.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// Agents that are listed although they are gone.
const MOST_GONE: usize = 100;

/// What an agent may be, for the metrics.
const STATES: [&str; 3] = ["connected", "drained", "gone"];
const CONNECTED: usize = 0;
const DRAINED: usize = 1;
const GONE: usize = 2;

/// A device of an agent.
type Place = (AgentId, DeviceId);

/// A waiting trial's place in the queue: the oldest first, of equals the sweep's earlier one.
type Turn = (Timestamp, Option<SweepId>, Option<u32>);

pub(super) struct State {
    clock: Arc<dyn Clock>,
    terms: Terms,
    agents: BTreeMap<AgentId, Entry>,
    drained: BTreeSet<AgentId>,
    queue: BTreeMap<Turn, Request>,
    held: BTreeMap<TrialId, Held>,
    usage: Usage,
    meters: HashMap<Place, Meter>,
    sessions: u64,
    /// Whether agents can come back.
    serves: bool,
    /// Where the limits of namespaces stand, if they have any, and what stood there last.
    limits: Option<Arc<Watched<Limits>>>,
    in_force: Arc<Limits>,
    /// Whether anything happened since the last placement that a waiting trial could profit from.
    may_place: bool,
    /// Agents by state, as the metrics have it.
    counted: [Part; STATES.len()],
    /// Whether that changed since it was counted.
    may_count: bool,
    /// Whether trials wait for an agent of a later version than those that are there.
    lacks_version: bool,
}

struct Entry {
    agent: Agent,
    session: Option<(SessionId, Outbox)>,
    leaving: bool,
    /// Whether a lease of its ended and it has said nothing since: nothing is given to it before it does.
    silent: bool,
    /// Whether it held trials when its session ended.
    lost: bool,
    last_seen: Timestamp,
    beginning: Beginning,
    /// What its session was told to fetch ahead.
    ahead: Vec<Reference>,
}

struct Held {
    attempt: Attempt,
    place: Place,
    needs: Waiting,
    /// When the lease ends; not before agents can come back.
    deadline: Option<Instant>,
    /// The meter's reading at assignment.
    from: f64,
    /// When that was, by this coordinator's clock that does not jump.
    since: Duration,
    /// For how long the device had held it then, as far as that was counted.
    before: Option<Duration>,
    /// Until when it was charged for by a coordinator before, whose time without a meter counts once the agent says that it
    /// trained on.
    unmetered: Option<Unmetered>,
    /// Device time used without a meter.
    adopted: f64,
    /// The stop to repeat when the agent reconnects.
    stop: Option<StopReason>,
    lost: oneshot::Sender<f64>,
}

/// What is known of the time for which no coordinator ran a meter.
#[derive(Clone, Copy)]
struct Unmetered {
    /// How long it was by the hour, which may have jumped.
    by_the_hour: Duration,
    /// For how long the device had held the trial before.
    held: Option<Duration>,
}

impl State {
    pub(super) fn new(clock: Arc<dyn Clock>, terms: Terms, drained: BTreeSet<AgentId>) -> Self {
        // What only begins with its first one cannot be seen to grow by it.
        metrics::LEASE_RENEWALS.add(0.0, &[]);
        metrics::LEASE_EXPIRATIONS.add(0.0, &[]);
        Self {
            clock,
            terms,
            agents: BTreeMap::new(),
            drained,
            queue: BTreeMap::new(),
            held: BTreeMap::new(),
            usage: Usage::default(),
            meters: HashMap::new(),
            sessions: 0,
            serves: false,
            limits: None,
            in_force: Arc::default(),
            may_place: false,
            counted: STATES.map(|state| metrics::AGENTS.part(&[("state", state)])),
            may_count: false,
            lacks_version: false,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Command>, scope: Scope) {
        let mut commands = Vec::with_capacity(CAPACITY);
        loop {
            let earliest = self.held.values().filter_map(|h| h.deadline).min();
            let expiry = async {
                match earliest {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            // In this order: what came in time, a heartbeat for one, counts before a lease ends.
            tokio::select! {
                biased;
                () = scope.cancelled() => return,
                count = inbox.recv_many(&mut commands, CAPACITY) => match count {
                    0 => return,
                    _ => commands.drain(..).for_each(|command| self.handle(command)),
                },
                () = expiry => {}
            }
            if earliest.is_some_and(|deadline| deadline <= Instant::now()) {
                self.expire();
            }
            if let Some(now) = self.limits.as_ref().map(|limits| limits.current())
                && !Arc::ptr_eq(&now, &self.in_force)
            {
                (self.in_force, self.may_place) = (now, true);
            }
            if std::mem::take(&mut self.may_place) {
                self.place();
                self.hint();
            }
            if std::mem::take(&mut self.may_count) {
                let counts = self.counts();
                self.counted.iter_mut().zip(counts).for_each(|(part, count)| part.set(count));
            }
        }
    }

    /// How many agents are in which state. One that ended with nothing in its hands is in none.
    fn counts(&self) -> [i64; STATES.len()] {
        let mut counts = [0; STATES.len()];
        for (id, entry) in &self.agents {
            match &entry.session {
                None if entry.lost => counts[GONE] += 1,
                None => {}
                Some(_) if self.drained.contains(id) => counts[DRAINED] += 1,
                Some(_) => counts[CONNECTED] += 1,
            }
        }
        counts
    }

    fn handle(&mut self, command: Command) {
        // Whoever asked and is gone since does not need the answer.
        match command {
            Command::Connect(agent, holdings, outbox, reply) => {
                let _ = reply.send(self.connect(agent, &holdings, outbox));
            }
            Command::Heartbeat(agent, session, holdings, resident, beginning, reply) => {
                let _ = reply.send(self.heartbeat(&agent, session, &holdings, &resident, beginning));
            }
            Command::Disconnect(agent, session) => self.disconnect(&agent, session),
            Command::Enqueue(request) => {
                // One of the same trial that was there before has been withdrawn.
                let trial = &request.trial;
                self.queue.insert((request.created_at, trial.sweep(), trial.number()), request);
                self.may_place = true;
            }
            Command::Expect(expected, reply) => {
                let place = (expected.agent, expected.device);
                let (lost, answer) = oneshot::channel();
                let now = self.clock.now();
                let unmetered = expected
                    .charged
                    .map(|Charged { at, held }| Unmetered { by_the_hour: now.since(at), held });
                let trial = expected.trial;
                self.hold(trial.clone(), expected.attempt, place, expected.needs, unmetered, lost);
                if let Some(held) = self.held.get_mut(&trial).filter(|_| !self.serves) {
                    held.deadline = None;
                }
                let _ = reply.send(answer);
            }
            Command::Serve => {
                self.serves = true;
                let deadline = Instant::now() + self.terms.lease;
                for held in self.held.values_mut() {
                    held.deadline.get_or_insert(deadline);
                }
            }
            Command::Send(trial, attempt, message) => self.send(&trial, attempt, message),
            Command::Release(trial, attempt, given_back, reply) => {
                let _ = reply.send(self.release(&trial, attempt, given_back));
            }
            Command::Used(trials, reply) => {
                let _ = reply.send(self.used(trials));
            }
            Command::Abandon(trials, reply) => {
                let _ = reply.send(self.abandon(trials));
            }
            Command::Agents(reply) => {
                let _ = reply.send(self.views());
            }
            Command::Drain(agent, drained, reply) => {
                let _ = reply.send(self.drain(agent, drained));
            }
            Command::Limit(limits) => self.limits = Some(limits),
            Command::HeldBack(namespace, reply) => {
                let _ = reply.send(self.held_back(&namespace));
            }
            Command::Lacking(sweep, reply) => {
                let _ = reply.send(self.lacking(&sweep));
            }
        }
    }

    fn connect(&mut self, mut agent: Agent, holdings: &[Holding], outbox: Outbox) -> SessionId {
        // An agent of an earlier version does not say it. A CPU and what the catalogue has not stay unknown.
        for device in agent.devices.iter_mut().filter(|device| device.compute_capability.is_none()) {
            let known = config::machines::accelerator(&device.accelerator).ok();
            device.compute_capability = known.map(|known| known.compute_capability);
        }
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let id = agent.id.clone();
        let last_seen = self.clock.now();
        let entry = Entry {
            agent,
            session: Some((session, outbox)),
            leaving: false,
            silent: false,
            lost: false,
            last_seen,
            // It says that with its first sign of life.
            beginning: Beginning::default(),
            ahead: Vec::new(),
        };
        if let Some((_, older)) = self.agents.insert(id.clone(), entry).and_then(|entry| entry.session) {
            tracing::info!(agent = %id, "a newer stream replaces the agent's older one");
            older.cut();
        }
        (self.may_place, self.may_count) = (true, true);
        let drop = self.renew(&id, holdings);
        let Terms { heartbeat, lease } = self.terms;
        self.reach(&id, ToAgent::Welcome { heartbeat, lease, drop });
        for holding in holdings {
            let held = self.held.get(&holding.trial).filter(|held| held.attempt == holding.attempt);
            if let Some(reason) = held.and_then(|held| held.stop) {
                self.reach(&id, ToAgent::Stop(holding.trial.clone(), holding.attempt, reason));
            }
        }
        self.take_back(&id);
        session
    }

    fn drain(&mut self, agent: AgentId, drained: bool) -> Option<AgentView> {
        self.may_count = true;
        if drained {
            self.drained.insert(agent.clone());
            self.take_back(&agent);
        } else {
            self.drained.remove(&agent);
        }
        // What it was to fetch ahead is another's, or its own again.
        self.may_place = true;
        self.views().into_iter().find(|view| view.agent.id == agent)
    }

    /// Asks an agent that is drained to give back what it holds and was not told to end.
    fn take_back(&mut self, agent: &AgentId) {
        if !self.drained.contains(agent) {
            return;
        }
        let held = self.held.iter_mut().filter(|(_, held)| held.place.0 == *agent && held.stop.is_none());
        let mut stops = Vec::new();
        for (trial, held) in held {
            held.stop = Some(StopReason::Release);
            stops.push(ToAgent::Stop(trial.clone(), held.attempt, StopReason::Release));
        }
        stops.into_iter().for_each(|stop| self.reach(agent, stop));
    }

    fn heartbeat(
        &mut self,
        agent: &AgentId,
        session: SessionId,
        holdings: &[Holding],
        resident: &HashMap<DeviceId, String>,
        beginning: Beginning,
    ) -> Option<Vec<Holding>> {
        let entry = self.agents.get_mut(agent).filter(|entry| entry.is(session))?;
        entry.last_seen = self.clock.now();
        entry.beginning = beginning;
        self.may_place |= std::mem::take(&mut entry.silent);
        for device in &mut entry.agent.devices {
            let now = resident.get(&device.id).cloned();
            self.may_place |= device.resident_base != now;
            device.resident_base = now;
        }
        Some(self.renew(agent, holdings))
    }

    /// Renews what is current and answers with the rest.
    fn renew(&mut self, agent: &AgentId, holdings: &[Holding]) -> Vec<Holding> {
        let (deadline, now) = (Instant::now() + self.terms.lease, self.clock.monotonic());
        let mut sharing: HashMap<DeviceId, u32> = HashMap::new();
        for held in self.held.values().filter(|held| held.place.0 == *agent) {
            *sharing.entry(held.place.1.clone()).or_default() += 1;
        }
        let (mut stale, mut renewed) = (Vec::new(), 0);
        for holding in holdings {
            match self.held.get_mut(&holding.trial) {
                Some(held) if held.attempt == holding.attempt && held.place.0 == *agent => {
                    held.deadline = Some(deadline);
                    renewed += 1;
                    let share = sharing.get(&held.place.1).copied().unwrap_or(1);
                    let unmetered = held.unmetered(holding.held, now, self.terms.lease);
                    held.adopted += unmetered.as_secs_f64() / f64::from(share);
                }
                _ => stale.push(holding.clone()),
            }
        }
        metrics::LEASE_RENEWALS.add(f64::from(renewed), &[]);
        stale
    }

    fn disconnect(&mut self, agent: &AgentId, session: SessionId) {
        if let Some(entry) = self.agents.get_mut(agent).filter(|entry| entry.is(session)) {
            entry.session = None;
            entry.last_seen = self.clock.now();
            entry.lost = self.held.values().any(|held| held.place.0 == *agent);
        }
        self.may_count = true;
        self.forget();
    }

    /// Forgets agents that are gone and hold nothing: those that are gone for long, and of too many the first to go.
    fn forget(&mut self) {
        let holding: BTreeSet<_> = self.held.values().map(|held| &held.place.0).collect();
        let is_gone = |(id, entry): &(&AgentId, &Entry)| entry.session.is_none() && !holding.contains(id);
        let gone = self.agents.iter().filter(is_gone);
        let mut gone: Vec<_> = gone.map(|(id, entry)| (entry.last_seen, id.clone())).collect();
        gone.sort();
        let (now, too_many) = (self.clock.now(), gone.len().saturating_sub(MOST_GONE));
        let too_long = gone.iter().take_while(|(seen, _)| now.since(*seen) >= REMEMBERED).count();
        for (_, agent) in gone.into_iter().take(too_many.max(too_long)) {
            self.agents.remove(&agent);
            self.meters.retain(|(of, _), _| *of != agent);
        }
    }

    fn hold(
        &mut self,
        trial: TrialId,
        attempt: Attempt,
        place: Place,
        needs: Waiting,
        unmetered: Option<Unmetered>,
        lost: oneshot::Sender<f64>,
    ) {
        let since = self.clock.monotonic();
        let from = self.meters.entry(place.clone()).or_default().take(since);
        let deadline = Some(Instant::now() + self.terms.lease);
        let before = unmetered.map_or(Some(Duration::ZERO), |unmetered| unmetered.held);
        let (adopted, stop) = (0.0, None);
        let held =
            Held { attempt, place, needs, deadline, from, since, before, unmetered, adopted, stop, lost };
        self.usage.add(&held.needs.namespace, &held.place);
        if let Some(before) = self.held.insert(trial, held) {
            self.usage.remove(&before.needs.namespace, &before.place);
        }
    }

    fn send(&mut self, trial: &TrialId, attempt: Attempt, message: ToAgent) {
        let Some(held) = self.held.get_mut(trial).filter(|held| held.attempt == attempt) else { return };
        if let ToAgent::Stop(_, _, reason) = message {
            held.stop = Some(reason);
        }
        let agent = held.place.0.clone();
        self.reach(&agent, message);
        // It may have been drained since the device was granted.
        self.take_back(&agent);
    }

    fn reach(&mut self, agent: &AgentId, message: ToAgent) {
        let Some(entry) = self.agents.get_mut(agent) else { return };
        if let Some((_, outbox)) = &entry.session
            && outbox.send(message).is_err()
        {
            tracing::warn!(%agent, "the agent's stream is gone or too slow; cutting it off");
            outbox.cut();
            entry.session = None;
            entry.lost = self.held.values().any(|held| held.place.0 == *agent);
            self.may_count = true;
        }
    }

    fn release(&mut self, trial: &TrialId, attempt: Attempt, given_back: bool) -> Option<f64> {
        self.held.get(trial).filter(|held| held.attempt == attempt)?;
        let (seconds, held) = self.end(trial)?;
        let leaving = given_back && held.stop != Some(StopReason::Release);
        if let Some(entry) = self.agents.get_mut(&held.place.0).filter(|_| leaving) {
            entry.leaving = true;
        }
        Some(seconds)
    }

    /// Takes a trial off its device; answers with the device time it used.
    fn end(&mut self, trial: &TrialId) -> Option<(f64, Held)> {
        let held = self.held.remove(trial)?;
        self.usage.remove(&held.needs.namespace, &held.place);
        self.may_place = true;
        let now = self.clock.monotonic();
        let reading = self.meters.get_mut(&held.place).map_or(held.from, |meter| meter.give(now));
        Some((held.used(reading), held))
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let is_over = |held: &Held| held.deadline.is_some_and(|deadline| deadline <= now);
        let over: Vec<_> =
            self.held.iter().filter(|(_, held)| is_over(held)).map(|(trial, _)| trial.clone()).collect();
        for trial in over {
            let Some((seconds, held)) = self.end(&trial) else { continue };
            let (agent, attempt) = (&held.place.0, held.attempt);
            metrics::LEASE_EXPIRATIONS.add(1.0, &[]);
            if let Some(entry) = self.agents.get_mut(agent) {
                entry.silent = true;
            }
            self.reach(agent, ToAgent::Stop(trial, attempt, StopReason::Fenced));
            // A sweep that is gone has no use for it.
            let _ = held.lost.send(seconds);
        }
    }

    fn used(&mut self, trials: Vec<TrialId>) -> Vec<(TrialId, Used)> {
        let now = self.clock.monotonic();
        let read = |trial: TrialId| {
            let held = self.held.get(&trial)?;
            let reading = self.meters.get_mut(&held.place)?.read(now);
            let counted = held.before.map(|before| before.saturating_add(now.saturating_sub(held.since)));
            Some((trial, Used { seconds: held.used(reading), held: counted }))
        };
        trials.into_iter().filter_map(read).collect()
    }

    fn abandon(&mut self, trials: Vec<TrialId>) -> Vec<(TrialId, f64)> {
        let is_away = |trial: &TrialId| {
            let agent = &self.held.get(trial)?.place.0;
            Some(self.agents.get(agent).is_none_or(|entry| entry.session.is_none()))
        };
        let away: Vec<_> = trials.into_iter().filter(|trial| is_away(trial) == Some(true)).collect();
        away.into_iter().filter_map(|trial| self.end(&trial).map(|(seconds, _)| (trial, seconds))).collect()
    }

    fn views(&self) -> Vec<AgentView> {
        let holds = |id: &AgentId| {
            let held = self.held.iter().filter(|(_, held)| held.place.0 == *id);
            held.map(|(trial, _)| trial.clone()).collect()
        };
        let view = |(id, entry): (&AgentId, &Entry)| AgentView {
            agent: entry.agent.clone(),
            connected: entry.session.is_some(),
            last_seen: entry.last_seen,
            drained: self.drained.contains(id),
            trials: holds(id),
            beginning: entry.beginning,
        };
        self.agents.iter().map(view).collect()
    }
}

impl Held {
    /// Device time used, when the device's meter stands at `reading`.
    fn used(&self, reading: f64) -> f64 {
        reading - self.from + self.adopted
    }

    /// The time without a meter before this coordinator's, when the agent says that its device has held the trial for so long
    /// until `now`; zero when it was told before. What an agent does not say is no longer than a lease: the hour alone may be
    /// wrong by hours.
    fn unmetered(&mut self, told: Option<Duration>, now: Duration, lease: Duration) -> Duration {
        let Some(Unmetered { by_the_hour, held }) = self.unmetered.take() else { return Duration::ZERO };
        let metered = now.saturating_sub(self.since);
        let unmetered = match (told, held) {
            (Some(told), Some(held)) => told.saturating_sub(held.saturating_add(metered)),
            _ => by_the_hour.min(lease),
        };
        self.before = match told {
            Some(told) => Some(told.saturating_sub(metered)),
            None => held.map(|held| held.saturating_add(unmetered)),
        };
        unmetered
    }
}

impl Entry {
    fn is(&self, session: SessionId) -> bool {
        self.session.as_ref().is_some_and(|(id, _)| *id == session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::SystemClock;

    fn agent(id: &str) -> Agent {
        let (version, hostname) = (String::new(), String::new());
        let (devices, labels, understands) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        Agent { id: AgentId::new(id), version, hostname, devices, labels, understands }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_ends_with_nothing_in_its_hands_is_not_missed() {
        let terms = Terms { heartbeat: Duration::from_secs(2), lease: Duration::from_secs(10) };
        let mut state = State::new(Arc::new(SystemClock::new()), terms, BTreeSet::new());
        let connect = |state: &mut State, id: &str| {
            let (outbox, messages) = Outbox::new();
            (state.connect(agent(id), &[], outbox), messages)
        };
        let ((idle, _a), (busy, _b)) = (connect(&mut state, "idle"), connect(&mut state, "busy"));
        let trial = TrialId::new("s/1");
        let place = (AgentId::new("busy"), DeviceId::new("cpu"));
        let (lost, _answer) = oneshot::channel();
        state.hold(trial.clone(), Attempt(1), place, Waiting::default(), None, lost);
        assert_eq!(state.counts(), [2, 0, 0]);
        state.disconnect(&AgentId::new("idle"), idle);
        assert_eq!(state.counts(), [1, 0, 0]);
        state.disconnect(&AgentId::new("busy"), busy);
        assert_eq!(state.counts(), [0, 0, 1]);
        let (_, _b) = connect(&mut state, "busy");
        assert_eq!(state.counts(), [1, 0, 0], "it came back");
    }
}
