//! Sweep files: where each problem is said to be, what `--set` does, which values are paths.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use config::sweep_file::{self, Loaded, SpecError};
use domain::sweep::Distribution;
use serde_json::json;
use std::path::Path;

const SOUND: &str = "\
name: test
pretrained_model_id: ./model
dataset_name: rows.jsonl
search: { algorithm: random, max_trials: 4 }
parameters:
  lora_rank: [8, 16]
  learning_rate:
    log_uniform: [1e-5, 1.0e-3]
max_steps: 100
";

/// A folder with a model and rows, in which the file lies, and one beside it, from which the command is run.
struct Folders {
    root: tempfile::TempDir,
}

impl Folders {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["sweeps/model", "cwd/other-model", "cwd/org/model"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        for file in ["sweeps/rows.jsonl", "cwd/rows.jsonl", "cwd/more.jsonl"] {
            std::fs::write(root.path().join(file), "{}").unwrap();
        }
        Self { root }
    }

    fn parse(&self, text: &str, sets: &[&str]) -> Result<Loaded, SpecError> {
        let sets: Vec<_> = sets.iter().map(|s| s.split_once('=').unwrap()).collect();
        let sets: Vec<_> = sets.into_iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let root = self.root.path();
        sweep_file::parse(text, Path::new("x.yaml"), &root.join("sweeps"), &sets, &root.join("cwd"))
    }

    fn path(&self, path: &str) -> String {
        self.root.path().canonicalize().unwrap().join(path).to_string_lossy().into_owned()
    }
}

fn check_error(text: &str, sets: &[&str], lines: &[&str]) {
    let folders = Folders::new();
    let error = match folders.parse(text, sets) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => error.to_string().replace(&folders.path(""), "ROOT/"),
    };
    assert_eq!(error.lines().collect::<Vec<_>>(), lines, "{text} {sets:?}");
}

#[test]
fn a_sound_file() {
    let folders = Folders::new();
    let loaded = folders.parse(SOUND, &[]).unwrap();
    assert_eq!(loaded.spec.base.pretrained_model_id, folders.path("sweeps/model"));
    assert_eq!(loaded.spec.base.dataset_name, folders.path("sweeps/rows.jsonl"));
    assert_eq!(loaded.spec.parameters[1].1, Distribution::LogUniform { low: 1e-5, high: 1e-3, step: None });
    assert_eq!(domain::sweep::SweepSpec::from_document(&loaded.document), Ok(loaded.spec.clone()));
    for (path, place) in [
        ("name", "x.yaml:1:1"),
        ("search.max_trials", "x.yaml:4:30"),
        ("parameters.lora_rank", "x.yaml:6:3"),
        ("parameters.lora_rank[1]", "x.yaml:6:18"),
        ("parameters.learning_rate.log_uniform[0]", "x.yaml:8:19"),
        ("parameters.learning_rate.step", "x.yaml:7:3"),
        ("batch_size", "x.yaml:1:1"),
    ] {
        assert_eq!(loaded.locate(path), place, "{path}");
    }
}

#[test]
fn each_problem_has_its_place() {
    let text = "\
name: test
pretrained_model_id: ./model
dataset_name: ./row.jsonl
lora_dropuot: 0.1
search:
  algorithm: random
  max_trials: many
parameters:
  lora_rnk: [8, 16]
  lora_rank: [8, 0]
  learning_rate: { log_uniform: [0, .inf] }
constraints: [\"lora_rank < 8\", \"lora_rank <\"]
";
    check_error(
        text,
        &[],
        &[
            "x.yaml:3:1: dataset_name: ./row.jsonl is not there (looked for ROOT/sweeps/row.jsonl); name a .jsonl, .json or \
         .parquet file or a directory of them; a relative path is taken from ROOT/sweeps",
            "x.yaml:4:1: lora_dropuot: unknown key; did you mean lora_dropout?",
            "x.yaml:7:3: search.max_trials: must be a whole number from 1, not \"many\"; give one of at most 4294967295",
            "x.yaml:9:3: parameters.lora_rnk: unknown key; did you mean lora_rank?",
            "x.yaml:10:18: parameters.lora_rank[1]: must be a whole number from 1, not 0; give one such as 16, the \
         default",
            "x.yaml:11:37: parameters.learning_rate.log_uniform[1]: inf is no finite number; give a finite one",
            "x.yaml:12:32: constraints[1]: column 12: expected a parameter, a number or a text, found the end; write a \
         condition such as lora_rank * batch_size <= 128",
        ],
    );
}

#[test]
fn texts_that_are_no_document() {
    for (text, line) in [
        ("", "x.yaml:1:1: a sweep file is a mapping; begin with name: my-sweep"),
        ("- a\n- b\n", "x.yaml:1:1: a sweep file is a mapping; begin with name: my-sweep"),
        ("name: a\nname: b\n", "x.yaml:2:1: the key stands twice in its mapping; remove one of the two"),
        (
            "search: { seed: 1, seed: 2 }\n",
            "x.yaml:1:20: the key stands twice in its mapping; remove one of the two",
        ),
        ("name: a\n---\nname: b\n", "x.yaml:3:1: a second document begins here; keep one in the file"),
    ] {
        check_error(text, &[], &[line]);
    }
    for (text, place) in [
        ("name: a\nsearch:\n\talgorithm: grid\n", "x.yaml:3:"),
        ("name: [a\n", "x.yaml:2:"),
        ("name: a\n  b: c\n", "x.yaml:2:"),
        ("name: \"a\n", "x.yaml:"),
        ("name: *nowhere\n", "x.yaml:1:"),
    ] {
        let error = Folders::new().parse(text, &[]).unwrap_err().to_string();
        assert!(error.starts_with(place) && error.lines().count() == 1, "{text:?}: {error}");
    }
    let missing = sweep_file::load(Path::new("/nowhere/x.yaml"), &[], Path::new("/")).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "/nowhere/x.yaml: cannot be read: No such file or directory (os error 2); name a sweep file, such as \
         config/sweeps/quickstart.yaml"
    );
}

/// YAML 1.2's core schema: what is a number, a truth value, a text.
#[test]
fn scalars() {
    for (yaml, value) in [
        ("1e-4", json!(1e-4)),
        ("1.0E-4", json!(1e-4)),
        ("+0.5", json!(0.5)),
        (".5", json!(0.5)),
        ("1", json!(1.0)),
        ("0x10", json!(16.0)),
    ] {
        let loaded = Folders::new().parse(&format!("{SOUND}lora_alpha: {yaml}\n"), &[]).unwrap();
        assert_eq!(json!(loaded.spec.base.lora_alpha), value, "{yaml}");
    }
    for (yaml, problem) in [
        ("\"1e-4\"", "must be a number above 0, not \"1e-4\""),
        ("1_000", "must be a number above 0, not \"1_000\""),
        ("true", "must be a number above 0, not true"),
        (".nan", "NaN is no finite number"),
        ("!!int x", "a value that does not fit its tag"),
        ("!half 3", "the tag !half means nothing here"),
        ("{ a: 1 }", "must be a number above 0, not a mapping"),
    ] {
        let error =
            Folders::new().parse(&format!("{SOUND}lora_alpha: {yaml}\n"), &[]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("x.yaml:10:1: lora_alpha: {problem};")), "{yaml}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let yes = Folders::new().parse(&format!("{SOUND}shuffle: yes\n"), &[]).unwrap_err().to_string();
    assert!(yes.contains("shuffle: must be true or false, not \"yes\""), "{yes}");
    let mode = Folders::new().parse(&format!("{SOUND}precision_mode: 4bit\n"), &[]).unwrap();
    assert_eq!(json!(mode.spec.base.precision_mode), json!("4bit"));
}

#[test]
fn anchors_are_fine() {
    let text = format!("{SOUND}warmup_steps: &few 5\nsave_steps: *few\n");
    let spec = Folders::new().parse(&text, &[]).unwrap().spec;
    assert_eq!((spec.base.warmup_steps, spec.base.save_steps), (5, 5));
}

#[test]
fn overrides() {
    let folders = Folders::new();
    let document = |sets: &[&str]| {
        let loaded = folders.parse(SOUND, sets).unwrap_or_else(|e| panic!("{sets:?}: {e}"));
        serde_json::Value::Object(loaded.document)
    };
    let parameters = |sets: &[&str]| document(sets)["parameters"].clone();
    let rate = json!({ "learning_rate": { "log_uniform": [1e-5, 1e-3] } });
    let rank = json!({ "lora_rank": { "choices": [8, 16] } });
    // An ordinary key, with dots or without, replaced or added.
    assert_eq!(document(&["search.max_trials=9"])["search"]["max_trials"], json!(9));
    assert_eq!(document(&["budget.max_wall_clock=2h"])["budget"]["max_wall_clock"], json!(7200.0));
    assert_eq!(document(&["name=other"])["name"], json!("other"));
    assert_eq!(document(&["max_steps=7"])["max_steps"], json!(7));
    assert_eq!(document(&["batch_size=7"])["batch_size"], json!(7));
    assert_eq!(document(&["max_steps=7", "max_steps=8"])["max_steps"], json!(8), "the last one counts");
    // A searched parameter is replaced where it stands.
    assert_eq!(parameters(&["lora_rank=4"]), json!([{ "lora_rank": 4 }, rate]));
    assert_eq!(parameters(&["lora_rank=[2, 4]"]), json!([{ "lora_rank": { "choices": [2, 4] } }, rate]));
    assert_eq!(parameters(&["parameters.lora_rank=4"]), json!([{ "lora_rank": 4 }, rate]));
    assert_eq!(
        parameters(&["parameters.learning_rate.log_uniform=[1e-4, 1e-3]"])[1],
        json!({ "learning_rate": { "log_uniform": [1e-4, 1e-3] } })
    );
    // A constant that becomes a search moves under `parameters`, and a new search goes there.
    assert_eq!(
        parameters(&["max_steps=[50, 100]"]),
        json!([rank, rate, { "max_steps": { "choices": [50, 100] } }])
    );
    assert_eq!(
        parameters(&["weight_decay={uniform: [0, 1]}"])[2],
        json!({ "weight_decay": { "uniform": [0.0, 1.0] } })
    );
    assert!(document(&["max_steps=[50, 100]"]).get("max_steps").is_none());
    // A list of module names is one value.
    let modules = json!(["q_proj", "v_proj"]);
    assert_eq!(document(&["target_modules=[q_proj, v_proj]"])["target_modules"], modules);
    let searched = ["parameters.target_modules=[all-linear]", "target_modules=[q_proj, v_proj]"];
    assert_eq!(parameters(&searched)[2], json!({ "target_modules": { "value": modules } }));

    let loaded = folders.parse(SOUND, &["lora_rank=4", "search.max_trials=2"]).unwrap();
    assert_eq!(loaded.locate("parameters.lora_rank"), "--set lora_rank");
    assert_eq!(loaded.locate("search.max_trials"), "--set search.max_trials");
    assert_eq!(loaded.locate("search.algorithm"), "x.yaml:4:11");
}

#[test]
fn overrides_that_are_refused() {
    for (set, line) in [
        ("lora_rnk=8", "--set lora_rnk: lora_rnk: unknown key; did you mean lora_rank?"),
        ("search.sed=8", "--set search.sed: search.sed: unknown key; did you mean seed?"),
        (
            "lora_rank=0",
            "--set lora_rank: parameters.lora_rank: must be a whole number from 1, not 0; give one such as 16, the default",
        ),
        ("lora_rank=[8", "--set lora_rank: lora_rank: `[8` is no YAML: "),
        (
            "lora_rank=[8, 0]",
            "--set lora_rank: parameters.lora_rank[1]: must be a whole number from 1, not 0; give one such as 16, the default",
        ),
        ("batch_size=.nan", "--set batch_size: batch_size: NaN is no finite number; give a finite one"),
        ("name.first=a", "--set name.first: name.first: name has no keys inside; set name as a whole"),
        ("search=grid", "--set search: search: must be a mapping, not \"grid\"; its keys are "),
        (
            "dataset_name=./nowhere.jsonl",
            "--set dataset_name: dataset_name: ./nowhere.jsonl is not there (looked for ROOT/cwd/nowhere.jsonl); name a .jsonl, .json or .parquet file or a directory of them; a relative path is taken from ROOT/cwd",
        ),
    ] {
        let folders = Folders::new();
        let error = folders.parse(SOUND, &[set]).unwrap_err().to_string().replace(&folders.path(""), "ROOT/");
        assert!(error.starts_with(line), "{set}: {error}");
    }
}

#[test]
fn paths() {
    let folders = Folders::new();
    let base =
        |sets: &[&str]| folders.parse(SOUND, sets).unwrap_or_else(|e| panic!("{sets:?}: {e}")).spec.base;
    // An override's path is relative to the working directory, the file's to the file.
    assert_eq!(
        base(&["pretrained_model_id=other-model"]).pretrained_model_id,
        folders.path("cwd/other-model")
    );
    assert_eq!(
        base(&["pretrained_model_id=../sweeps/model"]).pretrained_model_id,
        folders.path("sweeps/model")
    );
    assert_eq!(base(&["dataset_name=rows.jsonl"]).dataset_name, folders.path("cwd/rows.jsonl"));
    assert_eq!(base(&["dataset_name=."]).dataset_name, folders.path("cwd"));
    assert_eq!(base(&["pretrained_model_id=org/model"]).pretrained_model_id, folders.path("cwd/org/model"));
    let absolute = folders.path("cwd/more.jsonl");
    assert_eq!(base(&[&format!("eval_dataset_name={absolute}")]).eval_dataset_name, Some(absolute));
    // What is not there and does not look like a path is an id of the hub.
    assert_eq!(
        base(&["pretrained_model_id=openlm-research/open_llama_7b"]).pretrained_model_id,
        "openlm-research/open_llama_7b"
    );
    assert_eq!(base(&["pretrained_model_id=gpt2"]).pretrained_model_id, "gpt2");
    // Paths among choices and under conditions.
    let loaded = folders.parse(SOUND, &["dataset_name=[rows.jsonl, {}]", "lora_rank=8"]);
    assert!(loaded.is_err(), "a mapping is no path");
    let loaded = folders
        .parse(SOUND, &["dataset_name={when: {lora_rank: 8}, choices: [rows.jsonl], otherwise: more.jsonl}"])
        .unwrap();
    let at = |path| json!(folders.path(path));
    assert_eq!(
        loaded.document["parameters"][2]["dataset_name"],
        json!({ "when": { "lora_rank": 8 }, "choices": [at("cwd/rows.jsonl")], "otherwise": at("cwd/more.jsonl") })
    );
    for missing in ["/nowhere", "./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c", "rows.parquet"] {
        let error = folders.parse(SOUND, &[&format!("init_adapter={missing}")]).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("--set init_adapter: init_adapter: {missing} is not there")),
            "{error}"
        );
    }
}

#[cfg(unix)]
#[test]
fn a_linked_file_keeps_its_name() {
    let folders = Folders::new();
    let root = folders.root.path();
    std::fs::write(root.join("cwd/blob"), "{}").unwrap();
    std::os::unix::fs::symlink("blob", root.join("cwd/linked.jsonl")).unwrap();
    let loaded = folders.parse(SOUND, &["dataset_name=linked.jsonl"]).unwrap();
    assert_eq!(loaded.spec.base.dataset_name, folders.path("cwd/linked.jsonl"));
}
