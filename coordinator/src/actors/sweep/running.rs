//! The sweep's actor. Commands and signals that wait together are applied together, written in one batch, and
//! then answered: many small changes cost one write. While nothing can be written, questions are answered, and
//! changes wait.

mod checkpoints;
mod writing;

use super::budget::{LEVELS, spent};
use super::ledger::{Ledger, Standing};
use super::log::{self, Told};
use super::traced::{self, Untold};
use super::{Change, Command, Mutation, Operation, Query, Selection, Tools, View};
use crate::actors::dispatcher::{Expected, Grant, Request};
use crate::actors::message::{ToAgent, TrialEvent};
use crate::error::Result;
use crate::store::{LogEntry, Placement, StopCause, SweepRecord, TrialRecord};
use actor::Scope;
use domain::data;
use domain::metric::MetricPoint;
use domain::trial::TrialState;
use domain::{AgentId, Attempt, Timestamp, TrialId};
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::collections::BTreeMap;
use std::time::Duration;
use telemetry::metrics::{self, Part};
use telemetry::trace::at_place;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

/// Commands, and signals, that are applied together at most.
const GROUP: usize = 256;

/// Changes that a watcher may lag behind before it gets a fresh picture.
const CHANGES: usize = 256;

/// What a sweep waits for beside commands.
enum Signal {
    /// A device for a trial's next attempt; `None`: the dispatcher is gone.
    Granted(u32, Attempt, Option<Grant>),
    /// The attempt's lease ended, after this device time; `None`: it was released before.
    Lost(u32, Attempt, Option<f64>),
}

/// Says what came of a change, once that is durable.
type Answer = Box<dyn FnOnce(&Ledger) + Send>;

pub(super) struct RunningSweep {
    ledger: Ledger,
    tools: Tools,
    changes: broadcast::Sender<Change>,
    /// What each trial's log has told.
    told: BTreeMap<u32, Told>,
    /// Why trials went back into the queue since their logs were told.
    why: BTreeMap<u32, String>,
    /// What agents said since the logs of trials were told.
    noted: BTreeMap<u32, Vec<LogEntry>>,
    /// Entries of trials' logs that are not yet written: the trial, the entry's number, the entry.
    entries: Vec<(u32, u32, LogEntry)>,
    /// When devices were granted whose assignments are not yet written.
    granted: BTreeMap<u32, Timestamp>,
    /// Spans and counts that wait for what they tell of to be written.
    untold: Vec<Untold>,
    /// How many of its trials stand in each state, as the metrics have it.
    counted: [Part; TrialState::ALL.len()],
    /// Itself, by how much of its budget is spent, as the metrics have it.
    budgeted: [Part; LEVELS.len()],
    /// Trials that want a device. Dropping one withdraws it.
    requests: FuturesUnordered<BoxFuture<'static, Signal>>,
    /// Trials that hold one.
    losses: FuturesUnordered<BoxFuture<'static, Signal>>,
    scope: Scope,
    /// Answers to what is applied and not yet written.
    answers: Vec<Answer>,
    /// The monotonic time up to which the sweep's wall clock was counted.
    counted_to: Duration,
    /// When to try again to write what could not be written; changes wait until then.
    retry_at: Option<Instant>,
    /// The changes that wait.
    waiting: Vec<Mutation>,
}

impl RunningSweep {
    /// Takes up what the records say was under way. A sweep that was over runs again for an operation.
    pub(super) async fn restore(
        mut record: SweepRecord,
        trials: Vec<TrialRecord>,
        again: Option<Operation>,
        tools: Tools,
        scope: Scope,
    ) -> Result<Self> {
        record.count_wall_clock(tools.clock.now());
        let mut sweep = Self {
            counted_to: tools.clock.monotonic(),
            ledger: Ledger::new(record, trials)?,
            tools,
            changes: broadcast::channel(CHANGES).0,
            told: BTreeMap::new(),
            why: BTreeMap::new(),
            noted: BTreeMap::new(),
            entries: Vec::new(),
            granted: BTreeMap::new(),
            untold: Vec::new(),
            budgeted: LEVELS.map(|level| metrics::SWEEPS.part(&[("budget", level)])),
            counted: TrialState::ALL.map(|state| metrics::TRIALS.part(&[("state", state.as_str())])),
            requests: FuturesUnordered::new(),
            losses: FuturesUnordered::new(),
            scope,
            answers: Vec::new(),
            retry_at: None,
            waiting: Vec::new(),
        };
        let numbers: Vec<_> = sweep.ledger.trials().keys().copied().collect();
        for number in numbers {
            sweep.restore_trial(number).await?;
        }
        if let Some(operation) = again {
            sweep.operate(operation)?;
        }
        sweep.save().await?;
        // Also where there was nothing to write.
        sweep.count();
        Ok(sweep)
    }

    async fn restore_trial(&mut self, number: u32) -> Result<()> {
        let record = self.ledger.get(number)?;
        self.told.insert(number, Told::of(record));
        let trial = &record.trial;
        let curve = self.tools.history.curve(&trial.id, &trial.attempts).await?;
        if let Some(attempt) = self.tools.history.newest_attempt(&trial.id) {
            self.ledger.measured(number, attempt)?;
        }
        self.ledger.replay(number, &curve)?;
        let record = self.ledger.get(number)?;
        let trial = &record.trial;
        match record.placement.clone() {
            Some(Placement { agent, device, .. }) if trial.state.holds_device() => {
                let (id, attempt) = (trial.id.clone(), trial.attempt);
                let needs = self.ledger.needs(number)?;
                let charged = self.ledger.reopen_account(number)?;
                let trial = id.clone();
                let expected = Expected { trial, attempt, agent, device, needs, charged };
                let lost = self.tools.dispatcher.expect(expected).await?;
                self.await_loss(number, attempt, lost);
                if let Some(reason) = self.ledger.pending_stop(number)? {
                    let stop = ToAgent::Stop(id.clone(), attempt, reason);
                    self.tools.dispatcher.send(id, attempt, stop).await?;
                }
            }
            _ if trial.state == TrialState::Queued && !self.ledger.is_paused() => {
                self.enqueue(number).await?
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(self.tools.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let scope = self.scope.clone();
        let mut commands = Vec::with_capacity(GROUP);
        while self.retry_at.is_some() || !self.ledger.record().sweep.state.is_terminal() {
            let can_write = self.retry_at.is_none();
            // In this order: what is rare is not held up by many commands.
            let done = tokio::select! {
                biased;
                () = scope.cancelled() => return,
                () = until(self.retry_at), if !can_write => self.retry().await,
                _ = tick.tick(), if can_write => self.look_at_budget().await,
                Some(signal) = self.requests.next(), if can_write => self.signalled(signal).await,
                Some(signal) = self.losses.next(), if can_write => self.signalled(signal).await,
                count = inbox.recv_many(&mut commands, GROUP), if self.waiting.len() < super::CAPACITY => match count {
                    0 => return,
                    _ => self.hear_all(&mut commands).await,
                },
            };
            let done = match done {
                Ok(()) if self.retry_at.is_none() && self.has_news() => self.save().await,
                done => done,
            };
            if let Err(error) = done {
                tracing::error!(sweep = %self.ledger.record().sweep.id, %error, "the sweep cannot go on");
                self.scope.cancel();
            }
        }
        let sweep = &self.ledger.record().sweep;
        tracing::info!(sweep = %sweep.id, state = %sweep.state, "the sweep is over");
    }

    async fn hear_all(&mut self, commands: &mut Vec<Command>) -> Result<()> {
        for command in commands.drain(..) {
            match command {
                Command::Query(query) => self.answer(query),
                Command::Mutation(mutation) if self.retry_at.is_some() => self.waiting.push(mutation),
                Command::Mutation(mutation) => self.apply(mutation).await,
            }
        }
        Ok(())
    }

    /// Tries again to write; then come the changes that waited.
    async fn retry(&mut self) -> Result<()> {
        self.retry_at = None;
        self.save().await?;
        if self.retry_at.is_none() {
            for mutation in std::mem::take(&mut self.waiting) {
                self.apply(mutation).await;
            }
        }
        Ok(())
    }

    /// Whoever asked and is gone since does not need the answer.
    fn answer(&self, query: Query) {
        match query {
            Query::Sweep(reply) => drop(reply.send(self.ledger.record().sweep.clone())),
            Query::View(reply) => drop(reply.send(self.view())),
            Query::Watch(reply) => drop(reply.send((self.view(), self.changes.subscribe()))),
            Query::Subscribe(reply) => drop(reply.send(self.changes.subscribe())),
            Query::Trial(number, reply) => drop(reply.send(self.ledger.get(number).cloned())),
            Query::Trials(selection, reply) => drop(reply.send(self.select(&selection))),
            Query::Standing(number, attempt, by, reply) => {
                let trial = self.ledger.get(number).map(|record| &record.trial);
                drop(reply.send(trial.and_then(|trial| Standing::of(trial, attempt, by.as_ref()))));
            }
        }
    }

    fn view(&self) -> View {
        View { sweep: self.ledger.record().sweep.clone(), trials: self.ledger.records() }
    }

    fn select(&self, selection: &Selection) -> Vec<TrialRecord> {
        let after = self.ledger.trials().range(selection.after.saturating_add(1)..);
        let wanted = after.map(|(_, record)| record).filter(|record| selection.wants(record));
        wanted.take(selection.limit).map(|record| TrialRecord::clone(record)).collect()
    }

    /// Applies a change; its answer waits until it is durable.
    async fn apply(&mut self, mutation: Mutation) {
        let answer: Answer = match mutation {
            Mutation::Metrics(number, attempt, points, reply) => {
                let done = self.metrics(number, attempt, &points);
                Box::new(move |_| drop(reply.send(done)))
            }
            Mutation::Event(number, attempt, by, event, reply) => {
                let done = self.event(number, attempt, &by, *event).await;
                Box::new(move |_| drop(reply.send(done)))
            }
            Mutation::Checkpoint(number, attempt, step, stored, reply) => {
                let done = self.checkpoint(number, attempt, step, stored).await;
                Box::new(move |_| drop(reply.send(done)))
            }
            Mutation::CheckpointGone(number, attempt, gone, reply) => {
                let done = self.checkpoint_gone(number, attempt, &gone).await;
                Box::new(move |_| drop(reply.send(done)))
            }
            Mutation::StopTrial(number, reply) => {
                let done = self.stop_trial(number).await;
                Box::new(move |ledger| drop(reply.send(done.and_then(|()| ledger.get(number).cloned()))))
            }
            Mutation::Operate(operation, reply) => {
                let done = self.operate(operation);
                Box::new(move |ledger| drop(reply.send(done.map(|()| ledger.record().sweep.clone()))))
            }
            Mutation::Settle(reply) => {
                Box::new(move |ledger| drop(reply.send(ledger.record().sweep.clone())))
            }
            Mutation::Cancel(reply) => {
                let done = self.cancel().await;
                Box::new(move |ledger| drop(reply.send(done.map(|()| ledger.record().sweep.clone()))))
            }
        };
        self.answers.push(answer);
    }

    fn now(&self) -> Timestamp {
        self.tools.clock.now()
    }

    fn standing(&self, number: u32, attempt: Attempt) -> Result<Standing> {
        Standing::of(&self.ledger.get(number)?.trial, attempt, None)
    }

    fn metrics(&mut self, number: u32, attempt: Attempt, points: &[MetricPoint]) -> Result<()> {
        if self.standing(number, attempt)? == Standing::Over {
            return Ok(());
        }
        self.ledger.metrics(number, points)?;
        if self.changes.receiver_count() > 0 {
            // Of a batch, watchers hear the newest point, and each one that trials are compared by.
            let trial = self.ledger.get(number)?.trial.id.clone();
            let compared = &self.ledger.record().sweep.spec.search.metric;
            let last = points.len().saturating_sub(1);
            let told = points.iter().enumerate().filter(|(i, p)| *i == last || p.get(compared).is_some());
            for (_, point) in told {
                self.publish(Change::Progress(trial.clone(), attempt, point.clone()));
            }
        }
        Ok(())
    }

    async fn event(&mut self, number: u32, attempt: Attempt, by: &AgentId, event: TrialEvent) -> Result<()> {
        if Standing::of(&self.ledger.get(number)?.trial, attempt, Some(by))? == Standing::Over {
            return Ok(());
        }
        if let TrialEvent::Noted(note) = event {
            if self.ledger.noted(number, note.number)? {
                let entry = log::noted(self.ledger.get(number)?, note, self.now());
                self.noted.entry(number).or_default().push(entry);
            }
            return Ok(());
        }
        let trial = &self.ledger.get(number)?.trial;
        let belongs = traced::attempt_of(trial, attempt);
        let trial = trial.id.clone();
        at_place(belongs, || tracing::info!(%trial, %attempt, event = event.name(), "the agent reports"));
        if !matches!(event, TrialEvent::Started { .. }) {
            let given_back = event == TrialEvent::Released;
            let modelled = match &event {
                TrialEvent::Finished { summary, .. } => summary.simulated_seconds,
                _ => None,
            };
            self.release(number, trial, attempt, given_back, modelled).await?;
        }
        if let TrialEvent::Failed(failure) = &event {
            self.why.insert(number, failure.message.clone());
        }
        self.ledger.event(number, event, self.now())
    }

    /// An attempt gives its device up, and is charged for it.
    async fn release(
        &mut self,
        number: u32,
        trial: TrialId,
        attempt: Attempt,
        given_back: bool,
        modelled: Option<f64>,
    ) -> Result<()> {
        let mut seconds = self.tools.dispatcher.release(trial, attempt, given_back).await?;
        if seconds.is_none() {
            seconds = self.seconds_of_lost(number, attempt);
        }
        match seconds {
            Some(seconds) => self.close_account(number, seconds, modelled),
            // What it was charged until now stands.
            None => self.ledger.reopen_account(number).map(drop),
        }
    }

    async fn stop_trial(&mut self, number: u32) -> Result<()> {
        self.ledger.stop_trial(number, StopCause::Person, self.now())?;
        self.abandon(vec![self.ledger.get(number)?.trial.id.clone()]).await
    }

    async fn cancel(&mut self) -> Result<()> {
        self.ledger.stop_all(StopCause::Person, self.now())?;
        self.abandon(self.held()).await
    }

    fn operate(&mut self, operation: Operation) -> Result<()> {
        self.count_wall_clock();
        match operation {
            Operation::Pause => self.ledger.pause(),
            Operation::Resume => self.ledger.resume(),
            Operation::Extend(request_id, spec) => self.ledger.extend(&request_id, *spec),
            Operation::Retry(number) => self.ledger.retry(number),
        }
    }

    /// Counts the time since it was counted last.
    fn count_wall_clock(&mut self) {
        let passed = self.tools.clock.monotonic().saturating_sub(self.counted_to).as_millis() as u64;
        self.counted_to += Duration::from_millis(passed);
        self.ledger.pass(passed);
    }

    /// The trials that hold a device.
    fn held(&self) -> Vec<TrialId> {
        let live = self.ledger.live().filter_map(|number| self.ledger.get(number).ok());
        live.filter(|t| t.placement.is_some()).map(|t| t.trial.id.clone()).collect()
    }

    /// Ends those of these stopped trials whose agents are away: those may never come back to be told.
    async fn abandon(&mut self, stopped: Vec<TrialId>) -> Result<()> {
        let now = self.now();
        for (trial, seconds) in self.tools.dispatcher.abandon(stopped).await? {
            let Some(number) = trial.number() else { continue };
            self.close_account(number, seconds, None)?;
            self.ledger.lost(number, "its agent is away", now)?;
        }
        Ok(())
    }

    /// Takes a signal, and those that have come with it.
    async fn signalled(&mut self, first: Signal) -> Result<()> {
        let (mut next, mut heard) = (Some(first), 0);
        while let Some(signal) = next {
            match signal {
                Signal::Granted(number, attempt, Some(grant)) => self.granted(number, attempt, grant).await?,
                Signal::Lost(number, attempt, Some(seconds)) => self.lost(number, attempt, seconds)?,
                Signal::Granted(_, _, None) | Signal::Lost(_, _, None) => {}
            }
            heard += 1;
            if heard == GROUP {
                break;
            }
            next = self.requests.next().now_or_never().flatten();
            next = next.or_else(|| self.losses.next().now_or_never().flatten());
        }
        Ok(())
    }

    async fn granted(&mut self, number: u32, attempt: Attempt, grant: Grant) -> Result<()> {
        let record = self.ledger.get(number)?;
        let trial = &record.trial;
        let id = trial.id.clone();
        if trial.state != TrialState::Queued || record.next_attempt() != attempt {
            self.tools.dispatcher.release(id, attempt, false).await?;
            return Ok(());
        }
        let Grant { agent, device, price_per_hour, is, at, mut lost } = grant;
        if !matches!(lost.try_recv(), Err(TryRecvError::Empty)) {
            // Its lease ended while nothing could be written, and nobody was told to train it: that is no attempt.
            return self.enqueue(number).await;
        }
        let belongs = traced::attempt_of(trial, attempt);
        at_place(belongs, || tracing::info!(trial = %id, %attempt, %agent, %device, "assigning"));
        self.ledger.assign(number, Placement { agent, device, price_per_hour, is, before_usd: None })?;
        self.granted.insert(number, at);
        self.await_loss(number, attempt, lost);
        Ok(())
    }

    /// Charges an assignment that ends, as [`ledger::Ledger::close_account`] does.
    fn close_account(&mut self, number: u32, seconds: f64, modelled: Option<f64>) -> Result<()> {
        let earlier = self.ledger.get(number)?.earlier_cost_usd;
        self.ledger.close_account(number, seconds, modelled, self.now())?;
        // What a model says may be less than what an earlier coordinator had charged by its clock.
        let charged = (self.ledger.get(number)?.earlier_cost_usd - earlier).max(0.0);
        self.untold.push(Untold::count(move || metrics::TRIAL_COST.add(charged, &[])));
        Ok(())
    }

    fn lost(&mut self, number: u32, attempt: Attempt, seconds: f64) -> Result<()> {
        if !matches!(self.standing(number, attempt), Ok(Standing::Current { .. })) {
            return Ok(());
        }
        let trial = &self.ledger.get(number)?.trial;
        at_place(traced::attempt_of(trial, attempt), || {
            let agent = trial.agent.as_deref();
            tracing::warn!(trial = %trial.id, %attempt, agent, "the lease ended without a heartbeat");
        });
        self.close_account(number, seconds, None)?;
        let why = "its agent was not heard from for a whole lease";
        self.why.insert(number, why.into());
        self.ledger.lost(number, why, self.now())
    }

    /// The device time of a current attempt whose lease has ended: the word of that is here, unheard, and counts as heard.
    fn seconds_of_lost(&mut self, number: u32, attempt: Attempt) -> Option<f64> {
        let mut others = Vec::new();
        let seconds = loop {
            match tokio::task::unconstrained(self.losses.next()).now_or_never().flatten() {
                Some(Signal::Lost(of, which, seconds)) if (of, which) == (number, attempt) => break seconds,
                Some(other) => others.push(other),
                None => break None,
            }
        };
        self.losses.extend(others.into_iter().map(|other| std::future::ready(other).boxed()));
        seconds
    }

    /// Charges what runs, and ends the sweep if its budget is spent.
    async fn look_at_budget(&mut self) -> Result<()> {
        let now = self.now();
        self.count_wall_clock();
        for (trial, used) in self.tools.dispatcher.used(self.held()).await? {
            if let Some(number) = trial.number() {
                self.ledger.charge_used(number, used, now)?;
            }
        }
        self.ledger.settle(now);
        let record = self.ledger.record();
        let (sweep, budget) = (&record.sweep, &record.sweep.spec.budget);
        let elapsed = record.active_seconds();
        if let Some(spent) = spent(budget, sweep.cost_usd, elapsed)
            && record.stop.is_none()
        {
            tracing::info!(sweep = %sweep.id, cost_usd = sweep.cost_usd, elapsed, spent);
            self.ledger.ended_early(spent);
            self.ledger.stop_all(StopCause::Budget, now)?;
        }
        Ok(())
    }

    async fn enqueue(&mut self, number: u32) -> Result<()> {
        let needs = self.ledger.needs(number)?;
        let record = self.ledger.get(number)?;
        let trial = &record.trial;
        let (granted, grant) = oneshot::channel();
        let attempt = record.next_attempt();
        let data = data::uploaded(&trial.config, self.ledger.asked(number)?.as_ref());
        let request =
            Request { trial: trial.id.clone(), attempt, created_at: trial.created_at, needs, data, granted };
        self.tools.dispatcher.enqueue(request).await?;
        self.requests.push(Box::pin(async move { Signal::Granted(number, attempt, grant.await.ok()) }));
        Ok(())
    }

    /// Takes every waiting trial back from the dispatcher.
    async fn withdraw(&mut self) -> Result<()> {
        self.requests.clear();
        let waiting = self.ledger.trials().values().filter(|t| t.trial.state == TrialState::Queued);
        for record in waiting {
            // A device may have been granted just before.
            let (trial, attempt) = (record.trial.id.clone(), record.next_attempt());
            self.tools.dispatcher.release(trial, attempt, false).await?;
        }
        Ok(())
    }

    fn await_loss(&self, number: u32, attempt: Attempt, lost: oneshot::Receiver<f64>) {
        self.losses.push(Box::pin(async move { Signal::Lost(number, attempt, lost.await.ok()) }));
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
