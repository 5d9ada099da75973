//! Streams of messages, and the lines that they become.

use super::*;
use domain::{Attempt, Timestamp, TrialId};

/// A sweep of trials of 135 steps at most, compared by held-out loss.
fn sweep(search: &str, max_trials: u32, best: Option<(u32, f64)>) -> v1::WatchSweepResponse {
    let document = serde_json::json!({
        "name": "s",
        "pretrained_model_id": "m",
        "dataset_name": "d",
        "max_steps": 135,
        "eval_steps": 15,
        "search": { "algorithm": search, "max_trials": max_trials, "min_steps": 15 },
        "parameters": [{ "lora_rank": [4, 8, 16] }],
    });
    let mut document = document.as_object().unwrap().clone();
    if search == "grid" {
        document["search"].as_object_mut().unwrap().remove("min_steps");
    }
    SweepSpec::from_document(&document).unwrap();
    let sweep = v1::Sweep {
        spec: Some(proto::convert::to_struct(&document)),
        max_trials: Some(max_trials),
        state: v1::SweepState::Running.into(),
        best_trial_id: best.map(|(number, _)| format!("s-0000/{number}")),
        best_value: best.map(|(_, value)| value),
        ..Default::default()
    };
    v1::WatchSweepResponse { event: Some(Event::Sweep(sweep)) }
}

fn trial(number: u32, state: TrialState, step: u64) -> v1::WatchSweepResponse {
    let id = TrialId::new(format!("s-0000/{number}"));
    let config = domain::trial::TrialConfig { max_steps: Some(135), ..Default::default() };
    let parameters = [("lora_rank".into(), serde_json::json!(8))].into();
    let proposed = Trial::new(id, config, parameters, Timestamp(0));
    let trial = Trial { state, attempt: Attempt(1), step, total_steps: Some(135), ..proposed };
    v1::WatchSweepResponse { event: Some(Event::Trial(trial.into())) }
}

fn progress(number: u32, step: u64, values: &[(&str, f64)]) -> v1::WatchSweepResponse {
    let values = values.iter().map(|(name, value)| ((*name).to_string(), *value)).collect();
    let point = MetricPoint { step, time: Timestamp(0), values };
    v1::WatchSweepResponse {
        event: Some(Event::Progress(v1::TrialProgress {
            trial_id: format!("s-0000/{number}"),
            attempt: 1,
            point: Some(point.into()),
        })),
    }
}

fn board(messages: impl IntoIterator<Item = v1::WatchSweepResponse>) -> Board {
    let mut board = Board::default();
    for message in messages {
        board.apply(message, 0.0).unwrap();
    }
    board
}

#[test]
fn a_stream_becomes_lines() {
    let mut board = Board::default();
    for (message, want) in [
        (sweep("grid", 3, Some((1, 1.25))), Change::Sweep),
        (trial(1, TrialState::Running, 0), Change::Trial { number: 1, entered: true }),
        (trial(1, TrialState::Running, 20), Change::Trial { number: 1, entered: false }),
        (trial(1, TrialState::Completed, 135), Change::Trial { number: 1, entered: true }),
        (trial(2, TrialState::Running, 0), Change::Trial { number: 2, entered: true }),
        (progress(2, 0, &[("eval/loss", 5.0)]), Change::Progress(2)),
        (progress(2, 60, &[("loss", 2.5), ("tokens_per_second", 900.0)]), Change::Progress(2)),
    ] {
        assert_eq!(board.apply(message, 1.0).unwrap(), want);
    }
    assert_eq!(
        board.trial_line(2),
        "trial  2 running   step 60/135 · loss 2.5000 · eval/loss – · 900 tokens/s · lora_rank 8"
    );
    // 195 of 405 steps are made, in ten seconds of training: 11 for the others.
    assert_eq!(
        board.sweep_line(11.0),
        "1/3 trials over · best trial 1 at 1.2500 · 11 s elapsed · about 11 s left"
    );
    assert!(!board.is_over());
}

/// One step a second: what is said to be left, against what successive halving then takes.
#[test]
fn the_time_left_under_successive_halving() {
    use TrialState::{Completed, Queued, Running, Stopped};
    type Rows = &'static [(TrialState, u64)];
    // Trials so far of twelve, and the least and most seconds that may be said.
    let rows: &[(Rows, Option<(f64, f64)>)] = &[
        (&[(Queued, 0), (Queued, 0)], None),
        (&[(Running, 0), (Running, 0)], None),
        (&[(Running, 10), (Running, 10)], Some((350.0, 450.0))),
        // The first that is over made a ninth of its steps; the two others alone have 180 to make at most.
        (&[(Running, 45), (Running, 45), (Stopped, 15), (Running, 10)], Some((350.0, 550.0))),
        // The last one has 90 steps to make, whatever the others made.
        (
            &[
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 45),
                (Stopped, 45),
                (Completed, 135),
                (Running, 45),
            ],
            Some((90.0, 90.0)),
        ),
        (
            &[
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 15),
                (Stopped, 45),
                (Stopped, 45),
                (Completed, 135),
                (Completed, 135),
            ],
            None,
        ),
    ];
    for (trials, want) in rows {
        let mut board = board([sweep("asha", 12, None)]);
        let numbered = || (1..).zip(trials.iter());
        for (number, (state, _)) in numbered() {
            let first = if *state == Queued { Queued } else { Running };
            board.apply(trial(number, first, 0), 0.0).unwrap();
        }
        for (number, (state, step)) in numbered() {
            board.apply(trial(number, *state, *step), 0.0).unwrap();
        }
        let made: u64 = trials.iter().map(|(_, step)| step).sum();
        let got = board.seconds_left(made as f64);
        match (got, want) {
            (None, None) => {}
            (Some(got), Some((least, most))) => {
                assert!((*least..=*most).contains(&got), "{trials:?}: {got}, not {least} to {most}");
            }
            _ => panic!("{trials:?}: {got:?}, not {want:?}"),
        }
    }
}

#[test]
fn steps_made_before_the_watch_began_set_no_pace() {
    let mut board = board([
        sweep("grid", 3, None),
        trial(1, TrialState::Completed, 135),
        trial(2, TrialState::Running, 100),
    ]);
    assert_eq!(board.seconds_left(1.0), None);
    board.apply(trial(2, TrialState::Running, 110), 10.0).unwrap();
    assert_eq!(board.seconds_left(10.0), Some(160.0), "25 and 135 steps at one a second");
}

#[test]
fn the_best_so_far() {
    use TrialState::{Completed, Running};
    let eval = |number, step, value| progress(number, step, &[("eval/loss", value)]);
    let rows = [
        (None, vec![trial(1, Running, 0)], None),
        (None, vec![trial(1, Running, 0), eval(1, 0, 5.0)], None),
        (None, vec![trial(1, Running, 15), eval(1, 15, 2.0)], Some("best trial 1 at 2.0000 (running)")),
        (
            Some((1, 1.5)),
            vec![trial(1, Completed, 135), trial(2, Running, 15), eval(2, 15, 2.0)],
            Some("best trial 1 at 1.5000 ·"),
        ),
        (
            Some((1, 1.5)),
            vec![trial(1, Completed, 135), trial(2, Running, 15), eval(2, 15, 1.0), eval(3, 15, f64::NAN)],
            Some("best trial 2 at 1.0000 (running)"),
        ),
    ];
    for (best, messages, want) in rows {
        let line = board([sweep("asha", 3, best)].into_iter().chain(messages)).sweep_line(1.0);
        match want {
            Some(want) => assert!(line.contains(want), "{line} lacks {want}"),
            None => assert!(!line.contains("best"), "{line}"),
        }
    }
}

#[test]
fn a_sweep_that_waits_says_for_what() {
    let older = || vec!["older-1a2b".into()];
    for (older, lacks, want) in [
        (older(), None, "waits behind older-1a2b · "),
        (vec![], Some("a newer agent"), "waits for a newer agent · "),
        (older(), Some("a newer agent"), "waits for a newer agent · waits behind older-1a2b · "),
        (vec![], None, ""),
    ] {
        let mut board = Board::new(older, lacks);
        board.apply(sweep("asha", 12, None), 0.0).unwrap();
        board.apply(trial(1, TrialState::Queued, 0), 0.0).unwrap();
        assert_eq!(board.sweep_line(9.0), format!("0/12 trials over · {want}9 s elapsed"));
        board.apply(trial(1, TrialState::Running, 0), 9.0).unwrap();
        assert_eq!(board.sweep_line(10.0), "0/12 trials over · 10 s elapsed");
    }
    let mut board = Board::new(older(), None);
    board.apply(sweep("asha", 12, None), 0.0).unwrap();
    board.apply(trial(1, TrialState::Queued, 0), 0.0).unwrap();
    if let Some(sweep) = &mut board.sweep {
        sweep.waits_for = Some("namespace a has 2 of its 2 trials on devices".into());
    }
    let line = "0/12 trials over · waits: namespace a has 2 of its 2 trials on devices · 9 s elapsed";
    assert_eq!(board.sweep_line(9.0), line);
}

/// The same trial, as a run of another again.
fn again(of: u32, message: v1::WatchSweepResponse) -> v1::WatchSweepResponse {
    let Some(Event::Trial(mut trial)) = message.event else { panic!("{message:?} is of no trial") };
    trial.replicate_of = Some(format!("s-0000/{of}"));
    v1::WatchSweepResponse { event: Some(Event::Trial(trial)) }
}

/// A grid of three trials with so many runs of the best two, in a state.
fn replicated(runs: u32, state: v1::SweepState) -> v1::WatchSweepResponse {
    let Some(Event::Sweep(mut sweep)) = sweep("grid", 3, Some((1, 1.5))).event else { panic!("no sweep") };
    let mut document = proto::convert::from_struct(sweep.spec.unwrap());
    document.extend([("replicates".into(), runs.into()), ("finalists".into(), 2.into())]);
    SweepSpec::from_document(&document).unwrap();
    (sweep.spec, sweep.state) = (Some(proto::convert::to_struct(&document)), state.into());
    v1::WatchSweepResponse { event: Some(Event::Sweep(sweep)) }
}

#[test]
fn runs_with_other_seeds_are_trials_and_never_the_best() {
    use TrialState::{Completed, Running};
    let mut board = board([replicated(2, v1::SweepState::Running)]);
    (1..=3).for_each(|number| drop(board.apply(trial(number, Completed, 135), 0.0)));
    board.apply(again(1, trial(4, Running, 0)), 0.0).unwrap();
    board.apply(progress(4, 35, &[("eval/loss", 1.0)]), 35.0).unwrap();
    // 100 steps of the one and 135 of the other, at one a second.
    let line = board.sweep_line(35.0);
    assert_eq!(line, "3/5 trials over · best trial 1 at 1.5000 · 35 s elapsed · about 3 min 55 s left");
    // An extension asks for one more of each: 270 steps.
    board.apply(replicated(3, v1::SweepState::Running), 35.0).unwrap();
    let line = board.sweep_line(35.0);
    assert_eq!(line, "3/7 trials over · best trial 1 at 1.5000 · 35 s elapsed · about 8 min 25 s left");
    // Another had other finalists, whose runs stay.
    for number in 4..=8 {
        board.apply(again(1 + number % 3, trial(number, Completed, 135)), 40.0).unwrap();
    }
    assert!(board.sweep_line(40.0).starts_with("8/8 trials over"), "{}", board.sweep_line(40.0));
}

#[test]
fn a_sweep_that_is_over_has_as_many_trials_as_there_are() {
    let mut board = board([
        replicated(3, v1::SweepState::Running),
        trial(1, TrialState::Completed, 135),
        trial(2, TrialState::Stopped, 20),
    ]);
    assert!(board.sweep_line(9.0).starts_with("2/7 trials over"), "{}", board.sweep_line(9.0));
    board.apply(replicated(3, v1::SweepState::Completed), 9.0).unwrap();
    assert!(board.sweep_line(9.0).starts_with("2/2 trials over"), "{}", board.sweep_line(9.0));
}
