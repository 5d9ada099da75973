//! Holding a sweep and going on with it.

use super::*;

#[test]
fn a_paused_sweep_holds_everything_and_goes_on_where_it_was() {
    let mut ledger = ledger();
    ledger.run(1);
    ledger.checkpoint(1, 3, stored("c"), &[]).unwrap();
    ledger.pause().unwrap();
    let release = Effect::Stop(1, Attempt(1), StopReason::Release);
    assert_eq!(ledger.effects(), [Effect::Withdraw, release]);
    ledger.pause().unwrap();
    assert_eq!(ledger.effects(), [], "again changes nothing");
    assert_eq!(ledger.pending_stop(1).unwrap(), Some(StopReason::Release));
    ledger.event(1, TrialEvent::Released, NOW).unwrap();
    assert_eq!((ledger.state(1), ledger.pending_stop(1).unwrap()), (TrialState::Queued, None));
    ledger.fill(NOW);
    ledger.settle(NOW);
    assert_eq!((ledger.effects(), ledger.record().sweep.state), (vec![], SweepState::Paused));
    ledger.resume().unwrap();
    assert_eq!(ledger.effects(), [Effect::Enqueue(1), Effect::Enqueue(2)]);
    ledger.resume().unwrap();
    assert_eq!(ledger.effects(), []);
    assert_eq!(ledger.assigned(1).resume_step, Some(3));
}

/// What happens between the pause and the agent's word, and where the trial stands then.
#[test]
fn a_trial_that_is_being_given_back() {
    let check = |what: &str, happens: &dyn Fn(&mut Ledger), state: TrialState, wants_device: bool| {
        let mut ledger = ledger();
        ledger.run(1);
        ledger.pause().unwrap();
        ledger.effects();
        happens(&mut ledger);
        assert_eq!(ledger.state(1), state, "{what}");
        assert_eq!(ledger.effects().contains(&Effect::Enqueue(1)), wants_device, "{what}");
    };
    let released = |ledger: &mut Ledger| ledger.event(1, TrialEvent::Released, NOW).unwrap();
    check("given back", &released, TrialState::Queued, false);
    check("its lease ends", &|l| l.lost(1, "silence", NOW).unwrap(), TrialState::Queued, false);
    let done = |l: &mut Ledger| l.event(1, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
    check("it was done before", &done, TrialState::Completed, false);
    let resumed = |l: &mut Ledger| {
        l.resume().unwrap();
        released(l);
    };
    check("resumed before", &resumed, TrialState::Queued, true);
    let cancelled = |l: &mut Ledger| {
        l.stop_all(StopCause::Person, NOW).unwrap();
        released(l);
        l.settle(NOW);
        assert_eq!(l.record().sweep.state, SweepState::Cancelled);
    };
    check("cancelled meanwhile", &cancelled, TrialState::Cancelled, false);
}

#[test]
fn paused_time_is_no_wall_clock() {
    let mut ledger = ledger();
    let active = |ledger: &Ledger| ledger.record().active_seconds();
    ledger.pass(10_000);
    ledger.pause().unwrap();
    ledger.pass(88_000);
    assert_eq!(active(&ledger), 10.0);
    let trials = ledger.records();
    let mut ledger = Ledger::new(ledger.record().clone(), trials).unwrap();
    assert!(ledger.is_paused(), "it outlives a restart");
    ledger.resume().unwrap();
    ledger.pass(2_000);
    assert_eq!(active(&ledger), 12.0);
}

/// Records of earlier versions hold hours, in which time was counted that was not paused.
#[test]
fn the_wall_clock_of_an_earlier_version_goes_on() {
    for (change, now, want) in [
        (json!({}), 61_000, 60.0),
        (json!({"paused_at": 11_000, "idle_ms": 4_000}), 61_000, 6.0),
        (json!({"active_ms": 7_000}), 61_000, 7.0),
        (json!({}), 0, 0.0),
    ] {
        let mut old = serde_json::to_value(record(document())).unwrap();
        let object = old.as_object_mut().unwrap();
        object.remove("active_ms");
        object.extend(change.as_object().unwrap().clone());
        let mut record: SweepRecord = serde_json::from_value(old).unwrap();
        record.count_wall_clock(Timestamp(now));
        assert_eq!(record.active_seconds(), want, "{change}");
    }
}

#[test]
fn what_is_over_is_not_paused() {
    let mut ledger = ledger();
    ledger.stop_all(StopCause::Person, NOW).unwrap();
    ledger.settle(NOW);
    for refused in [ledger.pause(), ledger.resume()] {
        assert!(matches!(refused, Err(CoordinatorError::Over { .. })), "{refused:?}");
    }
}

fn spec_of(document: &Value) -> SweepSpec {
    SweepSpec::from_document(document.as_object().unwrap()).unwrap()
}

/// Ends every trial that is under way, and those that follow, until nothing is left to do.
fn finish(ledger: &mut Ledger) {
    loop {
        ledger.fill(NOW);
        let live: Vec<_> = ledger.live().collect();
        for number in &live {
            ledger.run(*number);
            ledger.event(*number, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
        }
        ledger.settle(NOW);
        if live.is_empty() {
            return;
        }
    }
}

fn restarted(ledger: &Ledger) -> Ledger {
    let trials = ledger.records();
    let mut next = Ledger::new(ledger.record().clone(), trials).unwrap();
    for number in next.trials().keys().copied().collect::<Vec<_>>() {
        next.replay(number, &[]).unwrap();
    }
    next
}

fn chosen(ledger: &Ledger) -> Vec<String> {
    let values = |t: &TrialRecord| json!(t.trial.parameters).to_string();
    ledger.records().iter().map(values).collect()
}

#[test]
fn a_completed_grid_runs_again_with_what_is_new() {
    let mut ledger = ledger();
    finish(&mut ledger);
    assert_eq!(ledger.record().sweep.state, SweepState::Completed);
    let mut wider = document();
    wider["parameters"]["lora_rank"] = json!([2, 8, 4, 16]);
    for _ in 0..2 {
        ledger.extend("r", spec_of(&wider)).unwrap();
    }
    assert_eq!(ledger.record().revisions.len(), 2, "the same request is one extension");
    assert_eq!(
        (ledger.record().sweep.state, ledger.record().sweep.max_trials),
        (SweepState::Running, Some(4))
    );
    ledger.fill(NOW);
    let mut again = restarted(&ledger);
    finish(&mut again);
    finish(&mut ledger);
    let want = [2, 4, 8, 16].map(|rank| json!({ "lora_rank": rank }).to_string());
    assert_eq!(chosen(&ledger), want, "what was proposed is not proposed again");
    assert_eq!(chosen(&again), want, "a restart changes nothing");
    assert_eq!(ledger.record().sweep.state, SweepState::Completed);
    // Another one, in which nothing is new but the budget.
    wider["parameters"]["lora_rank"] = json!([2, 4, 32]);
    let mut again = restarted(&ledger);
    again.extend("s", spec_of(&wider)).unwrap();
    finish(&mut again);
    assert_eq!(chosen(&again).last().unwrap(), r#"{"lora_rank":32}"#);
    assert_eq!(chosen(&restarted(&again)).len(), 5);
}

/// Draws before and after an extension, with a restart anywhere, are those of one that was never restarted.
#[test]
fn extended_draws_are_the_same_over_restarts() {
    let mut narrow = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
        "search": {"algorithm": "random", "max_trials": 10, "seed": 5},
        "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}},
    });
    let first = record(narrow.clone());
    narrow["search"]["max_trials"] = json!(25);
    narrow["parameters"]["lora_rank"] = json!([2, 4, 8]);
    let wide = spec_of(&narrow);
    let run = |restart_at: u32, extend_at: u32| {
        let mut ledger = Ledger::new(first.clone(), Vec::new()).unwrap();
        for round in 0..40 {
            if round == restart_at {
                ledger = restarted(&ledger);
            }
            if round == extend_at {
                ledger.extend("r", wide.clone()).unwrap();
            }
            ledger.fill(NOW);
            let Some(number) = ledger.live().next() else { continue };
            ledger.run(number);
            ledger.event(number, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
            ledger.settle(NOW);
        }
        chosen(&ledger)
    };
    for extend_at in [0, 2, 30] {
        let whole = run(99, extend_at);
        assert_eq!(whole.len(), 25);
        for restart_at in [1, extend_at, extend_at + 1, 20] {
            assert_eq!(run(restart_at, extend_at), whole, "{restart_at} {extend_at}");
        }
    }
}

#[test]
fn an_extension_changes_what_it_may_and_nothing_else() {
    let mut base = document();
    base["budget"] = json!({"max_cost_usd": 10, "max_wall_clock": "1h"});
    let refused = |change: &dyn Fn(&mut Value), field: &str| {
        let mut ledger = Ledger::new(record(base.clone()), Vec::new()).unwrap();
        ledger.fill(NOW);
        ledger.run(1);
        ledger.charge(1, 9.0, NOW).unwrap();
        ledger.settle(NOW);
        let mut document = base.clone();
        change(&mut document);
        let error = ledger.extend("r", spec_of(&document)).unwrap_err();
        let CoordinatorError::Invalid { fields } = &error else { panic!("{error}") };
        let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [field], "{error}");
        assert!(ledger.record().revisions.is_empty());
    };
    refused(&|_| {}, "spec");
    refused(&|d| d["name"] = json!("other"), "spec.name");
    refused(&|d| d["max_steps"] = json!(7), "spec.max_steps");
    refused(&|d| d["constraints"] = json!(["lora_rank < 99"]), "spec.constraints");
    refused(&|d| d["resources"] = json!({"accelerators": ["CPU"]}), "spec.resources");
    refused(&|d| d["search"]["goal"] = json!("maximize"), "spec.search.goal");
    refused(&|d| d["search"]["algorithm"] = json!("one_factor_at_a_time"), "spec.search.algorithm");
    refused(&|d| d["search"]["max_trials"] = json!(1), "spec.search.max_trials");
    refused(&|d| d["budget"]["max_cost_usd"] = json!(9.5), "spec.budget.max_cost_usd");
    refused(&|d| d["budget"]["max_wall_clock"] = json!("30m"), "spec.budget.max_wall_clock");
    refused(&|d| d["parameters"] = json!({"lora_dropout": [0.0, 0.1]}), "spec.lora_rank");
}

#[test]
fn a_raised_budget_goes_on_with_what_the_spent_one_ended() {
    let mut document = document();
    document["budget"] = json!({"max_cost_usd": 10});
    let mut ledger = Ledger::new(record(document.clone()), Vec::new()).unwrap();
    ledger.fill(NOW);
    ledger.run(1);
    ledger.checkpoint(1, 3, stored("c"), &[]).unwrap();
    ledger.charge(1, 12.0, NOW).unwrap();
    ledger.settle(NOW);
    ledger.ended_early("spent".into());
    ledger.stop_all(StopCause::Budget, NOW).unwrap();
    let mut ask = |ledger: &mut Ledger, id: &str, usd: f64| {
        document["budget"]["max_cost_usd"] = json!(usd);
        ledger.extend(id, spec_of(&document))
    };
    let early = ask(&mut ledger, "r", 20.0);
    assert!(matches!(early, Err(CoordinatorError::Over { .. })), "it is just ending: {early:?}");
    ledger.pass(2_000);
    ledger.event(1, finished(Ending::Stopped, Some(2.0)), NOW).unwrap();
    ledger.settle(NOW);
    assert_eq!(ledger.record().sweep.state, SweepState::Completed);
    ledger.pass(60_000);
    ledger.effects();
    let spent = ask(&mut ledger, "r", 11.0).unwrap_err().to_string();
    assert!(spent.contains("spec.budget: max_cost_usd of $11 is spent"), "{spent}");
    assert!(ledger.retry(1).unwrap_err().to_string().contains("lorafleet extend"));
    ask(&mut ledger, "r", 20.0).unwrap();
    assert_eq!(ledger.effects(), [Effect::Enqueue(1), Effect::Enqueue(2)]);
    let sweep = &ledger.record().sweep;
    assert_eq!((sweep.state, &sweep.ended_early, sweep.finished_at), (SweepState::Running, &None, None));
    assert_eq!(ledger.record().active_seconds(), 2.0, "the minute in between is not counted");
    assert_eq!(ledger.assigned(1).resume_step, Some(3));
}

#[test]
fn a_trial_is_tried_again_from_its_checkpoint() {
    let check = |what: &str, end: &dyn Fn(&mut Ledger), sweep: SweepState| {
        let mut ledger = ledger();
        ledger.run(1);
        ledger.checkpoint(1, 3, stored("c"), &[]).unwrap();
        end(&mut ledger);
        ledger.settle(NOW);
        assert!(ledger.state(1).is_terminal(), "{what}");
        ledger.effects();
        ledger.retry(1).unwrap();
        assert_eq!(ledger.effects(), [Effect::Enqueue(1)], "{what}");
        let record = ledger.get(1).unwrap();
        assert_eq!((record.trial.state, record.stop, record.losses), (TrialState::Queued, None, 0), "{what}");
        assert_eq!((&record.trial.failure, record.trial.finished_at), (&None, None), "{what}");
        assert!(ledger.retry(1).is_err(), "it waits already: {what}");
        ledger.settle(NOW);
        assert_eq!(ledger.record().sweep.state, SweepState::Running, "{what}");
        let mut ledger = restarted(&ledger);
        let assignment = ledger.assigned(1);
        assert_eq!((assignment.attempt, assignment.resume_step), (Attempt(2), Some(3)), "{what}");
        ledger.event(1, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
        finish(&mut ledger);
        assert_eq!(ledger.record().sweep.state, sweep, "{what}");
        assert!(ledger.retry(1).is_err(), "it made all its steps: {what}");
    };
    use FailureClass::{Diverged, User};
    let ends = |event: TrialEvent| move |ledger: &mut Ledger| ledger.event(1, event.clone(), NOW).unwrap();
    check("failed", &ends(broke(User)), SweepState::Completed);
    check("diverged", &ends(broke(Diverged)), SweepState::Completed);
    check("stopped", &ends(finished(Ending::Stopped, None)), SweepState::Completed);
    let over = |ledger: &mut Ledger| {
        ledger.event(1, broke(User), NOW).unwrap();
        finish(ledger);
        assert_eq!(ledger.record().sweep.state, SweepState::Completed);
    };
    check("its sweep is over", &over, SweepState::Completed);
    let cancelled = |ledger: &mut Ledger| {
        ledger.stop_all(StopCause::Person, NOW).unwrap();
        ledger.event(1, finished(Ending::Stopped, None), NOW).unwrap();
    };
    check("its sweep was cancelled", &cancelled, SweepState::Cancelled);
}

#[test]
fn the_search_does_not_end_a_trial_again_that_a_person_tries_again() {
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
        "search": {"algorithm": "asha", "max_trials": 2, "min_steps": 1, "reduction_factor": 2, "seed": 1},
        "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}},
    });
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    ledger.run(1);
    ledger.run(2);
    ledger.metrics(1, &[point(1, 1.0)]).unwrap();
    ledger.metrics(2, &[point(1, 2.0)]).unwrap();
    assert_eq!(ledger.get(2).unwrap().stop, Some(StopCause::Search));
    ledger.event(2, finished(Ending::Stopped, Some(2.0)), NOW).unwrap();
    ledger.retry(2).unwrap();
    ledger.run(2);
    ledger.metrics(2, &[point(1, 2.0), point(2, 3.0)]).unwrap();
    assert_eq!(ledger.get(2).unwrap().stop, None);
}
