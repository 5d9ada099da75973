//! The forms that rows come in besides text and tokens: arrays, prompts with completions, instructions, conversations;
//! and directories whose files are called after splits.

use crate::{BOS, EOS, VOCAB, all_of, directory, ids, input_ids, letter, letters_with, load};
use domain::trial::TrialConfig;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use trainer::data::{self, Dataset};

/// `<s>U:…\nA:…</s>\n`, turn by turn.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif m.role == 'assistant' %}A:{{ m.content }}{{ eos_token }}\n{% else %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";

fn chats(config: &TrialConfig) -> trainer::Result<Dataset> {
    let settings =
        json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" }, "chat_template": TEMPLATE });
    Dataset::load(config, Some(&letters_with(&settings)), VOCAB, 512)
}

/// A text's tokens, `<s>` and `</s>` where they are spelt out.
fn spelt(text: &str) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while let Some(c) = rest.chars().next() {
        let (id, length) = match rest {
            rest if rest.starts_with("<s>") => (BOS, 3),
            rest if rest.starts_with("</s>") => (EOS, 4),
            _ => (letter(c), c.len_utf8()),
        };
        ids.push(id);
        rest = &rest[length..];
    }
    ids
}

#[test]
fn prompts_and_instructions_become_texts() {
    let task = "Below is an instruction that describes a task. Write a response that appropriately completes the \
                request.\n\n### Instruction:\nAdd.\n\n### Response:\n";
    for (row, prompt, completion) in [
        (json!({ "prompt": "é:", "completion": "xy" }), "é:", "xy"),
        (json!({ "instruction": "Add.", "output": "3" }), task, "3"),
        (json!({ "instruction": "Add.", "input": "", "output": "3" }), task, "3"),
        (json!({ "instruction": "Add.", "input": null, "output": "3" }), task, "3"),
    ] {
        let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
        for assistant_only_loss in [false, true] {
            let config = TrialConfig { assistant_only_loss, ..all_of(&dir.path().join("a.jsonl")) };
            let dataset = load(&config).unwrap();
            let want = ids(&format!("{prompt}{completion}"));
            assert_eq!(input_ids(&dataset.train).concat(), want, "{row}");
            // All but BOS, or what follows the prompt, EOS with it.
            let first = if assistant_only_loss { 1 + prompt.chars().count() } else { 1 };
            let targets: Vec<_> = (0..want.len()).map(|at| at >= first).collect();
            assert_eq!(dataset.train[0].targets, targets, "{row}");
            assert_eq!(dataset.sample_prompt_text.as_deref(), Some(prompt), "{row}");
        }
    }
}

#[test]
fn conversations_are_rendered_by_the_models_template() {
    let text = "<s>U:é?\nA:b</s>\nU:c\nA:d</s>\n";
    let messages = |role: &str, content: &str, roles: [&str; 2]| {
        let turn = |at: usize, said: &str| json!({ role: roles[at], content: said });
        json!([turn(0, "é?"), turn(1, "b"), turn(0, "c"), turn(1, "d")])
    };
    let plain = messages("role", "content", ["user", "assistant"]);
    let (first, rest) = (json!(plain.as_array().unwrap()[..3]), json!(plain.as_array().unwrap()[3..]));
    for row in [
        json!({ "messages": plain }),
        json!({ "messages": plain, "prompt": "unread", "completion": "unread" }),
        json!({ "conversations": messages("from", "value", ["human", "gpt"]) }),
        json!({ "prompt": first, "completion": rest }),
    ] {
        let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
        for assistant_only_loss in [false, true] {
            let config = TrialConfig { assistant_only_loss, ..all_of(&dir.path().join("a.jsonl")) };
            let dataset = chats(&config).unwrap();
            // The template's BOS and EOS, and no others.
            assert_eq!(input_ids(&dataset.train), [spelt(text)], "{row}");
            let said: String = dataset.train[0]
                .input_ids
                .iter()
                .zip(&dataset.train[0].targets)
                .filter(|(_, target)| **target)
                .map(|(id, _)| if *id == EOS { '$' } else { char::from_u32(id - 3).unwrap() })
                .collect();
            let want = if assistant_only_loss { "b$\nd$\n" } else { "U:\u{80}?\nA:b$\nU:c\nA:d$\n" };
            assert_eq!(said, want, "{row}");
            assert_eq!(dataset.sample_prompt_text.as_deref(), Some("<s>U:é?\nA:"), "{row}");
            assert_eq!(dataset.sample_prompt, Some(spelt("<s>U:é?\nA:")), "{row}");
        }
    }
}

/// A prompt is what rows have before their answer: BOS in front and no EOS behind, or the template's text.
#[test]
fn prompts_are_what_answers_follow() {
    let chat = letters_with(&json!({ "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE }));
    let plain = letters_with(&json!({ "eos_token": "</s>" }));
    assert_eq!(data::prompt(&chat, "é?", true).unwrap(), spelt("<s>U:é?\nA:"));
    for tokenizer in [&chat, &plain] {
        let want = ids("é?");
        assert_eq!(data::prompt(tokenizer, "é?", false).unwrap(), want[..want.len() - 1]);
    }
    let broken = letters_with(&json!({ "chat_template": "{{ raise_exception('no') }}" }));
    for (tokenizer, want) in
        [(&plain, "comes without a chat template"), (&broken, "refuses a message alone: no")]
    {
        let refused = data::prompt(tokenizer, "é?", true).unwrap_err().to_string();
        assert!(refused.contains(want), "{refused}");
    }
}

/// A column of another name, if the configuration names it.
#[test]
fn a_named_column_of_messages_is_a_conversation() {
    let row = json!({ "chat": [{ "role": "user", "content": "a" }], "text": "x" });
    let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
    let config =
        TrialConfig { instruct_column_in_dataset: "chat".into(), ..all_of(&dir.path().join("a.jsonl")) };
    assert_eq!(input_ids(&chats(&config).unwrap().train), [spelt("<s>U:a\n")]);
}

#[test]
fn a_template_of_its_own_file_counts_in_the_digest() {
    let row = json!({ "messages": [{ "role": "user", "content": "a" }] });
    let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
    let config = all_of(&dir.path().join("a.jsonl"));
    let digest = |template: &str| {
        let tokenizer = letters_with(&json!({ "chat_template.jinja": template, "chat_template": TEMPLATE }));
        Dataset::load(&config, Some(&tokenizer), VOCAB, 512).map(|dataset| dataset.digest).unwrap()
    };
    let (one, other) = (digest("1{{ messages[0].content }}"), digest("2{{ messages[0].content }}"));
    assert_ne!(one, other);
    assert_eq!(one, digest("1{{ messages[0].content }}"));
}

#[test]
fn bad_rows_of_these_forms_are_named() {
    let user = json!([{ "role": "user", "content": "a" }]);
    for (row, want) in [
        (
            json!({ "messages": user.clone() }),
            "a.jsonl:2: column `messages` holds a conversation, and the model has no chat template",
        ),
        (json!({ "messages": 7 }), "a.jsonl:2: column `messages` holds a number, not a list of messages"),
        (
            json!({ "prompt": "a", "completion": 7 }),
            "a.jsonl:2: column `completion` holds a number, not text",
        ),
        (
            json!({ "prompt": "a", "completion": user }),
            "column `completion` holds a list of other things than whole numbers, not text",
        ),
        (json!({ "prompt": "a" }), "has no column `text` (and neither `messages`, `prompt` and `completion`"),
        (json!({ "instruction": 1, "output": "b" }), "column `instruction` holds a number, not text"),
        (json!({ "instruction": "a", "input": 1, "output": "b" }), "column `input` holds a number, not text"),
    ] {
        let lines = format!("{{\"text\": \"x\"}}\n{row}");
        let dir = directory(&[("a.jsonl", lines.as_bytes())]);
        let config = all_of(&dir.path().join("a.jsonl"));
        let error = load(&config).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("skip_bad_rows"), "{error}\nlacks {want}");
        let dataset = load(&TrialConfig { skip_bad_rows: true, ..config }).unwrap();
        assert_eq!((input_ids(&dataset.train), dataset.skipped_rows), (vec![ids("x")], 1));
    }
    // What a template refuses is a bad row too.
    let row = json!({ "messages": [{ "role": "system", "content": "a" }] });
    let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
    let error = chats(&all_of(&dir.path().join("a.jsonl"))).unwrap_err().to_string();
    assert!(
        error.contains(
            "a.jsonl:1: column `messages` holds a conversation that the chat template refuses: no system"
        ),
        "{error}"
    );
}

#[test]
fn json_files_hold_an_array_or_a_row_a_line() {
    let row = |text: &str| json!({ "text": text });
    for (name, bytes, want) in [
        ("a.json", json!([row("x"), row("y")]).to_string(), Ok(vec![ids("x"), ids("y")])),
        ("a.JSON", format!("\u{feff}\n {}", json!([row("x")])), Ok(vec![ids("x")])),
        ("a.json", format!("{}\n{}\n", row("x"), row("y")), Ok(vec![ids("x"), ids("y")])),
        ("a.json", "[]".into(), Err("a.json: has no rows")),
        (
            "a.json",
            json!([row("x"), 7]).to_string(),
            Err("a.json: row 2: is no JSON object but a number; write an array"),
        ),
        ("a.json", json!([row("x"), { "t": 1 }]).to_string(), Err("a.json: row 2: has no column `text`")),
        ("a.json", "[{\"text\": \"x\"}".into(), Err("a.json: is no JSON array: EOF while parsing a list")),
        (
            "a.json",
            format!("{}\n7", row("x")),
            Err("a.json:2: is no JSON object but a number; write one JSON object a line"),
        ),
    ] {
        let dir = directory(&[(name, bytes.as_bytes())]);
        match (load(&all_of(&dir.path().join(name))), want) {
            (Ok(dataset), Ok(want)) => assert_eq!(input_ids(&dataset.train), want, "{bytes}"),
            (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}\nlacks {want}"),
            (got, want) => panic!("{bytes}: {got:?}, not {want:?}"),
        }
    }
}

#[test]
fn a_directorys_files_are_split_by_their_names() {
    const HELD: f64 = 0.1;
    for (files, eval_size, train, eval) in [
        (vec!["train.jsonl", "test.jsonl"], HELD, "train", "test"),
        (vec!["train.jsonl", "test.jsonl"], 0.0, "train", ""),
        (vec!["train.jsonl", "test.jsonl", "validation.jsonl"], HELD, "train", "validation"),
        (
            vec!["best_replies_train.jsonl", "best_replies_eval.jsonl"],
            HELD,
            "best_replies_train",
            "best_replies_eval",
        ),
        (
            vec![
                "train-00001-of-00002.jsonl",
                "train-00000-of-00002.jsonl",
                "README.md",
                "more.jsonl",
                "dev.json",
            ],
            HELD,
            "train-00000-of-00002 train-00001-of-00002",
            "dev",
        ),
        (vec!["Train.jsonl"], 0.0, "Train", ""),
        // No file to train on by name: all are.
        (vec!["a.jsonl", "test.jsonl"], 0.0, "a test", ""),
        (vec!["trainer.jsonl", "contest.jsonl"], 0.0, "contest trainer", ""),
    ] {
        let texts = files.iter().map(|file| json!({ "text": file.split('.').next() }).to_string());
        let texts: Vec<String> = texts.collect();
        let contents: Vec<_> =
            files.iter().zip(&texts).map(|(file, text)| (*file, text.as_bytes())).collect();
        let dir = directory(&contents);
        let dataset = load(&TrialConfig { eval_size, ..all_of(dir.path()) }).unwrap();
        let want = |names: &str| names.split_whitespace().map(ids).collect::<Vec<_>>();
        assert_eq!(input_ids(&dataset.train), want(train), "{files:?}");
        assert_eq!(input_ids(&dataset.eval), want(eval), "{files:?}");
        // Named as the rows to evaluate on, the directory gives its held-out files.
        let named = TrialConfig {
            eval_dataset_name: Some(dir.path().to_str().unwrap().into()),
            ..all_of(dir.path())
        };
        let held = if eval.is_empty() { None } else { Some(want(eval)) };
        if let Some(held) = held {
            assert_eq!(input_ids(&load(&named).unwrap().eval), held, "{files:?}");
        }
    }
}

/// Messages in Parquet: a list of structures.
#[test]
fn conversations_in_parquet() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    write_messages(&path);
    let dataset = chats(&all_of(&path)).unwrap();
    assert_eq!(input_ids(&dataset.train), [spelt("<s>U:a\nA:b</s>\n"), spelt("<s>U:c\n")]);
}

fn write_messages(path: &Path) {
    let schema =
        "message schema { optional group messages (LIST) { repeated group list { optional group element {
                  optional binary role (UTF8); optional binary content (UTF8); } } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build());
    let mut writer =
        SerializedFileWriter::new(std::fs::File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for values in [["user", "assistant", "user"], ["a", "b", "c"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<_> = values.iter().map(|value| ByteArray::from(*value)).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&[4, 4, 4]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

/// Whatever a conversation holds, it ends in rows or in a named error.
#[test]
fn odd_values_bring_nothing_down() {
    let odd = [
        json!(null),
        json!(7),
        json!("x"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([{}]),
        json!([{ "role": "user" }]),
        json!([{ "role": "user", "content": { "deep": [1] } }]),
        json!([{ "role": "assistant", "tool_calls": [{}] }]),
    ];
    for value in &odd {
        for column in [
            "text",
            "messages",
            "conversations",
            "prompt",
            "completion",
            "instruction",
            "output",
            "input_ids",
        ] {
            let row: Value = json!({ column: value, "prompt": "a", "instruction": value });
            let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
            if let Err(error) = chats(&all_of(&dir.path().join("a.jsonl"))) {
                let text = error.to_string();
                assert!(text.contains("a.jsonl") || text.starts_with("dataset_name: "), "{row}: {text}");
            }
        }
    }
}
