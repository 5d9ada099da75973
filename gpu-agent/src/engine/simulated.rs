//! Trains nothing and behaves as a device that does: memory by the footprint model, time by the speed model
//! (`domain::footprint`), losses by a formula. It stands in for the trainer in tests of what is around it at any scale, and
//! for devices that one does not have (`--simulate`). What it produces says so: every digest begins with
//! [`domain::trial::SIMULATED`].
//!
//! - A model is its `config.json`: no weight is read. A data set is [`ROWS`] rows of `max_sequence_length` tokens: no row is
//!   read.
//! - The loss after `n` rows is `F + (5 − F)·exp(−n·q/100)`, where `q = 1 / (1 + log₁₀(learning_rate / 10⁻³)²)` and
//!   `F = 1 + 0.2 / √rank`, 0.01 more with 4-bit weights. A training loss is off by up to 0.2 %, as seed and step draw it; a
//!   held-out loss is not. A learning rate above 1 diverges at step 5; a rank of 0 is refused as the trainer refuses it.
//! - An accuracy is `1/4 + exp(−loss/2)/2`, a perplexity `exp(loss)`: no document is read.
//! - A pack's step takes as long as its trials' steps together. A base is read at [`LOAD_BYTES_PER_SECOND`]. Evaluations and
//!   checkpoints take no time of the device.

mod scores;

use super::pack::{Asking, Backend, Stepped, Write};
use super::{Admission, CheckpointDirs, Event, FourBits, sources};
use domain::footprint::{self, Engine, Load, ModelShape};
use domain::machine::Accelerator;
use domain::metric::{self, MetricPoint};
use domain::sweep::Evaluations;
use domain::trial::{
    BaseModel, Digests, Failure, FailureClass, GradientCheckpointing, PrecisionMode, SIMULATED, TrialConfig,
    TrialSummary,
};
use domain::{Clock, Timestamp, rng};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use trainer::model::ModelConfig;

/// Rows of a simulated data set.
pub const ROWS: u64 = 10_000;
/// Bytes of a base that are read a second.
pub const LOAD_BYTES_PER_SECOND: f64 = 1e9;
/// The learning rate above which a simulated trial diverges.
const DIVERGES_ABOVE: f64 = 1.0;
/// The step at which it does.
const DIVERGES_AT: u64 = 5;
/// The part of a training loss that seed and step draw.
const NOISE: f64 = 0.002;
/// The file of a simulated checkpoint.
const FILE: &str = "simulated.json";
/// The least that is slept at a time: a system sleeps no shorter.
const LEAST_SLEEP: f64 = 1e-3;

/// A backend that follows formulas.
pub struct Simulated {
    pace: Pace,
    /// Dates the points, and tells how long a sleep was.
    clock: Arc<dyn Clock>,
    /// Seconds that passed on the device and not yet here.
    owed: f64,
    /// The device's seconds of loading that no run has taken on itself yet.
    loading: f64,
}

/// What says how long things take.
enum Pace {
    /// Each step of a pack takes so long. Memory has no end, and models have no shape.
    Fixed(Duration),
    /// The models of footprint and speed, where so many seconds pass in one.
    Device(Accelerator, f64),
}

/// A simulated run.
#[derive(Debug)]
pub struct SimulatedRun {
    config: TrialConfig,
    evaluations: Option<Evaluations>,
    step: u64,
    /// Layers that are computed again.
    recomputed: u64,
    /// Steps that were made here, and the device's seconds that they took.
    made: (u64, f64),
    /// The device's seconds that a base was loaded for it.
    loading: f64,
    /// Of the seconds of the steps, those that are its own, not of others in its pack.
    own: f64,
}

/// The shape of a model that trials name, from its `config.json` alone: in a directory, or on the hub.
///
/// # Errors
/// There is none, or it is none that the trainer has.
pub fn shape(model: &str) -> Result<ModelShape, Failure> {
    let dir = sources::configuration(model)?;
    let config = ModelConfig::load(&dir)
        .map_err(|error| Failure { class: FailureClass::User, message: error.to_string() })?;
    Ok(config.shape())
}

impl Simulated {
    /// One whose every step takes `step_time`.
    pub fn stepping(step_time: Duration, clock: Arc<dyn Clock>) -> Self {
        Self { pace: Pace::Fixed(step_time), clock, owed: 0.0, loading: 0.0 }
    }

    /// One that behaves as an accelerator, of whose seconds `speed` pass in one.
    pub fn of(accelerator: Accelerator, speed: f64, clock: Arc<dyn Clock>) -> Self {
        Self { pace: Pace::Device(accelerator, speed), clock, owed: 0.0, loading: 0.0 }
    }

    /// Lets time pass, `seconds` of the device's.
    fn pass(&mut self, seconds: f64) {
        let speed = if let Pace::Device(_, speed) = self.pace { speed } else { 1.0 };
        self.owed += seconds / speed;
        if self.owed >= LEAST_SLEEP {
            let begun = self.clock.monotonic();
            std::thread::sleep(Duration::from_secs_f64(self.owed));
            // What was slept too long is not slept next time.
            self.owed -= self.clock.monotonic().saturating_sub(begun).as_secs_f64();
        }
    }

    /// The device's seconds that a run's step takes.
    fn step_seconds(&self, shape: Option<&ModelShape>, run: &SimulatedRun) -> f64 {
        match (&self.pace, shape) {
            (Pace::Device(accelerator, _), Some(shape)) => {
                let micro_batches = run.config.gradient_accumulation_steps;
                shape.step_seconds(&run.load(shape), run.recomputed, micro_batches, accelerator).total()
            }
            _ => 0.0,
        }
    }
}

/// A clock on which `speed` seconds pass in one; the hour is everybody's.
pub struct Hurried {
    /// The clock by which they pass.
    pub clock: Arc<dyn Clock>,
    /// How many.
    pub speed: f64,
}

impl Clock for Hurried {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn monotonic(&self) -> Duration {
        self.clock.monotonic().mul_f64(self.speed)
    }
}

impl SimulatedRun {
    /// Its parameters.
    pub fn config(&self) -> &TrialConfig {
        &self.config
    }

    fn load(&self, shape: &ModelShape) -> Load {
        shape.load_at_most(&self.config, Engine::Gpu)
    }

    /// The loss without noise.
    fn loss(&self, step: u64) -> f64 {
        let config = &self.config;
        let rate = config.learning_rate;
        if rate > DIVERGES_ABOVE && step >= DIVERGES_AT {
            return f64::NAN;
        }
        let quality = 1.0 / (1.0 + (rate / 1e-3).log10().powi(2));
        let quantised = if config.precision_mode == PrecisionMode::FourBit { 0.01 } else { 0.0 };
        let floor = 1.0 + 0.2 / f64::from(config.lora_rank).sqrt() + quantised;
        let rows = (step * self.rows_per_step()) as f64;
        floor + (5.0 - floor) * (-rows * quality / 100.0).exp()
    }

    fn noise(&self, step: u64) -> f64 {
        1.0 + NOISE * (2.0 * rng::uniform(rng::key(self.config.seed, metric::LOSS), step) - 1.0)
    }

    fn rows_per_step(&self) -> u64 {
        u64::from(self.config.batch_size) * u64::from(self.config.gradient_accumulation_steps)
    }

    fn total_steps(&self) -> u64 {
        self.config.total_steps(ROWS)
    }

    fn due(&self, every: u32) -> bool {
        every > 0 && self.step.is_multiple_of(u64::from(every))
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Failure + '_ {
    move |e| Failure { class: FailureClass::Infrastructure, message: format!("{}: {e}", path.display()) }
}

impl Backend for Simulated {
    type Base = Option<ModelShape>;
    type Run = SimulatedRun;

    fn base_bytes(&mut self, base: &BaseModel) -> Result<Option<u64>, Failure> {
        match self.pace {
            Pace::Fixed(_) => Ok(None),
            Pace::Device(..) => Ok(Some(shape(&base.model)?.base_bytes(base.precision))),
        }
    }

    fn fit(&self, base: &Option<ModelShape>, run: &mut SimulatedRun, memory_bytes: u64) -> Option<u64> {
        let shape = base.as_ref()?;
        let load = run.load(shape);
        if run.config.gradient_checkpointing == GradientCheckpointing::Auto {
            let fewest = shape.recomputed_layers(&load, memory_bytes);
            run.recomputed = fewest.unwrap_or(shape.num_hidden_layers);
        }
        Some(shape.peak_bytes(&load, run.recomputed).own())
    }

    fn spare(&self, _: &Option<ModelShape>, _: &mut SimulatedRun) -> bool {
        false
    }

    fn load(
        &mut self,
        base: &BaseModel,
        _: &Admission,
        _: &mut dyn FnMut(Event),
    ) -> Result<(Option<ModelShape>, Option<FourBits>), Failure> {
        if let Pace::Fixed(_) = self.pace {
            return Ok((None, None));
        }
        let shape = shape(&base.model)?;
        self.loading = shape.base_bytes(base.precision) as f64 / LOAD_BYTES_PER_SECOND;
        self.pass(self.loading);
        Ok((Some(shape), None))
    }

    fn start(&mut self, base: &Option<ModelShape>, admission: &Admission) -> Result<SimulatedRun, Failure> {
        let config = admission.config.clone();
        if config.lora_rank == 0 {
            let message = "lora_rank: is 0; use 1 or more".into();
            return Err(Failure { class: FailureClass::User, message });
        }
        let layers = base.as_ref().map_or(0, |shape| shape.num_hidden_layers);
        let [recomputed, _] = config.gradient_checkpointing.recomputed_layers(layers);
        let evaluations = admission.evaluations.clone();
        let unknown = evaluations.as_ref().and_then(|asked| eval::task::of_sweep(&asked.tasks).err());
        if let Some(error) = unknown {
            return Err(Failure { class: FailureClass::User, message: format!("evaluations: {error}") });
        }
        let run = SimulatedRun {
            config,
            evaluations,
            step: 0,
            recomputed,
            made: (0, 0.0),
            loading: std::mem::take(&mut self.loading),
            own: 0.0,
        };
        let Some(dirs) = &admission.resume else { return Ok(run) };
        let path = dirs.resume.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(io(&path))?;
        let step = text.trim().parse().map_err(|e| io(&path)(std::io::Error::other(e)))?;
        Ok(SimulatedRun { step, ..run })
    }

    fn digests(&self, run: &SimulatedRun) -> Digests {
        let digest = |name: &str| format!("{SIMULATED}{name}");
        Digests {
            base_model: digest(&run.config.pretrained_model_id),
            dataset: digest(&run.config.dataset_name),
            tokenizer: digest(&run.config.pretrained_model_id),
            spec: digest(&run.config.seed.to_string()),
            documents: run.evaluations.as_ref().map(|_| digest("documents")).unwrap_or_default(),
        }
    }

    fn step(&self, run: &SimulatedRun) -> u64 {
        run.step
    }

    fn total_steps(&self, run: &SimulatedRun) -> u64 {
        run.total_steps()
    }

    fn base_eval(&mut self, _: &Option<ModelShape>, run: &mut SimulatedRun) -> Result<Option<f64>, Failure> {
        Ok(Some(run.loss(0)))
    }

    fn step_pack(
        &mut self,
        base: &Option<ModelShape>,
        runs: &mut [&mut SimulatedRun],
    ) -> Result<Vec<Stepped>, Failure> {
        let own: Vec<_> = runs.iter().map(|run| self.step_seconds(base.as_ref(), run)).collect();
        let seconds = match self.pace {
            Pace::Fixed(each) => each.as_secs_f64(),
            Pace::Device(..) => own.iter().sum(),
        };
        self.pass(seconds);
        for (run, own) in runs.iter_mut().zip(own) {
            run.own += own;
        }
        let step = |run: &mut &mut SimulatedRun| {
            if run.loss(run.step + 1).is_nan() {
                let what = format!("loss is NaN at step {}", run.step + 1);
                return Stepped { diverged: Some(what), ..Stepped::default() };
            }
            run.step += 1;
            run.made = (run.made.0 + 1, run.made.1 + seconds);
            let last = run.step == run.total_steps();
            let loss = run.loss(run.step);
            let mut values = vec![
                (metric::LOSS.to_string(), loss * run.noise(run.step)),
                (metric::LEARNING_RATE.to_string(), run.config.learning_rate),
            ];
            let evaluate = last || run.due(run.config.eval_steps);
            if evaluate {
                values.push((metric::EVAL_LOSS.to_string(), loss));
            }
            let point = MetricPoint { step: run.step, time: self.clock.now(), values };
            Stepped {
                point: (evaluate || run.due(run.config.logging_steps)).then_some(point),
                checkpoint_due: run.due(run.config.save_steps),
                evaluation: evaluate.then_some(Duration::ZERO),
                ..Stepped::default()
            }
        };
        Ok(runs.iter_mut().map(step).collect())
    }

    fn save(&mut self, run: &mut SimulatedRun, dirs: CheckpointDirs) -> Result<Write, Failure> {
        let text = run.step.to_string();
        Ok(Box::new(move || {
            for dir in [&dirs.adapter, &dirs.resume] {
                std::fs::create_dir_all(dir).map_err(io(dir))?;
                let path = dir.join(FILE);
                std::fs::write(&path, &text).map_err(io(&path))?;
            }
            Ok(())
        }))
    }

    fn ask(&mut self, _: &Option<ModelShape>, _: &mut SimulatedRun) -> Result<Asking, Failure> {
        Ok(Asking::Nothing)
    }

    fn summary(
        &mut self,
        base: &Option<ModelShape>,
        run: &mut SimulatedRun,
    ) -> Result<TrialSummary, Failure> {
        let (loss, base_loss) = (run.loss(run.step), run.loss(0));
        let mut summary = TrialSummary {
            steps: run.step,
            loss: Some(loss * run.noise(run.step)),
            eval_loss: Some(loss),
            base_eval_loss: Some(base_loss),
            ..TrialSummary::default()
        };
        if let Some(evaluations) = run.evaluations.as_ref().filter(|_| run.step == run.total_steps()) {
            (summary.evaluations, summary.item_scores) = scores::of(evaluations, loss, base_loss);
        }
        let Some(shape) = base else { return Ok(summary) };
        let load = run.load(shape);
        let peak = shape.peak_bytes(&load, run.recomputed).total();
        summary.peak_memory_bytes = Some(peak);
        summary.predicted_peak_memory_bytes = Some(peak);
        summary.recomputed_layers = Some(run.recomputed);
        summary.trainable_parameters = load.trainable_parameters;
        summary.total_parameters = shape.parameters() + load.trainable_parameters;
        let tensors = 14 * shape.num_hidden_layers;
        summary.adapter_bytes =
            footprint::adapter_bytes(load.trainable_parameters + load.initial_parameters, tensors);
        summary.predicted_seconds_per_step = Some(self.step_seconds(Some(shape), run));
        summary.simulated_seconds = Some(run.loading + run.own);
        let (made, seconds) = run.made;
        summary.device_seconds = run.loading + seconds;
        if seconds > 0.0 {
            let rate = |a_step: u64| Some((made * a_step) as f64 / seconds);
            summary.samples_per_second = rate(run.rows_per_step());
            summary.tokens_per_second = rate(footprint::tokens_per_step(&run.config));
        }
        Ok(summary)
    }
}

#[cfg(test)]
mod tests;
