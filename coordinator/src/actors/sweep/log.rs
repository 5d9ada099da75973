//! What happened to a trial, told by what a change of its record shows. It is written in one batch with the change.

use crate::store::{LogEntry, StopCause, TrialRecord};
use domain::trial::{Note, Severity, TrialState};
use domain::{Attempt, Timestamp};

/// What a log has told of a trial so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Told {
    state: Option<TrialState>,
    attempt: Attempt,
    checkpoint: Option<u64>,
    adapter: bool,
    stop: Option<StopCause>,
    release: bool,
}

impl Told {
    /// All that a record shows.
    pub(super) fn of(record: &TrialRecord) -> Self {
        Self {
            state: Some(record.trial.state),
            attempt: record.trial.attempt,
            checkpoint: record.checkpoint.as_ref().map(|c| c.step),
            adapter: record.trial.adapter.is_some(),
            stop: record.stop,
            release: record.release,
        }
    }

    /// What a record shows that was not told yet, in the order of a life. `why` says what put the trial back into
    /// the queue, if anything did.
    pub(super) fn news(&mut self, record: &TrialRecord, why: Option<&str>, now: Timestamp) -> Vec<LogEntry> {
        let before = std::mem::replace(self, Self::of(record));
        let trial = &record.trial;
        let step = trial.step;
        let mut news = Vec::new();
        let mut tell = |what: &str, message: String| {
            let severity = severity(what, why);
            news.push(LogEntry {
                time: now,
                event: what.into(),
                severity,
                attempt: trial.attempt,
                step,
                message,
            });
        };
        if before.state.is_none() {
            tell("proposed", proposed(record));
        }
        if trial.attempt != before.attempt
            && let Some(place) = &record.placement
        {
            let from = trial.attempts.last().map_or(0, |(_, step)| *step);
            let (agent, device) = (&place.agent, &place.device);
            tell("assigned", format!("to {agent}, {device}, as attempt {} from step {from}", trial.attempt));
        }
        if trial.state == TrialState::Running && before.state != Some(TrialState::Running) {
            tell(
                "started",
                trial.total_steps.map_or_else(String::new, |total| format!("{total} steps in all")),
            );
        }
        if self.checkpoint != before.checkpoint
            && let Some(step) = self.checkpoint
        {
            tell("checkpoint", format!("of step {step} is stored"));
        }
        if record.release && !before.release {
            tell("told_to_release", "its sweep is paused".into());
        }
        if record.stop != before.stop
            && let Some(cause) = record.stop
            && !trial.state.is_terminal()
        {
            tell("told_to_stop", by(cause).into());
        }
        if before.state != Some(trial.state) {
            match trial.state {
                TrialState::Queued if before.state.is_some_and(TrialState::is_terminal) => {
                    tell("queued_again", "a person, or a raised budget, lets it go on".into());
                }
                TrialState::Queued if before.state.is_some() => {
                    let why = why.unwrap_or("its agent gave it back");
                    // It may have made more, of which nobody has heard here.
                    let again = match step.saturating_sub(self.checkpoint.unwrap_or(0)) {
                        0 => String::new(),
                        1 => "; the step that it told of since its last checkpoint is made again".into(),
                        steps => {
                            format!(
                                "; {steps} steps that it told of since its last checkpoint are made again"
                            )
                        }
                    };
                    tell("queued", format!("{why}{again}"));
                }
                state if state.is_terminal() => {
                    let failure = trial.failure.as_ref();
                    let class = |c| serde_json::to_value(c).ok().and_then(|v| v.as_str().map(String::from));
                    let failure =
                        failure.map(|f| format!("{}: {}", class(f.class).unwrap_or_default(), f.message));
                    let by =
                        record.stop.filter(|_| state != TrialState::Completed).map(|c| by(c).to_string());
                    let end = failure.or(by).unwrap_or_else(|| format!("at step {step}"));
                    tell(state.as_str(), end);
                }
                _ => {}
            }
        }
        if before.adapter && !self.adapter && trial.state.is_terminal() {
            tell("adapter_removed", "the sweep keeps those of better trials".into());
        }
        news
    }
}

/// Who proposed a trial.
fn proposed(record: &TrialRecord) -> String {
    let trial = &record.trial;
    let again = |of| format!("{of} again, with the seed {}", trial.config.seed);
    trial.replicate_of.as_ref().map_or_else(|| "the search proposed it".into(), again)
}

/// How much an entry matters.
fn severity(event: &str, why: Option<&str>) -> Severity {
    match event {
        "failed" => Severity::Error,
        "diverged" => Severity::Warning,
        // Not where it was paused.
        "queued" if why.is_some() => Severity::Warning,
        _ => Severity::Info,
    }
}

/// What the agent of a trial says, as an entry.
pub(super) fn noted(record: &TrialRecord, note: Note, now: Timestamp) -> LogEntry {
    let Note { severity, message, .. } = note;
    let trial = &record.trial;
    let event = severity.as_str().into();
    LogEntry { time: now, event, severity, attempt: trial.attempt, step: trial.step, message }
}

fn by(cause: StopCause) -> &'static str {
    match cause {
        StopCause::Search => "by the search",
        StopCause::Budget => "by the sweep's budget",
        StopCause::Person => "by a person",
    }
}
