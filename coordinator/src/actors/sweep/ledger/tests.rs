//! What happens to records, happening by happening.

mod operations;
mod replicates;
mod retention;

use super::*;
use crate::actors::dispatcher::{Charged, Used};
use crate::artifacts::Stored;
use domain::footprint::ModelShape;
use domain::sweep::{Sweep, SweepSpec};
use domain::trial::{Digests, SIMULATED, TaskScore, TrialConfig, TrialDevice, TrialPlacement};
use domain::{AgentId, DeviceId, SweepId};
use serde_json::{Value, json};
use std::time::Duration;

const NOW: Timestamp = Timestamp(1_000);

fn record(document: Value) -> SweepRecord {
    let spec = SweepSpec::from_document(document.as_object().unwrap()).unwrap();
    let sweep = Sweep {
        id: SweepId::new("s"),
        spec,
        state: SweepState::Running,
        request_id: "r".into(),
        namespace: "team-a".into(),
        proposed: 0,
        max_trials: None,
        best: None,
        cost_usd: 0.0,
        failure: None,
        ended_early: None,
        counts: Default::default(),
        created_at: NOW,
        finished_at: None,
    };
    SweepRecord::new(sweep, BTreeMap::new())
}

fn document() -> Value {
    json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [2, 4]},
    })
}

/// A grid of two trials, both proposed.
fn ledger() -> Ledger {
    let mut ledger = Ledger::new(record(document()), Vec::new()).unwrap();
    ledger.fill(NOW);
    assert_eq!(ledger.effects(), [Effect::Enqueue(1), Effect::Enqueue(2)]);
    ledger
}

fn placement() -> Placement {
    let is =
        TrialDevice { accelerator: "CPU".into(), memory_bytes: 1, price_per_hour: 3600.0, price_from: None };
    let (agent, device) = (AgentId::new("a"), DeviceId::new("cpu"));
    Placement { agent, device, price_per_hour: 3600.0, is: Some(is), before_usd: None }
}

fn digests(base: &str) -> Option<Digests> {
    let [base_model, dataset, tokenizer, spec] = [base, "d", "t", "s"].map(String::from);
    Some(Digests { base_model, dataset, tokenizer, spec, ..Digests::default() })
}

fn started(base: &str) -> TrialEvent {
    TrialEvent::Started { total_steps: 6, start_step: 0, digests: digests(base) }
}

fn finished(ending: Ending, eval_loss: Option<f64>) -> TrialEvent {
    let summary = Box::new(TrialSummary { eval_loss, ..TrialSummary::default() });
    TrialEvent::Finished { ending, summary, message: "why".into() }
}

fn broke(class: FailureClass) -> TrialEvent {
    TrialEvent::Failed(Failure { class, message: "it broke".into() })
}

fn stored(name: &str) -> Stored {
    Stored { adapter: Some(format!("{name}-adapter")), resume: Some(format!("{name}-resume")), items: None }
}

fn point(step: u64, loss: f64) -> MetricPoint {
    MetricPoint { step, time: NOW, values: vec![(EVAL_LOSS.to_string(), loss)] }
}

impl Ledger {
    /// The assignment that its agent is told.
    fn assigned(&mut self, number: u32) -> Assignment {
        self.assign(number, placement()).unwrap();
        let Some(Effect::Assign(assignment)) = self.effects().pop() else { panic!("it is assigned") };
        *assignment
    }

    fn run(&mut self, number: u32) {
        self.assign(number, placement()).unwrap();
        self.effects.retain(|effect| !matches!(effect, Effect::Assign(_)));
        self.event(number, started("m"), NOW).unwrap();
    }

    fn state(&self, number: u32) -> TrialState {
        self.get(number).unwrap().trial.state
    }
}

/// A budget that was too small for any result is said to be.
#[test]
fn a_sweep_that_ends_early_without_a_value_says_so() {
    for (value, want) in [
        (None, "it is spent, before any trial that ended had a value of eval/loss"),
        (Some(1.0), "it is spent"),
    ] {
        let mut ledger = ledger();
        ledger.run(1);
        ledger.ended_early("it is spent".into());
        ledger.stop_all(StopCause::Budget, NOW).unwrap();
        ledger.event(1, finished(Ending::Stopped, value), NOW).unwrap();
        ledger.settle(NOW);
        ledger.settle(NOW);
        assert_eq!(ledger.record().sweep.ended_early.as_deref(), Some(want));
    }
}

/// What a task makes of a trial comes with its end, and is what the trial is compared by.
#[test]
fn trials_are_compared_by_a_task() {
    let mut document = document();
    document["search"] = json!({ "algorithm": "grid", "metric": "eval/arc_easy/acc" });
    document["evaluations"] = json!({ "tasks": ["arc_easy"], "limit": 5 });
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    ledger.effects();
    assert!(ledger.needs(1).unwrap().evaluated, "its agent must be one that asks them");
    assert_eq!(ledger.assigned(1).evaluations, ledger.record().sweep.spec.evaluations);
    ledger.event(1, started("m"), NOW).unwrap();
    ledger.run(2);
    let score = |metric: &str, value| TaskScore {
        task: "arc_easy".into(),
        metric: metric.into(),
        value,
        stderr: None,
        base_value: None,
        base_stderr: None,
        difference_stderr: None,
        num_fewshot: 0,
        documents: 5,
    };
    for (number, acc) in [(1, 0.25), (2, 0.5)] {
        ledger.metrics(number, &[point(6, 1.0)]).unwrap();
        assert_eq!(ledger.get(number).unwrap().value, None, "a loss is not what they are compared by");
        let evaluations = vec![score("acc_norm", 0.9), score("acc", acc)];
        let summary = Box::new(TrialSummary { eval_loss: Some(1.0), evaluations, ..TrialSummary::default() });
        let event = TrialEvent::Finished { ending: Ending::Completed, summary, message: String::new() };
        ledger.event(number, event, NOW).unwrap();
        assert_eq!(ledger.get(number).unwrap().value, Some(acc));
    }
    ledger.settle(NOW);
    let best = ledger.record().sweep.best.clone();
    assert_eq!(best, Some((TrialId::of(&ledger.record().sweep.id, 2), 0.5)), "more is better");
}

#[test]
fn every_end_of_a_trial() {
    let stop = |cause| move |ledger: &mut Ledger| ledger.stop_trial(1, cause, NOW).unwrap();
    let nothing = |_: &mut Ledger| {};
    let check = |what: &str, before: &dyn Fn(&mut Ledger), event: TrialEvent, want: TrialState| {
        let mut ledger = ledger();
        ledger.run(1);
        before(&mut ledger);
        ledger.event(1, event, NOW).unwrap();
        let record = ledger.get(1).unwrap();
        assert_eq!(record.trial.state, want, "{what}");
        let over = want != TrialState::Queued;
        assert_eq!(record.trial.finished_at.is_some(), over, "{what}");
        assert_eq!(record.placement, None, "{what}");
        assert_eq!(ledger.effects().contains(&Effect::Enqueue(1)), !over, "{what}");
    };
    use FailureClass::{Diverged, Infrastructure, OutOfMemory, User};
    check("all steps", &nothing, finished(Ending::Completed, Some(1.0)), TrialState::Completed);
    check("stopped", &stop(StopCause::Search), finished(Ending::Stopped, None), TrialState::Stopped);
    check("budget", &stop(StopCause::Budget), finished(Ending::Stopped, None), TrialState::Stopped);
    check("cancelled", &stop(StopCause::Person), finished(Ending::Stopped, None), TrialState::Cancelled);
    let both = |ledger: &mut Ledger| {
        ledger.stop_trial(1, StopCause::Person, NOW).unwrap();
        ledger.stop_all(StopCause::Budget, NOW).unwrap();
    };
    check("a person's word is the last", &both, finished(Ending::Stopped, None), TrialState::Cancelled);
    check(
        "too late to stop",
        &stop(StopCause::Person),
        finished(Ending::Completed, None),
        TrialState::Completed,
    );
    check("NaN", &nothing, finished(Ending::Diverged, None), TrialState::Diverged);
    check("NaN, as a failure", &nothing, broke(Diverged), TrialState::Diverged);
    check("a wrong spec", &nothing, broke(User), TrialState::Failed);
    check("too large", &nothing, broke(OutOfMemory), TrialState::Failed);
    check("the machine's fault", &nothing, broke(Infrastructure), TrialState::Queued);
    check("given back", &nothing, TrialEvent::Released, TrialState::Queued);
    check(
        "given back when told to stop",
        &stop(StopCause::Search),
        TrialEvent::Released,
        TrialState::Stopped,
    );
    check("lost when cancelled", &stop(StopCause::Person), broke(Infrastructure), TrialState::Cancelled);
    check("other bytes than before", &nothing, started("other"), TrialState::Failed);
}

#[test]
fn a_waiting_trial_is_stopped_at_once_and_a_running_one_is_told() {
    let mut ledger = ledger();
    ledger.run(1);
    ledger.stop_all(StopCause::Budget, NOW).unwrap();
    assert_eq!(ledger.effects(), [Effect::Stop(1, Attempt(1), StopReason::Search)]);
    assert_eq!((ledger.state(1), ledger.state(2)), (TrialState::Running, TrialState::Stopped));
    assert!(matches!(ledger.stop_trial(2, StopCause::Person, NOW), Err(CoordinatorError::Over { .. })));
    assert!(matches!(ledger.stop_trial(3, StopCause::Person, NOW), Err(CoordinatorError::NotFound { .. })));
    ledger.settle(NOW);
    assert_eq!(ledger.record().sweep.state, SweepState::Running);
    ledger.event(1, finished(Ending::Stopped, Some(2.0)), NOW).unwrap();
    ledger.settle(NOW);
    let sweep = &ledger.record().sweep;
    assert_eq!((sweep.state, sweep.best.as_ref().map(|b| b.1)), (SweepState::Completed, Some(2.0)));
}

#[test]
fn losses_count_between_checkpoints() {
    let mut ledger = ledger();
    for attempt in 1..=3 {
        ledger.run(1);
        assert_eq!(ledger.get(1).unwrap().trial.attempt, Attempt(attempt));
        // One that is written again is no step further.
        if attempt >= 2 {
            ledger.checkpoint(1, 3, stored(&format!("c{attempt}")), &[]).unwrap();
        }
        ledger.lost(1, "silence", NOW).unwrap();
        assert_eq!(ledger.state(1), TrialState::Queued, "{attempt}");
    }
    let trial = &ledger.get(1).unwrap().trial;
    let attempts: Vec<_> = trial.attempts.iter().map(|(_, step)| *step).collect();
    assert_eq!(attempts, [0, 0, 3], "each says where it starts");
    let placed = |attempt| TrialPlacement {
        started_at: Some(NOW),
        ended_at: Some(NOW),
        ..TrialPlacement::new(Attempt(attempt), AgentId::new("a"), DeviceId::new("cpu"))
    };
    assert_eq!(trial.placements, [placed(1), placed(2), placed(3)], "and where it was");
    ledger.run(1);
    ledger.lost(1, "silence", NOW).unwrap();
    let failure = ledger.get(1).unwrap().trial.failure.clone().unwrap();
    assert_eq!(failure.class, FailureClass::Infrastructure);
    assert!(failure.message.contains("silence; 3 times since its last checkpoint"), "{}", failure.message);
}

/// However often a machine is taken away from a trial, whether or not that got further: its record fits into one value of etcd.
#[test]
fn thousands_of_interruptions_leave_a_small_record() {
    let mut ledger = ledger();
    for attempt in 1..=3000_u32 {
        ledger.run(1);
        if attempt.is_multiple_of(3) {
            ledger.checkpoint(1, attempt.into(), stored(&format!("c{attempt}")), &[]).unwrap();
        }
        ledger.event(1, TrialEvent::Released, NOW).unwrap();
        ledger.effects();
    }
    let record = ledger.get(1).unwrap();
    let bytes = serde_json::to_vec(record).unwrap().len();
    assert!(bytes < 48 << 10, "{bytes} bytes");
    assert_eq!(record.trial.attempt, Attempt(3000));
    assert_eq!(record.trial.attempts.last(), Some(&(Attempt(3000), 2997)));
}

#[test]
fn an_overtaken_checkpoint_never_replaces_a_newer_one() {
    let mut ledger = ledger();
    ledger.run(1);
    let none: [&str; 0] = [];
    assert_eq!(ledger.checkpoint(1, 2, stored("two"), &[]).unwrap(), none);
    assert_eq!(ledger.checkpoint(1, 2, stored("two"), &[]).unwrap(), none, "a repetition");
    assert_eq!(ledger.checkpoint(1, 4, stored("four"), &[]).unwrap(), ["two-adapter", "two-resume"]);
    assert_eq!(ledger.checkpoint(1, 3, stored("three"), &[]).unwrap(), ["three-adapter", "three-resume"]);
    let record = ledger.get(1).unwrap();
    assert_eq!(record.checkpoint.as_ref().map(|c| c.step), Some(4));
    assert_eq!(record.trial.adapter.as_deref(), Some("four-adapter"));
    assert_eq!(ledger.unused(1, stored("four")).unwrap(), none);
}

#[test]
fn points_count_once_and_the_base_does_not() {
    let mut ledger = ledger();
    ledger.run(1);
    ledger.metrics(1, &[point(0, 9.0), point(1, 3.0), point(2, 2.0)]).unwrap();
    ledger.metrics(1, &[point(1, 8.0), point(2, 7.0)]).unwrap();
    let record = ledger.get(1).unwrap();
    assert_eq!((record.trial.step, record.value, record.trial.eval_loss), (2, Some(2.0), Some(2.0)));
}

#[test]
fn an_account_adds_up_over_assignments_and_restarts() {
    let mut ledger = ledger();
    let cost = |ledger: &Ledger| ledger.get(1).unwrap().trial.cost_usd.unwrap();
    ledger.run(1);
    ledger.charge(1, 10.0, Timestamp(11_000)).unwrap();
    ledger.charge(1, 20.0, Timestamp(21_000)).unwrap();
    ledger.close_account(1, 25.0, None, Timestamp(26_000)).unwrap();
    ledger.lost(1, "silence", NOW).unwrap();
    assert_eq!(cost(&ledger), 25.0);
    ledger.run(1);
    let used = |seconds| Used { seconds, held: Some(Duration::from_secs(9)) };
    ledger.charge_used(1, used(5.0), Timestamp(40_000)).unwrap();
    ledger.charge_used(1, Used { held: None, ..used(5.0) }, Timestamp(41_000)).unwrap();
    assert_eq!(cost(&ledger), 30.0);
    // Another coordinator takes over: its meter begins anew, what was charged stands.
    let trials = ledger.records();
    let mut next = Ledger::new(ledger.record().clone(), trials).unwrap();
    // Nothing was charged a second later, so it is not written down either.
    let charged = Charged { at: Timestamp(40_000), held: Some(Duration::from_secs(9)) };
    assert_eq!(next.reopen_account(1).unwrap(), Some(charged));
    next.charge(1, 3.0, Timestamp(50_000)).unwrap();
    assert_eq!(cost(&next), 33.0);
    next.settle(NOW);
    assert_eq!(next.record().sweep.cost_usd, 33.0);
}

/// What a simulated device took by its model is what it costs, over attempts and coordinators, whatever the clock says of it.
#[test]
fn a_simulated_trial_costs_what_its_model_says() {
    // (whether it is simulated, what its agent says, what it costs at a dollar a second of its own time)
    for (base, modelled, want) in [
        (format!("{SIMULATED}m"), Some(40.0), 10.0 + 40.0),
        (format!("{SIMULATED}m"), None, 10.0 + 5.0 + 30.0),
        ("m".into(), Some(40.0), 10.0 + 5.0 + 30.0),
    ] {
        let mut ledger = ledger();
        let cost = |ledger: &Ledger| ledger.get(1).unwrap().trial.cost_usd.unwrap();
        let run = |ledger: &mut Ledger| {
            ledger.assign(1, placement()).unwrap();
            ledger.event(1, started(&base), NOW).unwrap();
        };
        run(&mut ledger);
        ledger.close_account(1, 10.0, None, NOW).unwrap();
        ledger.lost(1, "silence", NOW).unwrap();
        run(&mut ledger);
        ledger.charge(1, 5.0, NOW).unwrap();
        let mut next = Ledger::new(ledger.record().clone(), ledger.records()).unwrap();
        next.reopen_account(1).unwrap();
        next.close_account(1, 30.0, modelled, NOW).unwrap();
        next.settle(NOW);
        assert_eq!((cost(&next), next.record().sweep.cost_usd), (want, want), "{base} {modelled:?}");
    }
}

#[test]
fn memory_is_predicted_from_the_models_shape() {
    let shape = ModelShape {
        vocab_size: 1000,
        hidden_size: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        tie_word_embeddings: true,
        query_key_value_bias: true,
        query_key_norms: true,
        sliding_window: None,
        sliding_window_layers: 0,
    };
    let mut known = record(document());
    known.base_models.insert("/m".into(), shape);
    let mut ledger = Ledger::new(known, Vec::new()).unwrap();
    ledger.fill(NOW);
    let (small, large) = (ledger.needs(1).unwrap(), ledger.needs(2).unwrap());
    assert_eq!((small.base_bytes, large.base_bytes), (4 * shape.parameters(), 4 * shape.parameters()));
    assert!(0 < small.own_bytes && small.own_bytes < large.own_bytes, "rank 2 and 4");
    let assignment = ledger.assigned(1);
    assert_eq!(assignment.predicted_peak_memory_bytes, small.base_bytes + small.own_bytes);
    let unknown = self::ledger().needs(1).unwrap();
    assert_eq!((unknown.base_bytes, unknown.own_bytes), (0, 0));
}

/// A trial runs where its configuration says, else wherever its sweep may; its agent is told neither that nor the conditions
/// under which it is asked.
#[test]
fn a_trial_goes_to_its_accelerator_and_is_asked_if_it_is_to_be() {
    let mut document = document();
    document["resources"] =
        json!({ "accelerators": ["T4-16GB", "V100-16GB", "A100-40GB"], "max_pack_size": 1 });
    document["parameters"] = json!({
        "lora_rank": [2, 4],
        "accelerator": { "when": { "lora_rank": 4 }, "choices": ["V100-16GB", "A100-40GB"] },
    });
    document["evaluations"] = json!({ "tasks": ["arc_easy"], "when": { "accelerator": "A100-40GB" } });
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    ledger.effects();
    for (number, accelerators, asked) in [
        (1, &["T4-16GB", "V100-16GB", "A100-40GB"][..], false),
        (2, &["V100-16GB"], false),
        (3, &["A100-40GB"], true),
    ] {
        let needs = ledger.needs(number).unwrap();
        assert_eq!(
            (needs.accelerators, needs.max_pack_size, needs.evaluated),
            (accelerators.iter().map(ToString::to_string).collect(), Some(1), asked)
        );
        let config = ledger.get(number).unwrap().trial.config.clone();
        let told = ledger.assigned(number);
        assert_eq!(told.config, TrialConfig { accelerator: None, ..config });
        let whole = Evaluations { tasks: vec![json!("arc_easy")], ..Evaluations::default() };
        assert_eq!(told.evaluations, asked.then_some(whole), "trial {number}");
    }
}

#[test]
fn a_restarted_search_proposes_what_it_would_have_proposed() {
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
        "search": {"algorithm": "random", "max_trials": 40, "seed": 5},
        "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-2]}},
    });
    let finish_all = |ledger: &mut Ledger| {
        for number in ledger.live().collect::<Vec<_>>() {
            ledger.run(number);
            ledger.event(number, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
        }
        ledger.fill(NOW);
    };
    let parameters = |ledger: &Ledger| -> Vec<_> {
        ledger.trials().values().map(|t| t.trial.parameters.clone()).collect()
    };
    let mut whole = Ledger::new(record(document.clone()), Vec::new()).unwrap();
    let mut restarted = Ledger::new(record(document), Vec::new()).unwrap();
    whole.fill(NOW);
    restarted.fill(NOW);
    for _ in 0..5 {
        finish_all(&mut whole);
        finish_all(&mut restarted);
        let trials = restarted.records();
        restarted = Ledger::new(restarted.record().clone(), trials).unwrap();
        for number in restarted.trials().keys().copied().collect::<Vec<_>>() {
            restarted.replay(number, &[]).unwrap();
        }
    }
    assert_eq!(parameters(&whole).len(), 40);
    assert_eq!(parameters(&whole), parameters(&restarted));
}

/// What has begun goes on where it began: on devices that train, or on simulated ones.
#[test]
fn a_sweep_is_of_the_kind_of_its_first_trial() {
    for (agent, base, simulated) in [("a", "b", false), ("simulated-1", "simulated:b", true)] {
        let mut ledger = ledger();
        assert_eq!(ledger.needs(1).unwrap().simulated, None);
        ledger.assign(1, Placement { agent: AgentId::new(agent), ..placement() }).unwrap();
        // What it refuses before it starts is its word as well.
        assert_eq!(ledger.get(1).unwrap().trial.is_simulated(), simulated);
        ledger.event(1, started(base), NOW).unwrap();
        assert_eq!(ledger.needs(1).unwrap().simulated, Some(simulated));
        assert_eq!(ledger.needs(2).unwrap().simulated, Some(simulated), "as its sweep began");
        // Each goes on where it began itself.
        let other = if simulated { "a" } else { "simulated-1" };
        ledger.assign(2, Placement { agent: AgentId::new(other), ..placement() }).unwrap();
        assert_eq!(ledger.needs(2).unwrap().simulated, Some(!simulated));
        let trials = ledger.records();
        let restarted = Ledger::new(ledger.record().clone(), trials).unwrap();
        assert_eq!(restarted.needs(1).unwrap().simulated, Some(simulated));
    }
}

#[test]
fn a_record_says_what_its_trial_was_given() {
    let mut ledger = ledger();
    assert_eq!(ledger.get(1).unwrap().trial.device, None);
    ledger.assign(1, placement()).unwrap();
    ledger.event(1, started("b"), NOW).unwrap();
    ledger.event(1, broke(FailureClass::OutOfMemory), NOW).unwrap();
    let record = ledger.get(1).unwrap();
    assert_eq!((record.trial.state, &record.placement), (TrialState::Failed, &None));
    assert_eq!(record.trial.device, placement().is);
}

/// Its checkpoint may be of a step at which nothing was to be reported.
#[test]
fn a_restart_leaves_a_trial_where_its_attempt_starts() {
    let mut ledger = ledger();
    ledger.assign(1, placement()).unwrap();
    ledger.event(1, started("b"), NOW).unwrap();
    ledger.checkpoint(1, 2, stored("c"), &[point(0, 1.0)]).unwrap();
    ledger.event(1, TrialEvent::Released, NOW).unwrap();
    ledger.assign(1, placement()).unwrap();
    let trials = ledger.records();
    let mut restarted = Ledger::new(ledger.record().clone(), trials).unwrap();
    for (curve, step) in [(vec![], 2), (vec![point(0, 1.0)], 2), (vec![point(0, 1.0), point(3, 1.0)], 3)] {
        restarted.replay(1, &curve).unwrap();
        assert_eq!(restarted.get(1).unwrap().trial.step, step, "{curve:?}");
    }
}

/// The tally of a ledger that went through it all is that of a ledger read back from its records.
#[test]
fn sums_that_are_kept_up_to_date_are_those_counted_anew() {
    let mut document = document();
    document["parameters"] = json!({"lora_rank": [1, 2, 3, 4, 5, 6]});
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    for (number, seconds) in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0)] {
        ledger.run(number);
        ledger.charge(number, seconds, NOW).unwrap();
    }
    ledger.event(1, finished(Ending::Completed, Some(2.0)), NOW).unwrap();
    ledger.event(2, finished(Ending::Completed, Some(2.0)), NOW).unwrap();
    ledger.event(3, finished(Ending::Stopped, Some(1.0)), NOW).unwrap();
    ledger.stop_trial(5, StopCause::Person, NOW).unwrap();
    ledger.settle(NOW);
    let sweep = &ledger.record().sweep;
    assert_eq!(
        sweep.best,
        Some((TrialId::new("s/1"), 2.0)),
        "of equals, the first; completed before stopped"
    );
    assert_eq!(sweep.cost_usd, 15.0);
    let counts: Vec<_> = sweep.counts.iter().map(|(state, count)| (state.as_str(), count)).collect();
    let expected = [("queued", 1), ("running", 1), ("completed", 2), ("stopped", 1), ("cancelled", 1)];
    assert_eq!(counts, expected);
    let records = ledger.records();
    assert_eq!(ledger.tally, Ledger::new(ledger.record().clone(), records).unwrap().tally);
}
