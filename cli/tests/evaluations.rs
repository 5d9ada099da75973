//! A sweep that asks its base and its adapters: what comes out is what `lorafleet eval` says of the same adapters, and
//! what cannot be asked is told before anything is trained.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../trainer/tests/common/mod.rs"]
mod model;

use common::Sandbox;
use serde_json::{Value, json};

const SWEEP: &str = "name: asked
pretrained_model_id: ./model
dataset_name: ./rows.jsonl
eval_size: 4
batch_size: 2
max_sequence_length: 32
max_steps: 6
learning_rate: 0.05
search: { algorithm: grid, metric: eval/mine/acc }
parameters: { lora_rank: [2, 4] }
evaluations:
  tasks: [open-two.yaml, ./mine.yaml, perplexity, ./said.yaml]
  num_fewshot: 2
  task_data: { arc_easy: documents, mine: documents/ARC-Easy/test.jsonl, perplexity: book.jsonl, said: said.jsonl }
";

/// The first word of what is said, which is one of two.
const SAID: &str = r#"task: said
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: ["w5", "w6"]
generation_kwargs: { until: ["w39"], max_gen_toks: 4 }
filter_list:
  - { name: first-word, filter: [{ function: regex, regex_pattern: "w[0-9]+" }, { function: take_first }] }
metrics: [exact_match]
"#;

/// A model of words, and more documents of its words than are asked at a time.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new(SWEEP);
    let at = |name: &str| sandbox.path().join(name);
    model::write_tiny_model(&at("model"));
    model::write_tokenizer(&at("model"), 40);
    model::write_texts(&at("rows.jsonl"), 24);
    let document = |i: usize| {
        let choices = json!({ "text": ["w5", "w6 w7"], "label": ["A", "B"] });
        let question = format!("w{} w{}", 2 + i % 30, 3 + i % 7);
        json!({ "question": question, "answerKey": if i.is_multiple_of(3) { "A" } else { "B" }, "choices": choices })
    };
    let lines =
        |rows: std::ops::Range<usize>| rows.map(|i| document(i).to_string() + "\n").collect::<String>();
    std::fs::create_dir_all(at("documents/ARC-Easy")).unwrap();
    std::fs::write(at("documents/ARC-Easy/test.jsonl"), lines(0..70)).unwrap();
    std::fs::write(at("documents/ARC-Easy/train.jsonl"), lines(70..90)).unwrap();
    let page = "w5 w6 w7\nw8 w9";
    std::fs::write(at("book.txt"), page).unwrap();
    let pages = [page, "w9 w8 w7 w6", "w5"].map(|text| json!({ "text": text }).to_string() + "\n");
    std::fs::write(at("book.jsonl"), pages.concat()).unwrap();
    std::fs::write(at("mine.yaml"), "include: arc_easy\ntask: mine\nfewshot_config: { sampler: first_n }\n")
        .unwrap();
    std::fs::write(at("said.jsonl"), lines(0..40)).unwrap();
    std::fs::write(at("said.yaml"), SAID).unwrap();
    let preset = "preset: two\ntasks:\n  - { task: arc_easy, num_fewshot: 1, metric: acc }\n";
    std::fs::write(at("open-two.yaml"), preset).unwrap();
    sandbox
}

/// What `lorafleet eval` says under the names of a sweep.
fn evaluated(sandbox: &Sandbox, adapter: Option<&str>) -> Value {
    let tasks = "open-two.yaml,./mine.yaml,perplexity,./said.yaml";
    let mut arguments = vec!["eval", "--model", "model", "--tasks", tasks];
    arguments.extend(["--num-fewshot", "2", "--task-data", "arc_easy=documents"]);
    arguments.extend([
        "--task-data",
        "mine=documents/ARC-Easy/test.jsonl",
        "--task-data",
        "perplexity=book.jsonl",
        "--task-data",
        "said=said.jsonl",
    ]);
    arguments.extend(adapter.into_iter().flat_map(|adapter| ["--adapter", adapter]));
    sandbox.json(&arguments)
}

#[test]
fn a_sweep_asks_what_eval_asks() {
    let sandbox = sandbox();
    let result = sandbox.json(&["run", "sweep.yaml"]);
    let base = evaluated(&sandbox, None);
    let close = |got: &Value, want: &Value, what: &str| {
        // Passes of other texts round otherwise.
        let (got, want) = (got.as_f64().unwrap(), want.as_f64().unwrap());
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{what}: {got}, not {want}");
    };
    let trials = result["trials"].as_array().unwrap();
    let mut best: Option<f64> = None;
    for trial in trials {
        assert_eq!(trial["state"], "completed", "{trial:#}");
        let id = trial["id"].as_str().unwrap();
        let pulled =
            sandbox.json(&["adapters", "pull", id, "--to", &format!("pulled-{}", id.replace('/', "-"))]);
        let with = evaluated(&sandbox, pulled[0].as_str());
        let scores = trial["summary"]["evaluations"].as_array().unwrap();
        let names: Vec<_> =
            scores.iter().map(|s| (s["task"].as_str().unwrap(), s["metric"].as_str().unwrap())).collect();
        let wanted = [
            ("arc_easy", "acc"),
            ("arc_easy", "acc_norm"),
            ("mine", "acc"),
            ("mine", "acc_norm"),
            ("perplexity", "word_perplexity"),
            ("perplexity", "byte_perplexity"),
            ("perplexity", "bits_per_byte"),
            ("said", "exact_match,first-word"),
            ("two", "mean"),
        ];
        assert_eq!(names, wanted);
        for score in &scores[..8] {
            let (task, metric) = (score["task"].as_str().unwrap(), score["metric"].as_str().unwrap());
            let (name, filter) = metric.split_once(',').unwrap_or((metric, "none"));
            let of = |results: &Value| results["results"][task][format!("{name},{filter}")].clone();
            close(&score["value"], &of(&with), &format!("{id} {task} {metric}"));
            close(&score["base_value"], &of(&base), &format!("base {task} {metric}"));
            if task != "perplexity" {
                let stderr = &with["results"][task][format!("{name}_stderr,{filter}")];
                close(&score["stderr"], stderr, &format!("{id} {task} {metric} stderr"));
                assert!(score["difference_stderr"].is_number());
                assert_eq!(score["documents"], if task == "said" { 40 } else { 70 });
            } else {
                assert_eq!((&score["stderr"], &score["documents"]), (&Value::Null, &json!(3)));
            }
        }
        close(&scores[8]["value"], &with["means"]["two"], "the preset's mean");
        assert_eq!((&scores[0]["num_fewshot"], &scores[2]["num_fewshot"]), (&json!(1), &json!(2)));
        let compared = scores[2]["value"].as_f64().unwrap();
        assert_eq!(trial["eval_mine_acc"].as_f64(), Some(compared));
        best = best.map_or(Some(compared), |best| Some(best.max(compared)));
    }
    // They were asked the same.
    let documents: Vec<_> =
        trials.iter().map(|trial| trial["digests"]["documents"].as_str().unwrap()).collect();
    assert!(documents[0].starts_with("sha256:") && documents[0] == documents[1], "{documents:?}");
    // More is better, of an accuracy.
    let sweep = &result["sweep"];
    assert_eq!((&sweep["spec"]["search"]["goal"], sweep["best_value"].as_f64()), (&json!("maximize"), best));
    // The tasks' files are in the sweep itself.
    assert_eq!(sweep["spec"]["evaluations"]["tasks"][1]["task"], "mine");
    // People see it in the report, and programs in an export.
    let report = std::fs::read_to_string(sandbox.path().join(result["report"].as_str().unwrap())).unwrap();
    let by_items = "<td>paired bootstrap</td>";
    for said in ["What tasks say of them", "Accuracy by task", "eval/mine/acc", by_items] {
        assert!(report.contains(said), "{said} is not in the report");
    }
    // Of several texts, also what is no mean of documents.
    let of_texts = |row: &str| row.contains("word_perplexity") && row.contains(by_items);
    assert!(report.split("<tr").any(of_texts), "{report}");
    let id = sweep["id"].as_str().unwrap();
    sandbox.json(&["export", id, "--format", "csv", "--to", "out"]);
    let csv = std::fs::read_to_string(sandbox.path().join("out/trials.csv")).unwrap();
    for column in ["base_eval/mine/acc", "eval/mine/acc", "eval/mine/acc_stderr", "eval/two/mean"] {
        assert!(csv.lines().next().unwrap().split(',').any(|name| name == column), "{column}: {csv}");
    }
    let table = sandbox.lorafleet(&["trials", "get", trials[0]["id"].as_str().unwrap()]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("summary.evaluations[2].value"), "{table}");
}

/// What its adapters are asked is in the seconds and dollars that are foreseen, but for answers that are generated.
#[test]
fn a_plan_has_what_asking_takes() {
    let sandbox = sandbox();
    let plan = |set: &str| sandbox.json(&["plan", "sweep.yaml", "--device", "A100-40GB", "--set", set]);
    let all = plan("max_steps=6");
    for trial in all.as_array().unwrap() {
        let device = &trial["devices"][0];
        let of = |key: &str| device[key].as_f64().unwrap();
        let seconds = 6.0 * of("seconds_per_step") + of("evaluation_seconds");
        assert!(of("evaluation_seconds") > 0.0 && (of("seconds") - seconds).abs() < 1e-9, "{device:#}");
        let cost = device["price"]["price_per_hour"].as_f64().unwrap() * seconds / 3600.0;
        assert!((of("cost_usd") - cost).abs() < 1e-12, "{device:#}");
    }
    let tokens = |plan: &Value| plan[0]["evaluation_tokens"].as_f64().unwrap();
    // Two examples before each of 70 documents, one in the preset, and their choices; fewer documents, fewer tokens.
    assert!((500.0..40_000.0).contains(&tokens(&all)), "{all:#}");
    assert!(tokens(&plan("evaluations.limit=7")) < tokens(&all) / 4.0);
    let table = sandbox.lorafleet(&["plan", "sweep.yaml", "--device", "A100-40GB"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(
        table.contains("without loading and held-out rows")
            && table.contains("that are generated is left out"),
        "{table}"
    );
}

/// Real questions, to a real model of 260 thousand parameters: lm-evaluation-harness's figures for the base.
#[test]
fn a_base_answers_real_questions_as_the_harness_says() {
    let paths = [
        "data/models/stories260K-hf",
        "data/instruct/instruct_500_guanaco.jsonl",
        "data/eval",
        "reference/lmeval",
    ];
    let paths: Option<Vec<_>> = paths.into_iter().map(model::shared).collect();
    let Some([base, rows, questions, reference]) = paths.as_deref().and_then(|paths| paths.first_chunk())
    else {
        return;
    };
    let sandbox = Sandbox::new(&format!(
        "name: real\npretrained_model_id: {}\ndataset_name: {}\nmax_sequence_length: 64\nmax_steps: 2\nevaluations:\n  \
         tasks: [arc_challenge, truthfulqa_mc2]\n  task_data: {{ arc_challenge: {}, truthfulqa_mc2: {} }}\n",
        base.display(),
        rows.display(),
        questions.join("arc_challenge_test_100.jsonl").display(),
        questions.join("truthfulqa_mc_100.jsonl").display(),
    ));
    let result = sandbox.json(&["run", "sweep.yaml"]);
    let summary = model::json_file(&reference.join("summary.json"));
    let scores = result["trials"][0]["summary"]["evaluations"].as_array().unwrap();
    assert_eq!(scores.len(), 3, "{result:#}");
    for score in scores {
        let (task, metric) = (score["task"].as_str().unwrap(), score["metric"].as_str().unwrap());
        let (got, want) = (&score["base_value"], &summary[task]["metrics"][metric]);
        assert!(
            (got.as_f64().unwrap() - want.as_f64().unwrap()).abs() < 1e-4,
            "{task} {metric}: {got}, not {want}"
        );
    }
}

/// Each is found before anything is trained, and says where.
#[test]
fn what_cannot_be_asked_is_told_at_once() {
    let sandbox = sandbox();
    let good = json!({ "question": "w2", "answerKey": "A", "choices": { "text": ["w5"], "label": ["A"] } });
    let bad = format!("{good}\n{good}\n{}\n{good}\n", json!({ "question": "w2" }));
    std::fs::write(sandbox.path().join("bad.jsonl"), bad).unwrap();
    std::fs::write(sandbox.path().join("wrong.yaml"), "task: [").unwrap();
    let long = SAID.replace("max_gen_toks: 4", "max_gen_toks: 64");
    std::fs::write(sandbox.path().join("long.yaml"), long).unwrap();
    std::fs::write(sandbox.path().join("nested.yaml"), "include: ./mine.yaml\ntask: nested\n").unwrap();
    for (set, want) in [
        ("evaluations.tasks=[arc]", "--set evaluations.tasks: evaluations: arc: is no task; there are"),
        ("evaluations.tasks=[./gone.yaml]", "evaluations.tasks[0]: ./gone.yaml: cannot be read"),
        ("evaluations.tasks=[./wrong.yaml]", "evaluations.tasks[0]: ./wrong.yaml:2:1: "),
        ("evaluations.tasks=[./nested.yaml]", "./nested.yaml: includes a file"),
        ("search.metric=eval/mine/f1", "search.metric: eval/mine/f1 is measured by none of the tasks"),
        ("evaluations.task_data={mine: book.txt}", "perplexity: no documents are given; say where the file"),
        ("evaluations.task_data.arc_easy=gone", "evaluations.task_data.arc_easy: gone is not there"),
        ("evaluations.task_data.hellaswag=book.txt", "hellaswag: has a place in task_data, and is not asked"),
        ("evaluations.task_data.mine=bad.jsonl", "bad.jsonl: example 3: "),
        ("evaluations.num_fewshot=500", "needs 501 documents for 500 examples"),
        (
            "evaluations.tasks=[open-two.yaml, ./mine.yaml, perplexity, ./long.yaml]",
            "said: its answers have up to 64 tokens, and prompt and answer may have 64 together",
        ),
        ("search.algorithm=asha", "search.metric: asha compares trials as they train"),
        ("evaluations=null", "search.metric: eval/mine/acc is a task's, and none is asked"),
    ] {
        let output = sandbox.lorafleet(&["run", "sweep.yaml", "--set", set]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{set}: {said}");
        assert!(said.contains(want), "{set}: {said}\nlacks {want}");
        assert!(!sandbox.path().join("lorafleet-data").exists(), "{set}");
    }
}

/// Nothing is asked of simulated devices, and they say what a formula does.
#[test]
fn simulated_devices_answer_by_a_formula() {
    let sandbox = sandbox();
    let sweep = ["run", "sweep.yaml", "--simulate", "A100-40GB:2", "--simulate-speed", "1000"];
    let result = sandbox.json(&sweep);
    let scores = &result["trials"][1]["summary"]["evaluations"];
    assert_eq!(scores.as_array().unwrap().len(), 9, "{result:#}");
    let mine = &scores[2];
    assert_eq!(
        (&mine["task"], &mine["num_fewshot"], &mine["documents"]),
        (&json!("mine"), &json!(2), &json!(1000))
    );
    assert!(mine["value"].as_f64() > mine["base_value"].as_f64());
    assert!(result["sweep"]["best_value"].is_number());
}
