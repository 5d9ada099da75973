//! What lies in a history's directory, read without a change.

use super::index::Index;
use super::recovery::{self, Torn};
use super::{HistoryError, segment};
use domain::metric::MetricPoint;
use domain::{Attempt, TrialId};
use std::collections::BTreeMap;
use std::path::Path;

/// Every point of a history that nobody writes.
#[derive(Debug)]
pub struct Inspection {
    index: Index,
    /// Segment files.
    pub segments: u64,
    /// Points, repetitions aside.
    pub points: u64,
    /// The rest of writes that never were acknowledged; cut off at the next start.
    pub torn: Vec<Torn>,
    /// Points that are there twice with different values: trial, attempt, step.
    pub contradictions: Vec<(TrialId, Attempt, u64)>,
}

/// Reads the segments in `dir`, which need not be there.
///
/// # Errors
/// As [`super::History::open`]'s.
pub fn inspect(dir: &Path) -> Result<Inspection, HistoryError> {
    let (mut index, mut points, mut contradictions) = (Index::default(), 0, Vec::new());
    let (end, torn) = recovery::read_all(dir, |_, record: segment::Record| {
        for point in &record.points {
            match index.get(&record.trial, record.attempt, point.step) {
                None => points += 1,
                Some(first) if same(&first, point) => {}
                Some(_) => contradictions.push((record.trial.clone(), record.attempt, point.step)),
            }
        }
        index.insert(record);
    })?;
    Ok(Inspection { index, segments: end.number, points, torn, contradictions })
}

/// Whether two points say the same, NaN included.
fn same(a: &MetricPoint, b: &MetricPoint) -> bool {
    let bits = |p: &MetricPoint| p.values.iter().map(|(n, v)| (n.clone(), v.to_bits())).collect::<Vec<_>>();
    bits(a) == bits(b)
}

impl Inspection {
    /// See [`super::History::curve`].
    pub fn curve(&self, trial: &TrialId, attempts: &[(Attempt, u64)]) -> Vec<MetricPoint> {
        self.index.curve(trial, attempts)
    }

    /// The trials that have points, each with its newest attempt.
    pub fn trials(&self) -> BTreeMap<TrialId, Attempt> {
        self.index.trials()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Timestamp;

    #[test]
    fn a_point_that_is_there_twice_must_say_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let record = |loss: f64, time| {
            let point = MetricPoint { step: 1, time: Timestamp(time), values: vec![("loss".into(), loss)] };
            segment::Record { trial: TrialId::new("s/1"), attempt: Attempt(1), points: vec![point] }
        };
        let mut bytes = segment::header(0);
        for one in [record(f64::NAN, 1), record(f64::NAN, 2)] {
            bytes.extend(segment::frame(&[one]).unwrap());
        }
        std::fs::write(segment::path(dir.path(), 1), &bytes).unwrap();
        let found = inspect(dir.path()).unwrap();
        assert_eq!(
            (found.segments, found.points, found.contradictions.len(), found.torn.len()),
            (1, 1, 0, 0)
        );
        bytes.extend(segment::frame(&[record(1.0, 1)]).unwrap());
        bytes.extend(b"LFGC and no more");
        std::fs::write(segment::path(dir.path(), 1), &bytes).unwrap();
        let found = inspect(dir.path()).unwrap();
        assert_eq!(found.contradictions, [(TrialId::new("s/1"), Attempt(1), 1)]);
        assert_eq!(found.torn[0].bytes, 16);
        assert_eq!(std::fs::read(segment::path(dir.path(), 1)).unwrap(), bytes, "nothing is cut");
        assert_eq!(found.trials(), [(TrialId::new("s/1"), Attempt(1))].into());
    }
}
