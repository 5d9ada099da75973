//! Holding a sweep and going on with it.

use super::*;

#[test]
fn a_paused_sweep_holds_everything_and_goes_on_where_it_was() {
    let mut ledger = ledger();
    ledger.run(1);
    ledger.checkpoint(1, 3, stored("c")).unwrap();
    ledger.pause(NOW).unwrap();
    let release = Effect::Stop(1, Attempt(1), StopReason::Release);
    assert_eq!(ledger.effects(), [Effect::Withdraw, release]);
    ledger.pause(NOW).unwrap();
    assert_eq!(ledger.effects(), [], "again changes nothing");
    assert_eq!(ledger.pending_stop(1).unwrap(), Some(StopReason::Release));
    ledger.event(1, TrialEvent::Released, NOW).unwrap();
    assert_eq!((ledger.state(1), ledger.pending_stop(1).unwrap()), (TrialState::Queued, None));
    ledger.fill(NOW);
    ledger.settle(NOW);
    assert_eq!((ledger.effects(), ledger.record().sweep.state), (vec![], SweepState::Paused));
    ledger.resume(NOW).unwrap();
    assert_eq!(ledger.effects(), [Effect::Enqueue(1), Effect::Enqueue(2)]);
    ledger.resume(NOW).unwrap();
    assert_eq!(ledger.effects(), []);
    assert_eq!(ledger.assign(1, placement()).unwrap().resume_step, Some(3));
}

/// What happens between the pause and the agent's word, and where the trial stands then.
#[test]
fn a_trial_that_is_being_given_back() {
    let check = |what: &str, happens: &dyn Fn(&mut Ledger), state: TrialState, wants_device: bool| {
        let mut ledger = ledger();
        ledger.run(1);
        ledger.pause(NOW).unwrap();
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
        l.resume(NOW).unwrap();
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
    let active = |ledger: &Ledger, now| ledger.record().active_seconds(Timestamp(now));
    assert_eq!(active(&ledger, 11_000), 10.0);
    ledger.pause(Timestamp(11_000)).unwrap();
    assert_eq!(active(&ledger, 99_000), 10.0);
    let trials = ledger.trials().values().cloned().collect();
    let mut ledger = Ledger::new(ledger.record().clone(), trials).unwrap();
    assert!(ledger.is_paused(), "it outlives a restart");
    ledger.resume(Timestamp(101_000)).unwrap();
    assert_eq!(active(&ledger, 103_000), 12.0);
}

#[test]
fn what_is_over_is_not_paused() {
    let mut ledger = ledger();
    ledger.stop_all(StopCause::Person, NOW).unwrap();
    ledger.settle(NOW);
    for refused in [ledger.pause(NOW), ledger.resume(NOW)] {
        assert!(matches!(refused, Err(CoordinatorError::Over { .. })), "{refused:?}");
    }
}
