//! The points in memory, as small as they can be: the metrics of a point are named once for all points that measure
//! the same ones.

use super::segment::Record;
use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, Timestamp, TrialId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Points by trial, attempt and step.
#[derive(Debug, Default)]
pub(super) struct Index {
    trials: HashMap<TrialId, Vec<Kept>>,
    /// The lists of names that points refer to.
    names: HashSet<Arc<[String]>>,
}

/// The points of an attempt, in the order of their steps.
#[derive(Debug)]
struct Kept {
    attempt: Attempt,
    points: Vec<Point>,
    /// The lists of names that they have, each once.
    kinds: Vec<Arc<[String]>>,
}

#[derive(Debug)]
struct Point {
    step: u64,
    time: Timestamp,
    names: Arc<[String]>,
    values: Box<[f64]>,
}

impl Point {
    fn whole(&self) -> MetricPoint {
        let values = self.names.iter().cloned().zip(self.values.iter().copied()).collect();
        MetricPoint { step: self.step, time: self.time, values }
    }
}

impl Index {
    /// Adds points; where there is one already, that one stays.
    pub(super) fn insert(&mut self, record: Record) {
        let mut fresh: Vec<_> = record.points.into_iter().map(|point| self.small(point)).collect();
        fresh.sort_by_key(|point| point.step);
        fresh.dedup_by_key(|point| point.step);
        let attempts = self.trials.entry(record.trial).or_default();
        let at = attempts.iter().position(|kept| kept.attempt == record.attempt).unwrap_or_else(|| {
            // Most trials have one attempt.
            attempts.reserve_exact(1);
            attempts.push(Kept { attempt: record.attempt, points: Vec::new(), kinds: Vec::new() });
            attempts.len() - 1
        });
        let Kept { points, kinds, .. } = &mut attempts[at];
        let (Some(first), last) = (fresh.first(), points.last()) else { return };
        if last.is_some_and(|last| last.step >= first.step) {
            fresh.retain(|point| find(points, point.step).is_none());
        }
        for point in &fresh {
            // The last kind comes again most often.
            if !kinds.iter().rev().any(|kind| Arc::ptr_eq(kind, &point.names)) {
                kinds.reserve_exact(1);
                kinds.push(point.names.clone());
            }
        }
        let ordered = points.last().zip(fresh.first()).is_none_or(|(last, first)| last.step < first.step);
        if points.is_empty() {
            points.reserve_exact(fresh.len());
        }
        points.append(&mut fresh);
        if !ordered {
            points.sort_by_key(|point| point.step);
        }
    }

    fn small(&mut self, point: MetricPoint) -> Point {
        let MetricPoint { step, time, values } = point;
        let (names, values): (Vec<_>, Vec<_>) = values.into_iter().unzip();
        let known = self.names.get(names.as_slice()).cloned();
        let names = known.unwrap_or_else(|| {
            let names: Arc<[String]> = names.into();
            self.names.insert(names.clone());
            names
        });
        Point { step, time, names, values: values.into() }
    }

    /// Drops the points of sweeps.
    pub(super) fn forget(&mut self, gone: impl Fn(&SweepId) -> bool) {
        self.trials.retain(|trial, _| trial.sweep().is_none_or(|sweep| !gone(&sweep)));
        self.names.retain(|names| Arc::strong_count(names) > 1);
    }

    /// Whether there is a point.
    pub(super) fn contains(&self, trial: &TrialId, attempt: Attempt, step: u64) -> bool {
        self.find(trial, attempt, step).is_some()
    }

    /// How many different lists of names the points of an attempt have, these included.
    pub(super) fn kinds(&self, trial: &TrialId, attempt: Attempt, points: &[MetricPoint]) -> usize {
        let kept = self.trials.get(trial).and_then(|kept| kept.iter().find(|kept| kept.attempt == attempt));
        let kinds = kept.map(|kept| kept.kinds.as_slice()).unwrap_or_default();
        let is = |kind: &[String], point: &MetricPoint| {
            kind.len() == point.values.len()
                && kind.iter().zip(&point.values).all(|(name, (other, _))| name == other)
        };
        let mut fresh: Vec<Vec<&String>> = Vec::new();
        for point in points {
            if !kinds.iter().rev().any(|kind| is(kind, point)) {
                let names: Vec<_> = point.values.iter().map(|(name, _)| name).collect();
                if !fresh.contains(&names) {
                    fresh.push(names);
                }
            }
        }
        kinds.len() + fresh.len()
    }

    /// A point.
    pub(super) fn get(&self, trial: &TrialId, attempt: Attempt, step: u64) -> Option<MetricPoint> {
        self.find(trial, attempt, step).map(Point::whole)
    }

    fn find(&self, trial: &TrialId, attempt: Attempt, step: u64) -> Option<&Point> {
        let kept = self.trials.get(trial)?.iter().find(|kept| kept.attempt == attempt)?;
        find(&kept.points, step)
    }

    /// The newest attempt of a trial that has points.
    pub(super) fn newest_attempt(&self, trial: &TrialId) -> Option<Attempt> {
        self.trials.get(trial)?.iter().map(|kept| kept.attempt).max()
    }

    /// The trials that have points, each with its newest attempt.
    pub(super) fn trials(&self) -> BTreeMap<TrialId, Attempt> {
        let newest = |trial: &TrialId| Some((trial.clone(), self.newest_attempt(trial)?));
        self.trials.keys().filter_map(newest).collect()
    }

    /// See [`super::History::curve`].
    pub(super) fn curve(&self, trial: &TrialId, attempts: &[(Attempt, u64)]) -> Vec<MetricPoint> {
        let Some(kept) = self.trials.get(trial) else { return Vec::new() };
        let mut attempts = attempts.to_vec();
        attempts.sort_unstable();
        // From the last attempt back: `end` is the least start step of those after it.
        let (mut end, mut curve) = (u64::MAX, BTreeMap::new());
        for (attempt, start) in attempts.into_iter().rev() {
            let points = kept.iter().find(|kept| kept.attempt == attempt).map(|kept| kept.points.as_slice());
            for point in points.unwrap_or_default() {
                if (start..=end).contains(&point.step) {
                    curve.entry(point.step).or_insert(point);
                }
            }
            end = end.min(start);
        }
        curve.into_values().map(Point::whole).collect()
    }
}

/// The point of a step, of points in the order of their steps.
fn find(points: &[Point], step: u64) -> Option<&Point> {
    let at = points.binary_search_by_key(&step, |point| point.step).ok()?;
    points.get(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A point that says which attempt it is of.
    fn point(attempt: u32, step: u64) -> MetricPoint {
        MetricPoint { step, time: Timestamp(u64::from(attempt)), values: vec![("loss".into(), step as f64)] }
    }

    fn index(kept: &[(u32, Vec<u64>)]) -> Index {
        let mut index = Index::default();
        for (attempt, steps) in kept {
            let points = steps.iter().map(|step| point(*attempt, *step)).collect();
            index.insert(Record { trial: TrialId::new("s/1"), attempt: Attempt(*attempt), points });
        }
        index
    }

    /// The curve as (attempt, step).
    fn curve(kept: &[(u32, Vec<u64>)], attempts: &[(u32, u64)]) -> Vec<(u32, u64)> {
        let attempts: Vec<_> = attempts.iter().map(|(attempt, start)| (Attempt(*attempt), *start)).collect();
        let curve = index(kept).curve(&TrialId::new("s/1"), &attempts);
        curve.into_iter().map(|p| (p.time.0 as u32, p.step)).collect()
    }

    #[track_caller]
    fn check(kept: &[(u32, &[u64])], attempts: &[(u32, u64)], expected: &[(u32, u64)]) {
        let kept: Vec<_> = kept.iter().map(|(attempt, steps)| (*attempt, steps.to_vec())).collect();
        assert_eq!(curve(&kept, attempts), expected, "{kept:?} {attempts:?}");
    }

    #[test]
    fn attempts_make_one_curve() {
        // No attempts, no points, an attempt that the record does not know.
        check(&[(1, &[1, 2])], &[], &[]);
        check(&[], &[(1, 0)], &[]);
        check(&[(1, &[1]), (9, &[2])], &[(1, 0)], &[(1, 1)]);
        // Points come in any order.
        check(&[(1, &[3, 1, 2])], &[(1, 0)], &[(1, 1), (1, 2), (1, 3)]);
        // The second starts from the checkpoint at 2: the first one's point of step 2 stays, its 3 goes.
        check(&[(1, &[1, 2, 3]), (2, &[3, 4])], &[(1, 0), (2, 2)], &[(1, 1), (1, 2), (2, 3), (2, 4)]);
        // It has not reported yet.
        check(&[(1, &[1, 2, 3])], &[(1, 0), (2, 2)], &[(1, 1), (1, 2)]);
        // From the beginning: step 0, measured before training, is measured again.
        check(&[(1, &[0, 1, 2]), (2, &[0, 1])], &[(1, 0), (2, 0)], &[(2, 0), (2, 1)]);
        check(&[(1, &[0, 1, 2])], &[(1, 0), (2, 0)], &[(1, 0)]);
        // The third starts before the second did: the second's points are all undone.
        check(
            &[(1, &[1, 2, 3]), (2, &[3, 4]), (3, &[2, 3])],
            &[(1, 0), (2, 2), (3, 1)],
            &[(1, 1), (3, 2), (3, 3)],
        );
        // The third starts where the second did, and the second ended before it reported.
        check(&[(1, &[1, 2]), (3, &[2, 3])], &[(1, 0), (2, 1), (3, 1)], &[(1, 1), (3, 2), (3, 3)]);
        // Attempts are given in any order; a late point of an old attempt changes nothing.
        check(&[(2, &[2]), (1, &[1, 2, 3])], &[(2, 1), (1, 0)], &[(1, 1), (2, 2)]);
    }

    #[test]
    fn the_first_point_of_a_step_stays() {
        let mut index = index(&[(1, vec![1])]);
        let again = MetricPoint { values: vec![], ..point(1, 1) };
        index.insert(Record { trial: TrialId::new("s/1"), attempt: Attempt(1), points: vec![again] });
        assert_eq!(index.curve(&TrialId::new("s/1"), &[(Attempt(1), 0)]), [point(1, 1)]);
        assert!(index.contains(&TrialId::new("s/1"), Attempt(1), 1));
        assert!(!index.contains(&TrialId::new("s/1"), Attempt(2), 1));
        assert!(!index.contains(&TrialId::new("s/2"), Attempt(1), 1));
    }

    proptest! {
        /// The rule as it is said: a point counts between its attempt's start and every later attempt's.
        #[test]
        fn agrees_with_the_rule_as_said(
            kept in prop::collection::vec(prop::collection::vec(0..12_u64, 0..12), 0..5),
            starts in prop::collection::vec(0..12_u64, 0..5),
        ) {
            let kept: Vec<_> = (1..).zip(kept).collect();
            let attempts: Vec<_> = (1..).zip(starts).collect();
            let counts = |attempt: u32, step: u64| {
                attempts.iter().any(|(a, start)| *a == attempt && step >= *start)
                    && attempts.iter().all(|(a, start)| *a <= attempt || step <= *start)
            };
            let has = |attempt: u32, step: u64| kept.iter().any(|(a, s)| *a == attempt && s.contains(&step));
            let expected: Vec<_> = (0..12)
                .filter_map(|step| {
                    let last = (1..=5).rev().find(|attempt| has(*attempt, step) && counts(*attempt, step));
                    last.map(|attempt| (attempt, step))
                })
                .collect();
            prop_assert_eq!(curve(&kept, &attempts), expected);
        }
    }
}
