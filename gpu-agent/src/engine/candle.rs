//! What trains the trials of a pack: the trainer.

use super::pack::{Backend, Stepped};
use super::sources::{self, Sources};
use super::{Admission, CheckpointDirs};
use domain::Clock;
use domain::trial::{BaseModel, Digests, Failure, FailureClass, TrialSummary};
use hub::Kind;
use std::sync::Arc;
use trainer::model::Base;
use trainer::run::{Loaded, Run};
use trainer::{Device, TrainError, locate};

/// The trainer on one device.
pub struct Candle {
    /// Where it computes.
    pub device: Device,
    /// Measures speeds and dates the points.
    pub clock: Arc<dyn Clock>,
    /// Brings what trials name on the hub to this machine.
    pub sources: Sources,
}

/// Whose fault an error is.
fn failure(error: TrainError) -> Failure {
    let message = error.to_string();
    let class = match error {
        TrainError::Model { .. } | TrainError::Data { .. } | TrainError::Parameter { .. } => {
            FailureClass::User
        }
        TrainError::Io { .. } => FailureClass::Infrastructure,
        // Neither candle nor CUDA has a kind for it.
        TrainError::Tensor(_) if message.to_lowercase().contains("out of memory") => {
            FailureClass::OutOfMemory
        }
        TrainError::Tensor(_) => FailureClass::Infrastructure,
    };
    Failure { class, message }
}

impl Backend for Candle {
    type Base = Loaded;
    type Run = Run;

    fn base_bytes(&mut self, base: &BaseModel) -> Result<Option<u64>, Failure> {
        self.sources.ready(Kind::Model, &base.model)?;
        let dir = locate::model(&base.model).map_err(failure)?;
        let outline = Base::outline(&dir, base.precision).map_err(failure)?;
        Ok(Some(outline.bytes()))
    }

    fn fit(&self, base: &Loaded, run: &mut Run, memory_bytes: u64) -> Option<u64> {
        Some(run.fit(base, memory_bytes).own())
    }

    fn spare(&self, base: &Loaded, run: &mut Run) -> bool {
        run.spare_memory(base)
    }

    fn load(&mut self, base: &BaseModel) -> Result<Loaded, Failure> {
        let dir = locate::model(&base.model).map_err(failure)?;
        Loaded::load(&dir, base.precision, &self.device).map_err(failure)
    }

    fn start(&mut self, base: &Loaded, admission: &Admission) -> Result<Run, Failure> {
        let config = admission.placed();
        let named = [Some(&config.dataset_name), config.eval_dataset_name.as_ref()].into_iter().flatten();
        for name in named.chain(config.interleave_datasets.iter().flatten()) {
            self.sources.ready(Kind::Dataset, name)?;
        }
        config.init_adapter.as_deref().map_or(Ok(()), sources::absolute)?;
        let run = match &admission.resume {
            Some(dirs) => Run::resume(base, config, &dirs.adapter, &dirs.resume),
            None => Run::new(base, config),
        };
        Ok(run.map_err(failure)?.named(admission.config.clone()))
    }

    fn digests(&self, run: &Run) -> Digests {
        run.digests().clone()
    }

    fn step(&self, run: &Run) -> u64 {
        run.step()
    }

    fn total_steps(&self, run: &Run) -> u64 {
        run.total_steps()
    }

    fn base_eval(&mut self, base: &Loaded, run: &mut Run) -> Result<Option<f64>, Failure> {
        run.base_eval(base).map_err(failure)
    }

    fn step_pack(&mut self, base: &Loaded, runs: &mut [&mut Run]) -> Result<Vec<Stepped>, Failure> {
        let stepped = trainer::run::step_pack(base, runs, &*self.clock).map_err(failure)?;
        let stepped = stepped.into_iter().map(|s| Stepped {
            point: s.point,
            checkpoint_due: s.checkpoint_due,
            diverged: s.diverged,
            evaluation: s.evaluation,
        });
        Ok(stepped.collect())
    }

    fn save(&mut self, run: &Run, dirs: &CheckpointDirs) -> Result<(), Failure> {
        run.save(&dirs.adapter, &dirs.resume).map_err(failure)
    }

    fn summary(&mut self, base: &Loaded, run: &mut Run) -> Result<TrialSummary, Failure> {
        run.summary(base).map_err(failure)
    }
}
