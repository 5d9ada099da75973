//! Trains nothing: losses follow a formula, checkpoints hold a step number. It stands in for the trainer in
//! tests of what is around it, at any scale, and its records say so: every digest begins with `simulated:`.
//!
//! The loss after `s` steps is `1 + 4·exp(−s·q/50)` with `q = 1 / (1 + log₁₀(learning_rate / 10⁻³)²)`; a
//! learning rate above 1 diverges at step 5; a rank of 0 is refused as the trainer refuses it.

use super::pack::{Backend, Stepped};
use super::{Admission, CheckpointDirs};
use domain::Clock;
use domain::metric::{self, MetricPoint};
use domain::trial::{BaseModel, Digests, Failure, FailureClass, TrialConfig, TrialSummary};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The learning rate above which a simulated trial diverges.
const DIVERGES_ABOVE: f64 = 1.0;
/// The step at which it does.
const DIVERGES_AT: u64 = 5;
/// The file of a simulated checkpoint.
const FILE: &str = "simulated.json";

/// A backend that follows a formula.
pub struct Simulated {
    /// How long each step of a pack takes.
    pub step_time: Duration,
    /// Dates the points.
    pub clock: Arc<dyn Clock>,
}

/// A simulated run.
#[derive(Debug)]
pub struct SimulatedRun {
    config: TrialConfig,
    step: u64,
}

impl SimulatedRun {
    /// Its parameters.
    pub fn config(&self) -> &TrialConfig {
        &self.config
    }

    fn loss(&self, step: u64) -> f64 {
        let rate = self.config.learning_rate;
        if rate > DIVERGES_ABOVE && step >= DIVERGES_AT {
            return f64::NAN;
        }
        let quality = 1.0 / (1.0 + (rate / 1e-3).log10().powi(2));
        1.0 + 4.0 * (-(step as f64) * quality / 50.0).exp()
    }

    fn total_steps(&self) -> u64 {
        self.config.total_steps(100)
    }

    fn due(&self, every: u32) -> bool {
        every > 0 && self.step.is_multiple_of(u64::from(every))
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Failure + '_ {
    move |e| Failure { class: FailureClass::Infrastructure, message: format!("{}: {e}", path.display()) }
}

impl Backend for Simulated {
    type Base = ();
    type Run = SimulatedRun;

    fn base_bytes(&mut self, _: &BaseModel) -> Result<Option<u64>, Failure> {
        Ok(None)
    }

    fn fit(&self, (): &(), _: &mut SimulatedRun, _: u64) -> Option<u64> {
        None
    }

    fn spare(&self, (): &(), _: &mut SimulatedRun) -> bool {
        false
    }

    fn load(&mut self, _: &BaseModel) -> Result<(), Failure> {
        Ok(())
    }

    fn start(&mut self, (): &(), admission: &Admission) -> Result<SimulatedRun, Failure> {
        let config = admission.config.clone();
        if config.lora_rank == 0 {
            let message = "lora_rank: is 0; use 1 or more".into();
            return Err(Failure { class: FailureClass::User, message });
        }
        let Some(dirs) = &admission.resume else { return Ok(SimulatedRun { config, step: 0 }) };
        let path = dirs.resume.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(io(&path))?;
        let step = text.trim().parse().map_err(|e| io(&path)(std::io::Error::other(e)))?;
        Ok(SimulatedRun { config, step })
    }

    fn digests(&self, run: &SimulatedRun) -> Digests {
        let digest = |name: &str| format!("simulated:{name}");
        Digests {
            base_model: digest(&run.config.pretrained_model_id),
            dataset: digest(&run.config.dataset_name),
            tokenizer: digest(&run.config.pretrained_model_id),
            spec: digest(&run.config.seed.to_string()),
        }
    }

    fn step(&self, run: &SimulatedRun) -> u64 {
        run.step
    }

    fn total_steps(&self, run: &SimulatedRun) -> u64 {
        run.total_steps()
    }

    fn base_eval(&mut self, (): &(), run: &mut SimulatedRun) -> Result<Option<f64>, Failure> {
        Ok(Some(run.loss(0)))
    }

    fn step_pack(&mut self, (): &(), runs: &mut [&mut SimulatedRun]) -> Result<Vec<Stepped>, Failure> {
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time);
        }
        let step = |run: &mut &mut SimulatedRun| {
            if run.loss(run.step + 1).is_nan() {
                let what = format!("loss is NaN at step {}", run.step + 1);
                return Stepped { diverged: Some(what), ..Stepped::default() };
            }
            run.step += 1;
            let last = run.step == run.total_steps();
            let loss = run.loss(run.step);
            let mut values = vec![
                (metric::LOSS.to_string(), loss),
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
                diverged: None,
                evaluation: evaluate.then_some(Duration::ZERO),
            }
        };
        Ok(runs.iter_mut().map(step).collect())
    }

    fn save(&mut self, run: &SimulatedRun, dirs: &CheckpointDirs) -> Result<(), Failure> {
        for dir in [&dirs.adapter, &dirs.resume] {
            std::fs::create_dir_all(dir).map_err(io(dir))?;
            let path = dir.join(FILE);
            std::fs::write(&path, run.step.to_string()).map_err(io(&path))?;
        }
        Ok(())
    }

    fn summary(&mut self, (): &(), run: &mut SimulatedRun) -> Result<TrialSummary, Failure> {
        let loss = Some(run.loss(run.step));
        let base_eval_loss = Some(run.loss(0));
        Ok(TrialSummary { steps: run.step, loss, eval_loss: loss, base_eval_loss, ..TrialSummary::default() })
    }
}
