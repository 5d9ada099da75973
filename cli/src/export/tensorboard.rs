//! A sweep as TensorBoard's event files: a run a trial with its metrics by step and its configuration as text, and what
//! the HParams page needs to compare them.
//!
//! TensorBoard's numbers are float32.

mod events;
mod messages;
mod run;

use super::mirror::{Curve, Mirror, Picture};
use super::place;
use crate::Failure;
use domain::Timestamp;
use domain::metric;
use domain::sweep::{Distribution, SweepSpec};
use domain::trial::Trial;
use events::Events;
use messages::{
    Content, DataType, Event, Experiment, HParamInfo, HParams, HParamsPluginData, Metadata, MetricInfo,
    MetricName, PluginData, Summary, SummaryValue, Tensor, TensorShape, What,
};
use prost::Message;
use run::Run;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The plugin's name.
const HPARAMS: &str = "hparams";
/// `DataClass`.
const TENSOR: i32 = 2;
/// `DataType` of tensors.
const DT_FLOAT: i32 = 1;

/// Metrics that the HParams page compares trials by, behind the sweep's own.
const COMPARED: &[&str] = &[
    metric::EVAL_LOSS,
    metric::LOSS,
    metric::PEAK_MEMORY_BYTES,
    metric::SAMPLES_PER_SECOND,
    metric::TOKENS_PER_SECOND,
    metric::COST_USD,
];

/// A sweep's log directory.
pub(super) struct Log {
    dir: PathBuf,
    /// What the HParams page compares, as it was written.
    experiment: Option<Experiment>,
    types: BTreeMap<String, DataType>,
    /// Runs of trials that are not over, by number.
    runs: BTreeMap<u32, Run>,
}

impl Log {
    /// The log in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// It holds something else than this sweep.
    pub(super) fn open(dir: &Path, sweep: &str) -> Result<Self, Failure> {
        let mut log =
            Self { dir: dir.into(), experiment: None, types: BTreeMap::new(), runs: BTreeMap::new() };
        if place::refuse_full(dir, false).is_ok() {
            return Ok(log);
        }
        events::read_own(dir, |event| {
            if let Some(HParams::Experiment(experiment)) = hparams_of(&event) {
                log.experiment = Some(experiment);
            }
        })?;
        match &log.experiment {
            Some(experiment) if experiment.name == sweep => Ok(log),
            _ => Err(Failure::invalid(format!(
                "--to {}: is not empty, and no log of {sweep}; name another directory",
                dir.display()
            ))),
        }
    }
}

impl Mirror for Log {
    async fn sweep(&mut self, picture: &Picture<'_>) -> Result<(), Failure> {
        self.types = parameter_types(picture.spec, picture.trials);
        let Some(first) = picture.trials.first() else { return Ok(()) };
        let id = picture.document["id"].as_str().unwrap_or_default();
        let experiment = experiment(id, picture.spec, &self.types, first.created_at);
        if self.experiment.as_ref() == Some(&experiment) {
            return Ok(());
        }
        let since = experiment.time_created_secs;
        let mut file = Events::create(&self.dir, since)?;
        file.push(&hparams("experiment", first.created_at, HParams::Experiment(experiment.clone())))?;
        file.close()?;
        self.experiment = Some(experiment);
        Ok(())
    }

    async fn trial(&mut self, _: &Picture<'_>, trial: &Trial, curve: Curve<'_>) -> Result<(), Failure> {
        if !super::has_begun(trial) {
            return Ok(());
        }
        let number = trial.id.number().unwrap_or_default();
        let (dir, since) = (self.dir.join(format!("trial-{number}")), trial.created_at.as_secs_f64());
        let (mut run, mut file) = match self.runs.remove(&number) {
            Some(run) => (run, Events::append(&dir, since)?),
            None => {
                let mut run = Run::default();
                let file = Events::open(&dir, since, |event| run.take(&event))?;
                (run, file)
            }
        };
        for event in run.lacking(trial, &self.types, curve)? {
            file.push(&event)?;
            run.take(&event);
        }
        file.close()?;
        if !trial.state.is_terminal() {
            self.runs.insert(number, run);
        }
        Ok(())
    }
}

fn event(time: Timestamp, step: u64, value: Vec<SummaryValue>) -> Event {
    Event {
        wall_time: time.as_secs_f64(),
        step: i64::try_from(step).unwrap_or(i64::MAX),
        what: Some(What::Summary(Summary { value })),
    }
}

fn meaning(name: &str) -> String {
    match metric::definition(name) {
        Some(metric) if metric.unit != "1" => format!("{} Unit: {}.", metric.meaning, metric.unit),
        Some(metric) => metric.meaning.into(),
        None => String::new(),
    }
}

/// What the HParams plugin reads, in the form that it wants: the metadata of a value that says nothing.
fn hparams(what: &str, time: Timestamp, data: HParams) -> Event {
    let content = HParamsPluginData { data: Some(data) }.encode_to_vec();
    let metadata = Metadata {
        plugin_data: Some(PluginData { plugin_name: HPARAMS.into(), content }),
        summary_description: String::new(),
        data_class: TENSOR,
    };
    let nothing = Tensor {
        dtype: DT_FLOAT,
        tensor_shape: Some(TensorShape::default()),
        float_val: vec![0.0],
        ..Tensor::default()
    };
    let value = SummaryValue {
        tag: format!("_hparams_/{what}"),
        metadata: Some(metadata),
        content: Some(Content::Tensor(nothing)),
    };
    event(time, 0, vec![value])
}

/// What an event tells the HParams plugin, if it is one for that.
fn hparams_of(event: &Event) -> Option<HParams> {
    let Some(What::Summary(summary)) = &event.what else { return None };
    let plugin = summary.value.first()?.metadata.as_ref()?.plugin_data.as_ref()?;
    let for_it = plugin.plugin_name == HPARAMS;
    HParamsPluginData::decode(plugin.content.as_slice()).ok().filter(|_| for_it)?.data
}

/// Which parameters are compared, and by which metrics.
fn experiment(
    id: &str,
    spec: &SweepSpec,
    types: &BTreeMap<String, DataType>,
    created: Timestamp,
) -> Experiment {
    let own = [spec.search.metric.as_str()];
    let others = COMPARED.iter().copied().filter(|name| *name != spec.search.metric);
    let metric =
        |name: &str| MetricInfo { name: Some(MetricName { tag: name.into() }), description: meaning(name) };
    Experiment {
        name: id.into(),
        description: format!("LoraFleet sweep {}", spec.name),
        time_created_secs: created.as_secs_f64(),
        hparam_infos: types
            .iter()
            .map(|(name, r#type)| HParamInfo { name: name.clone(), r#type: (*r#type).into() })
            .collect(),
        metric_infos: own.into_iter().chain(others).map(metric).collect(),
    }
}

/// The parameters that the search chooses, each with the type that all its values have.
fn parameter_types(spec: &SweepSpec, trials: &[&Trial]) -> BTreeMap<String, DataType> {
    let mut types = BTreeMap::new();
    let mut add = |name: &str, of: DataType| {
        let known = types.entry(name.to_string()).or_insert(of);
        if *known != of {
            *known = DataType::String;
        }
    };
    for (name, distribution) in &spec.parameters {
        types_of(distribution, &mut |of| add(name, of));
    }
    // A space that was changed may have had others.
    for (name, value) in trials.iter().flat_map(|trial| &trial.parameters) {
        add(name, type_of(value));
    }
    types
}

fn types_of(distribution: &Distribution, add: &mut dyn FnMut(DataType)) {
    match distribution {
        Distribution::Constant(value) => add(type_of(value)),
        Distribution::Choices(choices) => choices.iter().map(type_of).for_each(add),
        Distribution::Uniform { .. } | Distribution::LogUniform { .. } | Distribution::Integer { .. } => {
            add(DataType::Float64);
        }
        Distribution::When { then, otherwise, .. } => {
            types_of(then, add);
            if let Some(otherwise) = otherwise {
                types_of(otherwise, add);
            }
        }
    }
}

fn type_of(value: &Value) -> DataType {
    match value {
        Value::Bool(_) => DataType::Bool,
        Value::Number(_) => DataType::Float64,
        _ => DataType::String,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::mirror::Curve;
    use super::super::tests::{points, spec, sweep, trials};
    use super::events::tests::events_in;
    use super::*;
    use domain::trial::TrialState;

    #[test]
    fn an_experiment_names_what_is_compared() {
        let trials = trials();
        let types = parameter_types(&spec(), &trials.iter().collect::<Vec<_>>());
        assert_eq!(types, parameter_types(&spec(), &[]), "they are known before there is a trial");
        for (name, want) in [
            ("learning_rate", DataType::Float64),
            ("batch_size", DataType::Float64),
            ("max_sequence_length", DataType::Float64),
            ("precision_mode", DataType::String),
            ("target_modules", DataType::String),
        ] {
            assert_eq!(types[name], want, "{name}");
        }
        let experiment = experiment("tiny-1", &spec(), &types, Timestamp(1_000_000));
        assert_eq!((experiment.name.as_str(), experiment.hparam_infos.len()), ("tiny-1", types.len()));
        let tags: Vec<_> = experiment.metric_infos.iter().map(|m| m.name.clone().unwrap().tag).collect();
        assert_eq!(tags[..2], ["eval/loss", "loss"]);
        assert_eq!(tags.len(), COMPARED.len());
    }

    /// A log that is written in two sittings is the one that is written in one.
    #[tokio::test]
    async fn a_log_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (sweep, spec, trials, points) = (sweep(), spec(), trials(), points());
        let mut queued = trials[0].clone();
        (queued.state, queued.started_at, queued.finished_at) = (TrialState::Queued, None, None);
        let mut running = trials[0].clone();
        (running.state, running.finished_at) = (TrialState::Running, None);
        let write = async |to: &str, told: &[(&Trial, usize)]| {
            let mut log = Log::open(&dir.path().join(to), "tiny-1").unwrap();
            for (trial, upto) in told {
                let picture = Picture { document: &sweep, spec: &spec, trials: &[*trial] };
                log.sweep(&picture).await.unwrap();
                let curve = Curve { from: 0, points: &points[..*upto] };
                log.trial(&picture, trial, curve).await.unwrap();
            }
        };
        write("one", &[(&trials[0], 4)]).await;
        write("two", &[(&queued, 0)]).await;
        assert!(!dir.path().join("two/trial-1").exists(), "it has not begun");
        write("two", &[(&running, 1), (&running, 2)]).await;
        write("two", &[(&running, 2), (&running, 3), (&trials[0], 4)]).await;
        write("two", &[(&trials[0], 4)]).await;
        for run in ["", "trial-1"] {
            let of = |log: &str| events_in(&dir.path().join(log).join(run));
            assert_eq!(format!("{:?}", of("two")), format!("{:?}", of("one")), "{run:?}");
        }
        // Another sweep's, and what is none.
        std::fs::create_dir(dir.path().join("other")).unwrap();
        std::fs::write(dir.path().join("other/file"), "x").unwrap();
        for (to, sweep) in [("one", "tiny-2"), ("other", "tiny-1")] {
            let refusal = Log::open(&dir.path().join(to), sweep).err().unwrap();
            assert!(refusal.message().contains("no log of"), "{refusal:?}");
        }
    }
}
