use super::super::Records;
use super::super::made::{self, float16, four_bit};
use super::*;
use domain::trial::Trial;

fn said(trials: &[Trial]) -> Vec<String> {
    of(Records { sweep: &made::sweep(), trials, curves: &[], items: &[] })
}

fn of(records: Records) -> Vec<String> {
    let Takeaways { key, more } = takeaways(&Sources::of(records));
    key.iter().chain(&more).map(Line::plain).collect()
}

fn check(trials: &[Trial], wanted: &[&str], unwanted: &[&str]) {
    let said = said(trials);
    for want in wanted {
        assert!(said.iter().any(|line| line == want), "{want:?} is not among {said:#?}");
    }
    for text in unwanted {
        assert!(!said.iter().any(|line| line.contains(text)), "{text:?} is in {said:#?}");
    }
}

#[test]
fn without_a_pair_there_is_no_sentence() {
    check(&[], &[], &[""]);
    let trials = [
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(4, 16, 512), 7.0, 3.0),
    ];
    check(&trials, &[], &[""]);
}

#[test]
fn what_four_bits_save_and_cost() {
    let mut trials = vec![
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(2, 16, 512), 7.28, 3.0),
    ];
    check(
        &trials,
        &[
            "4bit needs 74 % less memory than float16 at batch 2 × 512 (28 GB → 7.3 GB; 1 pair).",
            "4bit is 40 % slower than float16 at batch 2 × 512 (0.4 → 0.6667 s a step; 1 pair).",
            "4bit costs 67 % more than float16 at batch 2 × 512 ($1.00 → $1.67; 1 pair).",
        ],
        &["eval/loss"],
    );
    trials[0].eval_loss = Some(2.0);
    trials[1].eval_loss = Some(2.02);
    check(
        &trials,
        &[
            "4bit ends with a 1 % higher, so worse, eval/loss than float16 at batch 2 × 512 (2.0000 → 2.0200; 1 pair).",
        ],
        &[],
    );
    trials.push(made::measured(3, float16(4, 16, 512), 40.0, 6.0));
    trials.push(made::measured(4, four_bit(4, 16, 512), 8.0, 6.0));
    check(
        &trials,
        &[
            "4bit needs 77 % less memory than float16, by the median of 2 pairs: from −80 % (40 GB → 8 GB, batch 4 × 512) \
             to −74 % (28 GB → 7.3 GB, batch 2 × 512).",
            "4bit is 20 % slower than float16, by the median of 2 pairs: from −40 % (0.4 → 0.6667 s a step, batch 2 × 512) \
             to 0 % (0.6667 → 0.6667 s a step, batch 4 × 512).",
            "batch_size 4 needs 26 % more memory than batch_size 2, by the median of 2 pairs: from +9.9 % (7.3 GB → 8 GB, \
             4bit, 512 tokens) to +43 % (28 GB → 40 GB, float16, 512 tokens).",
        ],
        &[],
    );
}

/// Several pairs say how sure they are, and so does one of which the items are kept.
#[test]
fn a_difference_that_chance_could_make_is_none() {
    let losses = |losses: [f64; 6]| -> Vec<String> {
        let pair = |batch| [float16(batch, 16, 512), four_bit(batch, 16, 512)];
        let configs = [1, 2, 4].into_iter().flat_map(pair);
        let trial = |(number, (config, loss))| {
            let mut trial = made::packed(number, config, 28.0, 5.0);
            trial.eval_loss = Some(loss);
            trial
        };
        said(&(1..).zip(configs.zip(losses)).map(trial).collect::<Vec<_>>())
    };
    // Student's t of two degrees of freedom: 4.3027 times the standard error, 0.01 ÷ √3.
    assert_eq!(
        losses([2.0, 2.10, 2.0, 2.11, 2.0, 2.12]),
        [
            "4bit ends with a 5.5 % higher, so worse, eval/loss than float16, by the median of 3 pairs: from +5 % (2.0000 → \
         2.1000, batch 1 × 512) to +6 % (2.0000 → 2.1200, batch 4 × 512). The mean difference is +0.1100, 95 % interval +0.0852 to +0.1348 by Student's t over 3 \
         pairs."
        ]
    );
    let none = losses([2.0, 2.10, 2.0, 1.98, 2.0, 2.04]);
    let said = "No difference in eval/loss shown between 4bit and float16, by the median of 3";
    assert!(none.len() == 1 && none[0].starts_with(said), "{none:#?}");

    let mut sweep = made::sweep();
    sweep.spec.search.metric = "eval/t/acc".into();
    sweep.spec.search.goal = Goal::Maximize;
    let of_items = |right: [usize; 2]| -> Vec<String> {
        let mut trials = [
            made::packed(1, float16(2, 16, 512), 28.0, 5.0),
            made::packed(2, four_bit(2, 16, 512), 7.0, 3.0),
        ];
        let mut items = Vec::new();
        for (trial, right) in trials.iter_mut().zip(right) {
            items.push(made::answered(trial, "t", right, 100));
        }
        of(Records { sweep: &sweep, trials: &trials, curves: &[], items: &items })
    };
    let begins = "4bit ends with a 25 % lower, so worse, eval/t/acc than float16 at batch 2 × 512 (0.6000 → 0.4500; 1 pair). The \
                  mean difference is −0.1500, 95 % interval −0.";
    let shown = of_items([60, 45]);
    assert!(shown.len() == 1 && shown[0].starts_with(begins), "{shown:#?}");
    assert!(shown[0].ends_with(" by the paired bootstrap over 100 items, one run of each."), "{shown:#?}");
    let begins = "No difference in eval/t/acc shown between 4bit and float16 at batch 2 × 512 (0.6000 → 0.5800; 1 pair). The \
         mean";
    let none = of_items([60, 58]);
    assert!(none.len() == 1 && none[0].starts_with(begins), "{none:#?}");
}

#[test]
fn what_is_computed_again_is_a_cause_of_its_own() {
    let mut trials = vec![
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
        made::measured(3, float16(4, 16, 512), 30.0, 5.0),
        made::measured(4, four_bit(4, 16, 512), 9.0, 4.0),
    ];
    for (trial, layers) in trials.iter_mut().zip([0, 0, 32, 0]) {
        if let Some(summary) = &mut trial.summary {
            summary.recomputed_layers = Some(layers);
        }
    }
    check(
        &trials,
        &[
            "4bit needs 75 % less memory than float16 at batch 2 × 512 (28 GB → 7 GB; 1 pair). 1 pair is left out: one of the two \
           computed more layers again.",
        ],
        &["median"],
    );
    trials.truncate(1);
    trials.push(made::measured(5, float16(2, 16, 512), 21.0, 4.0));
    trials[1].config.gradient_checkpointing = domain::trial::GradientCheckpointing::On;
    trials[0].config.gradient_checkpointing = domain::trial::GradientCheckpointing::Off;
    check(
        &trials,
        &[
            "gradient_checkpointing true needs 25 % less memory than gradient_checkpointing false at batch 2 × 512 (28 GB → \
             21 GB; 1 pair).",
            "gradient_checkpointing true is 20 % slower than gradient_checkpointing false at batch 2 × 512 (0.4 → 0.5 s a \
             step; 1 pair).",
        ],
        &[],
    );
}

#[test]
fn packed_trials_say_nothing_of_memory_and_speed() {
    let mut trials = vec![
        made::packed(1, float16(2, 16, 512), 28.0, 5.0),
        made::packed(2, four_bit(2, 16, 512), 7.0, 3.0),
    ];
    trials.iter_mut().for_each(|trial| trial.eval_loss = Some(2.0));
    check(
        &trials,
        &["4bit ends at the eval/loss of float16 at batch 2 × 512 (2.0000 → 2.0000; 1 pair)."],
        &["memory", "slower"],
    );
}

#[test]
fn what_fits_and_what_does_not() {
    let trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 5.0),
        made::measured(2, float16(2, 16, 512), 28.0, 5.0),
        made::unfit(3, float16(4, 16, 512), 45.0),
        made::unfit(4, float16(8, 16, 512), 80.0),
        made::measured(5, four_bit(8, 16, 512), 9.0, 3.0),
    ];
    check(
        &trials,
        &["float16 fits up to batch_size 2, not 4, which needs 45 GB of 41.9 GB."],
        &["4bit fits", "max_sequence_length"],
    );
    // Pairs of which one does not fit are counted; what ran out beside others is none of those.
    let mut beside_others = made::unfit(9, four_bit(1, 16, 512), 45.0);
    beside_others.failure.as_mut().unwrap().message = "ran out beside 3 others".into();
    check(
        &[&trials[..3], &[made::measured(6, four_bit(4, 16, 512), 8.0, 3.0), beside_others]].concat(),
        &[
            "batch_size 2 needs 40 % more memory than batch_size 1 at float16, 512 tokens (20 GB → 28 GB; 1 pair).",
        ],
        &["4bit does not fit"],
    );
    check(
        &[
            &trials[1..3],
            &[
                made::measured(6, four_bit(2, 16, 512), 7.0, 3.0),
                made::measured(7, four_bit(4, 16, 512), 8.0, 3.0),
            ],
        ]
        .concat(),
        &[
            "4bit needs 75 % less memory than float16 at batch 2 × 512 (28 GB → 7 GB; 1 pair). In 1 more, one of the two does \
             not fit.",
        ],
        &[],
    );
    check(
        &[made::unfit(1, float16(1, 16, 512), 45.0), made::unfit(2, float16(2, 16, 512), 46.0)],
        &["float16 does not fit, even at batch_size 1, which needs 45 GB of 41.9 GB."],
        &[],
    );
}

#[test]
fn what_fits_each_accelerator() {
    let v100 = |mut trial: Trial| {
        trial.device = Some(made::device("V100-16GB", 15.5, 2.86));
        trial
    };
    let trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 5.0),
        made::measured(2, float16(2, 16, 512), 28.0, 5.0),
        made::unfit(3, float16(4, 16, 512), 45.0),
        v100(made::unfit(4, float16(1, 16, 512), 20.0)),
        v100(made::unfit(5, float16(2, 16, 512), 28.0)),
        v100(made::measured(6, four_bit(1, 16, 512), 6.0, 2.0)),
        v100(made::measured(7, four_bit(2, 16, 512), 7.0, 2.0)),
    ];
    check(
        &trials,
        &[
            "float16 on A100-40GB fits up to batch_size 2, not 4, which needs 45 GB of 41.9 GB.",
            "float16 on V100-16GB does not fit, even at batch_size 1, which needs 20 GB of 41.9 GB.",
        ],
        &["4bit on", "4bit fits"],
    );
}

#[test]
fn the_middle_of_values() {
    for (sorted, want) in [
        (vec![], None),
        (vec![1.0], Some(1.0)),
        (vec![1.0, 3.0], Some(2.0)),
        (vec![1.0, 2.0, 9.0], Some(2.0)),
    ] {
        assert_eq!(median(&sorted), want);
    }
}

/// Trials that differ in accelerator or recomputing alone are one result, and where all differ alike nothing says how sure
/// that is.
#[test]
fn the_same_result_again_counts_once() {
    use domain::trial::GradientCheckpointing::{Off, On};
    let lines = |losses: [[f64; 2]; 2]| -> Vec<String> {
        let mut trials = Vec::new();
        for (batch, losses) in [1, 2].into_iter().zip(losses) {
            for again in [Off, On] {
                for (mut config, loss) in
                    [float16(batch, 16, 512), four_bit(batch, 16, 512)].into_iter().zip(losses)
                {
                    config.gradient_checkpointing = again;
                    let mut trial = made::packed(trials.len() as u32 + 1, config, 28.0, 5.0);
                    trial.eval_loss = Some(loss);
                    trials.push(trial);
                }
            }
        }
        said(&trials).into_iter().filter(|line| line.contains("eval/loss")).collect()
    };
    // Student's t of one degree of freedom: 12.706 times the standard error, 0.005.
    let [line] = lines([[2.0, 2.10], [2.0, 2.11]]).try_into().unwrap();
    let ends = "95 % interval +0.0415 to +0.1685 by Student's t over 2 results (4 pairs: accelerator and recomputing change none).";
    assert!(line.ends_with(ends), "{line}");
    let [line] = lines([[2.0, 2.10], [2.0, 2.10]]).try_into().unwrap();
    assert!(line.starts_with("4bit ends with a 5 % higher") && !line.contains("interval"), "{line}");
}

/// What a preset's mean says of adapters and base, and of adapters of two modes.
#[test]
fn what_adapters_do_to_the_mean_of_tasks() {
    let mut trials = [
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
    ];
    for (trial, right) in trials.iter_mut().zip([60, 52]) {
        made::answered(trial, "preset", right, 100);
        if let Some(summary) = &mut trial.summary {
            summary.evaluations[0].metric = "mean".into();
        }
    }
    check(
        &trials,
        &[
            "LoRA, float16, raises the mean of preset by 10.0 points (0.5000 → 0.6000; 95 % interval +6.1 to +13.9 points, \
             normal, paired; trial 1).",
            "No difference shown between QLoRA, 4bit and its base in the mean of preset (0.5000 → 0.5200; 95 % interval −1.9 \
             to +5.9 points, normal, paired; trial 2).",
            "QLoRA, 4bit, ends 8.0 points below LoRA, float16, in the mean of preset (−8.0 points; 95 % interval −10.8 to −5.2 \
             points, normal, unpaired).",
        ],
        &[],
    );
}

/// Where some were recomputed, a limit says of which it is.
#[test]
fn a_limit_says_whether_layers_were_computed_again() {
    use domain::trial::GradientCheckpointing::{Off, On};
    let mut trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 5.0),
        made::unfit(2, float16(2, 16, 512), 45.0),
        made::measured(3, float16(1, 16, 512), 10.0, 4.0),
        made::unfit(4, float16(2, 16, 512), 44.0),
    ];
    for (trial, again) in trials.iter_mut().zip([Off, Off, On, On]) {
        trial.config.gradient_checkpointing = again;
    }
    check(
        &trials,
        &[
            "float16, not recomputed, fits up to batch_size 1, not 2, which needs 45 GB of 41.9 GB.",
            "float16, recomputed, fits up to batch_size 1, not 2, which needs 44 GB of 41.9 GB.",
        ],
        &[],
    );
}
