//! Trials against their metric points.

use super::Findings;
use super::records::Records;
use crate::history::Inspection;
use crate::store::TrialRecord;
use domain::TrialId;
use domain::trial::TrialState;
use std::collections::BTreeSet;

/// Missing steps that are named of one trial.
const NAMED: usize = 5;

pub(super) fn check(records: &Records, history: &Inspection, findings: &mut Findings) {
    findings.checked("history segments", usize::try_from(history.segments).unwrap_or(usize::MAX));
    findings.checked("metric points", usize::try_from(history.points).unwrap_or(usize::MAX));
    for torn in &history.torn {
        let what = match torn.whole {
            0 => {
                "bytes of a segment that was just begun; nothing in it was acknowledged, and it is removed at the next start"
            }
            _ => "bytes of a write that never was acknowledged; they are cut off at the next start",
        };
        findings.note(torn.path.display(), format!("{} {what}", torn.bytes));
    }
    for (trial, attempt, step) in &history.contradictions {
        findings.problem(trial, format!("attempt {attempt} has two different points of step {step}"));
    }
    for record in records.trials.values() {
        check_curve(record, history, findings);
    }
    for (trial, newest) in history.trials() {
        match record_of(records, &trial) {
            None => findings
                .note(&trial, "has metric points and no record: its sweep was deleted; they take space"),
            Some(record) => findings.expect(newest <= record.trial.attempt, &trial, || {
                format!(
                    "has points of attempt {newest}, and its record knows {} attempts",
                    record.trial.attempt
                )
            }),
        }
    }
}

fn record_of<'a>(records: &'a Records, trial: &TrialId) -> Option<&'a TrialRecord> {
    records.trials.get(&(trial.sweep()?, trial.number()?))
}

/// Up to the step that the record says is durable, there is a point wherever the trial was to report one.
fn check_curve(record: &TrialRecord, history: &Inspection, findings: &mut Findings) {
    let trial = &record.trial;
    let curve = history.curve(&trial.id, &trial.attempts);
    let there: BTreeSet<u64> = curve.iter().map(|point| point.step).collect();
    let every = u64::from(trial.config.logging_steps);
    let due = |step: &u64| {
        let last = trial.state == TrialState::Completed && *step == trial.step;
        last || (every > 0 && step.is_multiple_of(every))
    };
    let missing: Vec<_> = (1..=trial.step).filter(due).filter(|step| !there.contains(step)).collect();
    if !missing.is_empty() {
        let named = &missing[..missing.len().min(NAMED)];
        let more = if missing.len() > NAMED { ", …" } else { "" };
        let named: Vec<_> = named.iter().map(ToString::to_string).collect();
        let what = format!("{} metric points are missing: steps {}{more}", missing.len(), named.join(", "));
        findings.problem(&trial.id, what);
    }
    if trial.state.is_terminal()
        && let Some(last) = curve.last().filter(|point| point.step > trial.step)
    {
        findings.problem(
            &trial.id,
            format!("ended at step {}, and has a point of step {}", trial.step, last.step),
        );
    }
}
