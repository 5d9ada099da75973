//! What trains the trials of a pack: the trainer.

use super::exams::{self, Exams};
use super::kept::Keeper;
use super::pack::{Asking, Backend, Stepped, Write};
use super::sources::{self, Sources};
use super::{Admission, CheckpointDirs, Event, FourBits};
use crate::cache::quantised::Draft;
use domain::Clock;
use domain::machine::Accelerator;
use domain::trial::{BaseModel, Digests, Failure, FailureClass, TrialSummary};
use hub::Kind;
use std::sync::Arc;
use trainer::files::Outlives;
use trainer::model::Base;
use trainer::run::{Loaded, Run};
use trainer::{Device, TrainError, locate};

/// The trainer on one device.
pub struct Candle {
    /// Where it computes.
    device: Device,
    /// What that is, if the catalogue has it: for predictions.
    accelerator: Option<Accelerator>,
    /// Measures speeds and dates the points.
    clock: Arc<dyn Clock>,
    /// Brings what trials name on the hub to this machine.
    sources: Sources,
    exams: Exams,
    /// Bases in 4 bits, from and to the agent's cache.
    keeper: Keeper,
}

impl Candle {
    /// The trainer on a device; `clock` measures speeds and dates the points.
    pub fn new(device: Device, clock: Arc<dyn Clock>) -> Self {
        Self {
            device,
            accelerator: None,
            clock,
            sources: Sources::default(),
            exams: Exams::default(),
            keeper: Keeper::default(),
        }
    }

    /// The same on an accelerator of that name, of which trials' seconds are predicted if the catalogue has it.
    pub fn on(self, accelerator: &str) -> Self {
        Self { accelerator: config::machines::accelerator(accelerator).ok(), ..self }
    }
}

/// A trial that is trained, and what it is asked then.
pub struct Examined {
    run: Run,
    asked: Option<exams::Asked>,
}

/// Whether an error says that a device's memory is at its end. candle has no kind for it; the driver says it in words and in
/// a code, cuBLAS and its kin in a code of theirs.
fn is_of_memory(message: &str) -> bool {
    let message = message.to_lowercase();
    ["out of memory", "out_of_memory", "alloc_failed", "allocation_failed"]
        .iter()
        .any(|said| message.contains(said))
}

/// Whose fault an error is.
pub(super) fn failure(error: TrainError) -> Failure {
    let message = error.to_string();
    let class = match error {
        TrainError::Model { .. } | TrainError::Data { .. } | TrainError::Parameter { .. } => {
            FailureClass::User
        }
        TrainError::Io { .. } => FailureClass::Infrastructure,
        TrainError::Tensor(_) if is_of_memory(&message) => FailureClass::OutOfMemory,
        TrainError::Tensor(_) => FailureClass::Infrastructure,
    };
    Failure { class, message }
}

/// What a step did, as a pack hears it.
fn in_pack(stepped: trainer::run::Stepped) -> Stepped {
    let trainer::run::Stepped { point, checkpoint_due, diverged, evaluation, failed } = stepped;
    Stepped { point, checkpoint_due, diverged, evaluation, failed: failed.map(failure) }
}

impl Backend for Candle {
    type Base = Loaded;
    type Run = Examined;

    fn base_bytes(&mut self, base: &BaseModel) -> Result<Option<u64>, Failure> {
        self.sources.ready(Kind::Model, &base.model)?;
        let dir = locate::model(&base.model).map_err(failure)?;
        let outline = Base::outline(&dir, base.precision).map_err(failure)?;
        Ok(Some(outline.bytes()))
    }

    fn fit(&self, base: &Loaded, trial: &mut Examined, memory_bytes: u64) -> Option<u64> {
        Some(trial.run.fit(base, memory_bytes).own())
    }

    fn spare(&self, base: &Loaded, trial: &mut Examined) -> bool {
        trial.run.spare_memory(base)
    }

    fn load(
        &mut self,
        base: &BaseModel,
        admission: &Admission,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(Loaded, Option<FourBits>), Failure> {
        let dir = locate::model(&base.model).map_err(failure)?;
        self.exams.forget_answers();
        let on = (&self.device, &*self.clock);
        self.keeper.load((&dir, base.precision), admission, on, emit).map_err(failure)
    }

    fn keep(&mut self, base: &Loaded, draft: Draft) {
        self.keeper.keep(base, draft);
    }

    fn start(&mut self, base: &Loaded, admission: &Admission) -> Result<Examined, Failure> {
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
        let run = run.map_err(failure)?.named(admission.config.clone());
        // What cannot be asked is told before anything is trained.
        let asked = match admission.placed_evaluations() {
            Some(_) if base.tokenizer.is_none() => return Err(exams::no_tokenizer(base)),
            Some(evaluations) => Some(self.exams.of(evaluations, base, &mut self.sources)?),
            None => None,
        };
        Ok(Examined { run, asked })
    }

    fn digests(&self, trial: &Examined) -> Digests {
        let documents = trial.asked.as_ref().map(|asked| asked.digest().to_string()).unwrap_or_default();
        Digests { documents, ..trial.run.digests().clone() }
    }

    fn step(&self, trial: &Examined) -> u64 {
        trial.run.step()
    }

    fn total_steps(&self, trial: &Examined) -> u64 {
        trial.run.total_steps()
    }

    fn base_eval(&mut self, base: &Loaded, trial: &mut Examined) -> Result<Option<f64>, Failure> {
        trial.run.base_eval(base).map_err(failure)
    }

    fn make_up(&mut self, base: &Loaded, trial: &mut Examined) -> Option<Stepped> {
        trial.run.make_up(base, &*self.clock).map(in_pack)
    }

    fn step_pack(&mut self, base: &Loaded, trials: &mut [&mut Examined]) -> Result<Vec<Stepped>, Failure> {
        let mut runs: Vec<_> = trials.iter_mut().map(|trial| &mut trial.run).collect();
        let stepped = trainer::run::step_pack(base, &mut runs, &*self.clock).map_err(failure)?;
        Ok(stepped.into_iter().map(in_pack).collect())
    }

    fn save(&mut self, trial: &mut Examined, dirs: CheckpointDirs) -> Result<Write, Failure> {
        let snapshot = trial.run.snapshot().map_err(failure)?;
        // Where it is to last it is uploaded, and what lies here is gone when the agent starts again: nothing waits for the disk.
        Ok(Box::new(move || snapshot.write(&dirs.adapter, &dirs.resume, Outlives::Process).map_err(failure)))
    }

    /// From a GPU a state is copied to the computer's memory, 12 bytes a parameter, which nobody counts: one that is written,
    /// and one so that the disk has something to do until it is heard that the first is written, after a step perhaps. On
    /// the CPU it is a part of a trial's footprint, and no trial need stand still for another's.
    fn most_writes(&self) -> usize {
        if self.device.is_cpu() { usize::MAX } else { 2 }
    }

    fn ask(&mut self, base: &Loaded, trial: &mut Examined) -> Result<Asking, Failure> {
        let Some(asked) = &mut trial.asked else { return Ok(Asking::Nothing) };
        let done = self.exams.ask(base, &trial.run, asked)?;
        Ok(if done { Asking::Over } else { Asking::More })
    }

    fn summary(&mut self, base: &Loaded, trial: &mut Examined) -> Result<TrialSummary, Failure> {
        let summary = trial.run.summary(base).map_err(failure)?;
        let asked = trial.asked.as_ref().map(|asked| self.exams.scores(asked));
        let (evaluations, item_scores) = asked.unwrap_or_default();
        let predicted = self.accelerator.as_ref();
        let predicted_seconds_per_step =
            predicted.map(|accelerator| trial.run.predicted_seconds_per_step(base, accelerator));
        Ok(TrialSummary { evaluations, item_scores, predicted_seconds_per_step, ..summary })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_that_memory_is_at_its_end() {
        for (said, is) in [
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", true),
            ("CublasError(CUBLAS_STATUS_ALLOC_FAILED)", true),
            ("CurandError(CURAND_STATUS_ALLOCATION_FAILED)", true),
            ("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")", false),
            ("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)", false),
        ] {
            assert_eq!(is_of_memory(said), is, "{said}");
        }
    }
}
