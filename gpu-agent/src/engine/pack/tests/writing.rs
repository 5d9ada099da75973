//! Checkpoints that are written while their trials train on.

use super::*;
use std::sync::mpsc::{Sender, channel};

/// Has writes of checkpoints wait: what is sent lets the next one through, and once the sender is dropped none waits.
fn gate(pack: &mut Pack<Small>) -> Sender<()> {
    let (opens, waits) = channel();
    pack.backend.5 = Some(Arc::new(Mutex::new(waits)));
    opens
}

/// What is heard of trials, with the steps of points and checkpoints.
fn listen(heard: &mut Vec<String>) -> impl FnMut(Event) {
    |event| {
        let Event::Trial(Assignment { trial, .. }, happening) = event else { return };
        heard.push(match happening {
            Happening::Points(points) => format!("{trial} {}", points[0].step),
            Happening::Checkpoint(checkpoint) => format!("{trial} saved {}", checkpoint.step),
            Happening::Finished { ending, .. } => format!("{trial} {ending:?}"),
            Happening::Released => format!("{trial} released"),
            Happening::Note(_, what) | Happening::Failed(Failure { message: what, .. }) => {
                format!("{trial} {what}")
            }
            Happening::Started { .. } => return,
        });
    }
}

/// A trial of so many steps, each told of, with a checkpoint every `save_steps`.
fn saving(dir: &Path, name: &str, seed: u64, max_steps: u32, save_steps: u32) -> Admission {
    let mut admission = admission(dir, name, "a", seed);
    let config = &mut admission.config;
    (config.max_steps, config.save_steps, config.logging_steps) = (Some(max_steps), save_steps, 1);
    admission
}

/// The disk is slow, and steps are made; only a trial whose next checkpoint is due stands still.
#[test]
fn a_checkpoint_that_is_slow_to_write_stops_no_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    let opens = gate(&mut pack);
    pack.admit(saving(dir.path(), "one", 1, 7, 3));
    pack.admit(saving(dir.path(), "two", 1, 20, 0));
    let mut heard = Vec::new();
    while !heard.contains(&"two 19".to_string()) {
        pack.step(&mut listen(&mut heard));
    }
    let of = |heard: &[String], trial: &str| -> Vec<String> {
        heard.iter().filter_map(|heard| heard.strip_prefix(trial)).map(str::to_string).collect()
    };
    assert_eq!(of(&heard, "one "), ["0", "1", "2", "3", "4", "5", "6"]);
    assert!(writes(&pack) && !heard.iter().any(|heard| heard.contains("saved")), "{heard:?}");
    // With that of step 3 written, that of step 6 is, and it goes on meanwhile.
    opens.send(()).unwrap();
    while !heard.contains(&"one 7".to_string()) {
        pack.step(&mut listen(&mut heard));
    }
    assert_eq!(of(&heard, "one ")[7..], ["saved 3", "7"]);
    drop(opens);
    while !pack.is_idle() {
        pack.step(&mut listen(&mut heard));
    }
    assert_eq!(of(&heard, "one ")[9..], ["saved 6", "saved 7", "Completed"]);
    assert_eq!(of(&heard, "two ")[20..], ["20", "saved 20", "Completed"]);
}

/// With one checkpoint on its way, whose is due as well stands still, without a word, until it is its turn; none is passed by.
#[test]
fn checkpoints_take_turns_if_few_may_be_on_their_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    pack.backend.6 = 1;
    let opens = gate(&mut pack);
    for name in ["one", "two"] {
        pack.admit(saving(dir.path(), name, 1, 6, 2));
    }
    let until = |pack: &mut Pack<Small>, last: &str| {
        let mut heard: Vec<String> = Vec::new();
        while !heard.iter().any(|heard| heard == last) {
            pack.step(&mut listen(&mut heard));
            assert!(pack.writes() <= 1, "{heard:?}");
        }
        heard
    };
    let heard = until(&mut pack, "one 4");
    assert_eq!(heard, ["one 0", "two 0", "one 1", "two 1", "one 2", "two 2", "one 3", "one 4"]);
    for (saved, steps) in [
        ("one saved 2", ["two 3", "two 4"]),
        ("two saved 2", ["one 5", "one 6"]),
        ("one saved 4", ["two 5", "two 6"]),
    ] {
        opens.send(()).unwrap();
        assert_eq!(until(&mut pack, steps[1]), [saved, steps[0], steps[1]]);
    }
    drop(opens);
    let last = ["two saved 4", "one saved 6", "one Completed", "two saved 6", "two Completed"];
    assert_eq!(until(&mut pack, "two Completed"), last);
    assert!(pack.is_idle());
}

/// It stands still where it is by then, and its next checkpoint is of there.
#[test]
fn a_checkpoint_that_is_refused_after_more_steps_is_made_where_the_trial_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    let opens = gate(&mut pack);
    pack.admit(saving(dir.path(), "one", 13, 5, 2));
    let mut heard = Vec::new();
    while !heard.contains(&"one 3".to_string()) {
        pack.step(&mut listen(&mut heard));
    }
    drop(opens);
    while !pack.is_idle() {
        written(&mut pack, &mut listen(&mut heard));
        pack.step(&mut listen(&mut heard));
    }
    let refused = "one no checkpoint can be written; it waits: disk";
    let saved = ["one saved 3", "one 4", "one saved 4", "one 5", "one saved 5", "one Completed"];
    assert_eq!(heard[..5], ["one 0", "one 1", "one 2", "one 3", refused]);
    assert_eq!(heard[5..], saved);
    let left = |step| CheckpointDirs::within(&dir.path().join("one"), step).adapter.exists();
    assert_eq!([2, 3, 4, 5].map(left), [false, true, true, true], "what was refused takes no room");
}

/// However a trial ends, its last word comes when nothing of it is being written any more.
#[test]
fn what_ends_waits_for_its_checkpoint() {
    // (how it is ended after its third step, what is heard once the checkpoint of step 2 is written)
    for (how, wanted) in [
        (How::Stop, vec!["one saved 2", "one saved 3", "one Stopped"]),
        // What is to go on elsewhere does so from its last step: no upload of an earlier one holds that up.
        (How::Release, vec!["one saved 3", "one released"]),
        (How::Drop, vec![]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut pack = pack();
        let opens = gate(&mut pack);
        pack.admit(saving(dir.path(), "one", 1, 9, 2));
        let mut heard = Vec::new();
        while !heard.contains(&"one 3".to_string()) {
            pack.step(&mut listen(&mut heard));
        }
        heard.clear();
        pack.stop(&Assignment::new("one", 1), how);
        pack.step(&mut listen(&mut heard));
        assert!(heard.is_empty() && !pack.is_idle(), "{how:?}: {heard:?}");
        drop(opens);
        while !pack.is_idle() {
            pack.step(&mut listen(&mut heard));
        }
        assert_eq!(heard, wanted, "{how:?}");
        assert_eq!(dir.path().join("one").exists(), how != How::Drop, "{how:?}");
        let earlier = CheckpointDirs::within(&dir.path().join("one"), 2).adapter;
        assert_eq!(earlier.exists(), how == How::Stop, "{how:?}: what is not told of takes no room");
    }
}

/// The checkpoint of an earlier step is better than none.
#[test]
fn what_is_released_tells_of_its_earlier_checkpoint_if_the_disk_refuses_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    pack.backend.1 = 0;
    let opens = gate(&mut pack);
    pack.admit(saving(dir.path(), "one", 13, 9, 2));
    let mut heard = Vec::new();
    while !heard.contains(&"one 3".to_string()) {
        pack.step(&mut listen(&mut heard));
    }
    heard.clear();
    pack.backend.1 = 1;
    pack.stop(&Assignment::new("one", 1), How::Release);
    drop(opens);
    while !pack.is_idle() {
        pack.step(&mut listen(&mut heard));
    }
    let refused = "one no checkpoint can be written; it waits: disk";
    assert_eq!(heard, ["one saved 2", refused, "one saved 3", "one released"]);
}

/// A stop that comes while the last checkpoint is written finds a trial that has made all its steps.
#[test]
fn a_stop_during_the_last_write_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for how in [How::Stop, How::Release] {
        let mut pack = pack();
        let opens = gate(&mut pack);
        pack.admit(saving(dir.path(), "one", 1, 2, 0));
        while !writes(&pack) {
            pack.step(&mut |_| {});
        }
        pack.stop(&Assignment::new("one", 1), how);
        let mut unasked = Vec::new();
        pack.step(&mut |event| panic!("nothing is written: {event:?}"));
        drop(opens);
        while !pack.is_idle() {
            pack.step(&mut |event| {
                if let Event::Trial(_, Happening::Finished { ending, summary, .. }) = event {
                    assert_eq!(ending, Ending::Completed);
                    unasked.push(summary.unasked);
                }
            });
        }
        assert_eq!(unasked, [None], "{how:?}");
    }
}

/// The checkpoint before a failure counts. What failed holds no memory that another could have meanwhile.
#[test]
fn what_fails_waits_for_its_checkpoint_without_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    pack.backend.1 = 0;
    let opens = gate(&mut pack);
    let large = |mut admission: Admission| {
        // Each takes all that the base leaves.
        admission.config.batch_size = 6;
        admission
    };
    pack.admit(large(saving(dir.path(), "one", UNEVALUABLE, 5, 1)));
    pack.admit(large(saving(dir.path(), "two", 1, 2, 0)));
    let mut heard = Vec::new();
    // The checkpoint of step 1 is being written when step 2 fails.
    while !heard.contains(&"two 1".to_string()) {
        pack.step(&mut listen(&mut heard));
    }
    assert_eq!(heard, ["one 0", "one 1", "one 2", "two 0", "two 1"]);
    assert!(pack.unsaved.is_empty() && pack.leaving.len() == 1 && pack.members.len() == 1);
    drop(opens);
    while !pack.is_idle() {
        pack.step(&mut listen(&mut heard));
    }
    let one: Vec<_> = heard[5..].iter().filter(|heard| heard.starts_with("one")).collect();
    assert_eq!(one, ["one saved 1", "one saved 2", "one no room to evaluate"]);
}

/// Whatever else is asked of it, it fails; dropped, it leaves without a word and with all that it wrote.
#[test]
fn what_failed_can_be_ended_while_its_checkpoint_is_written() {
    for (how, wanted) in [
        (How::Stop, vec!["one saved 1", "one saved 2", "one no room to evaluate"]),
        (How::Release, vec!["one saved 1", "one saved 2", "one no room to evaluate"]),
        (How::Drop, vec![]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut pack = pack();
        pack.backend.1 = 0;
        let opens = gate(&mut pack);
        pack.admit(saving(dir.path(), "one", UNEVALUABLE, 5, 1));
        while pack.leaving.is_empty() {
            pack.step(&mut |_| {});
        }
        pack.stop(&Assignment::new("one", 1), how);
        pack.step(&mut |event| panic!("nothing is written: {event:?}"));
        drop(opens);
        let mut heard = Vec::new();
        while !pack.is_idle() {
            pack.step(&mut listen(&mut heard));
        }
        assert_eq!(heard, wanted, "{how:?}");
        assert_eq!(dir.path().join("one").exists(), how != How::Drop, "{how:?}");
    }
}

/// No step of it is lost: whoever tries it again makes up for the evaluation and goes on. The disk is not waited for.
#[test]
fn what_fails_in_an_evaluation_is_saved_where_it_is() {
    // (a checkpoint every so many steps, checkpoints that the disk refuses, those that are written)
    for (save_steps, refused, saved) in [
        (0, 0, vec!["one saved 2"]),
        (1, 0, vec!["one saved 1", "one saved 2"]),
        (1, 1, vec!["one saved 2"]),
        (1, 2, vec![]),
        (0, 1, vec![]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut pack = pack();
        pack.backend.1 = refused;
        let opens = gate(&mut pack);
        pack.admit(saving(dir.path(), "one", UNEVALUABLE, 3, save_steps));
        let mut heard = Vec::new();
        while pack.leaving.is_empty() {
            pack.step(&mut listen(&mut heard));
        }
        assert!(pack.is_empty() && heard == ["one 0", "one 1", "one 2"], "{heard:?}");
        heard.clear();
        drop(opens);
        while !pack.is_idle() {
            pack.step(&mut listen(&mut heard));
        }
        assert_eq!(heard, [&saved[..], &["one no room to evaluate"]].concat(), "{save_steps} {refused}");
        if saved.last() != Some(&"one saved 2") {
            continue;
        }
        let resume = Some(CheckpointDirs::within(&dir.path().join("one"), 2));
        pack.admit(Admission { resume, ..saving(dir.path(), "one", UNEVALUABLE, 3, 0) });
        heard.clear();
        while !pack.is_idle() {
            pack.step(&mut listen(&mut heard));
        }
        assert_eq!(heard, ["one 2", "one 3", "one saved 3", "one Completed"], "{save_steps}");
    }
}
