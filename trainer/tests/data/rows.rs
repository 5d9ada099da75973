//! What becomes of the rows: tokens, targets, the held-out split, the sample prompt.

use crate::{VOCAB, all_of, directory, ids, letters, load, shared};
use candle_core::{DType, Device, Tensor};
use domain::trial::{EvalSplit, TrialConfig};
use serde_json::json;
use trainer::data::Dataset;
use trainer::pack::Row;
use trainer::tokenizer::Tokenizer;

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let dir = directory(&[("a.jsonl", "{\"text\": \"aé\"}".as_bytes())]);
    let config = all_of(&dir.path().join("a.jsonl"));
    let refused = |tokenizer: Option<&Tokenizer>, vocab| {
        Dataset::load(&config, tokenizer, vocab, 512).unwrap_err().to_string()
    };
    let error = refused(Some(&letters(true)), 131);
    assert!(
        error.contains(
            "tokenizer.json: gives token id 131 (`é`) for this data, more than the model's 131 embedding rows"
        ),
        "{error}"
    );
    assert!(
        Dataset::load(&config, Some(&letters(true)), 132, 512).is_ok(),
        "ids that no text uses may lie above"
    );
    let error = refused(Some(&letters(false)), VOCAB);
    assert!(error.starts_with("add_eos: ") && error.contains("or set add_eos: false"), "{error}");
    let error = refused(None, VOCAB);
    assert!(error.starts_with("pretrained_model_id: the model has no tokenizer"), "{error}");
}

#[test]
fn labels_and_assistant_turns_are_the_targets() {
    let two_turns = "### Human: a### Assistant: bc### Human: é### Assistant: de";
    let human_last = "### Human: é### Assistant: b### Human: c";
    let cases = [
        (json!({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}), false, "001".to_owned()),
        (json!({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}), false, "011".to_owned()),
        (json!({"input_ids": [5, 6, 7]}), false, "011".to_owned()),
        (json!({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}), false, "01".to_owned()),
        (json!({"text": "ab"}), false, "0111".to_owned()),
        (
            json!({"text": two_turns}),
            true,
            "0".to_owned() + &"0".repeat(26) + "111" + &"0".repeat(26) + "111" + "1",
        ),
        (json!({"text": human_last}), true, "0".to_owned() + &"0".repeat(26) + "11" + &"0".repeat(12) + "0"),
    ];
    for (row, assistant_only_loss, want) in cases {
        let dir = directory(&[("a.jsonl", row.to_string().as_bytes())]);
        let config = TrialConfig { assistant_only_loss, ..all_of(&dir.path().join("a.jsonl")) };
        let dataset = load(&config).unwrap();
        let got: String = dataset.train[0].targets.iter().map(|t| if *t { '1' } else { '0' }).collect();
        assert_eq!(got, want, "{row}");
        assert_eq!(dataset.train[0].input_ids.len(), want.len());
    }
}

#[test]
fn rows_are_held_out_by_seed_by_place_or_by_file() {
    let lines = |n: u32, from: u32| {
        (from..from + n).map(|i| format!("{{\"input_ids\": [9, {i}]}}\n")).collect::<String>().into_bytes()
    };
    let dir = directory(&[("a.jsonl", &lines(40, 100)), ("b.jsonl", &lines(3, 150))]);
    let config = TrialConfig { eval_size: 0.25, ..all_of(&dir.path().join("a.jsonl")) };
    let numbers = |rows: &[Row]| rows.iter().map(|row| row.input_ids[1]).collect::<Vec<_>>();
    let held = |config: &TrialConfig| {
        let dataset = Dataset::load(config, None, VOCAB, 512).unwrap();
        let (train, eval) = (numbers(&dataset.train), numbers(&dataset.eval));
        assert!(train.is_sorted() && eval.is_sorted());
        assert!(eval.iter().all(|row| !train.contains(row)));
        (train.len(), eval)
    };
    let by_seed = held(&config);
    assert_eq!((by_seed.0, by_seed.1.len()), (30, 10));
    assert_eq!(held(&config), by_seed);
    assert_ne!(held(&TrialConfig { seed: 43, ..config.clone() }), by_seed);
    let last = TrialConfig { eval_split: EvalSplit::Last, eval_size: 4.0, ..config.clone() };
    assert_eq!(held(&last), (36, vec![136, 137, 138, 139]));
    let file = dir.path().join("b.jsonl").to_str().unwrap().to_owned();
    let by_file = TrialConfig { eval_dataset_name: Some(file), ..config.clone() };
    assert_eq!(held(&by_file), (40, vec![150, 151, 152]));
    assert_eq!(held(&TrialConfig { eval_size: 0.0, ..config.clone() }), (40, vec![]));
    // A directory's files, by name; the digest is that of all files read.
    let directory = TrialConfig { dataset_name: dir.path().to_str().unwrap().to_owned(), ..config.clone() };
    assert_eq!(
        held(&TrialConfig { eval_split: EvalSplit::Last, eval_size: 4.0, ..directory }),
        (39, vec![139, 150, 151, 152])
    );
    let digest = |config: &TrialConfig| Dataset::load(config, None, VOCAB, 512).unwrap().digest;
    assert_eq!(digest(&config), digest(&last));
    assert_ne!(digest(&config), digest(&by_file));
}

#[test]
fn the_sample_prompt_is_the_first_that_leaves_room() {
    let rows = [
        "### Human: a### Assistant: b",
        "no turns",
        "### Human: long### Assistant: c",
        "### Human: d### Assistant: e",
    ];
    let lines: Vec<String> = rows.iter().map(|text| json!({"text": text}).to_string()).collect();
    let dir = directory(&[("a.jsonl", lines.join("\n").as_bytes())]);
    for (held_out, max_sequence_length, want) in [
        (0.0, 512, Some("### Human: a### Assistant:")),
        (3.0, 512, Some("### Human: long### Assistant:")),
        (3.0, 28, Some("### Human: d### Assistant:")),
        (0.0, 20, None),
    ] {
        let config = TrialConfig {
            eval_split: EvalSplit::Last,
            eval_size: held_out,
            max_sequence_length,
            ..all_of(&dir.path().join("a.jsonl"))
        };
        let dataset = load(&config).unwrap();
        assert_eq!(dataset.sample_prompt_text.as_deref(), want);
        let ids = want.map(ids).map(|mut ids| {
            ids.pop();
            ids
        });
        assert_eq!(dataset.sample_prompt, ids);
    }
}

#[test]
fn the_tokens_of_the_reference_runs() {
    let (Some(data), Some(reference)) = (shared("data"), shared("reference/stories260k/tokens.safetensors"))
    else {
        return;
    };
    let tensors = candle_core::safetensors::load(reference, &Device::Cpu).unwrap();
    let table = |name: &str| -> Vec<Vec<u32>> {
        let tensor: &Tensor = &tensors[name];
        tensor.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
    };
    let (want, assistant) = (table("input_ids"), table("assistant"));
    let lengths: Vec<u32> = tensors["length"].to_vec1().unwrap();
    let tokenizer = Tokenizer::load(&data.join("models/stories260K-hf")).unwrap();
    for assistant_only_loss in [false, true] {
        let config = TrialConfig {
            eval_split: EvalSplit::Last,
            eval_size: 50.0,
            max_sequence_length: 256,
            assistant_only_loss,
            ..all_of(&data.join("instruct/instruct_500_guanaco.jsonl"))
        };
        let dataset = Dataset::load(&config, Some(&tokenizer), 512, 512).unwrap();
        assert_eq!((dataset.train.len(), dataset.eval.len()), (450, 50));
        assert_eq!((dataset.truncated_rows, dataset.skipped_rows), (346, 0));
        for (i, row) in dataset.train.iter().chain(&dataset.eval).enumerate() {
            let length = lengths[i] as usize;
            assert_eq!(row.input_ids, want[i][..length], "row {i}");
            let target = |t: usize| t > 0 && (!assistant_only_loss || assistant[i][t] == 1);
            assert_eq!(row.targets, (0..length).map(target).collect::<Vec<_>>(), "row {i}");
        }
        let targets = |rows: &[Row]| rows.iter().flat_map(|row| &row.targets).filter(|t| **t).count();
        assert_eq!(targets(&dataset.eval), if assistant_only_loss { 5_556 } else { 11_237 });
        assert!(dataset.sample_prompt_text.unwrap().ends_with("### Assistant:"));
    }
}
