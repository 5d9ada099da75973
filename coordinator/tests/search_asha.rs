//! Asynchronous successive halving: who is stopped where, and that a restart changes nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use coordinator::search::{Proposal, Searcher, Verdict};
use domain::sweep::SweepSpec;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// ASHA with rungs at 10 and 30 (factor 3) of 90 steps, or at 10, 20, 40 and 80 (factor 2), over seeds.
fn spec(changes: Value) -> SweepSpec {
    let mut document = json!({
        "name": "test", "pretrained_model_id": "model", "dataset_name": "rows.jsonl", "max_steps": 90,
        "search": { "algorithm": "asha", "max_trials": 27, "min_steps": 10 },
        "parameters": { "learning_rate": { "log_uniform": [1e-5, 1e-3] }, "lora_rank": [4, 8] },
    });
    document["search"].as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    SweepSpec::from_document(document.as_object().unwrap()).unwrap_or_else(|p| panic!("{p:#?}"))
}

fn searcher(changes: Value) -> Searcher {
    let mut searcher = Searcher::new(&spec(changes)).unwrap();
    searcher.fast_forward(27);
    searcher
}

/// Reports in turn as (trial, step, value), and what is said: `+` goes on, `-` stops.
fn check(changes: Value, reports: &[(u32, u64, f64)], want: &str) {
    let mut searcher = searcher(changes.clone());
    let mut sign = |&(number, step, value): &(u32, u64, f64)| match searcher.report(number, step, value) {
        Verdict::Continue => '+',
        Verdict::Stop => '-',
    };
    assert_eq!(reports.iter().map(&mut sign).collect::<String>(), want, "{changes} {reports:?}");
    assert_eq!(
        reports.iter().map(&mut sign).collect::<String>(),
        want,
        "the same again: {changes} {reports:?}"
    );
}

#[test]
fn who_is_stopped() {
    let factor_3 = || json!({});
    // The first two go on unseen; of three one goes on, of six two.
    check(factor_3(), &[(1, 10, 5.0), (2, 10, 4.0), (3, 10, 3.0)], "+++");
    check(factor_3(), &[(1, 10, 3.0), (2, 10, 4.0), (3, 10, 5.0)], "++-");
    check(
        factor_3(),
        &[(1, 10, 3.0), (2, 10, 4.0), (3, 10, 5.0), (4, 10, 3.5), (5, 10, 2.5), (6, 10, 2.7)],
        "++--++",
    );
    check(factor_3(), &[(1, 10, 3.0), (2, 10, 4.0), (3, 10, 3.0)], "+++"); // a tie goes on
    // Steps between rungs, and the last step, decide nothing.
    check(
        factor_3(),
        &[(1, 9, 1.0), (2, 9, 1.0), (3, 9, 9.0), (3, 11, 9.0), (3, 20, 9.0), (3, 90, 9.0)],
        "++++++",
    );
    // Each rung has its own values.
    check(
        factor_3(),
        &[(1, 10, 1.0), (2, 10, 2.0), (1, 30, 1.0), (2, 30, 2.0), (3, 30, 3.0), (3, 10, 0.5)],
        "++++-+",
    );
    // NaN is worst.
    check(factor_3(), &[(1, 10, 3.0), (2, 10, f64::NAN), (3, 10, f64::NAN)], "++-");
    check(factor_3(), &[(1, 10, f64::NAN), (2, 10, f64::NAN), (3, 10, 9.0)], "+++");
    // A second value at a rung (a later attempt) changes nothing.
    check(factor_3(), &[(1, 10, 3.0), (1, 10, 9.0), (2, 10, 4.0), (3, 10, 5.0)], "+++-");
    let larger = json!({ "goal": "maximize" });
    check(larger, &[(1, 10, 3.0), (2, 10, 4.0), (3, 10, 5.0), (4, 10, 2.0)], "+++-");
    let factor_2 = json!({ "reduction_factor": 2 });
    check(
        factor_2,
        &[(1, 10, 3.0), (2, 10, 4.0), (3, 20, 3.0), (4, 20, 4.0), (5, 80, 1.0), (6, 80, 2.0)],
        "+-+-+-",
    );
}

#[test]
fn a_trial_without_a_value_counts_as_worst_where_it_would_have_been_compared() {
    let mut searcher = searcher(json!({}));
    searcher.ended(1, None);
    searcher.ended(2, Some(f64::NAN));
    // Two at the rung have lost already: the third is best of three, the fourth not.
    assert_eq!(searcher.report(3, 10, 5.0), Verdict::Continue);
    assert_eq!(searcher.report(4, 10, 6.0), Verdict::Stop);
    // A stopped trial's end adds nothing to the next rung.
    searcher.ended(4, None);
    assert_eq!(searcher.report(5, 30, 1.0), Verdict::Continue);
    assert_eq!(searcher.report(6, 30, 2.0), Verdict::Continue);
    assert_eq!(searcher.report(7, 30, 3.0), Verdict::Stop);
}

/// 27 curves that fall to their own floor, reported step by step in turn as if all ran together.
#[test]
fn the_weak_end_early_and_the_best_is_kept() {
    let mut searcher = searcher(json!({}));
    let value = |number: u32, step: u64| f64::from((number * 7) % 27) + 20.0 * (-(step as f64) / 15.0).exp();
    let mut alive: Vec<u32> = (1..=27).collect();
    let mut steps = BTreeMap::new();
    for step in (5..=90).step_by(5) {
        alive.retain(|&number| {
            steps.insert(number, step);
            searcher.report(number, step, value(number, step)) == Verdict::Continue
        });
    }
    let best = (1..=27).min_by(|a, b| value(*a, 90).total_cmp(&value(*b, 90))).unwrap();
    assert!(alive.contains(&best), "trial {best} is best, {alive:?} are left");
    let spent: u64 = steps.values().sum();
    assert!(spent < 27 * 90 / 2, "{spent} steps of {}", 27 * 90);
    assert!(alive.len() <= 6, "{alive:?}");
}

#[derive(Debug, Clone)]
enum Event {
    Propose,
    Report(u32, u64, f64),
    Ended(u32, Option<f64>),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::Propose),
        4 => (1..20u32, prop::sample::select(vec![5u64, 10, 30, 90]), 0.0..9.0).prop_map(|(n, s, v)| Event::Report(n, s, v)),
        1 => (1..20u32, prop::option::of(0.0..9.0)).prop_map(|(n, v)| Event::Ended(n, v)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happened in whatever order, a searcher rebuilt from the records goes on as the first would.
    #[test]
    fn a_restart_changes_nothing(
        events in prop::collection::vec(event(), 0..60),
        seed in 0..1000u64,
        algorithm in prop::sample::select(vec!["asha", "random"]),
    ) {
        let spec = spec(json!({ "seed": seed, "algorithm": algorithm, "max_concurrent_trials": 5 }));
        let mut searcher = Searcher::new(&spec).unwrap();
        let mut proposed = Vec::new();
        for event in &events {
            match event {
                Event::Propose => if let Proposal::Trial(trial) = searcher.propose() { proposed.push(trial); },
                Event::Report(number, step, value) => drop(searcher.report(*number, *step, *value)),
                Event::Ended(number, value) => searcher.ended(*number, *value),
            }
        }
        let mut rebuilt = Searcher::new(&spec).unwrap();
        prop_assert_eq!(rebuilt.fast_forward(proposed.len() as u32), proposed);
        for event in &events {
            match event {
                Event::Propose => {}
                Event::Report(number, step, value) => drop(rebuilt.report(*number, *step, *value)),
                Event::Ended(number, value) => rebuilt.ended(*number, *value),
            }
        }
        for number in 1..20 {
            prop_assert_eq!(rebuilt.report(number, 10, 4.0), searcher.report(number, 10, 4.0));
            rebuilt.ended(number, Some(1.0));
            searcher.ended(number, Some(1.0));
        }
        prop_assert_eq!(rebuilt.propose(), searcher.propose());
    }
}
