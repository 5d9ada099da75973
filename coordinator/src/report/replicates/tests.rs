use super::super::made::{self, float16};
use super::super::paired::Items;
use super::super::{Records, recommendation};
use super::*;
use domain::metric;
use domain::sweep::Goal;

/// Trials 1, 2, … with these values by their first runs, then their further runs.
fn runs(values: &[[f64; 3]], tell: impl Fn(&mut Trial, f64)) -> Vec<Trial> {
    let count = values.len() as u32;
    let run = |round: usize, first: u32, value: f64| {
        let number = round as u32 * count + first;
        let mut trial = made::measured(number, float16(2, 16, 512), 28.0, 5.0);
        if round > 0 {
            trial.replicate_of = Some(made::trial(first).id);
            trial.config.seed = 100 + round as u64;
        }
        tell(&mut trial, value);
        trial
    };
    let round = |round: usize| (1..).zip(values).map(move |(first, values)| run(round, first, values[round]));
    (0..3).flat_map(round).collect()
}

fn by_loss(trial: &mut Trial, value: f64) {
    trial.eval_loss = Some(value);
    if let Some(summary) = &mut trial.summary {
        summary.base_eval_loss = Some(3.0);
    }
}

/// Puts further runs, by their numbers, into another state.
fn end(trials: &mut [Trial], numbers: &[usize], state: TrialState) {
    numbers.iter().for_each(|number| trials[number - 1].state = state);
}

/// The rows of its tables, and its sentences.
fn said(sweep: &Sweep, trials: &[Trial]) -> Vec<String> {
    said_of(Records { sweep, trials, curves: &[], items: &[] })
}

fn said_of(records: Records) -> Vec<String> {
    let sources = Sources::of(records);
    let mut all = Vec::new();
    for block in blocks(&sources) {
        match block {
            Block::Table(table) => {
                let row = |cells: &[Line]| cells.iter().map(Line::plain).collect::<Vec<_>>().join(" | ");
                all.extend(table.rows.iter().map(|r| row(&r.cells)));
            }
            Block::List(lines) => all.extend(lines.iter().map(Line::plain)),
            _ => {}
        }
    }
    all
}

/// Of trials 1, 2 and 3 the further runs are 4, 5 and 6, then 7, 8 and 9.
const LOSSES: [[f64; 3]; 3] = [[2.00, 2.04, 2.05], [2.01, 2.02, 2.00], [2.30, 2.33, 2.29]];

/// Reference for this and the next: the formulas in Python's `statistics`, Student's t integrated by mpmath, and the same
/// streams drawn there.
#[test]
fn the_best_mean_and_what_it_differs_by() {
    let mut trials = runs(&LOSSES, by_loss);
    let none = "no difference shown";
    assert_eq!(
        said(&made::sweep(), &trials),
        [
            "2 | 3 | 2.0100 | 2.0100 | 1.9852 to 2.0348 | 0.0100",
            "1 | 3 | 2.0000 | 2.0300 | 1.9643 to 2.0957 | 0.0265",
            "3 | 3 | 2.3000 | 2.3067 | 2.2550 to 2.3584 | 0.0208",
            "No difference shown between trial 2 and trial 1: eval/loss −0.0200, 95 % interval −0.1275 to +0.0875, adjusted \
             for 2 comparisons, over 3 seeds.",
            "Trial 2 is better than trial 3: eval/loss −0.2967, 95 % interval −0.3380 to −0.2553, adjusted for 2 \
             comparisons, over 3 seeds.",
            &format!(
                "eval/loss | trial 2 | trial 1 | 3 | −0.0200 | −0.1275 to +0.0875 | −0.0500 to +0.0100 | seeds alone | {none}"
            ),
            "eval/loss | trial 2 | trial 3 | 3 | −0.2967 | −0.3380 to −0.2553 | −0.3100 to −0.2900 | seeds alone | better",
            "eval/loss | trial 2 | its base | 3 | −0.9900 | −1.0148 to −0.9652 | −1.0000 to −0.9800 | seeds alone | better; \
             its first run was chosen",
        ]
    );
    // A run that failed is none, and one run alone says nothing: neither that it is as good, nor that it is worse.
    end(&mut trials, &[5, 8, 9], TrialState::Diverged);
    assert_eq!(
        said(&made::sweep(), &trials),
        [
            "1 | 3 | 2.0000 | 2.0300 | 1.9643 to 2.0957 | 0.0265",
            "3 | 2 of 3 | 2.3000 | 2.3150 | 2.1244 to 2.5056 | 0.0212",
            "2 | 1 of 3 | 2.0100 | – | – | –",
            "Trial 1 is better than trial 3: eval/loss −0.2950, 95 % interval −0.3585 to −0.2315 over 2 seeds.",
            "No difference shown between trial 1 and trial 2: too few runs of the same seed.",
            "eval/loss | trial 1 | trial 3 | 2 | −0.2950 | −0.3585 to −0.2315 | −0.3000 to −0.2900 | seeds alone | better",
            "eval/loss | trial 1 | trial 2 | 1 | – | – | – | – | too few runs of the same seed",
            "eval/loss | trial 1 | its base | 3 | −0.9700 | −1.0357 to −0.9043 | −1.0000 to −0.9500 | seeds alone | better; \
             its first run was chosen",
        ]
    );
    end(&mut trials, &[4, 6, 7], TrialState::Running);
    let none = ["1 | 1 of 3 | 2.0000", "2 | 1 of 3 | 2.0100", "3 | 1 of 3 | 2.3000"];
    assert_eq!(said(&made::sweep(), &trials), none.map(|row| format!("{row} | – | – | –")));
    trials.truncate(3);
    assert!(said(&made::sweep(), &trials).is_empty(), "nothing was run again");
}

#[test]
fn items_are_a_sample_too() {
    let mut sweep = made::sweep();
    sweep.spec.search.metric = metric::of_task("arc_easy", "acc");
    sweep.spec.search.goal = Goal::Maximize;
    let of = |stderr: Option<f64>, difference_stderr: Option<f64>| {
        let trials = runs(&[[0.40, 0.41, 0.45], [0.50, 0.54, 0.52]], |trial, value| {
            let score = TaskScore {
                task: "arc_easy".into(),
                metric: "acc".into(),
                value,
                stderr,
                base_value: Some(0.39),
                base_stderr: stderr,
                difference_stderr,
                num_fewshot: 0,
                documents: 570,
            };
            if let Some(summary) = &mut trial.summary {
                summary.evaluations = vec![score];
            }
        });
        said(&sweep, &trials)
    };
    let chosen = "better; its first run was chosen";
    let known = of(Some(0.02), Some(0.015));
    assert_eq!(
        known[..2],
        [
            "2 | 3 | 0.5000 | 0.5200 | 0.4730 to 0.5670 | 0.0200",
            "1 | 3 | 0.4000 | 0.4200 | 0.3663 to 0.4737 | 0.0265"
        ]
    );
    let of_pairs = "+0.1300 | +0.0895 to +0.1705 | +0.0952 to +0.1644 | seeds and items";
    // The error of a mean of tasks is known, that of the pairs not.
    let of_both = "+0.1300 | +0.0694 to +0.1906 | +0.0721 to +0.1885 | seeds and items";
    let of_none = "+0.1300 | +0.0803 to +0.1797 | +0.1100 to +0.1500 | seeds alone";
    let with_items = "+0.1000 | +0.0319 to +0.1681 | +0.0385 to +0.1614 | seeds and items";
    let without = "+0.1000 | +0.0255 to +0.1745 | +0.0700 to +0.1300 | seeds alone";
    for (said, from_other, against_base) in [
        (known, with_items, of_pairs),
        (of(Some(0.02), None), with_items, of_both),
        (of(None, None), without, of_none),
    ] {
        let name = "eval/arc_easy/acc | trial 2";
        assert_eq!(
            said[3..],
            [
                format!("{name} | trial 1 | 3 | {from_other} | better"),
                format!("{name} | its base | 3 | {against_base} | {chosen}"),
            ]
        );
    }
}

/// What both made of an item is in common to them, and makes no difference between them less sure.
#[test]
fn items_that_both_were_asked_are_paired() {
    let mut sweep = made::sweep();
    sweep.spec.search.metric = metric::of_task("t", "acc");
    sweep.spec.search.goal = Goal::Maximize;
    let mut trials = runs(&[[0.0; 3], [0.0; 3]], |_, _| ());
    // Both first runs, then both second ones, then both third ones; of each, the first items are right.
    let right = [400, 500, 410, 540, 450, 520];
    let asked = trials.iter_mut().zip(right);
    let items: Vec<_> = asked.map(|(trial, right)| made::answered(trial, "t", right, 1_000)).collect();
    let said = said_of(Records { sweep: &sweep, trials: &trials, curves: &[], items: &items });
    for (row, begins, ends) in [
        (3, "eval/t/acc | trial 2 | trial 1 | 3 | +0.1000 | +0.0", "| seeds and paired items | better"),
        (
            4,
            "eval/t/acc | trial 2 | its base | 3 | +0.0200 | −0.0",
            "| seeds and paired items | no difference shown",
        ),
    ] {
        assert!(said[row].starts_with(begins) && said[row].ends_with(ends), "{:?}", said[row]);
    }
    // Of a thousand items the first two runs tell a hundred apart: p(1 − p) ÷ (n − 1).
    let paired = Items::of(&items).between([(&trials[1], &trials[0])], &sweep.spec.search.metric).unwrap();
    let variance = paired.variance().unwrap();
    assert!((variance - 0.1 * 0.9 / 999.0).abs() < 1e-9, "{variance}");
}

/// By means where the best by one run has one, and by single runs else; what did not come to its end is told.
#[test]
fn whose_runs_a_recommendation_goes_by() {
    let by_one = |trials: &str| {
        format!("is the best of {trials} trials that came to their end, by one run each; it took $1.00")
    };
    let by_means = |runs: u32, means: u32| {
        format!(
            "is the mean of its {runs} runs with different seeds, the best of {means} such means; it took $1.00"
        )
    };
    let (diverged, running) = (TrialState::Diverged, TrialState::Running);
    for (what, numbers, state, further, want) in [
        (
            "means",
            &[][..],
            running,
            None,
            format!("trial 2. Its eval/loss of 2.0100 {}. No difference shown from trial 1.", by_means(3, 3)),
        ),
        (
            "the best under way",
            &[4, 7],
            running,
            None,
            format!("trial 1. Its eval/loss of 2.0000 {}; 2 of its 3 runs not over yet.", by_one("3")),
        ),
        (
            "its runs came to nothing",
            &[4, 7],
            diverged,
            None,
            format!("trial 1. Its eval/loss of 2.0000 {}; 2 of its 3 runs did not complete.", by_one("3")),
        ),
        (
            "a better one that was not run again",
            &[],
            running,
            Some(1.5),
            format!("trial 10. Its eval/loss of 1.5000 {}.", by_one("4")),
        ),
        (
            "a worse one that was not run again",
            &[],
            running,
            Some(2.5),
            format!("trial 2. Its eval/loss of 2.0100 {}. No difference shown from trial 1.", by_means(3, 3)),
        ),
        (
            "one run that came to nothing",
            &[8],
            diverged,
            None,
            format!(
                "trial 2. Its eval/loss of 2.0150 {}; 1 of its 3 runs did not complete. No difference shown from trial 1.",
                by_means(2, 3)
            ),
        ),
        (
            "another of too few runs",
            &[5, 8],
            diverged,
            None,
            format!("trial 1. Its eval/loss of 2.0300 {}. No difference shown from trial 2.", by_means(3, 2)),
        ),
    ] {
        let mut trials = runs(&LOSSES, by_loss);
        end(&mut trials, numbers, state);
        trials.extend(further.map(|value| {
            let mut trial = made::measured(10, float16(2, 16, 512), 28.0, 5.0);
            by_loss(&mut trial, value);
            trial
        }));
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &[], items: &[] });
        assert_eq!(
            sources.entries.len(),
            3 + usize::from(further.is_some()),
            "further runs are no trials of the search"
        );
        let said = recommendation::recommendations(&sources);
        assert_eq!(said[0].plain(), format!("The best: {want}"), "{what}");
    }
}
