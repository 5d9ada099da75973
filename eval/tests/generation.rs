//! What a tiny model of words makes of tasks: the answers that it generates are what it says by itself, and a long text is read
//! in windows.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../../trainer/tests/common/mod.rs"]
mod common;

use common::device;
use domain::sweep::{Evaluations, FewshotOrder};
use domain::trial::Precision;
use eval::EvalError;
use eval::data::{self, Data};
use eval::exam::{Exam, Sitting};
use eval::metric::Score;
use eval::prompt::Prompts;
use eval::results;
use eval::run::{self, Model, Options, Outcome, Sample};
use eval::task::{self, Chosen, Task};
use serde_json::{Value, json};
use tempfile::TempDir;
use trainer::model::Base;
use trainer::pack;
use trainer::tokenizer::Tokenizer;

const TASK: &str = r#"task: said
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers}}"
fewshot_config: { sampler: first_n, samples: [{ question: w9 w10, answers: [w11 w12, w13] }, { question: w14, answers: [w15] }] }
filter_list:
  - { name: whole, filter: [{ function: take_first }] }
  - { name: last-word, filter: [{ function: regex, regex_pattern: "w[0-9]+", group_select: -1 }] }
metrics: [{ metric: exact_match, ignore_case: true }]
"#;

/// A model of words, with or without a word for its end.
struct Speaker {
    dir: TempDir,
    base: Base,
    tokenizer: Tokenizer,
}

impl Speaker {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        common::write_tiny_model(dir.path());
        common::write_tokenizer(dir.path(), 40);
        let base = Base::load(dir.path(), Precision::default(), device()).unwrap();
        let tokenizer = Self::tokenizer(&dir, json!({}));
        Self { dir, base, tokenizer }
    }

    fn tokenizer(dir: &TempDir, settings: Value) -> Tokenizer {
        std::fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    fn model(&self) -> Model<'_> {
        Model { base: &self.base, adapter: None, tokenizer: &self.tokenizer }
    }

    /// What it says to the last `read` tokens of a text, in up to `most` tokens.
    fn says(&self, text: &str, read: usize, most: usize) -> String {
        let ids = self.tokenizer.encode(text).unwrap().ids;
        let ids = &ids[ids.len().saturating_sub(read)..];
        let said = pack::generate(&self.base, None, ids, most, self.tokenizer.eos()).unwrap();
        self.tokenizer.decode(&said).unwrap()
    }

    /// The task with other keys over its own, and some documents: what comes of it.
    fn asked(&self, keys: Value, rows: &[Value], options: &Options) -> Result<Outcome, EvalError> {
        let (task, documents) = (self.dir.path().join("said.yaml"), self.dir.path().join("rows.jsonl"));
        let keys = keys.as_object().unwrap();
        let keys: String = keys.iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
        std::fs::write(&task, format!("{TASK}{keys}")).unwrap();
        std::fs::write(&documents, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        let task = task::find(task.to_str().unwrap())?;
        let examples = options.num_fewshot.is_some();
        let data = data::load(&task, &documents, None, examples, options.fewshot_order)?;
        let chosen = Chosen { task, num_fewshot: None };
        run::evaluate(self.model(), &chosen, &data, options, &mut |_, _| ())
    }
}

fn row(question: &str, answers: &[&str]) -> Value {
    json!({ "question": question, "answers": answers })
}

/// Nothing before `until` is left out, and nothing from it on is left.
fn before(text: &str, until: &str) -> String {
    text.split(until).next().unwrap().to_owned()
}

/// The last word, as the task's filter has it.
fn last_word(text: &str) -> &str {
    text.split_whitespace().rfind(|word| word.starts_with('w')).unwrap_or("[invalid]")
}

fn generated(outcome: &Outcome) -> Vec<&str> {
    outcome.samples.iter().map(|sample| sample.generated.as_deref().unwrap()).collect()
}

#[test]
fn answers_are_what_the_model_says_by_itself() {
    let speaker = Speaker::new();
    let questions = ["w2 w3", "w17 w4 w30", "w8"];
    let whole: Vec<_> = questions.iter().map(|question| speaker.says(question, 64, 12)).collect();
    // A word that the first answer has, so that it ends before that.
    let until = whole[0].split(' ').nth(6).unwrap();
    let want: Vec<_> = whole.iter().map(|text| before(text, until)).collect();
    assert!(want[0].len() < whole[0].len());
    let kwargs = json!({ "generation_kwargs": { "until": [until], "max_gen_toks": 12 } });
    let rows = [
        row(questions[0], &["w5", &want[0].to_uppercase()]),
        row(questions[1], &["no word of its"]),
        row(questions[2], &[last_word(&want[2])]),
    ];
    let outcome = speaker.asked(kwargs, &rows, &Options::default()).unwrap();
    assert_eq!(generated(&outcome), want);
    assert_eq!((outcome.requests, outcome.documents), (3, 3));
    for (index, Sample { filtered_resps, metrics, loglikelihoods, .. }) in outcome.samples.iter().enumerate()
    {
        let last = last_word(&want[index]);
        assert_eq!((&filtered_resps["whole"], filtered_resps["last-word"].as_str()), (&want[index], last));
        let names: Vec<_> = metrics.iter().map(|(measure, _)| measure.to_string()).collect();
        assert_eq!(names, ["exact_match,whole", "exact_match,last-word"]);
        assert!(loglikelihoods.is_empty());
    }
    let scores = |index: usize| outcome.samples[index].metrics.iter().map(|(_, score)| *score);
    assert_eq!(scores(0).next(), Some(Score::Value(1.0)), "one of its answers, but for capitals");
    assert_eq!(scores(1).collect::<Vec<_>>(), [Score::Value(0.0), Score::Value(0.0)]);
    assert_eq!(scores(2).nth(1), Some(Score::Value(1.0)));
    // As people and programs read it.
    let document = results::document(std::slice::from_ref(&outcome), &[], Value::Null);
    let said = &document["results"]["said"];
    for (place, filter) in ["whole", "last-word"].into_iter().enumerate() {
        let figure = &outcome.figures[place];
        assert_eq!(said[format!("exact_match,{filter}")], figure.value);
        assert_eq!(said[format!("exact_match_stderr,{filter}")].as_f64(), figure.stderr);
    }
    assert_eq!(document["higher_is_better"]["said"], json!({ "exact_match": true }));
    let line = serde_json::to_value(&outcome.samples[1]).unwrap();
    assert_eq!((&line["generated"], &line["metrics"]["exact_match,whole"]), (&json!(want[1]), &json!(0.0)));
}

#[test]
fn an_answer_ends_at_eos_and_at_the_blank_line_of_its_examples() {
    let mut speaker = Speaker::new();
    let whole = speaker.says("w2 w3", 64, 12);
    let eos = whole.split(' ').nth(5).unwrap().to_owned();
    speaker.tokenizer = Speaker::tokenizer(&speaker.dir, json!({ "eos_token": eos }));
    let rows = [row("w2 w3", &["w5"])];
    let kwargs = json!({ "generation_kwargs": { "max_gen_toks": 12 } });
    let outcome = speaker.asked(kwargs, &rows, &Options::default()).unwrap();
    // Its name is none of what it says, alone or within another word.
    assert_eq!(generated(&outcome), [before(&speaker.says("w2 w3", 64, 12), &eos)]);
    // What stands behind examples ends it if nothing is named.
    let keys = json!({ "generation_kwargs": { "max_gen_toks": 12 }, "fewshot_delimiter": " " });
    let outcome = speaker.asked(keys, &rows, &Options::default()).unwrap();
    assert_eq!(generated(&outcome), [before(&before(&speaker.says("w2 w3", 64, 12), " "), &eos)]);
}

/// What an answer begins with, and the word that comes then; behind that is more than this word.
fn beginning(speaker: &Speaker) -> (&'static str, Vec<String>, String) {
    let of = |question: &'static str| {
        let words: Vec<_> = speaker.says(question, 64, 12).split(' ').map(str::to_owned).collect();
        let is_new =
            |place: &usize| !words[..*place].iter().any(|word| word.contains(words[*place].as_str()));
        let goes_on = |place: &usize| words[*place..].iter().any(|word| *word != words[*place]);
        let place = (1..words.len()).rev().find(|place| is_new(place) && goes_on(place))?;
        Some((question, words[..place].to_vec(), words[place].clone()))
    };
    ["w2 w3", "w17 w4 w30", "w8", "w21 w6", "w33"].into_iter().find_map(of).unwrap()
}

#[test]
fn an_answer_ends_at_a_special_token_that_it_does_not_show() {
    let mut speaker = Speaker::new();
    let (question, before, special) = beginning(&speaker);
    let path = speaker.dir.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    file["added_tokens"] = json!([{
        "id": file["model"]["vocab"][&special], "content": special, "special": true, "normalized": false,
        "single_word": true, "lstrip": false, "rstrip": false,
    }]);
    std::fs::write(&path, file.to_string()).unwrap();
    speaker.tokenizer = Speaker::tokenizer(&speaker.dir, json!({}));
    let asked = |until: Value| {
        let kwargs = json!({ "generation_kwargs": { "until": until, "max_gen_toks": 12 } });
        let outcome = speaker.asked(kwargs, &[row(question, &["w5"])], &Options::default()).unwrap();
        generated(&outcome)[0].to_owned()
    };
    assert_eq!(asked(json!([special])), before.join(" "));
    assert_ne!(asked(json!([])), before.join(" "), "it goes on where nothing ends it");
}

#[test]
fn an_answer_ends_at_each_token_that_its_model_lists() {
    let mut speaker = Speaker::new();
    let (question, before, end) = beginning(&speaker);
    let whole = speaker.says(question, 64, 12);
    let unsaid = (10..40).map(|id| format!("w{id}")).find(|word| !whole.contains(word.as_str())).unwrap();
    let ids = [unsaid, end].map(|word| speaker.tokenizer.encode(&word).unwrap().ids[0]);
    let settings = json!({ "eos_token_id": ids });
    std::fs::write(speaker.dir.path().join("generation_config.json"), settings.to_string()).unwrap();
    speaker.tokenizer = Speaker::tokenizer(&speaker.dir, json!({}));
    let kwargs = json!({ "generation_kwargs": { "until": [], "max_gen_toks": 12 } });
    let outcome = speaker.asked(kwargs, &[row(question, &["w5"])], &Options::default()).unwrap();
    assert_eq!(generated(&outcome), [before.join(" ")]);
}

#[test]
fn a_prompt_has_its_examples_and_loses_its_beginning() {
    let speaker = Speaker::new();
    let rows = [row("w2 w3 w4", &["w5"])];
    let kwargs = json!({ "generation_kwargs": { "until": [], "max_gen_toks": 6 } });
    let prompt = "w9 w10 w11 w12\n\nw2 w3 w4";
    let with = |max_length| Options { num_fewshot: Some(1), max_length, ..Options::default() };
    for (max_length, read) in [(None, 64), (Some(13), 7), (Some(12), 6), (Some(8), 2)] {
        let outcome = speaker.asked(kwargs.clone(), &rows, &with(max_length)).unwrap();
        assert_eq!(generated(&outcome), [speaker.says(prompt, read, 6)], "{max_length:?}");
    }
    for (keys, row, max_length, want) in [
        (
            kwargs.clone(),
            &rows[0],
            Some(6),
            "said: its answers have up to 6 tokens, and prompt and answer may have 6",
        ),
        (kwargs.clone(), &row("", &["w5"]), None, "rows.jsonl: document 1: its prompt has no tokens"),
        (kwargs.clone(), &row("w2", &[]), None, "rows.jsonl: document 1: its target is an empty list"),
        (json!({ "generation_kwargs": { "top_p": 1 } }), &rows[0], None, "top_p"),
    ] {
        let options = Options { max_length, ..Options::default() };
        let error = speaker.asked(keys, std::slice::from_ref(row), &options).unwrap_err().to_string();
        assert!(error.contains(want), "{error}\nlacks {want}");
    }
}

/// A model has 64 positions, whatever is asked of it: what it cannot read of a prompt makes room for the answer.
#[test]
fn no_prompt_takes_the_room_of_its_answer() {
    let speaker = Speaker::new();
    let question: Vec<_> = (0..70).map(|i| format!("w{}", 2 + 7 * i % 37)).collect();
    let rows = [row(&question.join(" "), &["w5"])];
    let kwargs = json!({ "generation_kwargs": { "until": [], "max_gen_toks": 6 } });
    for max_length in [None, Some(100)] {
        let options = Options { max_length, ..Options::default() };
        let outcome = speaker.asked(kwargs.clone(), &rows, &options).unwrap();
        let want = speaker.says(&question.join(" "), 58, 6);
        assert!(!want.is_empty());
        assert_eq!(generated(&outcome), [want], "{max_length:?}");
    }
}

/// What the harness's `doc_to_target` has, and `str` writes.
#[test]
fn targets_are_written_as_python_writes_them() {
    let row = json!({
        "flag": true, "list": [false, 1, "x"], "number": 3, "text": "['a', 'b']", "brackets": "[see below]",
    });
    let row = row.as_object().unwrap();
    let data = Data {
        path: "rows".into(),
        documents: vec![row.clone()],
        examples: Vec::new(),
        examples_hold_documents: false,
    };
    for (target, want) in [
        ("flag", &["True"][..]),
        ("{{flag}}", &["True"]),
        ("{{not flag}}", &["False"]),
        ("list", &["False", "1", "x"]),
        ("{{text}}", &["a", "b"]),
        ("[{{number}}, 'x']", &["3", "x"]),
        // No list, or a field's text as it is.
        ("text", &["['a', 'b']"]),
        ("{{brackets}}", &["[see below]"]),
        ("[a]", &["[a]"]),
    ] {
        let mut task = task::find("gsm8k").unwrap();
        (task.doc_to_text, task.doc_to_target) = ("?".into(), target.into());
        let item = Prompts::new(&task, &data, 0, FewshotOrder::V0_4).unwrap().item(0).unwrap();
        assert_eq!(item.choices, want, "{target}");
    }
}

/// Whoever trains in between waits for one answer at a time.
#[test]
fn a_sweep_is_asked_for_one_answer_at_a_time() {
    let speaker = Speaker::new();
    let documents = speaker.dir.path().join("rows.jsonl");
    let write = |questions: [&str; 3]| {
        let rows: String = questions.iter().map(|question| format!("{}\n", row(question, &["w5"]))).collect();
        std::fs::write(&documents, rows).unwrap();
    };
    write(["w2 w3", "w17 w4 w30", "w8"]);
    let mut task = config::tasks::read(TASK).unwrap();
    task["generation_kwargs"] = json!({ "max_gen_toks": 3 });
    let evaluations = Evaluations {
        tasks: vec![task],
        task_data: [("said".to_owned(), documents.display().to_string())].into(),
        ..Evaluations::default()
    };
    let load = || {
        Exam::load::<EvalError>(&evaluations, &mut |task: &Task| panic!("{} has documents", task.task))
            .unwrap()
    };
    let ask = |exam: &Exam| {
        let mut sitting = Sitting::default();
        let mut over = || exam.ask(speaker.model(), &mut sitting, 4096).unwrap();
        assert_eq!([over(), over(), over()], [false, false, true]);
        sitting
    };
    let exam = load();
    let sitting = ask(&exam);
    let scores = exam.scores(&sitting, &sitting);
    let names: Vec<_> = scores.iter().map(|score| score.name()).collect();
    assert_eq!(names, ["eval/said/exact_match,whole", "eval/said/exact_match,last-word"]);
    assert!(scores.iter().all(|score| score.documents == 3 && score.difference_stderr == Some(0.0)));
    // What single documents made of them is told beside, and of what documents.
    let items = exam.item_scores(&sitting, &sitting);
    for (items, score) in items.iter().zip(&scores) {
        let mean = items.scores.iter().map(|byte| f64::from(*byte) / 255.0).sum::<f64>() / 3.0;
        assert!((mean - score.value).abs() < 1e-12, "{items:?}, {score:?}");
        assert_eq!((&items.metric, &items.base, items.scores.len()), (&score.name(), &items.scores, 3));
        assert!(items.asked.len() == 64 && items.parts.is_empty(), "{items:?}");
    }
    assert_eq!(items.len(), scores.len());
    let again = load();
    assert_eq!(again.item_scores(&ask(&again), &sitting), items, "the same documents");
    write(["w2 w3", "w17 w4 w31", "w8"]);
    let other = load();
    assert_ne!(other.item_scores(&ask(&other), &sitting)[0].asked, items[0].asked, "another document");
}

/// One text has no other texts beside it: what is told of it is each window in which it was read.
#[test]
fn a_single_text_is_told_of_window_by_window() {
    let speaker = Speaker::new();
    let file = speaker.dir.path().join("book.txt");
    let ask = |words: usize| {
        let text: Vec<_> = (0..words).map(|word| format!("w{}", 2 + word * word % 31)).collect();
        std::fs::write(&file, text.join(" ")).unwrap();
        let evaluations = Evaluations {
            tasks: vec![json!("perplexity")],
            task_data: [("perplexity".to_owned(), file.display().to_string())].into(),
            ..Evaluations::default()
        };
        let of_hub = &mut |task: &Task| panic!("{} has a document", task.task);
        let exam = Exam::load::<EvalError>(&evaluations, of_hub).unwrap();
        let mut sitting = Sitting::default();
        assert!(exam.ask(speaker.model(), &mut sitting, 4096).unwrap());
        (exam.scores(&sitting, &sitting), exam.item_scores(&sitting, &sitting), text.join(" ").len())
    };
    // The model reads 64 tokens, each a word.
    let (scores, items, bytes) = ask(150);
    assert_eq!((scores.len(), items.len()), (3, 3));
    for (score, items) in scores.iter().zip(&items) {
        let texts = items.texts.as_ref().unwrap();
        assert_eq!((score.documents, &texts.base), (1, &texts.log_likelihoods), "{}", score.name());
        let weight = texts.weights.iter().sum::<u32>();
        if score.metric == "word_perplexity" {
            assert_eq!(texts.weights, [64, 64, 22]);
        } else {
            assert_eq!((texts.weights.len(), weight as usize), (3, bytes));
        }
        let mean = texts.log_likelihoods.iter().copied().map(f64::from).sum::<f64>() / f64::from(weight);
        let value = if score.metric == "bits_per_byte" { -mean / 2f64.ln() } else { (-mean).exp() };
        assert!((value / score.value - 1.0).abs() < 1e-4, "{}: {value}, not {}", score.name(), score.value);
    }
    // What was read at once has no parts that differ.
    let (scores, items, _) = ask(40);
    assert_eq!((scores.len(), items.len()), (3, 0));
}
