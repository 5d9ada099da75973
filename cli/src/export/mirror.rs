//! A sweep in another tool, which is told piece by piece what it lacks: all at once of a sweep as it stands, or as it
//! comes of one that is followed.

use super::Source;
use crate::board::{Board, Change};
use crate::client::Connection;
use crate::follow::{Cut, Listener};
use crate::output::say;
use crate::{Failure, trials, view};
use domain::metric::MetricPoint;
use domain::sweep::SweepSpec;
use domain::trial::Trial;
use domain::{Attempt, Clock, SystemClock};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A sweep as it stands.
pub(super) struct Picture<'a> {
    /// The sweep as `lorafleet get` shows it.
    pub(super) document: &'a Value,
    /// Its spec.
    pub(super) spec: &'a SweepSpec,
    /// Its trials in the order of their numbers.
    pub(super) trials: &'a [&'a Trial],
}

/// A part of a trial's curve.
#[derive(Debug, Clone, Copy)]
pub(super) struct Curve<'a> {
    /// Points of earlier steps are as they were told before.
    pub(super) from: u64,
    /// All others, in the order of their steps.
    pub(super) points: &'a [MetricPoint],
}

/// Another tool's picture of a sweep. What it has is not written again, whoever wrote it.
pub(super) trait Mirror {
    /// Tells of the sweep itself. Comes before its trials.
    async fn sweep(&mut self, picture: &Picture<'_>) -> Result<(), Failure>;

    /// Tells of a trial. No trial comes for the first time before those of smaller numbers.
    async fn trial(&mut self, picture: &Picture<'_>, trial: &Trial, curve: Curve<'_>) -> Result<(), Failure>;
}

/// Tells of the whole sweep as it stands.
pub(super) async fn write(source: &Source<'_>, mirror: &mut impl Mirror) -> Result<(), Failure> {
    let trials: Vec<&Trial> = source.trials.iter().collect();
    let spec = source.spec()?;
    let picture = Picture { document: &source.document, spec: &spec, trials: &trials };
    mirror.sweep(&picture).await?;
    for trial in &trials {
        let points = source.points(trial).await?;
        mirror.trial(&picture, trial, Curve { from: 0, points: &points }).await?;
    }
    Ok(())
}

/// A mirror of a sweep that is followed.
pub(super) struct Live<M> {
    mirror: M,
    /// How long a tool that is gone is waited for, and since when it is.
    patience: Duration,
    gone_since: Option<Duration>,
    clock: SystemClock,
    /// Whether the sweep's own record changed.
    changed: bool,
    /// Numbers of trials of which something is new.
    stale: BTreeSet<u32>,
    told: BTreeMap<u32, Told>,
}

/// What a mirror was told of a trial.
#[derive(Debug, Default)]
struct Told {
    /// Its attempts, as far as they were known.
    attempts: Vec<(Attempt, u64)>,
    /// The step after the last that was told.
    next: u64,
    /// Its record, if it was over.
    ended: Option<Trial>,
}

impl Told {
    /// The first step of which something may be new: an attempt makes the steps behind its start anew.
    fn first_step(&self, attempts: &[(Attempt, u64)]) -> u64 {
        let unknown = attempts.iter().filter(|attempt| !self.attempts.contains(attempt));
        // Step 0, the base's, is measured by an attempt that starts there.
        let begins = unknown.map(|(_, start)| if *start == 0 { 0 } else { start + 1 });
        begins.chain([self.next]).min().unwrap_or(0)
    }
}

impl<M: Mirror> Live<M> {
    /// A mirror that waits so long for a tool that is gone.
    pub(super) fn new(mirror: M, patience: Duration) -> Self {
        Self {
            mirror,
            patience,
            gone_since: None,
            clock: SystemClock::new(),
            changed: true,
            stale: BTreeSet::new(),
            told: BTreeMap::new(),
        }
    }

    async fn tell(&mut self, connection: &Connection, board: &Board) -> Result<(), Cut> {
        let Some(sweep) = board.sweep.as_ref().filter(|_| self.changed || !self.stale.is_empty()) else {
            return Ok(());
        };
        let document = view::sweep(sweep);
        let spec = super::spec(&sweep.id, &document)?;
        // A trial that was not heard of yet stands before those of larger numbers.
        let known = (1..).zip(&board.trials).take_while(|(at, (number, _))| at == *number);
        let trials: Vec<&Trial> = known.map(|(_, (_, trial))| trial).collect();
        let picture = Picture { document: &document, spec: &spec, trials: &trials };
        self.mirror.sweep(&picture).await?;
        self.changed = false;
        for (number, trial) in (1..).zip(&trials) {
            if !self.stale.contains(&number) {
                continue;
            }
            let told = self.told.entry(number).or_default();
            let from = told.first_step(&trial.attempts);
            let points = trials::points_from(connection, trial.id.as_str(), from).await??;
            // A server of an earlier version answers with the whole curve.
            let points = &points[points.partition_point(|point| point.step < from)..];
            self.mirror.trial(&picture, trial, Curve { from, points }).await?;
            told.next = points.last().map_or(from, |last| last.step + 1);
            told.attempts.clone_from(&trial.attempts);
            told.ended = trial.state.is_terminal().then(|| Trial::clone(trial));
            self.stale.remove(&number);
        }
        Ok(())
    }
}

impl<M: Mirror> Listener for Live<M> {
    fn hear(&mut self, board: &Board, change: &Change) {
        match change {
            Change::Sweep => self.changed = true,
            Change::Trial { number, .. } | Change::Progress(number) => {
                // A picture tells again of trials that were over before.
                let told = self.told.get(number).and_then(|told| told.ended.as_ref());
                if told.is_none() || told != board.trials.get(number) {
                    self.stale.insert(*number);
                }
            }
            Change::Nothing => {}
        }
    }

    async fn catch_up(&mut self, connection: &Connection, board: &Board) -> Result<(), Cut> {
        loop {
            match self.tell(connection, board).await {
                Err(Cut::Failed(failure)) if failure.is_unreachable() => {
                    let now = self.clock.monotonic();
                    let since = *self.gone_since.get_or_insert_with(|| {
                        say!("{}; trying again", failure.message());
                        now
                    });
                    if now.saturating_sub(since) >= self.patience {
                        return Err(Cut::Failed(failure));
                    }
                    // What is to be told is gathered meanwhile; of a sweep that is over nothing more comes.
                    if !board.is_over() {
                        return Ok(());
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                told => {
                    if told.is_ok() && self.gone_since.take().is_some() {
                        say!("going on");
                    }
                    return told;
                }
            }
        }
    }
}

/// Time between two attempts to tell a tool that is gone of a sweep that is over.
const AGAIN: Duration = Duration::from_secs(1);

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::tests::trials;
    use super::*;

    #[test]
    fn a_curve_is_read_from_where_it_may_be_new() {
        let attempt = |number: u32, start: u64| (Attempt(number), start);
        for (known, next, now, want) in [
            (&[][..], 0, &[][..], 0),
            (&[], 0, &[attempt(1, 0)], 0),
            (&[attempt(1, 0)], 8, &[attempt(1, 0)], 8),
            // It goes on where it was, from a checkpoint behind that, from the beginning.
            (&[attempt(1, 0)], 8, &[attempt(1, 0), attempt(2, 7)], 8),
            (&[attempt(1, 0)], 8, &[attempt(1, 0), attempt(2, 4)], 5),
            (&[attempt(1, 0)], 8, &[attempt(1, 0), attempt(2, 0)], 0),
            // Two attempts began since.
            (&[attempt(1, 0)], 8, &[attempt(1, 0), attempt(2, 2), attempt(3, 6)], 3),
        ] {
            let told = Told { attempts: known.to_vec(), next, ended: None };
            assert_eq!(told.first_step(now), want, "{now:?} after {known:?}");
        }
    }

    struct Deaf;

    impl Mirror for Deaf {
        async fn sweep(&mut self, _: &Picture<'_>) -> Result<(), Failure> {
            Ok(())
        }

        async fn trial(&mut self, _: &Picture<'_>, _: &Trial, _: Curve<'_>) -> Result<(), Failure> {
            Ok(())
        }
    }

    #[test]
    fn a_trial_that_was_over_is_told_again_only_if_it_changed() {
        let mut live = Live::new(Deaf, Duration::ZERO);
        let mut board = Board::default();
        let (one, two) = (trials().remove(0), trials().remove(1));
        board.trials.extend([(1, one.clone()), (2, two)]);
        live.told.insert(1, Told { ended: Some(one), ..Told::default() });
        live.told.insert(2, Told::default());
        let said = |number| Change::Trial { number, entered: false };
        for (change, want) in [(said(1), vec![]), (said(2), vec![2]), (Change::Nothing, vec![2])] {
            live.hear(&board, &change);
            assert_eq!(live.stale.iter().copied().collect::<Vec<u32>>(), want, "{change:?}");
        }
        // It is tried again.
        board.trials.get_mut(&1).unwrap().attempt = Attempt(3);
        live.hear(&board, &said(1));
        assert_eq!(live.stale.iter().copied().collect::<Vec<u32>>(), [1, 2]);
    }
}
