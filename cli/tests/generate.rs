//! `lorafleet generate` through the real binary: what it writes after prompts, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../trainer/tests/common/mod.rs"]
mod model;

use common::Sandbox;
use serde_json::Value;

/// A model of words, and an adapter of it that says something else.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new("");
    let at = |name: &str| sandbox.path().join(name);
    model::write_tiny_model(&at("model"));
    model::write_tokenizer(&at("model"), 40);
    model::write_texts(&at("rows.jsonl"), 24);
    train(&sandbox, "model", "rows.jsonl", "0.05");
    sandbox
}

/// Trains `adapter` of a model.
fn train(sandbox: &Sandbox, model: &str, rows: &str, learning_rate: &str) {
    let model = format!("--pretrained-model-id={model}");
    let (rows, rate) = (format!("--dataset-name={rows}"), format!("--learning-rate={learning_rate}"));
    let short = ["--max-steps=12", "--max-sequence-length=32", "--lora-rank=4", "--output-dir=adapter"];
    sandbox.json(&[&["train", &model, &rows, &rate], &short[..]].concat());
}

/// The lines of JSON about some prompts.
fn lines(sandbox: &Sandbox, args: &[&str]) -> Vec<Value> {
    let output = sandbox.lorafleet(&[&["generate", "-o", "json"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The texts alone.
fn texts(sandbox: &Sandbox, args: &[&str]) -> Vec<String> {
    lines(sandbox, args).iter().map(|line| line["text"].as_str().unwrap().to_string()).collect()
}

/// What a command for people prints.
fn printed(sandbox: &Sandbox, args: &[&str]) -> String {
    let output = sandbox.lorafleet(&[&["generate"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Greedy texts are the same each time, and an adapter's are others; drawn ones follow the seed.
fn check_texts(sandbox: &Sandbox, model: &str, prompt: &str) {
    let base = ["--model", model, "--prompt", prompt];
    let with = |more: &[&'static str]| texts(sandbox, &[&base[..], more].concat());
    let greedy = with(&[]);
    assert_eq!(with(&[]), greedy);
    assert_eq!(with(&["--seed", "5"]), greedy, "nothing is drawn");
    assert_eq!(with(&["--temperature", "1", "--top-p", "1e-9"]), greedy, "a nucleus of one token");
    let adapted = with(&["--adapter", "adapter"]);
    assert_ne!(adapted, greedy);
    assert_eq!(with(&["--adapter", "adapter"]), adapted);
    let drawn = |seed| with(&["--temperature", "1.5", "--top-p", "0.95", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"));
    assert!(drawn("1") != drawn("2") && drawn("1") != greedy);
    // What is printed as it is made is the same text.
    assert_eq!(printed(sandbox, &base), format!("{}\n", greedy[0]));
}

#[test]
fn texts_of_base_and_adapter() {
    let sandbox = sandbox();
    check_texts(&sandbox, "model", "w5 w6 w7");
    let line = &lines(&sandbox, &["--model", "model", "--prompt", "w5", "--max-new-tokens", "3"])[0];
    let keys: Vec<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["prompt", "text", "tokens", "finish_reason", "tokens_per_second"]);
    assert_eq!(line["prompt"], "w5");
    let (tokens, stops) = (line["tokens"].as_u64().unwrap(), line["finish_reason"] == "stop");
    assert!(tokens < 3 && stops || tokens == 3 && line["finish_reason"] == "length", "{line}");
    assert_eq!(line["text"].as_str().unwrap().split_whitespace().count() as u64, tokens);
    // The model knows 64 positions.
    let prompt = ["w5"; 60].join(" ");
    let full = &lines(&sandbox, &["--model", "model", "--prompt", &prompt, "--max-new-tokens", "50"])[0];
    assert!(full["tokens"].as_u64().unwrap() <= 4, "{full}");
    // A base in 4 bits takes the same adapter.
    let quantised = ["--model", "model", "--prompt", "w5", "--precision-mode", "4bit"];
    assert_eq!(texts(&sandbox, &[&quantised[..], &["--adapter", "adapter"]].concat()).len(), 1);
}

#[test]
fn texts_of_a_real_model() {
    let (Some(stories), Some(rows)) = (
        model::shared("data/models/stories260K-hf"),
        model::shared("data/instruct/instruct_500_guanaco.jsonl"),
    ) else {
        return;
    };
    let (stories, rows) = (stories.display().to_string(), rows.display().to_string());
    let sandbox = Sandbox::new("");
    train(&sandbox, &stories, &rows, "0.01");
    check_texts(&sandbox, &stories, "Once upon a time, there was a little");
    let story =
        texts(&sandbox, &["--model", &stories, "--prompt", "Once upon a time", "--max-new-tokens", "40"]);
    assert!(story[0].starts_with(", there was a little girl"), "{story:?}");
}

#[test]
fn several_prompts_and_files_of_them() {
    let sandbox = sandbox();
    let write = |name: &str, text: &str| std::fs::write(sandbox.path().join(name), text).unwrap();
    write("prompts.txt", "w5 w6\n\nw7\n");
    write("prompts.jsonl", "{\"prompt\": \"w5 w6\"}\n{\"prompt\": \"w7\"}\n");
    let model = ["--model", "model"];
    for draws in [&[][..], &["--temperature", "1", "--seed", "3"]] {
        let of = |args: &[&str]| texts(&sandbox, &[&model[..], args, draws].concat());
        let both = of(&["--prompt", "w5 w6", "w7"]);
        assert_eq!(both.len(), 2);
        assert_eq!(of(&["--prompt", "w5 w6", "--prompt", "w7"]), both);
        assert_eq!(of(&["--file", "prompts.txt"]), both);
        assert_eq!(of(&["--file", "prompts.jsonl"]), both);
        // The first does not depend on what comes after it.
        assert_eq!(of(&["--prompt", "w5 w6"])[0], both[0]);
        let shown = printed(&sandbox, &[&model[..], &["--file", "prompts.txt"], draws].concat());
        let want = format!("==> w5 w6 <==\n{}\n\n==> w7 <==\n{}\n", both[0], both[1]);
        assert_eq!(shown, want);
    }
    // The same prompt again is another draw.
    let twice =
        texts(&sandbox, &["--model", "model", "--temperature", "2", "--prompt", "w5", "--prompt", "w5"]);
    assert_ne!(twice[0], twice[1]);
}

#[test]
fn a_chat_is_put_by_its_template() {
    let sandbox = sandbox();
    let template =
        "{% for m in messages %}w9 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w8{% endif %}";
    let of = |args: &[&str]| texts(&sandbox, &[&["--model", "model"], args].concat());
    let want = of(&["--prompt", "w9 w5 w6 w8"]);
    assert_ne!(of(&["--prompt", "w5 w6"]), want);
    std::fs::write(sandbox.path().join("model/chat_template.jinja"), template).unwrap();
    assert_eq!(of(&["--chat", "--prompt", "w5 w6"]), want);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let sandbox = sandbox();
    let write = |name: &str, text: &str| std::fs::write(sandbox.path().join(name), text).unwrap();
    write("empty.txt", "\n \n");
    write("bad.jsonl", "{\"prompt\": \"w5\"}\n{\"text\": \"w5\"}\n");
    let long = ["w5"; 64].join(" ");
    let prompt = ["--model", "model", "--prompt", "w5"];
    for (args, want) in [
        (&["--model", "./nowhere", "--prompt", "w5"][..], "nowhere"),
        (&["--model", "model"], "--prompt"),
        (&["--model", "model", "--prompt", ""], "--prompt: is empty"),
        (&["--model", "model", "--prompt", "w5", "--file", "empty.txt"], "cannot be used with"),
        (&["--model", "model", "--file", "empty.txt"], "empty.txt: holds no prompt"),
        (&["--model", "model", "--file", "nothing.txt"], "nothing.txt"),
        (
            &["--model", "model", "--file", "bad.jsonl"],
            "bad.jsonl:2: is no object with a text under `prompt`",
        ),
        (&["--model", "model", "--prompt", &long], "has 64 tokens, and the model reads 64"),
        (&[&prompt[..], &["--temperature", "-1"]].concat(), "temperature: is -1"),
        (&[&prompt[..], &["--temperature", "nan"]].concat(), "temperature: is NaN"),
        (&[&prompt[..], &["--temperature", "1", "--top-p", "0"]].concat(), "top_p: is 0,"),
        (&[&prompt[..], &["--temperature", "1", "--top-p", "1.5"]].concat(), "top_p: is 1.5"),
        (&[&prompt[..], &["--top-p", "0.9"]].concat(), "add --temperature 1"),
        (&[&prompt[..], &["--max-new-tokens", "0"]].concat(), "--max-new-tokens"),
        (&[&prompt[..], &["--chat"]].concat(), "comes without a chat template"),
        (&[&prompt[..], &["--adapter", "model"]].concat(), "adapter_config.json"),
        (&[&prompt[..], &["--precision-mode", "8bit"]].concat(), "float32, bfloat16, float16 or 4bit"),
    ] {
        let output = sandbox.lorafleet(&[&["generate"], args].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(want) && output.stdout.is_empty(), "{args:?}: {said}");
    }
}
