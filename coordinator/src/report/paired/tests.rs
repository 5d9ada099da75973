use super::super::made;
use super::*;
use proptest::prelude::*;

const METRIC: &str = "eval/arc_easy/acc";

/// Of one pair of runs on one task.
fn single(differences: Vec<f32>) -> Paired {
    Paired::of(vec![vec![("a", Task::Scores(differences))]]).unwrap()
}

/// A trial's scores under a metric, and its base's.
fn scores(metric: &str, asked: &str, scores: &[u8], base: &[u8]) -> ItemScores {
    let (metric, asked) = (metric.into(), asked.into());
    ItemScores { metric, asked, scores: scores.into(), base: base.into(), ..ItemScores::default() }
}

/// A mean over `n` items that are −1, 0 or 1, the third of them right, is as good as normal.
#[test]
fn of_many_items_it_is_the_normal_interval() {
    for (n, seed) in [(500, 1), (2_000, 2), (4_000, 3)] {
        let draw = |item: u64| (rng::uniform(rng::key(seed, "differences"), item) * 3.0).floor() as f32 - 1.0;
        let paired = single((0..n).map(draw).collect());
        let mean = paired.tasks[0].contributions(1).iter().sum::<f64>() / n as f64;
        let stderr = paired.variance().unwrap().sqrt();
        // An accuracy's error: of items that are as often −1 as 0 as 1 the variance is 2/3.
        assert!((stderr * (1.5 * n as f64).sqrt() - 1.0).abs() < 0.1, "{n}: {stderr}");
        let (low, high) = paired.bootstrap(1);
        // Of 2,000 resamples a 2.5 % quantile is off by 0.06 standard errors, one of them.
        for (got, want) in [(low, mean - 1.96 * stderr), (high, mean + 1.96 * stderr)] {
            assert!((got - want).abs() < 0.3 * stderr, "{n}: {got}, not {want} ± {stderr}");
        }
        // That of one of five comparisons is wider, by 2.576 standard errors for 1.96.
        let wide = paired.bootstrap(5);
        assert!(wide.0 < low && high < wide.1, "{wide:?} {low} {high}");
        assert!((wide.1 - wide.0 - 2.0 * 2.576 * stderr).abs() < 0.8 * stderr, "{n}: {wide:?}");
    }
}

#[test]
fn runs_are_drawn_and_so_are_items() {
    let of = |runs: &[Vec<f32>]| {
        let run = |run: &Vec<f32>| vec![("a", Task::Scores(run.clone()))];
        Paired::of(runs.iter().map(run).collect()).unwrap()
    };
    // Items that say the same: each resample is a mean of runs. Of two, one is drawn twice in a quarter of them.
    let (low, high) = of(&[vec![0.25; 9], vec![0.75; 9]]).bootstrap(1);
    assert!((low - 0.25).abs() < 1e-9 && (high - 0.75).abs() < 1e-9, "{low} {high}");
    // Runs that say the same: each resample is a mean of items, as of one run.
    let items: Vec<f32> = (0..400).map(|item| if item % 4 == 0 { 1.0 } else { 0.0 }).collect();
    let (one, three) = (single(items.clone()), of(&[items.clone(), items.clone(), items]));
    assert_eq!((one.items(), three.items()), (400, 400));
    assert!((one.variance().unwrap() - three.variance().unwrap()).abs() < 1e-12);
    let (a, b, stderr) = (one.bootstrap(1), three.bootstrap(1), (0.25 * 0.75 / 400.0_f64).sqrt());
    assert!((a.0 - b.0).abs() < 1e-9 && (a.1 - b.1).abs() < 1e-9, "{a:?} {b:?}");
    assert!((a.1 - a.0 - 2.0 * 1.96 * stderr).abs() < 0.5 * stderr, "{a:?} {stderr}");
}

/// Items of several tasks are drawn apart: a task's share does not change with what is drawn.
#[test]
fn a_mean_of_tasks_has_each_of_them() {
    let tasks = vec![("a", Task::Scores(vec![1.0; 10])), ("b", Task::Scores(vec![0.0; 1_000]))];
    let paired = Paired::of(vec![tasks]).unwrap();
    assert_eq!((paired.bootstrap(1), paired.variance(), paired.items()), ((0.5, 0.5), Some(0.0), 1_010));
    let varied = vec![("a", Task::Scores(vec![0.0, 1.0])), ("b", Task::Scores(vec![0.0, 0.0, 1.0, 1.0]))];
    // (1/2 ÷ 2 + 1/3 ÷ 4) ÷ 4.
    let variance = Paired::of(vec![varied]).unwrap().variance().unwrap();
    assert!((variance - (0.25 + 1.0 / 12.0) / 4.0).abs() < 1e-12, "{variance}");
    assert_eq!(single(vec![1.0]).variance(), None, "of one item nothing is known");
}

/// Texts' likelihoods under a metric.
fn texts(metric: &str, asked: &str, with: &[f32], base: &[f32], weights: &[u32]) -> ItemScores {
    let texts = TextScores::new(with.into(), base.into(), weights.into());
    assert!(texts.is_some());
    ItemScores { metric: metric.into(), asked: asked.into(), texts, ..ItemScores::default() }
}

/// Of a perplexity each resample is one of whole texts, of both sides the same ones.
#[test]
fn perplexities_are_computed_anew_of_the_texts_that_are_drawn() {
    let (a, b) = (made::trial(1), made::trial(2));
    let check = |metric: &str, value: fn(f64) -> f64| {
        // Of 600 texts of other lengths the adapter finds each more likely, by about as much of a word.
        let draw = |stream: &str, text: u64| rng::uniform(rng::key(7, stream), text);
        let weights: Vec<u32> = (0..600).map(|text| 5 + (20.0 * draw("words", text)) as u32).collect();
        let likelihood = |text: usize, mean: f64, stream: &str| {
            (-(mean + 0.4 * draw(stream, text as u64)) * f64::from(weights[text])) as f32
        };
        let with: Vec<_> = (0..600).map(|text| likelihood(text, 1.0, "with")).collect();
        let base: Vec<_> = (0..600).map(|text| likelihood(text, 1.1, "base")).collect();
        let kept = [(a.id.clone(), vec![texts(metric, "x", &with, &base, &weights)])];
        let paired = Items::of(&kept).against_base([&a], metric).unwrap();
        let weight: f64 = weights.iter().copied().map(f64::from).sum();
        let of = |values: &[f32]| value(values.iter().copied().map(f64::from).sum::<f64>() / weight);
        let difference = of(&with) - of(&base);
        let (stderr, (low, high)) = (paired.variance().unwrap().sqrt(), paired.bootstrap(1));
        // Of the delta method for once the difference is as good as normal.
        for (got, want) in [(low, difference - 1.96 * stderr), (high, difference + 1.96 * stderr)] {
            assert!((got - want).abs() < 0.3 * stderr, "{metric}: {got}, not {want} ± {stderr}");
        }
        assert!(low < high && high < 0.0 && paired.items() == 600, "{metric}: {low} {high}");
        // Several runs that say the same are as one, and other texts are none of these.
        let three = Items::of(&kept).against_base([&a; 3], metric).unwrap();
        assert!((three.variance().unwrap().sqrt() - stderr).abs() < 1e-9 * stderr);
        let (other_low, other_high) = three.bootstrap(1);
        assert!(
            (other_low - low).abs() < 1e-9 && (other_high - high).abs() < 1e-9,
            "{other_low} {other_high}"
        );
        for other in [
            texts(metric, "y", &with, &base, &weights),
            texts(metric, "x", &with[1..], &base[1..], &weights[1..]),
            scores(metric, "x", &[255; 600], &[0; 600]),
        ] {
            let kept = [kept[0].clone(), (b.id.clone(), vec![other])];
            assert_eq!(Items::of(&kept).between([(&a, &b)], metric), None);
        }
    };
    check("eval/wiki/word_perplexity", |mean| (-mean).exp());
    check("eval/wiki/bits_per_byte", |mean| -mean / LN_2);
    // Two texts: each resample is the one twice, the other twice, or both.
    let metric = "eval/wiki/byte_perplexity";
    let kept = [(a.id.clone(), vec![texts(metric, "x", &[-1.0, -4.0], &[-2.0, -4.0], &[1, 2])])];
    let (low, high) = Items::of(&kept).against_base([&a], metric).unwrap().bootstrap(1);
    let want = 1f64.exp() - 2f64.exp();
    assert!((low - want).abs() < 1e-9 && high.abs() < 1e-9, "{low} {high}, not {want} and 0");
}

#[test]
fn only_the_same_documents_are_paired() {
    let (a, b, c) = (made::trial(1), made::trial(2), made::trial(3));
    let mean = |parts: &[&str]| ItemScores {
        parts: parts.iter().map(ToString::to_string).collect(),
        ..scores("eval/board/mean", "", &[], &[])
    };
    let other = "eval/hellaswag/acc";
    let kept = [
        (
            a.id.clone(),
            vec![
                scores(METRIC, "x", &[255, 0, 255], &[255, 255, 0]),
                scores(other, "y", &[255, 51], &[0, 0]),
                mean(&[METRIC, other]),
            ],
        ),
        (
            b.id.clone(),
            vec![
                scores(METRIC, "x", &[0, 0, 255], &[]),
                scores(other, "y", &[255, 255], &[0, 0]),
                mean(&[METRIC, other]),
            ],
        ),
        (c.id.clone(), vec![scores(METRIC, "z", &[0, 0, 255], &[0]), mean(&[METRIC, "eval/board/mean"])]),
    ];
    let items = Items::of(&kept);
    let between = |of: &Trial, from: &Trial, metric: &str| items.between([(of, from)], metric);
    assert_eq!(between(&a, &b, METRIC), Some(single(vec![1.0, 0.0, 0.0])));
    let of_both = Paired::of(vec![vec![
        ("x", Task::Scores(vec![1.0, 0.0, 0.0])),
        ("y", Task::Scores(vec![0.0, -0.8])),
    ]]);
    assert_eq!(between(&a, &b, "eval/board/mean"), of_both);
    assert_eq!(between(&a, &c, METRIC), None, "other documents");
    assert_eq!(between(&a, &b, "eval/mmlu/acc"), None, "a metric that neither has");
    assert_eq!(between(&a, &made::trial(9), METRIC), None, "a trial of which nothing is kept");
    assert_eq!(between(&a, &c, "eval/board/mean"), None, "a mean of what is not there");
    assert_eq!(items.between([(&a, &b), (&a, &c)], METRIC), None, "one pair of two");
    assert_eq!(items.between([], METRIC), None, "no pair");
    assert_eq!(items.against_base([&a], METRIC), Some(single(vec![0.0, -1.0, 1.0])));
    assert_eq!(items.against_base([&b], METRIC), None, "a base of which nothing is kept");
    assert_eq!(items.against_base([&a, &c], METRIC), None, "runs on other documents");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_the_same_differs_by_nothing(scored in prop::collection::vec(any::<u8>(), 1..60), runs in 1usize..4) {
        let (a, b) = (made::trial(1), made::trial(2));
        let of = |trial: &Trial| (trial.id.clone(), vec![scores(METRIC, "x", &scored, &scored)]);
        let kept = [of(&a), of(&b)];
        let items = Items::of(&kept);
        for paired in [items.between(vec![(&a, &b); runs], METRIC), items.against_base(vec![&a; runs], METRIC)] {
            prop_assert_eq!(paired.unwrap().bootstrap(1), (0.0, 0.0));
        }
    }

    /// The same each time, and between the least and the largest mean that there can be; turned about, it is the other way
    /// round.
    #[test]
    fn it_repeats_and_stays_within_what_there_is(
        differences in prop::collection::vec(-255i16..=255, 1..40),
        comparisons in 1usize..9,
    ) {
        let of = |sign: f32| single(differences.iter().map(|d| sign * f32::from(*d) / 255.0).collect());
        let (low, high) = of(1.0).bootstrap(comparisons);
        prop_assert_eq!(of(1.0).bootstrap(comparisons), (low, high));
        let (least, most) = differences.iter().fold((255, -255), |(a, b), d| (a.min(*d), b.max(*d)));
        prop_assert!(f64::from(least) / 255.0 - 1e-6 <= low && low <= high && high <= f64::from(most) / 255.0 + 1e-6);
        let turned = of(-1.0).bootstrap(comparisons);
        prop_assert!((turned.0 + high).abs() < 1e-9 && (turned.1 + low).abs() < 1e-9, "{:?}", turned);
    }
}
