//! SIGKILL at drawn moments, of the server or of its engine's process. `LORAFLEET_SEED=n` replays one seed.

use crate::common::{Sandbox, engines, soon};
use crate::server::{Trial, expect_sound, finish, sweep, the_sweep, up_with_engine};
use domain::rng;
use serde_json::Value;
use std::collections::BTreeMap;

/// Steps of a trial: enough that a kill falls in the middle.
const STEPS: u32 = 90;

const GRID: &str =
    "search: { algorithm: grid }\nparameters: { lora_rank: [2, 4], learning_rate: [1.0e-3, 5.0e-3] }\n";
const HALVING: &str =
    "search: { algorithm: asha, max_trials: 5, min_steps: 18, reduction_factor: 3, seed: 2 }
parameters: { lora_rank: [2, 4], learning_rate: { log_uniform: [3.0e-4, 1.0e-2] } }
";

/// Whether a trial has no agent, or has a new checkpoint since it was given to the one that it has.
fn is_safe(trial: &Value) -> bool {
    let started =
        trial["attempts"].as_array().unwrap().last().map_or(0, |attempt| attempt[1].as_u64().unwrap());
    let has_agent = ["assigned", "running"].contains(&trial["state"].as_str().unwrap());
    !has_agent || trial["resume"][1].as_u64().is_some_and(|step| step > started)
}

/// Waits until the sweep has made `steps` more steps than now, and every trial can be lost: one that is lost three times
/// without a new checkpoint is given up. Answers whether it still runs then.
fn makes(sandbox: &Sandbox, id: &str, steps: u64) -> bool {
    let state = || {
        let sweep = sandbox.json(&["get", id]);
        let trials = sweep["trials"].as_array().unwrap();
        let made = trials.iter().map(|trial| trial["step"].as_u64().unwrap()).sum::<u64>();
        (made, trials.iter().all(is_safe), sweep["state"] == "running")
    };
    let (start, ..) = state();
    soon("more steps", || {
        let (made, safe, running) = state();
        (!running || made >= start + steps && safe).then_some(running)
    })
}

/// A sweep under two to four kills. Answers with its results, and how many kills hit it while it ran.
fn killed(seed: u64, rest: &str) -> (BTreeMap<String, Trial>, u32) {
    let key = rng::key(seed, "kills");
    let sandbox = Sandbox::new(&sweep(STEPS, rest));
    let mut hits = 0;
    let start = || up_with_engine(&sandbox).unwrap_or_else(|said| panic!("seed {seed}: {said}"));
    let mut server = start();
    for kill in 0..2 + rng::bits(key, 0) % 3 {
        let id = the_sweep(&sandbox).unwrap();
        hits += u32::from(makes(&sandbox, &id, 24 + rng::bits(key, 1 + kill) % 48));
        if rng::bits(key, 5 + kill).is_multiple_of(3) {
            let [engine] = engines(server.id(), None)[..] else { panic!("one engine expected") };
            tests::signal(engine, "KILL");
            continue;
        }
        server.signal("-KILL");
        expect_sound(&sandbox, &format!("seed {seed}, kill {kill}"));
        server = start();
    }
    server.signal("-KILL");
    expect_sound(&sandbox, &format!("seed {seed}, the last kill"));
    (finish(&sandbox, &format!("seed {seed}")), hits)
}

fn uninterrupted(rest: &str) -> BTreeMap<String, Trial> {
    finish(&Sandbox::new(&sweep(STEPS, rest)), "without a kill")
}

#[test]
fn a_grid_that_is_killed_at_drawn_moments_is_the_uninterrupted_one() {
    let expected = uninterrupted(GRID);
    assert!(
        expected.len() == 4 && expected.values().all(|trial| trial.state == "completed"),
        "{expected:#?}"
    );
    for seed in tests::seeds() {
        println!("LORAFLEET_SEED={seed}");
        let (found, hits) = killed(seed, GRID);
        assert_eq!(found, expected, "LORAFLEET_SEED={seed} replays it");
        assert!(hits >= 2, "{hits} kills hit a running sweep; its trials are too short for this machine");
    }
}

/// Which trials successive halving ends depends on who reports first; what each of them trained does not.
#[test]
fn successive_halving_that_is_killed_at_drawn_moments_trains_the_same_trials() {
    let expected = uninterrupted(HALVING);
    for seed in tests::seeds() {
        println!("LORAFLEET_SEED={seed}");
        let (found, hits) = killed(seed, HALVING);
        assert!(hits >= 2, "{hits} kills hit a running sweep; its trials are too short for this machine");
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>(),
            "LORAFLEET_SEED={seed}"
        );
        for (number, trial) in &found {
            let other = &expected[number];
            let shared = trial.curve.len().min(other.curve.len());
            assert!(shared > 18, "every trial comes to the first rung: {trial:?}");
            assert!(["completed", "stopped"].contains(&trial.state.as_str()), "{trial:?}");
            assert_eq!(trial.parameters, other.parameters, "trial {number}, LORAFLEET_SEED={seed}");
            assert_eq!(trial.curve[..shared], other.curve[..shared], "trial {number}, LORAFLEET_SEED={seed}");
        }
    }
}
