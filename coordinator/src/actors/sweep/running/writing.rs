//! What changed is written in one batch, then told to whoever asked or watches, to the dispatcher and to agents.

use super::RunningSweep;
use crate::actors::message::{StopReason, ToAgent};
use crate::actors::sweep::ledger::{Changes, Effect};
use crate::actors::sweep::{Change, budget, traced};
use crate::error::Result;
use crate::store::Batch;
use crate::trouble::{RETRY, Storage};
use domain::trial::TrialState;
use tokio::time::Instant;

impl RunningSweep {
    /// Writes what changed, then tells of it. What the disk refuses is tried again later, and told of then.
    ///
    /// # Errors
    /// Another coordinator leads, or a defect: what this one knows is not what is durable.
    pub(super) async fn save(&mut self) -> Result<()> {
        match self.write().await {
            Ok(()) => self.tell().await,
            Err(error) if error.is_storage() => {
                self.tools.trouble.failed(Storage::Registry, &error);
                self.retry_at = Some(Instant::now() + RETRY);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn has_news(&self) -> bool {
        *self.ledger.changes() != Changes::default() || !self.answers.is_empty()
    }

    /// Proposes what may wait, and writes every change in one batch.
    pub(super) async fn write(&mut self) -> Result<()> {
        let now = self.now();
        self.ledger.fill(now);
        self.ledger.settle(now);
        let trials = self.ledger.changes().trials.clone();
        let mut batch = Batch::default();
        for number in trials {
            let why = self.why.remove(&number);
            let told = self.told.entry(number).or_default();
            let mut news = self.noted.remove(&number).unwrap_or_default();
            news.extend(told.news(self.ledger.get(number)?, why.as_deref(), now));
            let (granted, record) = (self.granted.remove(&number), self.ledger.get(number)?);
            let (stage, untold) =
                traced::follow(self.ledger.record(), record, &news, granted, why.as_deref());
            self.untold.extend(untold);
            self.ledger.staged(number, stage)?;
            let first = self.ledger.logged(number, news.len())?;
            self.entries.extend((first..).zip(news).map(|(entry, what)| (number, entry, what)));
            batch.trial(self.ledger.get(number)?);
        }
        let record = self.ledger.record();
        for (number, entry, what) in &self.entries {
            batch.log(&record.sweep.id, *number, *entry, what);
        }
        if self.ledger.changes().sweep {
            batch.sweep(record);
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.tools.store.commit(batch).await?;
        for (number, _, entry) in self.entries.drain(..) {
            traced::log(self.ledger.record(), &self.ledger.get(number)?.trial, entry);
        }
        let durable = self.now();
        self.untold.drain(..).for_each(|untold| untold.tell(durable));
        self.count();
        self.tools.trouble.succeeded(Storage::Registry);
        Ok(())
    }

    /// Keeps the metrics' count of its trials, and of itself.
    pub(super) fn count(&mut self) {
        let record = self.ledger.record();
        let level = budget::level(&record.sweep.spec.budget, record.sweep.cost_usd, record.active_seconds());
        for (i, part) in self.budgeted.iter_mut().enumerate() {
            part.set(i64::from(i == level));
        }
        let counts = &record.sweep.counts;
        for (part, state) in self.counted.iter_mut().zip(TrialState::ALL) {
            part.set(i64::from(counts.of(state)));
        }
    }

    /// Tells whoever asked, whoever watches, dispatcher and agents of what is durable now.
    pub(super) async fn tell(&mut self) -> Result<()> {
        let changes = self.ledger.written();
        if self.changes.receiver_count() > 0 {
            for number in &changes.trials {
                let record = self.ledger.get(*number)?;
                self.publish(Change::Trial(Box::new(record.trial.clone()), record.value));
            }
            if changes.sweep || !changes.trials.is_empty() {
                self.publish(Change::Sweep(Box::new(self.ledger.record().sweep.clone())));
            }
        }
        for effect in self.ledger.effects() {
            self.perform(effect).await?;
        }
        for answer in self.answers.drain(..) {
            answer(&self.ledger);
        }
        Ok(())
    }

    pub(super) fn publish(&self, change: Change) {
        // Nobody may be watching.
        let _ = self.changes.send(change);
    }

    async fn perform(&mut self, effect: Effect) -> Result<()> {
        let dispatcher = self.tools.dispatcher.clone();
        match effect {
            Effect::Enqueue(number) => self.enqueue(number).await?,
            Effect::Withdraw => self.withdraw().await?,
            Effect::Assign(assignment) => {
                let (trial, attempt) = (assignment.trial.clone(), assignment.attempt);
                dispatcher.send(trial, attempt, ToAgent::Assign(assignment)).await?;
            }
            Effect::Stop(number, attempt, reason) => {
                let trial = self.ledger.get(number)?.trial.id.clone();
                let stop = ToAgent::Stop(trial.clone(), attempt, reason);
                dispatcher.send(trial.clone(), attempt, stop).await?;
                if reason == StopReason::Fenced {
                    dispatcher.release(trial, attempt, false).await?;
                }
            }
            Effect::Remove(number, paths) => {
                let trial = self.ledger.get(number)?.trial.id.clone();
                let artifacts = self.tools.artifacts.clone();
                // Few files, so that a server that ends waits for it; what a crash leaves goes at the next start.
                self.scope.spawn("retention", async move {
                    domain::crash::point("retention/recorded");
                    artifacts.discard(&trial, paths).await;
                });
            }
        }
        Ok(())
    }
}
