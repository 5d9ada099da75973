//! The report's structure, on a sweep as it ends. The page that is checked lies at `target/tmp/report.html`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use coordinator::report::{self, Records};
use domain::metric::{self, MetricPoint};
use domain::sweep::{Algorithm, DEFAULT_NAMESPACE, Distribution, SearchSpec, Sweep, SweepSpec, SweepState};
use domain::trial::{
    Digests, Failure, FailureClass, SampleText, TaskScore, Throughput, Trial, TrialConfig, TrialDevice,
    TrialPlacement, TrialState, TrialSummary,
};
use domain::{AgentId, Attempt, DeviceId, SweepId, Timestamp, TrialId};
use serde_json::json;

const START: u64 = 1_795_491_021_000;
const BASE_LOSS: f64 = 5.0635;
const EVIL: &str = "<script>alert(\"x\")</script>";

/// What a trial's curve is made from: state, learning rate, rank, target modules, steps made, where it ends.
type Made = (TrialState, f64, u32, &'static str, u64, f64);

const TRIALS: [Made; 11] = [
    (TrialState::Completed, 1e-3, 16, "all-linear", 180, 2.94),
    (TrialState::Completed, 2.1e-3, 8, "all-linear", 180, 2.99),
    (TrialState::Stopped, 3.3e-4, 4, "all-linear", 60, 3.62),
    (TrialState::Stopped, 2.4e-4, 4, "q_proj", 20, 4.40),
    (TrialState::Completed, 3.1e-3, 16, "q_proj", 180, 3.02),
    (TrialState::Stopped, 5.0e-4, 8, "q_proj", 60, 3.41),
    (TrialState::Stopped, 4.1e-4, 16, "all-linear", 60, 3.33),
    (TrialState::Stopped, 2.9e-4, 8, "all-linear", 20, 4.25),
    (TrialState::Stopped, 7.0e-4, 4, "q_proj", 60, 3.38),
    (TrialState::Diverged, 5.0e-3, 16, "all-linear", 14, f64::NAN),
    (TrialState::Running, 1.4e-3, 8, "all-linear", 33, 3.30),
];

fn spec() -> SweepSpec {
    let searched = [
        ("learning_rate", Distribution::LogUniform { low: 2e-4, high: 5e-3, step: None }),
        ("lora_rank", Distribution::Choices(vec![json!(4), json!(8), json!(16)])),
        ("target_modules", Distribution::Choices(vec![json!("all-linear"), json!("q_proj")])),
        ("batch_size", Distribution::Constant(json!(4))),
    ];
    SweepSpec {
        name: "stories".into(),
        search: SearchSpec {
            algorithm: Algorithm::Asha,
            max_trials: Some(11),
            min_steps: Some(20),
            ..SearchSpec::default()
        },
        parameters: searched.map(|(name, d)| (name.to_string(), d)).into(),
        base: TrialConfig {
            pretrained_model_id: "/data/models/stories260K-hf".into(),
            dataset_name: "/data/instruct/instruct_500_guanaco.jsonl".into(),
            ..TrialConfig::default()
        },
        constraints: Vec::new(),
        budget: Default::default(),
        resources: Default::default(),
        keep_adapters: None,
        evaluations: None,
        replicates: None,
    }
}

fn summary(steps: u64, end: f64, rank: u32, packed: bool) -> TrialSummary {
    let say = |text: &str| Some(text.to_string());
    TrialSummary {
        steps,
        eval_loss: Some(end),
        base_eval_loss: Some(BASE_LOSS),
        peak_memory_bytes: Some(38_400_000),
        pack_peak_memory_bytes: packed.then_some(130_000_000),
        trainable_parameters: u64::from(rank) * 5_780,
        total_parameters: 260_032 + u64::from(rank) * 5_780,
        adapter_bytes: u64::from(rank) * 5_780 * 4 + 6_000,
        samples_per_second: Some(61.7),
        tokens_per_second: Some(14_210.4),
        throughput: if packed { Throughput::Packed } else { Throughput::Solo },
        sample_prompt: say("### Human: What colour is the sky?### Assistant:"),
        sample_before: say(" upon a time, there was a little girl named Lily. She loved"),
        sample_after: say(" The sky is blue."),
        samples: vec![SampleText { step: 10, text: " The sky is a little girl.".into() }],
        ..TrialSummary::default()
    }
}

fn curve(steps: u64, end: f64) -> Vec<MetricPoint> {
    let point = |step: u64, values: &[(&str, f64)]| MetricPoint {
        step,
        time: Timestamp(START + step * 100),
        values: values.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
    };
    let fall = |step: u64| end + (BASE_LOSS - end) * (-(step as f64) / 25.0).exp();
    let base = point(0, &[(metric::EVAL_LOSS, BASE_LOSS)]);
    let steps = (1..=steps).map(|step| {
        // A noise that repeats, so that the page does too.
        let noise = ((step * 7919) % 101) as f64 / 101.0 - 0.5;
        let loss = (metric::LOSS, fall(step) + 0.6 * noise);
        if step % 10 == 0 {
            point(step, &[loss, (metric::EVAL_LOSS, fall(step))])
        } else {
            point(step, &[loss])
        }
    });
    [base].into_iter().chain(steps).collect()
}

fn trial(number: u32, (state, learning_rate, rank, targets, steps, end): Made) -> Trial {
    let finished = state.is_terminal();
    let diverged = state == TrialState::Diverged;
    Trial {
        id: TrialId::of(&SweepId::new("stories-1a2b"), number),
        config: TrialConfig { learning_rate, lora_rank: rank, ..spec().base },
        parameters: [
            ("learning_rate", json!(learning_rate)),
            ("lora_rank", json!(rank)),
            ("target_modules", json!(targets)),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into(),
        state,
        attempt: Attempt(1),
        step: steps,
        total_steps: Some(180),
        agent: Some("local".into()),
        device: Some(TrialDevice {
            accelerator: "A100-40GB".into(),
            memory_bytes: 41_900_000_000,
            price_per_hour: 3.673385,
            price_from: None,
        }),
        adapter: Some(format!("sweeps/stories-1a2b/{number}/adapter-a1-s{steps}")),
        resume: None,
        attempts: vec![(Attempt(1), 0)],
        placements: vec![TrialPlacement {
            started_at: Some(Timestamp(START + 100)),
            ended_at: finished.then_some(Timestamp(START + 60_000)),
            ..TrialPlacement::new(
                Attempt(1),
                AgentId::new("local"),
                DeviceId::new(format!("cuda:{}", number % 2)),
            )
        }],
        eval_loss: Some(end).filter(|loss| loss.is_finite()),
        cost_usd: Some(0.0),
        summary: (finished && !diverged).then(|| summary(steps, end, rank, number.is_multiple_of(2))),
        failure: diverged.then(|| Failure {
            class: FailureClass::Diverged,
            message: "the loss became NaN at step 14; lower learning_rate".into(),
        }),
        digests: None,
        created_at: Timestamp(START),
        started_at: Some(Timestamp(START + 100)),
        finished_at: finished.then_some(Timestamp(START + 60_000)),
        trace_id: None,
        replicate_of: None,
    }
}

fn sweep(best: Option<(TrialId, f64)>) -> Sweep {
    Sweep {
        id: SweepId::new("stories-1a2b"),
        spec: spec(),
        state: SweepState::Completed,
        request_id: "r".into(),
        namespace: DEFAULT_NAMESPACE.into(),
        proposed: 11,
        max_trials: Some(11),
        best,
        cost_usd: 0.0,
        failure: None,
        ended_early: None,
        counts: Default::default(),
        created_at: Timestamp(START),
        finished_at: Some(Timestamp(START + 83_000)),
    }
}

type Curves = Vec<(TrialId, Vec<MetricPoint>)>;

fn made() -> (Sweep, Vec<Trial>, Curves) {
    let trials: Vec<_> = (1..).zip(TRIALS).map(|(number, made)| trial(number, made)).collect();
    let curves = trials.iter().zip(TRIALS).map(|(t, made)| {
        let end = if made.5.is_nan() { 9e3 } else { made.5 };
        (t.id.clone(), curve(made.4, end))
    });
    let curves = curves.collect();
    (sweep(Some((trials[0].id.clone(), 2.94))), trials, curves)
}

fn html((sweep, trials, curves): &(Sweep, Vec<Trial>, Curves)) -> String {
    report::html(Records { sweep, trials, curves, items: &[] })
}

fn check(page: &str, wanted: &[&str], unwanted: &[&str]) {
    for text in wanted {
        assert!(page.contains(text), "the page lacks {text:?}");
    }
    for text in unwanted {
        assert!(!page.contains(text), "the page has {text:?}");
    }
}

/// Each start tag has its end tag, in order.
fn check_nesting(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1) {
        let name = tag.split([' ', '>', '\n', '/']).find(|n| !n.is_empty()).unwrap_or_default();
        let head = tag.split('>').next().unwrap_or_default();
        match name {
            "!DOCTYPE" | "meta" => {}
            _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "</{name}> has no start"),
            _ if head.ends_with('/') => {}
            _ => open.push(name),
        }
    }
    assert!(open.is_empty(), "not ended: {open:?}");
}

/// Each figure's whole text.
fn figures_of(page: &str) -> Vec<String> {
    let figures = page.split("<svg ").skip(1).filter_map(|rest| rest.split("</svg>").next());
    figures.map(String::from).collect()
}

#[test]
fn a_sweep_as_it_ends() {
    let page = html(&made());
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/report.html"), &page).unwrap();
    check_nesting(&page);
    // Memory and speed by rank; dollars are none, time is all the same; two learning curves, three searched parameters
    // (the constant has no chart) and all together; the search; the timeline; predicted memory is not known.
    for name in [
        "Peak memory by lora rank, a line",
        "Speed by lora rank, a line",
        "eval/loss against peak memory of each",
        "eval/loss over the steps",
        "\"loss over the steps",
        "learning_rate against",
        "lora_rank against",
        "target_modules against",
        "A line for each trial through",
        "What each of 2 devices did when",
    ] {
        assert_eq!(page.matches(name).count(), 1, "{name}");
    }
    assert_eq!(page.matches("<svg ").count(), 11);
    assert_eq!(page.matches("<td><span class=\"state ").count(), TRIALS.len());
    check(
        &page,
        &[
            "Best: trial 1",
            "<strong>2.9400</strong>, where the base has 5.0635",
            "sweeps/stories-1a2b/1/adapter-a1-s180",
            "<h3>After step 10</h3><p> The sky is a little girl.</p>",
            " The sky is blue.",
            "She loved",
            "38.4 MB solo",
            "38.4 MB attributed",
            "14\u{202F}210 packed",
            "61.7 solo",
            "26.23 %",
            "180 / 180",
            "log-uniform 0.0002 … 0.005",
            "one of 4 | 8 | 16",
            "2 × lora_rank",
            "the loss became NaN at step 14",
            "took 1 min 23 s",
            "2026-11-24 03:30 UTC",
            metric::definition(metric::PEAK_RSS_BYTES).unwrap().meaning,
            "prefers-color-scheme: dark",
            "width=device-width",
            "<th scope=\"row\">local · cuda:1</th><td>A100-40GB</td>",
        ],
        &["<script", "http-equiv", "href=", "src=", "@import"],
    );
    let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
    check(&without_namespace, &[], &["http://", "https://"]);
}

/// Further runs of a trial stand in the table and in a section of their own, and in no figure.
#[test]
fn runs_with_other_seeds_are_no_other_configurations() {
    let (sweep, mut trials, curves) = made();
    let page = html(&(sweep.clone(), trials.clone(), curves.clone()));
    check(&page, &[], &["Runs with other seeds", "(1 again)", "Best single run"]);
    let figures = figures_of(&page);
    for (number, (of, end)) in (12..).zip([(1, 2.99), (5, 2.96), (1, 3.01), (5, 2.95)]) {
        let mut again = trial(number, TRIALS[of - 1]);
        again.replicate_of = Some(trials[of - 1].id.clone());
        again.config.seed = 100 + u64::from(number / 14);
        again.eval_loss = Some(end);
        trials.push(again);
    }
    let page = html(&(sweep, trials, curves));
    check_nesting(&page);
    assert!(!figures.is_empty() && figures_of(&page) == figures, "a figure changed");
    assert_eq!(page.matches("<td><span class=\"state ").count(), TRIALS.len() + 4);
    check(
        &page,
        &[
            "Best single run: trial 1",
            "Runs with other seeds",
            "12 (1 again)",
            "15 (5 again)",
            "The best</strong>: trial 5",
            "No difference shown between trial 5 and trial 1: eval/loss −0.0034",
        ],
        &[],
    );
}

#[test]
fn rank_order_is_the_goals() {
    let mut made = made();
    let order = |page: &str| -> Vec<u32> {
        let rows = page.split("class=\"swatch\"").skip(1);
        rows.filter_map(|r| r.split("</i>").nth(1)?.split([' ', '<']).next()?.parse().ok()).collect()
    };
    // The diverged trial has no finite eval/loss after the base's: its curve alone counts.
    let down = order(&html(&made));
    assert_eq!(down.len(), TRIALS.len());
    assert_eq!(&down[..3], [1, 2, 5]);
    made.0.spec.search.goal = domain::sweep::Goal::Maximize;
    let up = order(&html(&made));
    assert_eq!(up.last(), Some(&1));
}

/// Each figure says so, and the heading says of how many.
#[test]
fn simulated_numbers_are_marked() {
    let mut made = made();
    let marks = |page: &str| page.matches("<strong>Simulated.</strong>").count();
    assert_eq!(marks(&html(&made)), 0);
    let digests = Digests { base_model: "simulated:x".into(), ..Digests::default() };
    made.1[0].digests = Some(digests.clone());
    let page = html(&made);
    assert_eq!(page.matches(">\nsimulated\n<").count(), page.matches("<svg ").count());
    check_nesting(&page);
    assert_eq!(marks(&page), page.matches("<svg ").count());
    check(&page, &["1 of 11 trials ran on simulated devices"], &[]);
    made.1.iter_mut().for_each(|trial| trial.digests = Some(digests.clone()));
    check(&html(&made), &["All trials ran on simulated devices"], &[]);
}

/// Scores of different questions do not compare.
#[test]
fn other_documents_are_told() {
    let score = TaskScore {
        task: "arc_easy".into(),
        metric: "acc".into(),
        value: 0.5,
        stderr: None,
        base_value: Some(0.4),
        base_stderr: None,
        difference_stderr: None,
        num_fewshot: 0,
        documents: 10,
    };
    let said = "Not all trials were asked the same documents";
    for (of_first, of_second, is_told) in
        [("sha256:a", "sha256:a", false), ("sha256:a", "sha256:b", true), ("sha256:a", "", false)]
    {
        let mut made = made();
        for (trial, documents) in made.1.iter_mut().zip([of_first, of_second]) {
            trial.summary.as_mut().unwrap().evaluations = vec![score.clone()];
            trial.digests = Some(Digests { documents: documents.into(), ..Digests::default() });
        }
        let page = html(&made);
        assert_eq!(page.contains(said), is_told, "{of_first:?} {of_second:?}");
        check(&page, &["eval/arc_easy/acc"], &[]);
    }
}

#[test]
fn nothing_to_show_yet() {
    let page = html(&(sweep(None), Vec::new(), Vec::new()));
    check_nesting(&page);
    check(&page, &["<strong>eval/loss</strong>: no points."], &["<svg", "Best: trial", "Parameters against"]);
}

#[test]
fn every_text_is_escaped() {
    let (mut sweep, mut trials, curves) = made();
    sweep.spec.name = EVIL.into();
    sweep.failure = Some(EVIL.into());
    sweep.spec.base.dataset_name = EVIL.into();
    for trial in &mut trials {
        trial.parameters.insert("target_modules".into(), json!(EVIL));
        trial.adapter = Some(EVIL.into());
        trial.failure = Some(Failure { class: FailureClass::User, message: EVIL.into() });
        if let Some(summary) = &mut trial.summary {
            summary.sample_prompt = Some(EVIL.into());
            summary.sample_before = Some(EVIL.into());
            summary.sample_after = Some(format!("</blockquote>{EVIL}"));
            summary.samples = vec![SampleText { step: 1, text: EVIL.into() }];
        }
    }
    let page = html(&(sweep.clone(), trials.clone(), curves.clone()));
    check_nesting(&page);
    check(&page, &["&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;"], &["<script"]);
    // Code is what it is, on a line or in a fence: nothing else is markup.
    for (_, text) in report::markdown(Records { sweep: &sweep, trials: &trials, curves: &curves, items: &[] })
    {
        let text = without_fenced(&text);
        assert_eq!(text.matches("<script").count(), text.matches("`<script").count(), "{text}");
    }
}

/// Markdown without its fenced code.
fn without_fenced(text: &str) -> String {
    let (mut left, mut fence) = (String::new(), None);
    for line in text.lines() {
        match fence {
            Some(end) if line == end => fence = None,
            Some(_) => {}
            None if line.starts_with("```") => fence = line.strip_suffix("text"),
            None => left = left + line + "\n",
        }
    }
    assert_eq!(fence, None, "{text}");
    left
}

/// The same in Markdown: each figure that it shows is there, and nothing else.
#[test]
fn markdown_beside_its_figures() {
    let (sweep, mut trials, curves) = made();
    trials[0].digests = Some(Digests { base_model: "simulated:x".into(), ..Digests::default() });
    let files = report::markdown(Records { sweep: &sweep, trials: &trials, curves: &curves, items: &[] });
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    for (name, text) in &files {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let (name, text) = &files[0];
    assert_eq!(name, "report.md");
    check(
        text,
        &[
            "# stories\n",
            "## Best: trial 1",
            "eval/loss **2.9400**, where the base has 5.0635",
            "| **1 ★** | **completed** | **180 / 180** |",
            "| **1 ★** | **0.001** | **16** |",
            "- **stories-1a2b/10**: the loss became NaN",
        ],
        &["<svg"],
    );
    let shown: Vec<_> = text.split("](figures/").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    let written: Vec<_> = files[1..].iter().map(|(name, _)| name.strip_prefix("figures/").unwrap()).collect();
    assert!(!shown.is_empty());
    assert_eq!(shown, written);
    let names: std::collections::BTreeSet<_> = written.iter().collect();
    assert_eq!(names.len(), written.len(), "a file each");
    assert_eq!(text.matches("**Simulated.**").count(), shown.len());
    for (name, svg) in &files[1..] {
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{name}");
        check(
            svg,
            &["<title>", "<desc>Simulated. ", "prefers-color-scheme", "simulated\n</text>"],
            &["<script"],
        );
    }
}
