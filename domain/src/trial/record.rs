//! A trial's record: what the coordinator keeps and people see.

use super::{ItemScores, TrialConfig, TrialState};
use crate::fleet::SIMULATED_AGENT;
use crate::machine::PriceSource;
use crate::metric;
use crate::{AgentId, Attempt, DeviceId, Timestamp, TrialId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Whose fault a failure is, and so what happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The spec or the data cannot be trained on; another try would fail likewise.
    User,
    /// The trial does not fit the device's memory.
    OutOfMemory,
    /// The loss became NaN or infinite.
    Diverged,
    /// A process, disk or connection failed; the trial goes on from its last checkpoint.
    Infrastructure,
}

/// Why a trial could not go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose fault it is.
    pub class: FailureClass,
    /// What happened, and what to do about it.
    pub message: String,
}

/// Whether a trial had its device for itself while it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Throughput {
    /// It was alone on the device.
    #[default]
    Solo,
    /// It shared the device with the other trials of its pack.
    Packed,
}

/// What a trial reports at its end; [`crate::metric`] defines each number. `None`: not measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TrialSummary {
    /// Steps made.
    pub steps: u64,
    /// Training loss of the last step.
    pub loss: Option<f64>,
    /// Held-out loss of the adapter at its last evaluation.
    pub eval_loss: Option<f64>,
    /// Held-out loss of the base without an adapter, on the same rows.
    pub base_eval_loss: Option<f64>,
    /// High-water mark of the trial's memory.
    pub peak_memory_bytes: Option<u64>,
    /// High-water mark of the whole pack, if the trial was in one; then `peak_memory_bytes` is attributed.
    pub pack_peak_memory_bytes: Option<u64>,
    /// Resident set size of the process at its highest.
    pub peak_rss_bytes: Option<u64>,
    /// What the footprint model said `peak_memory_bytes` would be.
    pub predicted_peak_memory_bytes: Option<u64>,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter together.
    pub total_parameters: u64,
    /// Size of `adapter_model.safetensors`.
    pub adapter_bytes: u64,
    /// Rows a second.
    pub samples_per_second: Option<f64>,
    /// Unpadded tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Whether the two speeds were measured alone on the device.
    pub throughput: Throughput,
    /// Decoder layers that were computed again in the backward pass. `None` in a record of an earlier version.
    pub recomputed_layers: Option<u64>,
    /// What the speed model said that a step on its largest micro-batches would take, in seconds. `None` where it knows nothing
    /// of the accelerator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_seconds_per_step: Option<f64>,
    /// Seconds of training, evaluation and loading on the device.
    pub device_seconds: f64,
    /// Of a simulated device, those of its seconds that the trial's own steps took by the model in this attempt, with the loading
    /// of a base that was loaded for it: what it costs, whatever the machine that simulates took. `None`: it trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simulated_seconds: Option<f64>,
    /// Rows cut to `max_sequence_length`, of all rows read.
    pub truncated_rows: u64,
    /// Rows that could not be read (with `skip_bad_rows`).
    pub skipped_rows: u64,
    /// Text that the base generates for the sample prompt.
    pub sample_before: Option<String>,
    /// Text that base and adapter generate for the same prompt.
    pub sample_after: Option<String>,
    /// The sample prompt.
    pub sample_prompt: Option<String>,
    /// How texts begin that base and adapter generated for it on the way, in order of their steps, which are below `steps`.
    pub samples: Vec<SampleText>,
    /// What the tasks of its sweep's `evaluations` made of it, if it made all its steps.
    pub evaluations: Vec<TaskScore>,
    /// Why it was not asked, if it made all its steps and should have been.
    pub unasked: Option<String>,
    /// What single documents made of them, on its way to the coordinator, which keeps it beside the adapter and not here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub item_scores: Vec<ItemScores>,
    /// Where the coordinator keeps that, as a path in its object store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items: Option<String>,
}

impl TrialSummary {
    /// Its score under a metric's name (`eval/arc_challenge/acc_norm`).
    pub fn evaluation(&self, name: &str) -> Option<&TaskScore> {
        let (task, metric) = metric::task_and_metric(name)?;
        self.evaluations.iter().find(|score| score.task == task && score.metric == metric)
    }

    /// What is said to the sample prompt, each text with its step: the base's with step 0, those on the way, and that of the end.
    pub fn texts(&self) -> impl Iterator<Item = (u64, &str)> {
        let before = self.sample_before.iter().map(|text| (0, text.as_str()));
        let between = self.samples.iter().map(|sample| (sample.step, sample.text.as_str()));
        let after = self.sample_after.iter().map(|text| (self.steps, text.as_str()));
        before.chain(between).chain(after)
    }
}

/// A text that base and adapter generate for the sample prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleText {
    /// Steps made before it.
    pub step: u64,
    /// The text; the beginning of a long one.
    pub text: String,
}

/// What one metric of a task makes of an adapter, and of the base without it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// The task's name; a preset's for the mean of its tasks.
    pub task: String,
    /// The metric's name: `acc`, `acc_norm`, `word_perplexity`, ….
    pub metric: String,
    /// Its value with the adapter.
    pub value: f64,
    /// The standard error of that.
    pub stderr: Option<f64>,
    /// Its value without.
    pub base_value: Option<f64>,
    /// The standard error of that.
    pub base_stderr: Option<f64>,
    /// The standard error of the difference of the two, which were asked the same documents.
    pub difference_stderr: Option<f64>,
    /// Examples before each document; 0 of a mean.
    pub num_fewshot: u32,
    /// Documents that were asked.
    pub documents: u64,
}

impl TaskScore {
    /// The metric's full name: `eval/arc_challenge/acc_norm`.
    pub fn name(&self) -> String {
        metric::of_task(&self.task, &self.metric)
    }
}

/// What a trial was given to train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialDevice {
    /// `CPU`, `A100-40GB`, ….
    pub accelerator: String,
    /// Bytes that trials may use.
    pub memory_bytes: u64,
    /// US dollars an hour of its own time.
    pub price_per_hour: f64,
    /// Where that price comes from. `None`: whoever started the agent named it, there is none, or in a record of an earlier
    /// version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_from: Option<Box<PriceSource>>,
}

/// Where an attempt of a trial is or was, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialPlacement {
    /// The attempt.
    pub attempt: Attempt,
    /// The agent.
    pub agent: AgentId,
    /// Its device.
    pub device: DeviceId,
    /// When its first training step began, if it came to that.
    pub started_at: Option<Timestamp>,
    /// When it gave the device up.
    pub ended_at: Option<Timestamp>,
}

impl TrialPlacement {
    /// One that was just assigned.
    pub fn new(attempt: Attempt, agent: AgentId, device: DeviceId) -> Self {
        Self { attempt, agent, device, started_at: None, ended_at: None }
    }
}

/// A stretch of time in which a trial trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch<'a> {
    /// The agent.
    pub agent: &'a str,
    /// Its device. `None`: of a record of an earlier version it is not known.
    pub device: Option<&'a DeviceId>,
    /// When its first step began.
    pub from: Timestamp,
    /// When it ended; `None`: it still trains.
    pub to: Option<Timestamp>,
}

/// Digests (`sha256:<hex>`) that say what was trained on what, and what was asked then. A trial goes on only on the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Digests {
    /// Of the base model's configuration and weights.
    pub base_model: String,
    /// Of the files of training and evaluation rows.
    pub dataset: String,
    /// Of the tokenizer's files.
    pub tokenizer: String,
    /// Of the trial's configuration.
    pub spec: String,
    /// Of what its evaluations ask: the prompts, and what is right, whatever files they come from. Empty where nothing is asked,
    /// and of an agent of an earlier version. It says which scores may be compared; whoever goes on with a trial asks anew.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub documents: String,
}

impl Digests {
    /// What a trial that goes on must find again and does not, by its name for people, with this digest of it and the other. Its
    /// configuration comes with it, whatever a version makes of that for a digest.
    pub fn difference<'a>(&'a self, other: &'a Self) -> Option<(&'static str, &'a str, &'a str)> {
        let pairs = [
            ("base model", &self.base_model, &other.base_model),
            ("data set", &self.dataset, &other.dataset),
            ("tokenizer", &self.tokenizer, &other.tokenizer),
        ];
        let differs = |(_, one, other): &(&str, &String, &String)| one != other;
        pairs.into_iter().find(differs).map(|(what, one, other)| (what, one.as_str(), other.as_str()))
    }
}

/// What digests begin with where nothing was trained: see [`Trial::is_simulated`].
pub const SIMULATED: &str = "simulated:";

/// One trial as the coordinator knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its id, `<sweep>/<number>`.
    pub id: TrialId,
    /// Every parameter as it was asked for; [`Trial::config_in_force`] fills in what that leaves open.
    pub config: TrialConfig,
    /// The parameters that the search chose, by name.
    pub parameters: BTreeMap<String, serde_json::Value>,
    /// Where it stands.
    pub state: TrialState,
    /// The number of its current or last assignment; 0 before the first.
    pub attempt: Attempt,
    /// The last step whose metrics are durable.
    pub step: u64,
    /// Steps it will make if nothing ends it; known once an agent has read the data.
    pub total_steps: Option<u64>,
    /// The agent that trains or trained it.
    pub agent: Option<String>,
    /// The agent's device. `None` in a record of an earlier version.
    #[serde(default)]
    pub device: Option<TrialDevice>,
    /// Object-store path of the newest adapter, unless its sweep keeps better ones alone.
    pub adapter: Option<String>,
    /// Object-store path of the newest resume state, and the step it was taken at, while it may go on from one.
    pub resume: Option<(String, u64)>,
    /// Step at which each attempt started, in order: `(attempt, step)`. Of very many [`Trial::assign`] leaves some out.
    pub attempts: Vec<(Attempt, u64)>,
    /// Where each attempt is or was, in order. Without those of earlier versions; of very many, the first and the last.
    #[serde(default)]
    pub placements: Vec<TrialPlacement>,
    /// The last held-out loss reported.
    pub eval_loss: Option<f64>,
    /// What it cost, so far or in all, in US dollars.
    pub cost_usd: Option<f64>,
    /// Numbers at its end.
    pub summary: Option<TrialSummary>,
    /// Why it could not go on.
    pub failure: Option<Failure>,
    /// What it is trained on; known once an agent has read it.
    pub digests: Option<Digests>,
    /// The id of its trace: 32 hexadecimal digits. `None` in a record of an earlier version.
    #[serde(default)]
    pub trace_id: Option<String>,
    /// The trial that it is another run of, with another seed; `None` of one that the search proposed.
    #[serde(default)]
    pub replicate_of: Option<TrialId>,
    /// When it was proposed.
    pub created_at: Timestamp,
    /// When its first training step began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

impl Trial {
    /// A trial that was just proposed: it waits, and nothing has happened to it.
    pub fn new(
        id: TrialId,
        config: TrialConfig,
        parameters: BTreeMap<String, serde_json::Value>,
        created_at: Timestamp,
    ) -> Self {
        Self {
            id,
            config,
            parameters,
            state: TrialState::Queued,
            attempt: Attempt(0),
            step: 0,
            total_steps: None,
            agent: None,
            device: None,
            adapter: None,
            resume: None,
            attempts: Vec::new(),
            placements: Vec::new(),
            eval_loss: None,
            cost_usd: None,
            summary: None,
            failure: None,
            digests: None,
            created_at,
            started_at: None,
            finished_at: None,
            trace_id: None,
            replicate_of: None,
        }
    }

    /// Its current attempt trains.
    pub fn begin(&mut self, now: Timestamp) {
        self.started_at.get_or_insert(now);
        if let Some(newest) = self.placements.last_mut() {
            newest.started_at.get_or_insert(now);
        }
    }

    /// Its current attempt gave its device up, if it had one.
    pub fn leave(&mut self, now: Timestamp) {
        if let Some(newest) = self.placements.last_mut() {
            newest.ended_at.get_or_insert(now);
        }
    }

    /// The agent's device that trains or trained it. `None` before its first attempt, and in a record of an earlier version.
    pub fn device_id(&self) -> Option<&DeviceId> {
        self.placements.last().map(|newest| &newest.device)
    }

    /// When and where its attempts trained, in order. A record of an earlier version knows of one stretch, from its first
    /// step to its end, on the agent that had it last.
    pub fn stretches(&self) -> Vec<Stretch<'_>> {
        if self.placements.is_empty() {
            let from = self.agent.as_deref().zip(self.started_at);
            let whole = |(agent, from)| Stretch { agent, device: None, from, to: self.finished_at };
            return from.map(whole).into_iter().collect();
        }
        let trained = self.placements.iter().filter_map(|placed| {
            let (agent, device) = (placed.agent.as_str(), Some(&placed.device));
            Some(Stretch { agent, device, from: placed.started_at?, to: placed.ended_at })
        });
        trained.collect()
    }

    /// Whether a simulated device made its numbers up, or refused it.
    pub fn is_simulated(&self) -> bool {
        self.kind() == Some(true)
    }

    /// Whether it is one of simulated devices, by what it was trained on or, before it has started, by whom it was given
    /// to; `None` if it was given to nobody yet.
    pub fn kind(&self) -> Option<bool> {
        let by_digests = self.digests.as_ref().map(|digests| digests.base_model.starts_with(SIMULATED));
        by_digests.or_else(|| Some(self.agent.as_ref()?.starts_with(SIMULATED_AGENT)))
    }

    /// The value of a metric that its record knows, which is the last that was measured.
    pub fn recorded(&self, metric: &str) -> Option<f64> {
        let summary = self.summary.as_ref();
        match metric {
            metric::EVAL_LOSS => self.eval_loss.or_else(|| summary?.eval_loss),
            metric::COST_USD => self.cost_usd,
            metric::LOSS => summary?.loss,
            metric::PEAK_MEMORY_BYTES => summary?.peak_memory_bytes.map(|bytes| bytes as f64),
            metric::SAMPLES_PER_SECOND => summary?.samples_per_second,
            metric::TOKENS_PER_SECOND => summary?.tokens_per_second,
            task => summary?.evaluation(task).map(|score| score.value),
        }
    }

    /// Seconds that a step took of it, as measured, of the time in which it trained: its rows by its rows a second.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let speed = self.summary.as_ref()?.samples_per_second.filter(|speed| *speed > 0.0)?;
        let rows = f64::from(self.config.batch_size) * f64::from(self.config.gradient_accumulation_steps);
        Some(rows / speed)
    }

    /// Every parameter with the value in force, as people see it.
    pub fn config_in_force(&self) -> TrialConfig {
        // Epochs come to a number of steps once an agent has counted the rows; otherwise it is known from the start.
        let depends_on_rows = self.config.max_steps.is_none() && self.config.num_train_epochs.is_some();
        let known = (!depends_on_rows).then(|| self.config.total_steps(0));
        self.config.in_force(self.total_steps.or(known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SweepId;

    fn trial() -> Trial {
        let id = TrialId::of(&SweepId::new("s"), 1);
        Trial::new(id, TrialConfig::default(), BTreeMap::new(), Timestamp(0))
    }

    fn placed(attempt: u32, device: &str) -> TrialPlacement {
        TrialPlacement::new(Attempt(attempt), AgentId::new("a"), DeviceId::new(device))
    }

    #[test]
    fn a_trial_that_moved_trained_in_two_places() {
        let mut trial = trial();
        let shown = |trial: &Trial| -> Vec<(String, u64, Option<u64>)> {
            let stretches = trial.stretches().into_iter();
            let device = |stretch: Stretch| stretch.device.map_or(String::new(), DeviceId::to_string);
            stretches.map(|stretch| (device(stretch), stretch.from.0, stretch.to.map(|to| to.0))).collect()
        };
        trial.leave(Timestamp(1));
        assert_eq!((shown(&trial), trial.device_id()), (vec![], None), "nobody had it");
        trial.placements.push(placed(1, "cuda:0"));
        assert_eq!(shown(&trial), [], "it has not begun");
        trial.begin(Timestamp(10));
        trial.begin(Timestamp(11));
        assert_eq!(shown(&trial), [("cuda:0".into(), 10, None)]);
        trial.leave(Timestamp(20));
        trial.leave(Timestamp(25));
        // One that was lost before it began.
        trial.placements.push(placed(2, "cuda:1"));
        trial.leave(Timestamp(30));
        trial.placements.push(placed(3, "cuda:2"));
        trial.begin(Timestamp(40));
        let want = [("cuda:0".into(), 10, Some(20)), ("cuda:2".into(), 40, None)];
        assert_eq!(shown(&trial), want);
        assert_eq!(trial.started_at, Some(Timestamp(10)), "its first step is its first attempt's");
        assert_eq!(trial.device_id(), Some(&DeviceId::new("cuda:2")));
    }

    #[test]
    fn a_record_of_an_earlier_version_knows_its_agent() {
        let record = serde_json::json!({ "agent": "a", "started_at": 10, "finished_at": 20 });
        let mut old = serde_json::to_value(trial()).unwrap();
        let fields = old.as_object_mut().unwrap();
        fields.remove("placements");
        fields.extend(record.as_object().unwrap().clone());
        let trial: Trial = serde_json::from_value(old).unwrap();
        let whole = Stretch { agent: "a", device: None, from: Timestamp(10), to: Some(Timestamp(20)) };
        assert_eq!((trial.stretches(), trial.device_id()), (vec![whole], None));
    }
}
