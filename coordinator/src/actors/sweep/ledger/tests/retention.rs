//! Which checkpoints and adapters are kept.

use super::*;
use crate::actors::sweep::ledger::tally::Tally;

/// A grid of trials that keeps some adapters, all of which train and have a checkpoint of step 3.
fn training(keep: Option<u32>, goal: &str) -> Ledger {
    let mut document = document();
    document["parameters"] = json!({"lora_rank": [1, 2, 3, 4, 5, 6]});
    document["search"]["goal"] = goal.into();
    document["keep_adapters"] = keep.into();
    let mut ledger = Ledger::new(record(document), Vec::new()).unwrap();
    ledger.fill(NOW);
    for number in 1..=6 {
        ledger.run(number);
        ledger.checkpoint(number, 3, stored(&number.to_string()), &[]).unwrap();
    }
    ledger.effects();
    ledger
}

/// The trials whose adapters are there.
fn adapters(ledger: &Ledger) -> Vec<u32> {
    let with = ledger.trials().iter().filter(|(_, record)| record.trial.adapter.is_some());
    with.map(|(number, _)| *number).collect()
}

fn paths<const N: usize>(paths: [&str; N]) -> BTreeSet<String> {
    paths.map(String::from).into()
}

/// Trials that are over with these values, one after the other, and whose adapters are there then.
#[test]
fn of_trials_that_are_over_the_best_keep_their_adapters() {
    use Ending::{Completed, Stopped};
    let check = |what: &str, keep, goal: &str, ends: &[(u32, Ending, Option<f64>)], want: &[u32]| {
        let mut ledger = training(keep, goal);
        for (number, ending, value) in ends {
            ledger.event(*number, finished(*ending, *value), NOW).unwrap();
            let anew = Tally::of(&ledger.record().sweep.spec, ledger.trials());
            assert_eq!(ledger.tally, anew, "{what}: kept up to date and counted anew");
        }
        let over = ends.iter().map(|(number, ..)| *number).collect::<Vec<_>>();
        let kept: Vec<_> = adapters(&ledger).into_iter().filter(|number| over.contains(number)).collect();
        assert_eq!(kept, want, "{what}");
        assert_eq!(adapters(&ledger).len(), 6 - over.len() + want.len(), "{what}: others are not touched");
    };
    let completed = |values: [(u32, f64); 4]| values.map(|(number, value)| (number, Completed, Some(value)));
    let four = completed([(1, 4.0), (2, 1.0), (3, 3.0), (4, 2.0)]);
    check("all", None, "minimize", &four, &[1, 2, 3, 4]);
    check("more than there are", Some(9), "minimize", &four, &[1, 2, 3, 4]);
    check("the two smallest", Some(2), "minimize", &four, &[2, 4]);
    check("the two largest", Some(2), "maximize", &four, &[1, 3]);
    check("one", Some(1), "minimize", &four, &[2]);
    let equal = completed([(4, 0.0), (3, -0.0), (2, 0.0), (1, 0.0)]);
    check("of equals the earlier", Some(2), "minimize", &equal, &[1, 2]);
    check("of equals the earlier, the other way", Some(2), "maximize", &equal, &[1, 2]);
    let without = [(1, Completed, None), (2, Completed, Some(f64::NAN)), (3, Completed, Some(9.0))];
    check("no value is the worst", Some(1), "minimize", &without, &[3]);
    check("no value is the worst, the other way", Some(1), "maximize", &without, &[3]);
    check("no value at all", Some(1), "minimize", &without[..2], &[1]);
    let both = [(1, Completed, Some(3.0)), (2, Stopped, Some(2.0)), (3, Stopped, Some(1.0))];
    check("stopped ones compete", Some(2), "minimize", &both, &[1, 3]);
    check("the sweep's best trial stays", Some(1), "minimize", &both, &[1]);
    let late = [(2, Stopped, Some(2.0)), (1, Completed, Some(3.0))];
    check("the sweep's best trial stays, when it comes late", Some(1), "minimize", &late, &[1]);
}

/// What a trial's end lets go of, and from which step it goes on when it is tried again.
#[test]
fn what_nothing_goes_on_from_is_removed() {
    let check = |what: &str, end: &dyn Fn(&mut Ledger), removed: BTreeSet<String>, again: Option<u64>| {
        let mut ledger = training(Some(1), "minimize");
        ledger.event(2, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
        ledger.effects();
        end(&mut ledger);
        let removes = ledger.effects().into_iter().filter_map(|effect| match effect {
            Effect::Remove(_, paths) => Some(paths),
            _ => None,
        });
        assert_eq!(removes.flatten().collect::<BTreeSet<_>>(), removed, "{what}");
        if ledger.state(1) == TrialState::Completed {
            assert_eq!(again, None, "{what}");
            return;
        }
        ledger.retry(1).unwrap();
        assert_eq!(ledger.assigned(1).resume_step, again, "{what}");
    };
    let (all, none) = (|| paths(["1-adapter", "1-resume"]), || paths([]));
    let finish =
        |ending, value| move |ledger: &mut Ledger| ledger.event(1, finished(ending, value), NOW).unwrap();
    let stop = |cause| {
        move |ledger: &mut Ledger| {
            ledger.stop_trial(1, cause, NOW).unwrap();
            ledger.event(1, finished(Ending::Stopped, Some(2.0)), NOW).unwrap();
        }
    };
    check("worse", &finish(Ending::Completed, Some(2.0)), all(), None);
    let better = paths(["1-resume", "2-adapter"]);
    check("better", &finish(Ending::Completed, Some(0.5)), better, None);
    check("stopped by the search", &stop(StopCause::Search), all(), None);
    check("ended by the budget", &stop(StopCause::Budget), none(), Some(3));
    check("cancelled", &stop(StopCause::Person), none(), Some(3));
    check("diverged", &finish(Ending::Diverged, None), none(), Some(3));
    let failed = |ledger: &mut Ledger| ledger.event(1, broke(FailureClass::User), NOW).unwrap();
    check("failed", &failed, none(), Some(3));
}

#[test]
fn a_stopped_trial_that_keeps_its_adapter_goes_on_from_it() {
    let mut ledger = training(Some(1), "minimize");
    ledger.event(1, finished(Ending::Stopped, Some(1.0)), NOW).unwrap();
    assert_eq!((ledger.effects(), adapters(&ledger).contains(&1)), (vec![], true));
    ledger.retry(1).unwrap();
    assert_eq!(ledger.assigned(1).resume_step, Some(3));
    // It competes again when it is over.
    ledger.event(2, finished(Ending::Stopped, Some(2.0)), NOW).unwrap();
    assert!(adapters(&ledger).contains(&2));
    ledger.event(1, started("m"), NOW).unwrap();
    ledger.event(1, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
    assert_eq!((adapters(&ledger).contains(&1), adapters(&ledger).contains(&2)), (true, false));
}

/// Checkpoints with the values known when each comes, and which steps are kept then.
#[test]
fn while_a_trial_trains_its_newest_and_its_best_checkpoint_are_kept() {
    type Coming<'a> = (u64, &'a [(u64, f64)], &'a [u64]);
    let check = |what: &str, coming: &[Coming]| {
        let mut ledger = ledger();
        ledger.run(1);
        let mut there = BTreeSet::new();
        for (step, values, kept) in coming {
            let curve: Vec<_> = values.iter().map(|(step, loss)| point(*step, *loss)).collect();
            let name = step.to_string();
            there.extend([format!("{name}-adapter"), format!("{name}-resume")]);
            for _ in 0..2 {
                for gone in ledger.checkpoint(1, *step, stored(&name), &curve).unwrap() {
                    assert!(there.remove(&gone), "{what}: {gone}");
                }
            }
            let parts = |step| [format!("{step}-adapter"), format!("{step}-resume")];
            let want: BTreeSet<_> = kept.iter().flat_map(parts).collect();
            assert_eq!(there, want, "{what}, at {step}");
            assert_eq!(ledger.get(1).unwrap().paths(), want, "{what}, at {step}");
            assert_eq!(ledger.get(1).unwrap().checkpoint.as_ref().map(|c| c.step), Some(*step), "{what}");
        }
        ledger.event(1, finished(Ending::Completed, Some(1.0)), NOW).unwrap();
        let newest = coming.last().map(|(step, ..)| format!("{step}-adapter"));
        assert_eq!(ledger.get(1).unwrap().paths(), newest.into_iter().collect(), "{what}, at its end");
    };
    check("no values", &[(1, &[], &[1]), (2, &[], &[2]), (3, &[(4, 1.0)], &[3])]);
    check("the base's is none", &[(1, &[(0, 1.0)], &[1]), (2, &[(0, 1.0), (2, 5.0)], &[2])]);
    let ever_better = [(1, 3.0), (2, 2.0), (3, 1.0)];
    check("ever better", &[(1, &ever_better, &[1]), (2, &ever_better, &[2]), (3, &ever_better, &[3])]);
    let turns = [(1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0), (5, 0.5)];
    check(
        "it turns",
        &[
            (1, &turns, &[1]),
            (2, &turns, &[2]),
            (3, &turns, &[2, 3]),
            (4, &turns, &[2, 4]),
            (5, &turns, &[5]),
        ],
    );
    check(
        "a point that is late",
        &[(1, &turns[..1], &[1]), (2, &turns[..1], &[1, 2]), (3, &turns[..2], &[2, 3])],
    );
    check("NaN", &[(1, &[(1, f64::NAN)], &[1]), (2, &[(1, f64::NAN), (2, 5.0)], &[2])]);
}
