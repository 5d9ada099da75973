#![doc = include_str!("README.md")]

mod draw;
mod enumerate;
mod halving;
mod space;

use domain::sweep::{Algorithm, Problem, SweepSpec};
use domain::trial::TrialConfig;
use halving::Halving;
use serde_json::Value;
use space::{Candidate, Identity, Space};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// Draws of one trial before its space counts as exhausted.
const MOST_DRAWS: u32 = 1000;

/// Chooses a sweep's trials, and says which end early.
#[derive(Debug)]
pub struct Searcher {
    space: Space,
    source: Source,
    halving: Option<Halving>,
    proposed: u32,
    running: BTreeSet<u32>,
    /// What was proposed so far.
    seen: HashSet<Identity>,
    /// Trials that were proposed before the space was last changed.
    before: u32,
    max_trials: Option<u32>,
    max_concurrent: u32,
}

/// Where trials come from.
#[derive(Debug)]
enum Source {
    /// All that come after those proposed `before`.
    List { candidates: Vec<Candidate>, rejected: u32 },
    /// Drawn one by one; what was drawn is not drawn again. A small space is known in full beside it.
    Draws { seed: u64, few: Option<Vec<Candidate>> },
}

/// What `propose` says.
#[allow(clippy::large_enum_variant, reason = "made once for each trial and taken apart at once")]
#[derive(Debug, Clone, PartialEq)]
pub enum Proposal {
    /// The next trial.
    Trial(Proposed),
    /// Nothing until a trial ends: as many are under way as may be.
    Wait,
    /// There is no further trial.
    Exhausted,
}

/// A new trial.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposed {
    /// Its number: 1, 2, 3, ….
    pub number: u32,
    /// The values that the search chose, by parameter; constants and parameters that do not apply are not here.
    pub parameters: BTreeMap<String, Value>,
    /// Every parameter with the value in force.
    pub config: TrialConfig,
}

/// What becomes of a trial that has reported a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Continue,
    /// It ends here; its device is better used by another.
    Stop,
}

impl Searcher {
    /// A searcher that has proposed nothing yet.
    ///
    /// # Errors
    /// What makes the search impossible: an endless grid, one that would repeat or drop a combination,
    /// constraints that nothing meets.
    pub fn new(spec: &SweepSpec) -> Result<Self, Vec<Problem>> {
        let space = Space::new(spec)?;
        let seen = HashSet::new();
        let (source, max_trials) = source(spec, &space, &seen)?;
        let halving = (spec.search.algorithm == Algorithm::Asha).then(|| Halving::new(spec));
        let searcher = Self {
            space,
            source,
            halving,
            proposed: 0,
            running: BTreeSet::new(),
            seen,
            before: 0,
            max_trials,
            max_concurrent: spec.search.max_concurrent_trials.unwrap_or(u32::MAX),
        };
        searcher.candidate(1).map(|_| searcher).ok_or_else(nothing_meets_the_constraints)
    }

    /// Goes on under a changed spec: with more trials, or in another space. What was proposed stays, and is not
    /// proposed again.
    ///
    /// # Errors
    /// As [`Searcher::new`]; nothing changes then.
    pub fn extend(&mut self, spec: &SweepSpec) -> Result<(), Vec<Problem>> {
        let space = Space::new(spec)?;
        let (source, max_trials) = source(spec, &space, &self.seen)?;
        if let (Some(halving), Algorithm::Asha) = (&mut self.halving, spec.search.algorithm) {
            halving.extend(Halving::new(spec));
        }
        (self.space, self.source, self.max_trials) = (space, source, max_trials);
        self.before = self.proposed;
        Ok(())
    }

    /// Trials in all, if that is bounded. Draws from a large space may end sooner, when nothing new is found.
    pub fn size(&self) -> Option<u32> {
        match &self.source {
            Source::List { candidates, .. } => u32::try_from(self.before as usize + candidates.len()).ok(),
            Source::Draws { .. } => self.max_trials,
        }
    }

    /// Combinations that constraints left out of a grid or of one factor at a time.
    pub fn rejected(&self) -> u32 {
        match &self.source {
            Source::List { rejected, .. } => *rejected,
            Source::Draws { .. } => 0,
        }
    }

    /// The next trial, if there is one and it may start now.
    pub fn propose(&mut self) -> Proposal {
        let waits = u32::try_from(self.running.len()).unwrap_or(u32::MAX) >= self.max_concurrent;
        let number = self.proposed + 1;
        let Some(candidate) = self.candidate(number) else {
            return Proposal::Exhausted;
        };
        if waits {
            return Proposal::Wait;
        }
        self.take(number, &candidate);
        Proposal::Trial(self.proposal(number, candidate))
    }

    /// Proposes the first `count` trials again after a restart, heedless of how many may run at a time;
    /// those that are over are to be ended again.
    pub fn fast_forward(&mut self, count: u32) -> Vec<Proposed> {
        let mut again = Vec::new();
        while self.proposed < count {
            let number = self.proposed + 1;
            let Some(candidate) = self.candidate(number) else { break };
            self.take(number, &candidate);
            again.push(self.proposal(number, candidate));
        }
        again
    }

    /// A trial has reported a value of the sweep's metric at a step. The same report again gets the same
    /// answer.
    pub fn report(&mut self, number: u32, step: u64, value: f64) -> Verdict {
        self.halving.as_mut().map_or(Verdict::Continue, |halving| halving.report(number, step, value))
    }

    /// A trial is over, in whatever state; `None` if it came to no value.
    pub fn ended(&mut self, number: u32, value: Option<f64>) {
        self.running.remove(&number);
        if let Some(halving) = self.halving.as_mut()
            && value.is_none_or(f64::is_nan)
        {
            halving.infeasible(number);
        }
    }

    /// A trial that was over is under way again: it may come to a value after all.
    pub fn again(&mut self, number: u32) {
        self.running.insert(number);
        if let Some(halving) = self.halving.as_mut() {
            halving.again(number);
        }
    }

    fn candidate(&self, number: u32) -> Option<Candidate> {
        match &self.source {
            Source::List { candidates, .. } => candidates.get((number - self.before) as usize - 1).cloned(),
            Source::Draws { .. } if self.max_trials.is_some_and(|most| number > most) => None,
            Source::Draws { seed, few } => draw::next(&self.space, *seed, number, &self.seen)
                .or_else(|| few.as_ref()?.iter().find(|c| !self.seen.contains(&c.identity)).cloned()),
        }
    }

    fn take(&mut self, number: u32, candidate: &Candidate) {
        self.proposed = number;
        self.running.insert(number);
        self.seen.insert(candidate.identity);
    }

    fn proposal(&self, number: u32, candidate: Candidate) -> Proposed {
        let parameters = self.space.chosen(&candidate);
        Proposed { number, parameters, config: candidate.config }
    }
}

/// Where the trials come from that were not proposed yet, and how many there may be in all.
fn source(
    spec: &SweepSpec,
    space: &Space,
    seen: &HashSet<Identity>,
) -> Result<(Source, Option<u32>), Vec<Problem>> {
    let limit = spec.search.max_trials;
    let list = match spec.search.algorithm {
        Algorithm::Grid => enumerate::grid(space)?,
        Algorithm::OneFactorAtATime => enumerate::one_factor(space)?,
        Algorithm::Random | Algorithm::Asha => {
            let few = enumerate::few(space);
            let fresh = few.as_ref().map(|few| few.iter().filter(|c| !seen.contains(&c.identity)).count());
            let all = fresh.and_then(|fresh| u32::try_from(seen.len() + fresh).ok());
            // A small space may hold fewer than the limit.
            let most = all.map_or(limit, |all| limit.min(Some(all)));
            return Ok((Source::Draws { seed: spec.search.seed, few }, most));
        }
    };
    Ok((enumerate::checked(space, list, seen, limit)?, limit))
}

fn nothing_meets_the_constraints() -> Vec<Problem> {
    let problem = "no combination of values meets them all";
    vec![Problem::new("constraints", problem, "loosen a constraint or widen a parameter")]
}
