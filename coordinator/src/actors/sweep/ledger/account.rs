//! What trials cost.

use super::Ledger;
use crate::actors::dispatcher::{Charged, Used};
use crate::error::Result;
use crate::store::TrialRecord;
use domain::Timestamp;
use std::time::Duration;

impl Ledger {
    /// What the current assignment has cost so far: device seconds × share × price.
    pub fn charge(&mut self, number: u32, seconds: f64, now: Timestamp) -> Result<()> {
        let record = self.get(number)?;
        let price = record.placement.as_ref().map_or(0.0, |p| p.price_per_hour);
        self.set_cost(number, record.earlier_cost_usd + seconds * price / 3600.0, now)
    }

    fn set_cost(&mut self, number: u32, cost: f64, now: Timestamp) -> Result<()> {
        let record = self.get_mut(number)?;
        if record.trial.cost_usd != Some(cost) {
            let before = record.trial.cost_usd.replace(cost);
            record.charged_at = Some(now);
            self.changes.trials.insert(number);
            self.tally.charge(before, Some(cost));
        }
        Ok(())
    }

    /// The same of one that goes on, with what the next coordinator has to know to go on with its account.
    pub fn charge_used(&mut self, number: u32, used: Used, now: Timestamp) -> Result<()> {
        let before = self.get(number)?.trial.cost_usd;
        self.charge(number, used.seconds, now)?;
        let record = self.get_mut(number)?;
        if record.trial.cost_usd != before {
            record.charged_held_seconds = used.held.map(|held| held.as_secs_f64());
        }
        Ok(())
    }

    /// Goes on with the account of an assignment after a restart: what was charged so far stands. Answers with
    /// until when that was.
    pub fn reopen_account(&mut self, number: u32) -> Result<Option<Charged>> {
        let record = self.get_mut(number)?;
        record.earlier_cost_usd = record.trial.cost_usd.unwrap_or_default();
        let held = record.charged_held_seconds;
        let held = held.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Ok(record.charged_at.map(|at| Charged { at, held }))
    }

    /// The current assignment ends: what it cost comes before what the next one will. On a simulated device it costs the seconds
    /// that its model took, if the agent says them: in what a clock measured is the work of the machine that simulates, as often
    /// as the device's speed says.
    pub fn close_account(
        &mut self,
        number: u32,
        seconds: f64,
        modelled: Option<f64>,
        now: Timestamp,
    ) -> Result<()> {
        let record = self.get(number)?;
        match modelled.and_then(|seconds| modelled_cost(record, seconds)) {
            Some(cost) => self.set_cost(number, cost, now)?,
            None => self.charge(number, seconds, now)?,
        }
        let record = self.get_mut(number)?;
        record.earlier_cost_usd = record.trial.cost_usd.unwrap_or_default();
        Ok(())
    }
}

/// What a trial of a simulated device cost, of whose seconds the current assignment took so many.
fn modelled_cost(record: &TrialRecord, seconds: f64) -> Option<f64> {
    let placement = record.placement.as_ref().filter(|_| record.trial.is_simulated())?;
    Some(placement.before_usd? + seconds * placement.is.as_ref()?.price_per_hour / 3600.0)
}
