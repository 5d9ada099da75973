//! Runs of the best trials with other seeds.

use super::*;
use crate::actors::sweep::ledger::proposals::QUEUE_AHEAD;
use domain::sweep::Replicates;
use domain::trial::TrialConfig;

/// The seed of the first runs.
const SEED: u64 = 42;

/// A grid whose trials come to the values of their ranks: the third is the best, the fifth the second best.
fn ranks(changes: Value) -> Value {
    let mut document = document();
    document["parameters"] = json!({"lora_rank": [5, 3, 1, 4, 2]});
    (document["replicates"], document["finalists"]) = (json!(3), json!(2));
    document.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    document
}

fn begin(document: Value) -> Ledger {
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    ledger
}

/// What a coordinator knows that starts on what is durable.
fn restarted(ledger: &Ledger) -> Ledger {
    let mut next = Ledger::new(ledger.record().clone(), ledger.records()).unwrap();
    for number in next.trials().keys().copied().collect::<Vec<_>>() {
        next.replay(number, &[]).unwrap();
    }
    next.fill(NOW);
    next
}

/// Ends a trial that waits with the value of its rank, and what follows from that.
fn end(ledger: &mut Ledger, number: u32, ending: Ending) {
    let rank = ledger.get(number).unwrap().trial.config.lora_rank;
    ledger.run(number);
    ledger.event(number, finished(ending, Some(f64::from(rank))), NOW).unwrap();
    ledger.fill(NOW);
    ledger.settle(NOW);
}

/// The first that is under way.
fn next(ledger: &Ledger) -> Option<u32> {
    ledger.live().next()
}

/// Ends what is under way, one trial after the other, until nothing is left to do.
fn finish(ledger: &mut Ledger) {
    while let Some(number) = next(ledger) {
        end(ledger, number, Ending::Completed);
    }
}

/// What runs again: its number, whose, and its run, which its seed tells.
fn runs(ledger: &Ledger) -> Vec<(u32, u32, u32)> {
    let run = |seed: u64| (2..20).find(|run| Replicates::seed(SEED, *run) == seed).unwrap();
    let again = ledger.trials().iter().filter_map(|(number, record)| {
        let trial = &record.trial;
        Some((*number, trial.replicate_of.as_ref()?.number()?, run(trial.config.seed)))
    });
    again.collect()
}

#[test]
fn the_best_are_run_again_with_other_seeds() {
    let mut ledger = begin(ranks(json!({})));
    for number in [3, 1, 2, 5] {
        end(&mut ledger, number, Ending::Completed);
        assert_eq!(runs(&ledger), [], "not while a trial may become a finalist");
    }
    end(&mut ledger, 4, Ending::Completed);
    let want = [(6, 3, 2), (7, 5, 2), (8, 3, 3), (9, 5, 3)];
    assert_eq!(runs(&ledger), want);
    assert_eq!((ledger.record().sweep.state, ledger.record().sweep.proposed), (SweepState::Running, 9));
    for (again, first, _) in want {
        let [again, first] = [again, first].map(|number| ledger.get(number).unwrap().trial.clone());
        assert_eq!(again.parameters, first.parameters);
        assert_eq!(TrialConfig { seed: first.config.seed, ..again.config }, first.config);
    }
    finish(&mut ledger);
    assert_eq!(runs(&ledger), want);
    let sweep = &ledger.record().sweep;
    assert_eq!((sweep.state, sweep.proposed), (SweepState::Completed, 9));
    assert_eq!(ledger.tally, Ledger::new(ledger.record().clone(), ledger.records()).unwrap().tally);
}

#[test]
fn who_is_a_finalist() {
    let ends = |ledger: &mut Ledger, endings: [Ending; 5]| {
        for (number, ending) in (1..).zip(endings) {
            end(ledger, number, ending);
        }
    };
    use Ending::{Completed, Diverged, Stopped};
    let all = [Completed; 5];
    for (what, changes, endings, want) in [
        ("the two best", json!({}), all, vec![(6, 3, 2), (7, 5, 2), (8, 3, 3), (9, 5, 3)]),
        ("one", json!({"finalists": 1, "replicates": 2}), all, vec![(6, 3, 2)]),
        (
            "no more than there are",
            json!({"finalists": 9, "replicates": 2}),
            [Diverged, Stopped, Completed, Stopped, Completed],
            vec![(6, 3, 2), (7, 5, 2)],
        ),
        (
            "none that did not run to its end",
            json!({"finalists": 1, "replicates": 2}),
            [Completed, Completed, Stopped, Completed, Diverged],
            vec![(6, 2, 2)],
        ),
        ("none at all", json!({}), [Stopped; 5], vec![]),
        (
            "the largest",
            json!({"finalists": 1, "search": {"algorithm": "grid", "goal": "maximize"}}),
            all,
            vec![(6, 1, 2), (7, 1, 3)],
        ),
        ("not asked for", json!({"replicates": 1, "finalists": null}), all, vec![]),
    ] {
        let mut ledger = begin(ranks(changes));
        ends(&mut ledger, endings);
        assert_eq!(runs(&ledger), want, "{what}");
        finish(&mut ledger);
        assert_eq!((runs(&ledger), ledger.record().sweep.state), (want, SweepState::Completed), "{what}");
    }
}

/// What is owed follows from what is durable: more than may wait at a time, with a restart after each trial's end.
#[test]
fn a_restart_neither_loses_nor_doubles_a_run() {
    let document = || ranks(json!({"replicates": 9, "finalists": 3}));
    let mut whole = begin(document());
    finish(&mut whole);
    let mut ledger = begin(document());
    while let Some(number) = next(&ledger) {
        ledger = restarted(&ledger);
        end(&mut ledger, number, Ending::Completed);
        let waiting = ledger.tally.count(TrialState::Queued);
        assert!(waiting <= QUEUE_AHEAD, "{waiting} wait");
    }
    assert_eq!(runs(&whole).len(), 3 * 8);
    assert_eq!(runs(&ledger), runs(&whole));
    assert_eq!(ledger.record().sweep.state, SweepState::Completed);
    assert_eq!(next(&restarted(&ledger)), None, "nor once it is over");
}

/// The search proposes what it would have proposed: its draws are numbered without the runs that came between.
#[test]
fn extended_draws_go_on_as_if_nothing_had_run_again() {
    let draws = |trials: u32, replicates: u32| {
        json!({
            "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6, "replicates": replicates,
            "search": {"algorithm": "random", "max_trials": trials, "seed": 5},
            "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}},
        })
    };
    let spec = |document: Value| SweepSpec::from_document(document.as_object().unwrap()).unwrap();
    let searched = |ledger: &Ledger| -> Vec<_> {
        let all = ledger.trials().values().filter(|record| record.trial.replicate_of.is_none());
        all.map(|record| record.trial.parameters.clone()).collect()
    };
    let play = |replicates: u32, restarts: bool| {
        let again = |ledger: Ledger| if restarts { restarted(&ledger) } else { ledger };
        let mut ledger = begin(draws(4, replicates));
        finish(&mut ledger);
        for trials in [6, 9] {
            ledger = again(ledger);
            ledger.extend(&format!("to {trials}"), spec(draws(trials, replicates))).unwrap();
            ledger.fill(NOW);
            ledger = again(ledger);
            finish(&mut ledger);
        }
        ledger
    };
    let (without, with, over_restarts) = (play(1, false), play(2, false), play(2, true));
    assert_eq!(searched(&without).len(), 9);
    assert_eq!(searched(&with), searched(&without));
    assert_eq!(searched(&over_restarts), searched(&without));
    assert_eq!(runs(&over_restarts), runs(&with));
    // All are as good: the first three are the finalists, also of what came later.
    let of: Vec<_> = runs(&with).into_iter().map(|(_, of, _)| of).collect();
    assert_eq!(of, [1, 2, 3]);
    assert_eq!(with.record().sweep.proposed, 12);
    let mut fewer = with;
    assert!(fewer.extend("x", spec(draws(8, 2))).is_err(), "9 were drawn");
    fewer.extend("y", spec(draws(9, 4))).unwrap();
    fewer.fill(NOW);
    assert_eq!(runs(&fewer).len(), 9, "more runs of them are an extension");
}

/// As `extend --set replicates=N` has it: the document as it is kept, with one key changed.
#[test]
fn an_extension_asks_for_other_numbers_of_runs() {
    for (runs, want) in [(1, 4), (2, 4), (4, 6)] {
        let mut ledger = begin(ranks(json!({})));
        (1..=5).for_each(|number| end(&mut ledger, number, Ending::Completed));
        ledger.stop_all(StopCause::Budget, NOW).unwrap();
        ledger.settle(NOW);
        let cut = self::runs(&ledger).len();
        let mut document = ledger.record().sweep.spec.to_document();
        document.insert("replicates".into(), json!(runs));
        ledger.extend("r", SweepSpec::from_document(&document).unwrap()).unwrap();
        finish(&mut ledger);
        let there = self::runs(&ledger).len();
        assert_eq!((cut, there, ledger.record().sweep.state), (4, want, SweepState::Completed), "{runs}");
    }
}

/// Finalists of other seeds would have no runs in common.
#[test]
fn an_extension_does_not_change_the_seed() {
    let spec = |seed: &Value, replicates: u32| {
        let mut document = ranks(json!({"replicates": replicates, "finalists": null}));
        document["parameters"]["seed"] = seed.clone();
        SweepSpec::from_document(document.as_object().unwrap()).unwrap()
    };
    let (one, two, both) = (json!(1), json!(2), json!([1, 2]));
    for (before, after, refused) in [
        ((&one, 3), (&two, 3), true),
        ((&one, 1), (&two, 3), true),
        ((&both, 1), (&one, 3), true),
        ((&one, 3), (&one, 4), false),
        ((&one, 1), (&two, 1), false),
    ] {
        let mut document = ranks(json!({"replicates": before.1, "finalists": null}));
        document["parameters"]["seed"] = before.0.clone();
        let extended = begin(document).extend("r", spec(after.0, after.1));
        let told = |fields: &[(String, String)]| fields.iter().any(|(field, _)| field == "spec.seed");
        let is_refused = matches!(&extended, Err(CoordinatorError::Invalid { fields }) if told(fields));
        assert_eq!(is_refused, refused, "{before:?} {after:?}: {extended:?}");
    }
}

/// No rung sees them: the search neither ends one nor learns from it.
#[test]
fn halving_hears_nothing_of_them() {
    let mut document = document();
    document["search"] = json!({
        "algorithm": "asha", "max_trials": 4, "min_steps": 2, "reduction_factor": 2, "metric": "eval/loss",
    });
    document["parameters"] = json!({"learning_rate": {"log_uniform": [1e-5, 1e-2]}});
    (document["eval_steps"], document["replicates"]) = (json!(2), json!(2));
    let mut ledger = begin(document);
    for number in 1..=4 {
        ledger.run(number);
        ledger.metrics(number, &[point(2, f64::from(number))]).unwrap();
        let told = ledger.effects().iter().any(|effect| matches!(effect, Effect::Stop(..)));
        assert_eq!(told, number > 1, "trial {number}: only the first is among the better half");
        let ending = if told { Ending::Stopped } else { Ending::Completed };
        ledger.event(number, finished(ending, Some(f64::from(number))), NOW).unwrap();
    }
    ledger.fill(NOW);
    assert_eq!(runs(&ledger), [(5, 1, 2)], "of those that made all their steps");
    for mut ledger in [restarted(&ledger), ledger] {
        ledger.run(5);
        ledger.effects();
        ledger.metrics(5, &[point(2, 99.0)]).unwrap();
        assert_eq!(ledger.effects(), [], "the worst of all goes on");
        ledger.event(5, finished(Ending::Diverged, None), NOW).unwrap();
        ledger.fill(NOW);
        ledger.settle(NOW);
        assert_eq!(ledger.record().sweep.state, SweepState::Completed, "one that failed is no more owed");
        assert_eq!(runs(&ledger).len(), 1);
    }
}

/// They are trials like others to whoever holds the sweep, ends it, or pays for it.
#[test]
fn held_ended_and_tried_again() {
    let at_the_first = || {
        let mut ledger = begin(ranks(json!({"search": {"algorithm": "grid", "max_concurrent_trials": 2}})));
        for number in 1..=5 {
            assert!(ledger.tally.live_count() <= 2);
            end(&mut ledger, number, Ending::Completed);
        }
        assert_eq!(runs(&ledger), [(6, 3, 2), (7, 5, 2)], "so many may run at a time");
        ledger.effects();
        ledger
    };
    let mut paused = at_the_first();
    paused.run(6);
    paused.pause().unwrap();
    paused.event(6, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
    paused.fill(NOW);
    paused.settle(NOW);
    assert_eq!((runs(&paused).len(), paused.record().sweep.state), (2, SweepState::Paused));
    paused = restarted(&paused);
    paused.resume().unwrap();
    finish(&mut paused);
    assert_eq!((runs(&paused).len(), paused.record().sweep.state), (4, SweepState::Completed));

    let mut cancelled = at_the_first();
    cancelled.stop_all(StopCause::Person, NOW).unwrap();
    cancelled.fill(NOW);
    cancelled.settle(NOW);
    assert_eq!((runs(&cancelled).len(), cancelled.record().sweep.state), (2, SweepState::Cancelled));

    let mut spent = at_the_first();
    spent.ended_early("it is spent".into());
    spent.stop_all(StopCause::Budget, NOW).unwrap();
    spent.fill(NOW);
    spent.settle(NOW);
    assert_eq!((runs(&spent).len(), spent.record().sweep.state), (2, SweepState::Completed));
    let search = json!({"algorithm": "grid", "max_concurrent_trials": 2});
    let raised = ranks(json!({"search": search, "replicates": 4}));
    spent.extend("r", SweepSpec::from_document(raised.as_object().unwrap()).unwrap()).unwrap();
    finish(&mut spent);
    let of: Vec<_> = runs(&spent).into_iter().map(|(_, of, run)| (of, run)).collect();
    assert_eq!(
        of,
        [(3, 2), (5, 2), (3, 3), (5, 3), (3, 4), (5, 4)],
        "what was cut off goes on, and the rest follows"
    );

    // A trial that is tried again may become a finalist after all.
    let mut retried = begin(ranks(json!({"finalists": 1, "replicates": 2})));
    for number in [1, 2, 4, 5] {
        end(&mut retried, number, Ending::Completed);
    }
    end(&mut retried, 3, Ending::Diverged);
    assert_eq!(runs(&retried), [(6, 5, 2)]);
    retried.retry(3).unwrap();
    finish(&mut retried);
    assert_eq!(runs(&retried), [(6, 5, 2), (7, 3, 2)]);
}

/// A second run is better than its first by luck: it is never the sweep's best, and takes no adapter's place.
#[test]
fn the_best_is_one_that_the_search_proposed() {
    let mut ledger = begin(ranks(json!({"keep_adapters": 2, "replicates": 2, "finalists": 1})));
    let keep = |ledger: &mut Ledger, number: u32, value: f64| {
        ledger.run(number);
        ledger.checkpoint(number, 3, stored(&number.to_string()), &[]).unwrap();
        ledger.event(number, finished(Ending::Completed, Some(value)), NOW).unwrap();
        ledger.fill(NOW);
        ledger.settle(NOW);
    };
    for number in 1..=5 {
        keep(&mut ledger, number, f64::from(number));
    }
    assert_eq!(runs(&ledger), [(6, 1, 2)]);
    keep(&mut ledger, 6, 0.5);
    assert_eq!(ledger.record().sweep.best, Some((TrialId::new("s/1"), 1.0)));
    let kept = ledger.trials().iter().filter(|(_, record)| record.trial.adapter.is_some());
    assert_eq!(kept.map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2]);
}

/// Records of earlier versions know of no runs.
#[test]
fn a_record_of_an_earlier_version_is_of_a_trial_of_the_search() {
    let ledger = begin(document());
    let mut old = serde_json::to_value(ledger.get(1).unwrap()).unwrap();
    let trial = old["trial"].as_object_mut().unwrap();
    assert!(!trial.contains_key("replicate_of"), "what is not there is not kept");
    // They kept every parameter, and said of much that it is not there.
    trial.insert("config".into(), serde_json::to_value(&ledger.get(1).unwrap().trial.config).unwrap());
    for name in ["agent", "device", "adapter", "resume", "summary", "failure", "digests", "trace_id"] {
        trial.entry(name).or_insert(Value::Null);
    }
    let old: TrialRecord = serde_json::from_value(old).unwrap();
    assert_eq!(&old, ledger.get(1).unwrap());
    let mut sweep = serde_json::to_value(ledger.record()).unwrap();
    assert!(sweep["sweep"]["spec"].as_object_mut().unwrap().remove("replicates").is_some());
    assert_eq!(&serde_json::from_value::<SweepRecord>(sweep).unwrap(), ledger.record());
}
