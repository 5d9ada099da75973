//! `lorafleet train` as people call it: the process, its files and its exit code.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../trainer/tests/common/mod.rs"]
mod common;

use common::{json_file, shared, write_texts, write_tiny_model, write_tokenizer};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A command in the directory of a test.
fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
    command.current_dir(dir).arg("train").args(arguments);
    command
}

fn train(dir: &Path, arguments: &[&str]) -> Output {
    command(dir, arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(dir: &Path, arguments: &[&str]) -> Output {
    let output = train(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    output
}

/// A directory with a model, its tokenizer and 24 rows.
fn workplace() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_tiny_model(&dir.path().join("model"));
    write_tokenizer(&dir.path().join("model"), 40);
    write_texts(&dir.path().join("rows.jsonl"), 24);
    dir
}

/// A short run in a [`workplace`] with everything on that resuming has to bring back.
const SHORT: [&str; 8] = [
    "--pretrained-model-id=model",
    "--dataset-name=rows.jsonl",
    "--lora-rank=4",
    "--lora-dropout=0.1",
    "--max-sequence-length=32",
    "--learning-rate=1e-2",
    "--gradient-accumulation-steps=2",
    "--save-steps=5",
];

/// [`SHORT`] and more flags, which take the place of those of the same name.
fn with<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let flag = |argument: &str| argument.split('=').next().unwrap().replace('_', "-");
    let kept = SHORT.into_iter().filter(|a| !arguments.iter().any(|b| flag(a) == flag(b)));
    kept.chain(arguments.iter().copied()).collect()
}

fn points(file: &Path) -> Vec<Value> {
    std::fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What does not depend on the clock.
fn numbers(file: &Path) -> Vec<Value> {
    let keep = ["step", "loss", "grad_norm", "learning_rate", "tokens", "eval/loss"];
    points(file).iter().map(|point| keep.iter().map(|key| point[*key].clone()).collect()).collect()
}

#[test]
fn the_published_flags_give_pefts_steps() {
    let (Some(model), Some(data)) =
        (shared("data/models/stories260K-hf"), shared("data/instruct/instruct_500_guanaco.jsonl"))
    else {
        return;
    };
    let Some(reference) = shared("reference/stories260k") else { return };
    let (want, init) = (json_file(&reference.join("r4_lr1e-3.json")), reference.join("init_r4"));
    let dir = tempfile::tempdir().unwrap();
    let output = succeed(
        dir.path(),
        &[
            "--task=instruct-lora",
            &format!("--pretrained_model_id={}", model.display()),
            &format!("--dataset_name={}", data.display()),
            "--instruct_column_in_dataset=text",
            "--precision_mode=float32",
            "--output_dir=adapter",
            "--lora_rank=4",
            "--max_sequence_length=256",
            "--learning_rate=1e-3",
            "--max_steps=12",
            "--batch_size=4",
            "--eval_split=last",
            "--eval_size=50",
            "--lr_scheduler_type=constant_with_warmup",
            "--warmup_steps=10",
            "--shuffle",
            "false",
            &format!("--init-adapter={}", init.display()),
            "--metrics=metrics.jsonl",
            "--output=json",
        ],
    );
    let points = points(&dir.path().join("metrics.jsonl"));
    assert_eq!(points.len(), 12);
    for (step, point) in points.iter().enumerate() {
        for (ours, theirs, tolerance) in
            [("loss", "loss", 1e-4), ("grad_norm", "grad_norm", 1e-3), ("learning_rate", "lr", 1e-9)]
        {
            let (got, want) = (point[ours].as_f64().unwrap(), want[theirs][step].as_f64().unwrap());
            assert!(
                (got - want).abs() <= tolerance * want.max(1e-3),
                "step {step} {ours}: {got}, not {want}"
            );
        }
        assert_eq!(point["tokens"], want["tokens"][step], "step {step}");
        assert_eq!(point["step"], json!(step + 1));
        assert!(point["samples_per_second"].as_f64().unwrap() > 0.0);
        assert!(point["tokens_per_second"].as_f64().unwrap() > 0.0);
    }
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let summary = &result["summary"];
    assert!((summary["base_eval_loss"].as_f64().unwrap() - 5.063520).abs() < 1e-5);
    assert_eq!(summary["eval_loss"], points[11]["eval/loss"]);
    assert_eq!(summary["trainable_parameters"], json!(23_120));
    assert!(summary["sample_prompt"].as_str().unwrap().ends_with("### Assistant:"));
    let written = json_file(&dir.path().join("adapter/adapter_config.json"));
    let theirs = json_file(&init.join("adapter_config.json"));
    for key in ["r", "lora_alpha", "target_modules", "peft_type", "task_type", "bias"] {
        assert_eq!(written[key], theirs[key], "{key}");
    }
}

#[test]
fn resuming_gives_the_uninterrupted_run() {
    let dir = workplace();
    let at = |path: &str| dir.path().join(path);
    succeed(dir.path(), &with(&["--max-steps=12", "--output-dir=whole", "--metrics=whole.jsonl"]));
    succeed(dir.path(), &with(&["--max-steps=12", "--output-dir=part", "--metrics=part.jsonl"]));
    // As if the machine had died after step 7: the newest whole checkpoint is that of step 5.
    std::fs::remove_dir_all(at("part/checkpoint-10")).unwrap();
    std::fs::remove_dir_all(at("part/checkpoint-12")).unwrap();
    std::fs::remove_file(at("part/resume.json")).unwrap();
    let text = std::fs::read_to_string(at("part.jsonl")).unwrap();
    let lines: Vec<String> = text.lines().take(7).map(|line| format!("{line}\n")).collect();
    std::fs::write(at("part.jsonl"), lines.concat()).unwrap();

    let refused = train(dir.path(), &with(&["--max-steps=12", "--output-dir=part"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--resume"), "{}", stderr(&refused));

    let again = ["--max-steps=12", "--output-dir=part", "--metrics=part.jsonl", "--resume"];
    let resumed = succeed(dir.path(), &with(&again));
    assert!(stderr(&resumed).contains("after step 5 of 12"), "{}", stderr(&resumed));
    let weights = |run: &str| std::fs::read(at(run).join("adapter_model.safetensors")).unwrap();
    assert!(weights("whole") == weights("part"), "the resumed adapter differs");
    assert_eq!(numbers(&at("whole.jsonl")), numbers(&at("part.jsonl")));

    let other = train(dir.path(), &with(&["--max-steps=12", "--output-dir=part", "--resume", "--seed=1"]));
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("seed"), "{}", stderr(&other));
}

/// Out of memory in an evaluation: no step is lost, and what is missing is evaluated first.
#[test]
fn a_run_that_could_not_be_evaluated_goes_on_as_if_it_had_been() {
    // (the evaluation that fails, of those of steps 4, 8 and 12, and the step of its checkpoint)
    for (evaluation, step) in [(1, 4), (2, 8), (3, 12)] {
        let dir = workplace();
        let at = |path: &str| dir.path().join(path);
        let flags = ["--max-steps=12", "--eval-steps=4", "--eval-size=4", "--save-steps=0"];
        let run = |name: &str, more: &[&str]| {
            let places = [format!("--output-dir={name}"), format!("--metrics={name}.jsonl")];
            let places = places.iter().map(String::as_str);
            command(
                dir.path(),
                &with(&flags.into_iter().chain(places).chain(more.iter().copied()).collect::<Vec<_>>()),
            )
        };
        assert!(run("whole", &[]).output().unwrap().status.success());
        let armed = format!("evaluate/memory:{evaluation}:fail");
        let failed = run("part", &[]).env(domain::crash::VARIABLE, armed).output().unwrap();
        let said = stderr(&failed);
        assert_eq!(failed.status.code(), Some(1), "{said}");
        assert!(said.contains("could not be evaluated: ") && said.contains("out of memory"), "{said}");
        assert!(said.contains(&format!("checkpoint-{step}")), "{said}");

        let resumed = run("part", &["--resume"]).output().unwrap();
        let said = stderr(&resumed);
        assert!(resumed.status.success() && said.contains(&format!("after step {step} of 12")), "{said}");
        let weights = |run: &str| std::fs::read(at(run).join("adapter_model.safetensors")).unwrap();
        assert!(weights("whole") == weights("part"), "{step}");
        assert_eq!(numbers(&at("whole.jsonl")), numbers(&at("part.jsonl")), "{step}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_a_checkpoint_to_go_on_from() {
    let dir = workplace();
    let mut child = command(dir.path(), &with(&["--max-steps=1000000", "--output-dir=out"]))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("rows to train on")), "training does not begin");
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let said: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    assert!(said.last().unwrap().contains("--resume"), "{said:?}");
    let step = std::fs::read_dir(dir.path().join("out"))
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok())
        .max()
        .unwrap();
    let steps = format!("--max-steps={}", step + 3);
    let output = succeed(dir.path(), &with(&[&steps, "--output-dir=out", "--resume", "--output=json"]));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["summary"]["steps"], json!(step + 3));
}

#[test]
fn a_diverging_run_keeps_its_last_good_state() {
    let dir = workplace();
    let output = train(dir.path(), &with(&["--learning-rate=1e30", "--max-steps=20", "--output-dir=out"]));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for fragment in ["diverged", "learning_rate", "checkpoint-"] {
        assert!(stderr(&output).contains(fragment), "{}", stderr(&output));
    }
}

/// A full disk does not hide why the run ended.
#[test]
fn a_diverging_run_says_so_if_its_state_cannot_be_written() {
    let dir = workplace();
    std::fs::create_dir(dir.path().join("out")).unwrap();
    for step in 0..20 {
        std::fs::write(dir.path().join(format!("out/.checkpoint-{step}.partial")), "in its way").unwrap();
    }
    let arguments = ["--learning-rate=1e30", "--max-steps=20", "--save-steps=0", "--output-dir=out"];
    let output = train(dir.path(), &with(&arguments));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for fragment in ["diverged", "learning_rate", "could not be written", ".partial"] {
        assert!(stderr(&output).contains(fragment), "{}", stderr(&output));
    }
}

/// A checkpoint is written while the run goes on; that it cannot be ends the run all the same.
#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run() {
    let dir = workplace();
    std::fs::create_dir(dir.path().join("out")).unwrap();
    std::fs::write(dir.path().join("out/.checkpoint-10.partial"), "in its way").unwrap();
    let output = train(dir.path(), &with(&["--max-steps=12", "--output-dir=out"]));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(".checkpoint-10.partial"), "{}", stderr(&output));
    assert!(dir.path().join("out/checkpoint-5/resume.json").exists());
    assert!(!dir.path().join("out/adapter_model.safetensors").exists(), "it did not finish");
}

#[test]
fn an_earlier_run_is_not_overwritten_unasked() {
    let dir = workplace();
    let weights = dir.path().join("out/adapter_model.safetensors");
    let short = ["--max-steps=2", "--output-dir=out", "--save-steps=0"];
    let longer = ["--max-steps=4", "--output-dir=out"];
    succeed(dir.path(), &with(&short));
    let first = std::fs::read(&weights).unwrap();
    // Whether it left checkpoints or its adapter alone.
    for _ in 0..2 {
        let refused = train(dir.path(), &with(&longer));
        let message = stderr(&refused);
        assert_eq!(refused.status.code(), Some(2), "{message}");
        for fragment in ["--output-dir", "out/", "--overwrite-output-dir"] {
            assert!(message.contains(fragment), "no {fragment:?} in {message}");
        }
        assert!(std::fs::read(&weights).unwrap() == first, "it was overwritten");
        std::fs::create_dir_all(dir.path().join("out/checkpoint-2")).unwrap();
        std::fs::copy(dir.path().join("out/resume.json"), dir.path().join("out/checkpoint-2/resume.json"))
            .unwrap();
    }
    succeed(
        dir.path(),
        &with(&[&longer[..], &["--save-steps=0", "--overwrite_output_dir", "-o", "yaml"]].concat()),
    );
    assert!(std::fs::read(&weights).unwrap() != first);
    assert!(!dir.path().join("out/checkpoint-2").exists(), "a later --resume would find it");
}

#[test]
fn bad_rows_can_be_skipped() {
    let dir = workplace();
    let rows = dir.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&rows).unwrap();
    std::fs::write(&rows, format!("{text}no json\n")).unwrap();
    let arguments = ["--max-steps=2", "--output-dir=out", "--skip-bad-rows", "--output=json"];
    let result: Value = serde_json::from_slice(&succeed(dir.path(), &with(&arguments)).stdout).unwrap();
    assert_eq!(result["summary"]["skipped_rows"], json!(1));
}

/// What is done to a workplace before the command is called.
type Spoil = fn(&Path);

fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{} has no {from}", path.display());
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// An adapter directory whose configuration has a setting that is not supported.
fn write_qalora(dir: &Path) {
    let config = json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "use_qalora": true });
    std::fs::create_dir(dir.join("init")).unwrap();
    std::fs::write(dir.join("init/adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn unusable_input_is_named_and_nothing_starts() {
    let nothing: Spoil = |_| {};
    let rows: &[(&str, Spoil, &[&str], &[&str])] = &[
        (
            "no model",
            nothing,
            &["--pretrained-model-id=./none"],
            &["pretrained_model_id", "none", "download"],
        ),
        (
            "no config",
            |dir| std::fs::remove_file(dir.join("model/config.json")).unwrap(),
            &[],
            &["model", "config.json"],
        ),
        (
            "no weights",
            |dir| std::fs::remove_file(dir.join("model/model.safetensors")).unwrap(),
            &[],
            &["model", "model.safetensors", "download"],
        ),
        (
            "truncated weights",
            |dir| {
                let file = std::fs::OpenOptions::new().write(true).open(dir.join("model/model.safetensors"));
                file.unwrap().set_len(9000).unwrap();
            },
            &[],
            &["model/model.safetensors", "cut off", "9000 bytes", "download"],
        ),
        (
            "no Llama",
            |dir| edit(&dir.join("model/config.json"), "\"llama\"", "\"gpt2\""),
            &[],
            &["model/config.json", "model_type is gpt2", "llama"],
        ),
        (
            "weights of another model",
            |dir| {
                edit(&dir.join("model/config.json"), "\"intermediate_size\":24", "\"intermediate_size\":32")
            },
            &[],
            &["gate_proj", "[24, 16]", "[32, 16]", "config.json"],
        ),
        (
            "more ids than rows",
            |dir| write_tokenizer(&dir.join("model"), 41),
            &[],
            &["model", "41 token ids", "40 rows", "tokenizer"],
        ),
        (
            "broken tokenizer",
            |dir| std::fs::write(dir.join("model/tokenizer.json"), "{}").unwrap(),
            &[],
            &["model/tokenizer.json"],
        ),
        ("no data", nothing, &["--dataset-name=none.jsonl"], &["none.jsonl", "does not exist"]),
        ("no column", nothing, &["--instruct-column-in-dataset=txt"], &["rows.jsonl", "`txt`", "`text`"]),
        (
            "no JSON",
            |dir| edit(&dir.join("rows.jsonl"), "\n", "\nno json\n"),
            &[],
            &["rows.jsonl:2", "skip_bad_rows"],
        ),
        (
            "empty data",
            |dir| std::fs::write(dir.join("rows.jsonl"), "").unwrap(),
            &[],
            &["rows.jsonl", "no rows"],
        ),
        ("too long", nothing, &["--max-sequence-length=65"], &["max_sequence_length", "65", "64"]),
        ("rank 0", nothing, &["--lora_rank=0"], &["lora_rank", "must be a whole number from 1, not 0"]),
        (
            "rank above width",
            nothing,
            &["--lora-rank=9"],
            &["lora_rank", "9", "width 8", "k_proj", "8 or less"],
        ),
        ("no such layer", nothing, &["--target-modules=query"], &["target_modules", "query", "q_proj"]),
        ("bad pattern", nothing, &["--target-modules=(q"], &["target_modules", "(q", "regular expression"]),
        (
            "precision",
            nothing,
            &["--precision_mode=8bit"],
            &["--precision-mode", "8bit", "float32, bfloat16, float16 or 4bit"],
        ),
        ("no memory", nothing, &["--memory-limit=1kB"], &["does not fit", "1.0 kB", "4bit"]),
        ("memory", nothing, &["--memory-limit=lots"], &["--memory-limit", "8GB"]),
        ("batch 0", nothing, &["--batch-size=0"], &["batch_size", "must be a whole number from 1, not 0"]),
        ("dropout 1", nothing, &["--lora-dropout=1"], &["lora_dropout", "below 1"]),
        ("rate below 0", nothing, &["--learning-rate=-1"], &["learning_rate", "-1", "above 0"]),
        ("rate 0", nothing, &["--learning_rate=0"], &["learning_rate", "must be a number above 0"]),
        ("type", nothing, &["--lora-rank=four"], &["--lora-rank", "four", "a whole number from 1"]),
        ("unknown flag", nothing, &["--learning-rat=1"], &["--learning-rat", "--learning-rate"]),
        (
            "no mixture to stop",
            nothing,
            &["--stopping-strategy=all_exhausted"],
            &["stopping_strategy", "is given without interleave_datasets"],
        ),
        (
            "iterations",
            nothing,
            &["--init-lora-weights=pissa_niter_1001"],
            &["--init-lora-weights", "pissa_niter_1001", "N from 1 to 1000"],
        ),
        ("no init", nothing, &["--init-adapter=none"], &["none/adapter_config.json", "adapter directory"]),
        (
            "QALoRA",
            write_qalora,
            &["--init-adapter=init"],
            &["init/adapter_config.json", "use_qalora", "does not compute"],
        ),
        ("nothing to resume", nothing, &["--resume"], &["--resume", "out", "no checkpoint"]),
        (
            "output is a file",
            |dir| std::fs::write(dir.join("out"), "").unwrap(),
            &[],
            &["--output-dir", "out", "directory"],
        ),
    ];
    for (name, spoil, arguments, fragments) in rows {
        let dir = workplace();
        spoil(dir.path());
        let output = train(dir.path(), &with(&[*arguments, &["--output-dir=out", "--max-steps=2"]].concat()));
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{name}: {message}");
        for fragment in *fragments {
            assert!(message.contains(fragment), "{name}: no {fragment:?} in {message}");
        }
        assert!(!dir.path().join("out").is_dir(), "{name}: something was started");
    }
}

#[test]
fn help_shows_an_example_and_every_parameter() {
    let output = train(Path::new("."), &["--help"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("lorafleet train --task=instruct-lora"));
    for name in domain::trial::PARAMETER_NAMES {
        // Where a trial is to run is a matter of a fleet.
        let has = *name != domain::trial::TrialConfig::ACCELERATOR;
        assert_eq!(text.contains(&format!("--{}", name.replace('_', "-"))), has, "{name}");
    }
}
