//! A task as data: where its documents lie, how one becomes a prompt with choices, what is counted. The keys are the
//! harness's where it has them.

mod check;

use crate::filter::{Filter, Judge};
use crate::generate::GenerationKwargs;
use crate::metric::{Counted, Measure};
use crate::{EvalError, Result};
use config::tasks;
use domain::metric::{self, MEAN};
use domain::trial::ItemScores;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What a model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputType {
    /// Which of some continuations is the likeliest.
    #[default]
    MultipleChoice,
    /// How likely whole texts are, window by window.
    LoglikelihoodRolling,
    /// To go on until it comes to an end by itself or writes what ends an answer.
    GenerateUntil,
}

/// How the examples of a prompt are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Drawn anew for each document, from one stream of random numbers.
    #[default]
    Default,
    /// The first ones, the same for every document.
    FirstN,
}

/// Where the examples of a prompt come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FewshotConfig {
    /// How they are chosen.
    pub sampler: Sampler,
    /// The examples themselves, in the form of the task's documents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<Vec<Map<String, Value>>>,
}

/// A task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Its name.
    pub task: String,
    /// The data set's name on the hub.
    #[serde(default)]
    pub dataset_path: Option<String>,
    /// The part of the data set: a folder of it.
    #[serde(default)]
    pub dataset_name: Option<String>,
    /// The split to learn from: where examples come from if `fewshot_split` does not say.
    #[serde(default)]
    pub training_split: Option<String>,
    /// The split whose documents are asked if there is no `test_split`.
    #[serde(default)]
    pub validation_split: Option<String>,
    /// The split whose documents are asked.
    #[serde(default)]
    pub test_split: Option<String>,
    /// The split that examples come from.
    #[serde(default)]
    pub fewshot_split: Option<String>,
    /// Examples before each document unless asked for otherwise; 0 is not to be changed.
    #[serde(default)]
    pub num_fewshot: Option<usize>,
    /// More about the examples.
    #[serde(default)]
    pub fewshot_config: FewshotConfig,
    /// A template: what stands before all else.
    #[serde(default)]
    pub description: String,
    /// Expressions over a document's own fields; their values stand in for fields of these names.
    #[serde(default)]
    pub document: BTreeMap<String, String>,
    /// A template: the question.
    #[serde(default)]
    pub doc_to_text: String,
    /// The place of the right choice, or a template of it or of the choice itself. Of rolling tasks, the text. Of generated
    /// answers without choices, the right one or a list of them.
    #[serde(default)]
    pub doc_to_target: Value,
    /// The choices, or an expression that has a list of them.
    #[serde(default)]
    pub doc_to_choice: Value,
    /// An expression that has a 1 for each true choice and a 0 for the others: then `acc` is the true choices' share of
    /// the probability.
    #[serde(default)]
    pub doc_to_labels: Option<String>,
    /// Stands between a question and its answer.
    #[serde(default = "blank")]
    pub target_delimiter: String,
    /// Stands behind each example.
    #[serde(default = "blank_line")]
    pub fewshot_delimiter: String,
    /// What is asked.
    #[serde(default)]
    pub output_type: OutputType,
    /// How answers are generated, and where they end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub generation_kwargs: GenerationKwargs,
    /// What generated answers go through before they are counted: after each filter once, as they are if there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filter_list: Vec<Filter>,
    /// What is counted.
    pub metrics: Vec<Counted>,
    /// Changes when the task's numbers do.
    #[serde(default)]
    pub version: f64,
}

fn is_default(kwargs: &GenerationKwargs) -> bool {
    *kwargs == GenerationKwargs::default()
}

fn blank() -> String {
    " ".into()
}

fn blank_line() -> String {
    "\n\n".into()
}

/// A task that was chosen, with the number of examples if that goes with the choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// The task.
    pub task: Task,
    /// Examples before each document, pinned by a preset.
    pub num_fewshot: Option<usize>,
}

/// Several tasks of which one metric each makes a mean: the harness's group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// Its name.
    pub preset: String,
    /// Whether a task counts in the mean by its documents, else as much as every other.
    #[serde(default)]
    pub weight_by_size: bool,
    /// Its tasks.
    pub tasks: Vec<PresetTask>,
}

impl Preset {
    /// The name of its mean: `eval/open-llm-leaderboard-v1/mean`.
    pub fn metric(&self) -> String {
        metric::of_task(&self.preset, MEAN)
    }

    /// Of its mean: it has no documents of its own, and names the metrics of its tasks. `None` of one by size: who pairs
    /// documents takes the tasks for equals.
    pub fn item_scores(&self) -> Option<ItemScores> {
        let part = |task: &PresetTask| metric::of_task(&task.task, &task.metric.to_string());
        let parts = self.tasks.iter().map(part).collect();
        (!self.weight_by_size).then(|| ItemScores { metric: self.metric(), parts, ..ItemScores::default() })
    }

    /// The mean of its tasks' values; of each its value, and how many documents that is of.
    pub(crate) fn mean(&self, of: &[(f64, u64)]) -> f64 {
        let weight = |documents: u64| if self.weight_by_size { documents as f64 } else { 1.0 };
        let sum: f64 = of.iter().map(|(value, documents)| value * weight(*documents)).sum();
        sum / of.iter().map(|(_, documents)| weight(*documents)).sum::<f64>()
    }

    /// The standard error of that mean; of each task its own, and how many documents that is of. By size it is pooled, as the
    /// harness does it: that of all documents as if each task had the same variance. `None` where nothing can be said.
    pub(crate) fn stderr(&self, of: &[(f64, u64)]) -> Option<f64> {
        let stderr = if self.weight_by_size {
            let size = |documents: u64| documents as f64;
            let all: f64 = of.iter().map(|(_, documents)| size(*documents)).sum();
            let squares = of.iter().map(|(e, documents)| (size(*documents) - 1.0) * e * e * size(*documents));
            (squares.sum::<f64>() / (all - of.len() as f64) / all).sqrt()
        } else {
            // They have no documents in common: the variance of a sum is the sum of the variances.
            of.iter().map(|(stderr, _)| stderr * stderr).sum::<f64>().sqrt() / of.len() as f64
        };
        Some(stderr).filter(|stderr| stderr.is_finite())
    }
}

/// A task of a preset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PresetTask {
    /// The task's name.
    pub task: String,
    /// Examples before each document; left out, as whoever asks says.
    #[serde(default)]
    pub num_fewshot: Option<usize>,
    /// What goes into the mean.
    pub metric: Measure,
}

/// What was chosen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    /// The tasks, in order, each once.
    pub tasks: Vec<Chosen>,
    /// The presets that they come from.
    pub presets: Vec<Preset>,
}

/// Finds tasks and presets: by the names of those that ship, or files by their paths (`.yaml`, or with a `/`).
///
/// # Errors
/// There is no such task; a file cannot be read or says what cannot be.
pub fn select(names: &[String]) -> Result<Selection> {
    let mut selection = Selection::default();
    for name in names {
        let (place, value) = document(name, Files::Read)?;
        selection.take(&place, value, Files::Read)?;
    }
    Ok(selection)
}

/// Finds the tasks and presets of a sweep: by the names of those that ship, or as what their files say. No file is read:
/// whoever wrote the sweep is not on this machine.
///
/// # Errors
/// There is no such task, it says what cannot be, or asks for too much.
pub fn of_sweep(tasks: &[Value]) -> Result<Selection> {
    let mut selection = Selection::default();
    for task in tasks {
        let (place, value) = match task {
            Value::String(name) => document(name, Files::Refuse)?,
            definition => {
                let name = ["task", "preset"].iter().find_map(|key| definition.get(*key)?.as_str());
                (name.unwrap_or("a task").to_owned(), definition.clone())
            }
        };
        selection.take(&place, value, Files::Refuse)?;
    }
    selection.tasks.iter().try_for_each(|chosen| check::of_sweep(&chosen.task))?;
    Ok(selection)
}

/// Whether files may be named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Read,
    Refuse,
}

impl Selection {
    fn take(&mut self, place: &str, value: Value, files: Files) -> Result<()> {
        if value.get("preset").is_none() {
            return self.add(parse(place, value, files)?, None);
        }
        let preset: Preset = typed(place, value)?;
        if preset.tasks.is_empty() {
            return Err(EvalError::task(place, "has no tasks", "name some in tasks"));
        }
        for entry in &preset.tasks {
            let (place, value) = document(&entry.task, files)?;
            let task = parse(&place, value, files)?;
            let rolling = entry.metric.metric.output_type() == OutputType::LoglikelihoodRolling;
            if rolling || !task.measures().contains(&entry.metric) {
                let problem = format!(
                    "makes a mean of {} of {}, which is no accuracy that it counts",
                    entry.metric, entry.task
                );
                return Err(EvalError::task(&preset.preset, problem, "name one of the metrics of that task"));
            }
            self.add(task, entry.num_fewshot)?;
        }
        self.presets.push(preset);
        Ok(())
    }

    /// The metrics of its tasks, and the means of its presets, as a sweep calls them.
    pub fn metrics(&self) -> Vec<String> {
        let of_task = |chosen: &Chosen| {
            let task = chosen.task.task.clone();
            let measures = chosen.task.measures().into_iter();
            measures.map(move |m| metric::of_task(&task, &m.to_string()))
        };
        self.tasks.iter().flat_map(of_task).chain(self.presets.iter().map(Preset::metric)).collect()
    }

    fn add(&mut self, task: Task, num_fewshot: Option<usize>) -> Result<()> {
        match self.tasks.iter().find(|chosen| chosen.task.task == task.task) {
            Some(same) if same.num_fewshot == num_fewshot => {}
            Some(_) => {
                let problem = "is asked for twice, with other numbers of examples";
                return Err(EvalError::task(task.task, problem, "run the two one after the other"));
            }
            None => self.tasks.push(Chosen { task, num_fewshot }),
        }
        Ok(())
    }
}

impl Task {
    /// The names of its filters; no name of what is counted as it is.
    pub(crate) fn filter_names(&self) -> Vec<Option<&str>> {
        match self.filter_list.is_empty() {
            true => vec![None],
            false => self.filter_list.iter().map(|filter| Some(filter.name.as_str())).collect(),
        }
    }

    /// What is counted of it: each metric behind each filter.
    pub fn measures(&self) -> Vec<Measure> {
        let names = self.filter_names().into_iter();
        names
            .flat_map(|name| self.metrics.iter().map(move |counted| Measure::new(counted.metric, name)))
            .collect()
    }

    /// The judge of its answers.
    pub(crate) fn judge(&self) -> Result<Judge> {
        Judge::new(self)
            .map_err(|problem| EvalError::task(&self.task, problem, "write it as Python's re does"))
    }

    /// Whether its data set is that of a task that ships: only of these a sweep may have a machine download documents.
    pub fn asks_shipped_data(&self) -> bool {
        let Some(path) = &self.dataset_path else { return false };
        let shipped = tasks::SHIPPED.iter().filter_map(|(_, text)| tasks::read(text).ok());
        shipped.into_iter().any(|task| task.get("dataset_path").and_then(Value::as_str) == Some(path))
    }
}

/// The task of a name or file.
///
/// # Errors
/// Those of [`select`].
pub fn find(name: &str) -> Result<Task> {
    let (place, value) = document(name, Files::Read)?;
    parse(&place, value, Files::Read)
}

fn parse(place: &str, mut value: Value, files: Files) -> Result<Task> {
    // Above one another: a file's own keys over those of the file it includes.
    let mut depth = 0;
    while let Some(included) = value.as_object_mut().and_then(|keys| keys.remove("include")) {
        let wrong = |problem: &str| EvalError::task(place, problem, "include the name of a task that ships");
        let included = included.as_str().ok_or_else(|| wrong("include is no name"))?;
        depth += 1;
        if depth > 8 {
            return Err(wrong("includes itself"));
        }
        let (_, mut below) = document(included, files)?;
        if let (Some(below), Value::Object(own)) = (below.as_object_mut(), value) {
            below.extend(own.into_iter().filter(|(key, _)| key != "include"));
        }
        value = below;
    }
    let task: Task = typed(place, value)?;
    check::check(place, &task)?;
    Ok(task)
}

fn typed<T: serde::de::DeserializeOwned>(place: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| {
        EvalError::task(place, error.to_string(), "docs/evaluation.md has the keys of a task file")
    })
}

/// A task file's place in words, and what it says.
fn document(name: &str, files: Files) -> Result<(String, Value)> {
    if tasks::is_file(name) {
        if files == Files::Refuse {
            return Err(EvalError::task(
                name,
                "is a file",
                "name a task that ships, or say what the file says",
            ));
        }
        let path = Path::new(name);
        let text = std::fs::read_to_string(path)
            .map_err(|source| EvalError::Io { path: path.to_owned(), source })?;
        return read(name, &text);
    }
    let of_subjects = |text: &str| text.contains("{subject}");
    for (shipped, text) in tasks::SHIPPED {
        if !of_subjects(text) {
            if *shipped == name {
                return read(name, text);
            }
            continue;
        }
        // One file for the many subjects of a data set, and for all of them.
        let Some(rest) = name.strip_prefix(shipped) else { continue };
        let (place, mut value) = read(name, &text.replace("{subject}", rest.trim_start_matches('_')))?;
        let subjects = value.as_object_mut().and_then(|keys| keys.remove("subjects")).unwrap_or_default();
        let subjects: Vec<String> = typed(&place, subjects)?;
        if rest.is_empty() {
            return Ok((place, group(shipped, &subjects, &value["metrics"][0])));
        }
        if subjects.iter().any(|subject| rest.strip_prefix('_') == Some(subject)) {
            return Ok((place, value));
        }
        let remedy = format!("there are {shipped} and, by its subjects, {}", subjects.join(", "));
        return Err(EvalError::task(name, "is no task", remedy));
    }
    let known = tasks::SHIPPED.iter().flat_map(|(shipped, text)| {
        let subject = of_subjects(text).then(|| format!("{shipped}_SUBJECT"));
        std::iter::once((*shipped).to_owned()).chain(subject)
    });
    let remedy = format!("there are {}, and files by their paths", known.collect::<Vec<_>>().join(", "));
    Err(EvalError::task(name, "is no task", remedy))
}

/// The preset of all subjects of a data set, each as large as it is.
fn group(name: &str, subjects: &[String], metric: &Value) -> Value {
    let task = |subject: &String| json!({ "task": format!("{name}_{subject}"), "metric": metric });
    let tasks: Vec<_> = subjects.iter().map(task).collect();
    json!({ "preset": name, "weight_by_size": true, "tasks": tasks })
}

fn read(place: &str, text: &str) -> Result<(String, Value)> {
    let value = tasks::read(text).map_err(|problem| {
        let (at, why) = problem.split_once(": ").unwrap_or(("", &problem));
        EvalError::task(format!("{place}:{at}"), why, "docs/evaluation.md shows a task file")
    })?;
    Ok((place.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_file_is_a_task_or_a_preset() {
        for (name, _) in tasks::SHIPPED {
            let selection = select(&[(*name).to_owned()]).unwrap();
            assert!(!selection.tasks.is_empty());
            if selection.presets.is_empty() {
                assert_eq!(selection.tasks[0].task.task, *name);
            }
        }
        let preset = select(&["open-llm-leaderboard-v1".into(), "arc_easy".into()]).unwrap();
        let shots: Vec<_> = preset.tasks.iter().map(|c| (c.task.task.as_str(), c.num_fewshot)).collect();
        assert_eq!(
            shots,
            [
                ("arc_challenge", Some(25)),
                ("hellaswag", Some(10)),
                ("truthfulqa_mc2", Some(0)),
                ("arc_easy", None)
            ]
        );
        let mmlu = find("mmlu_world_religions").unwrap();
        assert_eq!(mmlu.dataset_name.as_deref(), Some("world_religions"));
        assert_eq!(
            (mmlu.fewshot_config.sampler, mmlu.fewshot_split.as_deref()),
            (Sampler::FirstN, Some("dev"))
        );
    }

    #[test]
    fn all_subjects_are_a_group() {
        let whole = select(&["mmlu".into()]).unwrap();
        assert_eq!((whole.tasks.len(), whole.presets.len()), (57, 1));
        let [first, last] = [&whole.tasks[0], &whole.tasks[56]];
        assert_eq!([&first.task.task, &last.task.task], ["mmlu_abstract_algebra", "mmlu_world_religions"]);
        assert_eq!((first.num_fewshot, &first.task), (None, &find("mmlu_abstract_algebra").unwrap()));
        assert_eq!(whole.metrics().last().unwrap(), "eval/mmlu/mean");
        // A subject beside the group is asked once.
        let both = select(&["mmlu_anatomy".into(), "mmlu".into()]).unwrap();
        assert_eq!((both.tasks.len(), both.tasks[0].task.task.as_str()), (57, "mmlu_anatomy"));
        for name in ["mmlu_anatom", "mmlu_", "mmluanatomy", "mmlu__anatomy"] {
            let error = find(name).unwrap_err().to_string();
            assert!(
                error.contains("is no task; there are mmlu and, by its subjects, abstract_algebra, "),
                "{error}"
            );
        }
    }

    /// The figures are those of lm-evaluation-harness 0.4.13: `aggregate_subtask_metrics`, `pooled_sample_stderr` and
    /// `unweighted_mean_stderr` of `lm_eval.api.metrics`.
    #[test]
    fn means_as_the_harness_has_them() {
        let preset = |weight_by_size| Preset { preset: "p".into(), weight_by_size, tasks: Vec::new() };
        let (values, errors) = ([(0.2, 5), (0.9, 100), (0.5, 30)], [(0.2, 5), (0.03, 100), (0.09, 30)]);
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got} {want}");
        close(preset(true).mean(&values), 0.7851851851851852);
        close(preset(true).stderr(&errors).unwrap(), 0.030665092918190497);
        close(preset(false).mean(&values), 0.5333333333333333);
        close(preset(false).stderr(&errors).unwrap(), 0.07378647873726218);
        assert_eq!(preset(true).stderr(&[(0.1, 1), (0.1, 1)]), None);
    }

    #[test]
    fn what_a_file_may_say() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.yaml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            find(path.to_str().unwrap()).map_err(|error| error.to_string())
        };
        let task = read("include: arc_challenge\ntask: mine\nnum_fewshot: 2").unwrap();
        assert_eq!((task.task.as_str(), task.num_fewshot), ("mine", Some(2)));
        assert_eq!(task.dataset_name.as_deref(), Some("ARC-Challenge"));
        assert_eq!(task.metrics.len(), 2);
        for (text, want) in [
            ("task: [", "mine.yaml:2:1: "),
            ("task: x\nmetrics: [acc]\nbogus: 1", "unknown field `bogus`"),
            ("task: x\nmetrics: [f1]", "unknown variant `f1`"),
            ("task: x\nmetrics: [acc]", "has no choices"),
            ("task: x\nmetrics: [acc]\ndoc_to_choice: [a]", "has no target"),
            ("include: arc_easy\nmetrics: []", "counts nothing"),
            ("include: arc_easy\nmetrics: [word_perplexity]", "which its output_type does not have"),
            ("include: nowhere", "nowhere: is no task; there are arc_challenge, arc_easy"),
            ("include: gsm8k\nmetrics: [acc]", "counts acc, which its output_type does not have"),
            ("include: gsm8k\nmetrics: [exact_match, exact_match]", "counts exact_match twice"),
            (
                "include: gsm8k\ngeneration_kwargs: { top_k: 5 }",
                "generation_kwargs.top_k is not followed; answers",
            ),
            ("include: gsm8k\nfilter_list: [{ name: a/b, filter: [] }]", "a filter of the name `a/b`"),
            (
                "include: gsm8k\nfilter_list: [{ name: a, filter: [] }, { name: a, filter: [] }]",
                "a filter of the name `a`",
            ),
            (
                "include: gsm8k\nfilter_list: [{ name: a, filter: [{ function: vote }] }]",
                "unknown variant `vote`",
            ),
            (
                "include: gsm8k\nfilter_list: [{ name: a, filter: [{ function: take_first, k: 2 }] }]",
                "unknown field `k`",
            ),
            (
                "include: gsm8k\nfilter_list: [{ name: a, filter: [{ function: regex, regex_pattern: '(' }] }]",
                "is no regular expression",
            ),
            ("include: arc_easy\ngeneration_kwargs: { until: x }", "its answers are not generated"),
            ("include: 3", "include is no name"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
        std::fs::write(&path, format!("include: {}", path.display())).unwrap();
        assert!(find(path.to_str().unwrap()).unwrap_err().to_string().contains("includes itself"));
        assert!(find("gone.yaml").unwrap_err().to_string().starts_with("gone.yaml: "));
    }

    /// What a sweep says is no way to the files of whoever runs it.
    #[test]
    fn a_sweep_names_no_file() {
        let mine = serde_json::json!({ "include": "arc_challenge", "task": "mine" });
        let preset = serde_json::json!({
            "preset": "two", "tasks": [{ "task": "arc_easy", "num_fewshot": 3, "metric": "acc" }],
        });
        let selection = of_sweep(&["hellaswag".into(), mine, preset]).unwrap();
        assert_eq!(
            selection.metrics(),
            [
                "eval/hellaswag/acc",
                "eval/hellaswag/acc_norm",
                "eval/mine/acc",
                "eval/mine/acc_norm",
                "eval/arc_easy/acc",
                "eval/arc_easy/acc_norm",
                "eval/two/mean"
            ]
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret.yaml");
        std::fs::write(&path, "include: arc_easy").unwrap();
        let path = path.to_str().unwrap();
        let preset = serde_json::json!({
            "preset": "x", "tasks": [{ "task": path, "num_fewshot": 0, "metric": "acc" }],
        });
        for task in [path.into(), serde_json::json!({ "include": path, "task": "mine" }), preset] {
            let error = of_sweep(&[task]).unwrap_err().to_string();
            assert!(error.contains("is a file"), "{error}");
        }
    }
}
