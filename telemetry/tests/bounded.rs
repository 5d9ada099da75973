//! Series do not grow with the number of trials.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use telemetry::{Options, Settings, metrics};

/// What the metrics hear of one trial: all that the programs tell, with the values that a trial may give.
fn trial(number: u32) {
    let states = ["queued", "assigned", "running", "completed", "stopped", "diverged", "failed", "cancelled"];
    let outcome = states[number as usize % states.len()];
    let device = if number.is_multiple_of(2) { "cuda:0" } else { "cuda:1" };
    let value = f64::from(number);
    let mut parts = states.map(|state| metrics::TRIALS.part(&[("state", state)]));
    parts.iter_mut().for_each(|part| part.set(1));
    metrics::TRIAL_QUEUE_DURATION.record(value, &[]);
    metrics::PLACEMENT_DURATION.record(value / 1e6, &[]);
    metrics::ATTEMPTS.add(1.0, &[("outcome", outcome)]);
    metrics::TRIAL_COST.add(value / 1e4, &[]);
    metrics::TRIAL_EVAL_LOSS.record(value / 1e3, &[]);
    metrics::TRIAL_LOSS.record(value / 1e3, &[("device", device)]);
    metrics::TRIAL_MEMORY_PEAK.record(value * 1e6, &[]);
    metrics::TRIAL_MEMORY_PREDICTED.record(value * 1e6, &[]);
    metrics::TRIAL_MEMORY_QUOTIENT.record(1.0, &[]);
    metrics::STEP_DURATION.record(value / 1e3, &[("device", device)]);
    metrics::TOKENS_PER_SECOND.record(value, &[("device", device)]);
    metrics::SAMPLES_PER_SECOND.record(value, &[("device", device)]);
    metrics::PHASE_DURATION.record(value, &[("phase", "load")]);
    metrics::CHECKPOINT_UPLOAD_DURATION.record(value, &[("outcome", "stored")]);
    metrics::CHECKPOINT_SIZE.record(value * 1e6, &[]);
    metrics::ACKNOWLEDGEMENT_LAG.record(value / 1e4, &[]);
}

fn series() -> usize {
    telemetry::http::text().lines().filter(|line| !line.starts_with('#')).count()
}

#[test]
fn ten_thousand_trials_have_no_more_series_than_a_few() {
    let options = Options { service: "tested", version: "0", level: "off", scraped: true };
    let _telemetry = telemetry::start(&options, &Settings::read(|_| None).unwrap()).unwrap();
    (1..=16).for_each(trial);
    let few = series();
    assert!(few > 100, "{}", telemetry::http::text());
    (17..=10_000).for_each(trial);
    assert_eq!(series(), few);
    let text = telemetry::http::text();
    assert!(text.contains("lorafleet_trial_queue_duration_seconds_count 10000"), "{text}");
    assert!(text.contains("lorafleet_trials{state=\"running\"} 0"), "{text}");
}
