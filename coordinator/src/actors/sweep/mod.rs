//! A running sweep: it owns the sweep's record, its trials and its search. Each change is durable before anyone
//! hears of it. The actor ends with the sweep.

mod ledger;
mod log;

pub use ledger::Standing;

use super::dispatcher::{Dispatcher, Expected, Grant, Request};
use super::message::{StopReason, ToAgent, TrialEvent};
use crate::artifacts::{Artifacts, Stored};
use crate::error::Result;
use crate::history::History;
use crate::store::{Batch, Placement, StopCause, Store, SweepRecord, TrialRecord};
use actor::{Gone, Mailbox, Reply, Scope};
use domain::metric::MetricPoint;
use domain::sweep::{Budget, Sweep, SweepSpec};
use domain::trial::{Trial, TrialState};
use domain::{Attempt, Clock, SweepId, Timestamp, TrialId};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use ledger::{Effect, Ledger};
use log::Told;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::MissedTickBehavior;

/// Commands that may wait.
const CAPACITY: usize = 64;

/// Changes that a watcher may lag behind before it gets a fresh picture.
const CHANGES: usize = 256;

/// What the sweeps work with.
#[derive(Clone)]
pub struct Tools {
    /// The durable state.
    pub store: Store,
    /// Metric history.
    pub history: History,
    /// Checkpoints.
    pub artifacts: Artifacts,
    /// Devices.
    pub dispatcher: Dispatcher,
    /// The hour.
    pub clock: Arc<dyn Clock>,
    /// Time between two looks at cost and budget.
    pub tick: Duration,
}

/// A sweep with its trials, by number.
#[derive(Debug, Clone)]
pub struct View {
    /// The sweep.
    pub sweep: Sweep,
    /// Its trials.
    pub trials: Vec<TrialRecord>,
}

/// What watchers hear.
#[derive(Debug, Clone)]
pub enum Change {
    /// The sweep as it stands, and each trial's state.
    Sweep(Box<Sweep>, Vec<TrialState>),
    /// A trial as it stands.
    Trial(Box<Trial>),
    /// A running trial's newest point.
    Progress(TrialId, Attempt, MetricPoint),
}

/// What a sweep is asked.
enum Command {
    View(Reply<View>),
    Watch(Reply<(View, broadcast::Receiver<Change>)>),
    Trial(u32, Reply<Result<TrialRecord>>),
    Metrics(u32, Attempt, Vec<MetricPoint>, Reply<Result<()>>),
    Event(u32, Attempt, Box<TrialEvent>, Reply<Result<()>>),
    Checkpoint(u32, Attempt, u64, Stored, Reply<Result<Vec<String>>>),
    StopTrial(u32, Reply<Result<TrialRecord>>),
    Cancel(Reply<Result<View>>),
    Operate(Operation, Reply<Result<View>>),
}

/// What a person asks of a sweep beside ending it.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// Propose and train nothing until it is resumed.
    Pause,
    /// Go on.
    Resume,
    /// More trials, more budget, another space: the extension's request id, and the whole spec.
    Extend(String, Box<SweepSpec>),
    /// Try a trial again, by its number.
    Retry(u32),
}

impl Operation {
    /// Whether it makes a sweep that is over run again.
    pub fn reopens(&self) -> bool {
        matches!(self, Self::Extend(..) | Self::Retry(_))
    }
}

/// Speaks to a running sweep. Every call answers [`Gone`] once the sweep is over; its records then lie in the
/// store.
#[derive(Clone)]
pub struct SweepHandle(Mailbox<Command>);

impl SweepHandle {
    /// Starts a sweep from its records, new, after a restart, or to run again by an operation. `ended` is called
    /// when it is over.
    ///
    /// # Errors
    /// Its records or metrics cannot be read, the operation is refused, or the first changes cannot be written.
    pub async fn start<F>(
        record: SweepRecord,
        trials: Vec<TrialRecord>,
        again: Option<Operation>,
        tools: Tools,
        scope: &Scope,
        ended: F,
    ) -> Result<Self>
    where
        F: FnOnce(SweepId) -> BoxFuture<'static, ()> + Send + 'static,
    {
        let id = record.sweep.id.clone();
        let mut sweep = RunningSweep {
            ledger: Ledger::new(record, trials)?,
            tools,
            changes: broadcast::channel(CHANGES).0,
            told: BTreeMap::new(),
            why: BTreeMap::new(),
            requests: FuturesUnordered::new(),
            losses: FuturesUnordered::new(),
            scope: scope.clone(),
        };
        sweep.restore().await?;
        if let Some(operation) = again {
            sweep.apply(operation)?;
        }
        sweep.save().await?;
        let (mailbox, inbox) = actor::mailbox(CAPACITY);
        scope.spawn("sweep", async move {
            sweep.run(inbox).await;
            ended(id).await;
        });
        Ok(Self(mailbox))
    }

    /// The sweep as it stands.
    pub async fn view(&self) -> std::result::Result<View, Gone> {
        self.0.ask(Command::View).await
    }

    /// The sweep as it stands, and every change after.
    pub async fn watch(&self) -> std::result::Result<(View, broadcast::Receiver<Change>), Gone> {
        self.0.ask(Command::Watch).await
    }

    /// A trial as it stands.
    pub async fn trial(&self, number: u32) -> std::result::Result<Result<TrialRecord>, Gone> {
        self.0.ask(|reply| Command::Trial(number, reply)).await
    }

    /// Durable points of an attempt.
    pub async fn metrics(
        &self,
        number: u32,
        attempt: Attempt,
        points: Vec<MetricPoint>,
    ) -> std::result::Result<Result<()>, Gone> {
        self.0.ask(|reply| Command::Metrics(number, attempt, points, reply)).await
    }

    /// What an agent says of an attempt; durable when it returns.
    pub async fn event(
        &self,
        number: u32,
        attempt: Attempt,
        event: TrialEvent,
    ) -> std::result::Result<Result<()>, Gone> {
        self.0.ask(|reply| Command::Event(number, attempt, Box::new(event), reply)).await
    }

    /// An attempt's checkpoint is in the object store; durable when it returns. Answers with the paths that
    /// nothing points at any more.
    pub async fn checkpoint(
        &self,
        number: u32,
        attempt: Attempt,
        step: u64,
        stored: Stored,
    ) -> std::result::Result<Result<Vec<String>>, Gone> {
        self.0.ask(|reply| Command::Checkpoint(number, attempt, step, stored, reply)).await
    }

    /// Ends a trial for a person.
    pub async fn stop_trial(&self, number: u32) -> std::result::Result<Result<TrialRecord>, Gone> {
        self.0.ask(|reply| Command::StopTrial(number, reply)).await
    }

    /// Ends the sweep for a person.
    pub async fn cancel(&self) -> std::result::Result<Result<View>, Gone> {
        self.0.ask(Command::Cancel).await
    }

    /// Does what a person asks; durable when it returns.
    pub async fn operate(&self, operation: Operation) -> std::result::Result<Result<View>, Gone> {
        self.0.ask(|reply| Command::Operate(operation, reply)).await
    }
}

/// What a sweep waits for beside commands.
enum Signal {
    /// A device for a trial's next attempt; `None`: the dispatcher is gone.
    Granted(u32, Attempt, Option<Grant>),
    /// The attempt's lease ended, after this device time; `None`: it was released before.
    Lost(u32, Attempt, Option<f64>),
}

struct RunningSweep {
    ledger: Ledger,
    tools: Tools,
    changes: broadcast::Sender<Change>,
    /// What each trial's log has told.
    told: BTreeMap<u32, Told>,
    /// Why trials went back into the queue since the last change was written.
    why: BTreeMap<u32, String>,
    /// Trials that want a device. Dropping one withdraws it.
    requests: FuturesUnordered<BoxFuture<'static, Signal>>,
    /// Trials that hold one.
    losses: FuturesUnordered<BoxFuture<'static, Signal>>,
    scope: Scope,
}

impl RunningSweep {
    /// Takes up what the records say was under way.
    async fn restore(&mut self) -> Result<()> {
        let trials: Vec<_> = self.ledger.trials().iter().map(|(n, t)| (*n, t.clone())).collect();
        for (number, record) in trials {
            self.told.insert(number, Told::of(&record));
            let trial = &record.trial;
            let curve = self.tools.history.curve(&trial.id, &trial.attempts).await?;
            self.ledger.replay(number, &curve)?;
            match record.placement {
                Some(Placement { agent, device, .. }) if trial.state.holds_device() => {
                    let (id, attempt) = (trial.id.clone(), trial.attempt);
                    let needs = self.ledger.needs(number)?;
                    let charged_at = self.ledger.reopen_account(number)?;
                    let trial = id.clone();
                    let expected = Expected { trial, attempt, agent, device, needs, charged_at };
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
        }
        Ok(())
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(self.tools.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let scope = self.scope.clone();
        while !self.ledger.record().sweep.state.is_terminal() {
            let done = tokio::select! {
                () = scope.cancelled() => return,
                command = inbox.recv() => match command {
                    Some(command) => {
                        self.answer(command).await;
                        Ok(())
                    }
                    None => return,
                },
                Some(signal) = self.requests.next() => self.hear(signal).await,
                Some(signal) = self.losses.next() => self.hear(signal).await,
                _ = tick.tick() => self.look_at_budget().await,
            };
            if let Err(error) = done {
                tracing::error!(sweep = %self.ledger.record().sweep.id, %error, "the sweep cannot go on");
                self.scope.cancel();
            }
        }
        let sweep = &self.ledger.record().sweep;
        tracing::info!(sweep = %sweep.id, state = %sweep.state, "the sweep is over");
    }

    /// Whoever asked and is gone since does not need the answer.
    async fn answer(&mut self, command: Command) {
        match command {
            Command::View(reply) => {
                let _ = reply.send(self.view());
            }
            Command::Watch(reply) => {
                let _ = reply.send((self.view(), self.changes.subscribe()));
            }
            Command::Trial(number, reply) => {
                let _ = reply.send(self.ledger.get(number).cloned());
            }
            Command::Metrics(number, attempt, points, reply) => {
                let _ = reply.send(self.metrics(number, attempt, &points).await);
            }
            Command::Event(number, attempt, event, reply) => {
                let _ = reply.send(self.event(number, attempt, *event).await);
            }
            Command::Checkpoint(number, attempt, step, stored, reply) => {
                let _ = reply.send(self.checkpoint(number, attempt, step, stored).await);
            }
            Command::StopTrial(number, reply) => {
                let _ = reply.send(self.stop_trial(number).await);
            }
            Command::Cancel(reply) => {
                let _ = reply.send(self.cancel().await);
            }
            Command::Operate(operation, reply) => {
                let _ = reply.send(self.operate(operation).await);
            }
        }
    }

    fn view(&self) -> View {
        let trials = self.ledger.trials().values().cloned().collect();
        View { sweep: self.ledger.record().sweep.clone(), trials }
    }

    fn now(&self) -> Timestamp {
        self.tools.clock.now()
    }

    fn standing(&self, number: u32, attempt: Attempt) -> Result<Standing> {
        Standing::of(&self.ledger.get(number)?.trial, attempt)
    }

    async fn metrics(&mut self, number: u32, attempt: Attempt, points: &[MetricPoint]) -> Result<()> {
        if self.standing(number, attempt)? == Standing::Over {
            return Ok(());
        }
        self.ledger.metrics(number, points)?;
        // Of a batch, watchers hear the newest point, and each one that trials are compared by.
        let trial = self.ledger.get(number)?.trial.id.clone();
        let compared = &self.ledger.record().sweep.spec.search.metric;
        let last = points.len().saturating_sub(1);
        let told = points.iter().enumerate().filter(|(i, p)| *i == last || p.get(compared).is_some());
        for (_, point) in told {
            self.publish(Change::Progress(trial.clone(), attempt, point.clone()));
        }
        if self.ledger.is_changed() { self.save().await } else { Ok(()) }
    }

    async fn event(&mut self, number: u32, attempt: Attempt, event: TrialEvent) -> Result<()> {
        if self.standing(number, attempt)? == Standing::Over {
            return Ok(());
        }
        let trial = self.ledger.get(number)?.trial.id.clone();
        tracing::info!(%trial, %attempt, event = event.name(), "the agent reports");
        if !matches!(event, TrialEvent::Started { .. }) {
            let given_back = event == TrialEvent::Released;
            let seconds = self.tools.dispatcher.release(trial.clone(), attempt, given_back).await?;
            self.ledger.close_account(number, seconds, self.now())?;
        }
        if let TrialEvent::Failed(failure) = &event {
            self.why.insert(number, failure.message.clone());
        }
        self.ledger.event(number, event, self.now())?;
        self.save().await?;
        if self.ledger.get(number)?.trial.state.is_terminal() {
            // A start that was refused: the agent still trains. Otherwise nothing is held, and nothing is sent.
            let stop = ToAgent::Stop(trial.clone(), attempt, StopReason::Fenced);
            self.tools.dispatcher.send(trial.clone(), attempt, stop).await?;
            self.tools.dispatcher.release(trial, attempt, false).await?;
        }
        Ok(())
    }

    async fn checkpoint(
        &mut self,
        number: u32,
        attempt: Attempt,
        step: u64,
        stored: Stored,
    ) -> Result<Vec<String>> {
        if self.standing(number, attempt)? == Standing::Over {
            return self.ledger.unused(number, stored);
        }
        let unused = self.ledger.checkpoint(number, step, stored)?;
        self.save().await?;
        Ok(unused)
    }

    async fn stop_trial(&mut self, number: u32) -> Result<TrialRecord> {
        self.ledger.stop_trial(number, StopCause::Person, self.now())?;
        self.abandon(vec![self.ledger.get(number)?.trial.id.clone()]).await?;
        self.save().await?;
        self.ledger.get(number).cloned()
    }

    async fn cancel(&mut self) -> Result<View> {
        self.ledger.stop_all(StopCause::Person, self.now())?;
        self.abandon(self.held()).await?;
        self.save().await?;
        Ok(self.view())
    }

    async fn operate(&mut self, operation: Operation) -> Result<View> {
        self.apply(operation)?;
        self.save().await?;
        Ok(self.view())
    }

    fn apply(&mut self, operation: Operation) -> Result<()> {
        let now = self.now();
        match operation {
            Operation::Pause => self.ledger.pause(now),
            Operation::Resume => self.ledger.resume(now),
            Operation::Extend(request_id, spec) => self.ledger.extend(&request_id, *spec, now),
            Operation::Retry(number) => self.ledger.retry(number, now),
        }
    }

    /// The trials that hold a device.
    fn held(&self) -> Vec<TrialId> {
        let held = self.ledger.trials().values().filter(|t| t.placement.is_some());
        held.map(|t| t.trial.id.clone()).collect()
    }

    /// Ends those of these stopped trials whose agents are away: those may never come back to be told.
    async fn abandon(&mut self, stopped: Vec<TrialId>) -> Result<()> {
        let now = self.now();
        for (trial, seconds) in self.tools.dispatcher.abandon(stopped).await? {
            let Some(number) = trial.number() else { continue };
            self.ledger.close_account(number, seconds, now)?;
            self.ledger.lost(number, "its agent is away", now)?;
        }
        Ok(())
    }

    async fn hear(&mut self, signal: Signal) -> Result<()> {
        match signal {
            Signal::Granted(number, attempt, Some(grant)) => self.granted(number, attempt, grant).await,
            Signal::Lost(number, attempt, Some(seconds)) => self.lost(number, attempt, seconds).await,
            Signal::Granted(_, _, None) | Signal::Lost(_, _, None) => Ok(()),
        }
    }

    async fn granted(&mut self, number: u32, attempt: Attempt, grant: Grant) -> Result<()> {
        let trial = &self.ledger.get(number)?.trial;
        let id = trial.id.clone();
        if trial.state != TrialState::Queued || trial.attempt.next() != attempt {
            self.tools.dispatcher.release(id, attempt, false).await?;
            return Ok(());
        }
        let Grant { agent, device, price_per_hour, lost } = grant;
        tracing::info!(trial = %id, %attempt, %agent, %device, "assigning");
        let assignment = self.ledger.assign(number, Placement { agent, device, price_per_hour })?;
        self.save().await?;
        self.await_loss(number, attempt, lost);
        let message = ToAgent::Assign(Box::new(assignment));
        Ok(self.tools.dispatcher.send(id, attempt, message).await?)
    }

    async fn lost(&mut self, number: u32, attempt: Attempt, seconds: f64) -> Result<()> {
        if !matches!(self.standing(number, attempt), Ok(Standing::Current)) {
            return Ok(());
        }
        self.ledger.close_account(number, seconds, self.now())?;
        let why = "its agent was not heard from for a whole lease";
        self.why.insert(number, why.into());
        self.ledger.lost(number, why, self.now())?;
        self.save().await
    }

    /// Charges what runs, and ends the sweep if its budget is spent.
    async fn look_at_budget(&mut self) -> Result<()> {
        let now = self.now();
        for (trial, seconds) in self.tools.dispatcher.used(self.held()).await? {
            if let Some(number) = trial.number() {
                self.ledger.charge(number, seconds, now)?;
            }
        }
        self.ledger.settle(now);
        let record = self.ledger.record();
        let (sweep, budget) = (&record.sweep, &record.sweep.spec.budget);
        let elapsed = record.active_seconds(now);
        if let Some(spent) = spent(budget, sweep.cost_usd, elapsed)
            && record.stop.is_none()
        {
            tracing::info!(sweep = %sweep.id, cost_usd = sweep.cost_usd, elapsed, spent);
            self.ledger.ended_early(spent);
            self.ledger.stop_all(StopCause::Budget, now)?;
        }
        if self.ledger.is_changed() { self.save().await } else { Ok(()) }
    }

    /// Proposes what may wait, writes every change in one batch, then tells watchers, dispatcher and agents.
    /// If the changes cannot be written, the coordinator ends: what it knows is not what is durable.
    async fn save(&mut self) -> Result<()> {
        let now = self.now();
        self.ledger.fill(now);
        self.ledger.settle(now);
        let (sweep_changed, trials) = self.ledger.changes();
        let mut batch = Batch::default();
        for number in &trials {
            let told = self.told.entry(*number).or_default();
            let why = self.why.remove(number);
            let news = told.news(self.ledger.get(*number)?, why.as_deref(), now);
            let first = self.ledger.logged(*number, news.len())?;
            for (entry, what) in (first..).zip(&news) {
                batch.log(&self.ledger.record().sweep.id, *number, entry, what);
            }
            batch.trial(self.ledger.get(*number)?);
        }
        if sweep_changed {
            batch.sweep(self.ledger.record());
        }
        if let Err(error) = self.tools.store.commit(batch).await {
            tracing::error!(%error, "the durable state cannot be written; shutting down");
            self.scope.cancel();
            return Err(error);
        }
        for number in &trials {
            self.publish(Change::Trial(Box::new(self.ledger.get(*number)?.trial.clone())));
        }
        if sweep_changed || !trials.is_empty() {
            let states = self.ledger.trials().values().map(|t| t.trial.state).collect();
            self.publish(Change::Sweep(Box::new(self.ledger.record().sweep.clone()), states));
        }
        for effect in self.ledger.effects() {
            self.perform(effect).await?;
        }
        Ok(())
    }

    fn publish(&self, change: Change) {
        // Nobody may be watching.
        let _ = self.changes.send(change);
    }

    async fn perform(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Enqueue(number) => self.enqueue(number).await,
            Effect::Withdraw => self.withdraw().await,
            Effect::Stop(number, attempt, reason) => {
                let trial = self.ledger.get(number)?.trial.id.clone();
                let stop = ToAgent::Stop(trial.clone(), attempt, reason);
                Ok(self.tools.dispatcher.send(trial, attempt, stop).await?)
            }
        }
    }

    async fn enqueue(&mut self, number: u32) -> Result<()> {
        let needs = self.ledger.needs(number)?;
        let trial = &self.ledger.get(number)?.trial;
        let (granted, grant) = oneshot::channel();
        let attempt = trial.attempt.next();
        let request =
            Request { trial: trial.id.clone(), attempt, created_at: trial.created_at, needs, granted };
        self.tools.dispatcher.enqueue(request).await?;
        self.requests.push(Box::pin(async move { Signal::Granted(number, attempt, grant.await.ok()) }));
        Ok(())
    }

    /// Takes every waiting trial back from the dispatcher.
    async fn withdraw(&mut self) -> Result<()> {
        self.requests.clear();
        let waiting = self.ledger.trials().values().filter(|t| t.trial.state == TrialState::Queued);
        for trial in waiting.map(|t| &t.trial) {
            // A device may have been granted just before.
            self.tools.dispatcher.release(trial.id.clone(), trial.attempt.next(), false).await?;
        }
        Ok(())
    }

    fn await_loss(&self, number: u32, attempt: Attempt, lost: oneshot::Receiver<f64>) {
        self.losses.push(Box::pin(async move { Signal::Lost(number, attempt, lost.await.ok()) }));
    }
}

/// Which part of a budget is spent, if any is.
fn spent(budget: &Budget, cost_usd: f64, elapsed_seconds: f64) -> Option<String> {
    match (budget.max_cost_usd, budget.max_wall_clock_seconds) {
        (Some(most), _) if cost_usd >= most => Some(format!("max_cost_usd of ${most} is spent")),
        (_, Some(most)) if elapsed_seconds >= most => Some(format!("max_wall_clock of {most} s is spent")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_budget_that_is_spent() {
        for (max_cost_usd, max_wall_clock_seconds, want) in [
            (None, None, None),
            (Some(2.5), Some(61.0), None),
            (Some(2.0), Some(60.0), Some("max_cost_usd of $2 is spent")),
            (None, Some(60.0), Some("max_wall_clock of 60 s is spent")),
        ] {
            let budget = Budget { max_cost_usd, max_wall_clock_seconds };
            assert_eq!(spent(&budget, 2.0, 60.0).as_deref(), want, "{budget:?}");
        }
    }
}
