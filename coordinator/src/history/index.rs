//! The points in memory.

use super::segment::Record;
use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, TrialId};
use std::collections::{BTreeMap, HashMap};

/// Points by trial, attempt and step.
#[derive(Debug, Default)]
pub(super) struct Index(HashMap<TrialId, BTreeMap<Attempt, BTreeMap<u64, MetricPoint>>>);

impl Index {
    /// Adds points; where there is one already, that one stays.
    pub(super) fn insert(&mut self, record: Record) {
        let points = self.0.entry(record.trial).or_default().entry(record.attempt).or_default();
        for point in record.points {
            points.entry(point.step).or_insert(point);
        }
    }

    /// Drops the points of sweeps.
    pub(super) fn forget(&mut self, gone: impl Fn(&SweepId) -> bool) {
        self.0.retain(|trial, _| trial.sweep().is_none_or(|sweep| !gone(&sweep)));
    }

    /// Whether there is a point.
    pub(super) fn contains(&self, trial: &TrialId, attempt: Attempt, step: u64) -> bool {
        self.get(trial, attempt, step).is_some()
    }

    /// A point.
    pub(super) fn get(&self, trial: &TrialId, attempt: Attempt, step: u64) -> Option<&MetricPoint> {
        self.0.get(trial)?.get(&attempt)?.get(&step)
    }

    /// The trials that have points, each with its newest attempt.
    pub(super) fn trials(&self) -> BTreeMap<TrialId, Attempt> {
        let newest = |(trial, attempts): (&TrialId, &BTreeMap<Attempt, _>)| {
            Some((trial.clone(), *attempts.last_key_value()?.0))
        };
        self.0.iter().filter_map(newest).collect()
    }

    /// See [`super::History::curve`].
    pub(super) fn curve(&self, trial: &TrialId, attempts: &[(Attempt, u64)]) -> Vec<MetricPoint> {
        let Some(kept) = self.0.get(trial) else { return Vec::new() };
        let mut attempts = attempts.to_vec();
        attempts.sort_unstable();
        // From the last attempt back: `end` is the least start step of those after it.
        let (mut end, mut curve) = (u64::MAX, BTreeMap::new());
        for (attempt, start) in attempts.into_iter().rev() {
            if let (Some(points), true) = (kept.get(&attempt), start <= end) {
                for (step, point) in points.range(start..=end) {
                    curve.entry(*step).or_insert(point);
                }
            }
            end = end.min(start);
        }
        curve.into_values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Timestamp;
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
