//! Modules that are trained whole beside an adapter: PEFT's `modules_to_save`. Each trial has its own copy.

use crate::data::Dataset;
use crate::error::Result;
use crate::lora::{Target, Trained};
use crate::model::Base;
use crate::ops;
use crate::weight::Weight;
use candle_core::Tensor;
use domain::footprint::{Engine, Load, ModelShape};
use domain::trial::{Precision, TrialConfig};
use std::ops::Range;

/// What a module does, and where in the base it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The embedding.
    Embedding,
    /// A norm, by its number among all ([`Base::modules`]).
    Norm(usize),
    /// A linear layer, by its number among all, the head last.
    Linear(usize),
}

/// A module that is to be trained whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSpec {
    /// Its path, such as `model.norm`.
    pub path: String,
    /// What it does.
    pub kind: Kind,
    /// The shape of its weight.
    pub shape: Vec<usize>,
    /// Whether it has a bias.
    pub has_bias: bool,
}

impl SavedSpec {
    /// The parameters that it trains.
    pub fn parameters(&self) -> u64 {
        let bias = if self.has_bias { self.shape[0] } else { 0 };
        (self.shape.iter().product::<usize>() + bias) as u64
    }
}

/// All that a trial trains.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trainable {
    /// The layers that get an adapter.
    pub targets: Vec<Target>,
    /// The modules that are trained whole.
    pub saved: Vec<SavedSpec>,
}

impl From<Vec<Target>> for Trainable {
    fn from(targets: Vec<Target>) -> Self {
        Self { targets, saved: Vec::new() }
    }
}

impl Trainable {
    /// Its parameters.
    pub fn parameters(&self) -> u64 {
        let adapters = self.targets.iter().map(Target::parameters);
        adapters.chain(self.saved.iter().map(SavedSpec::parameters)).sum()
    }

    /// The parameters that are held beside them: PiSSA's initial matrices.
    pub fn initial_parameters(&self) -> u64 {
        self.targets.iter().map(Target::initial_parameters).sum()
    }

    /// The most that the start of a layer takes while it lasts.
    pub fn start_bytes(&self, engine: Engine, precision: Precision) -> u64 {
        self.targets.iter().map(|target| target.start_bytes(engine, precision)).max().unwrap_or(0)
    }

    /// What the footprint of a trial of `config` depends on that trains these of a model of `shape`, on `data`.
    pub fn load(&self, config: &TrialConfig, engine: Engine, shape: &ModelShape, data: &Dataset) -> Load {
        let precision = config.base_model().precision;
        let elements = |t: &Target| (t.module.in_features * t.module.out_features) as u64;
        let with_magnitudes = self.targets.iter().filter(|t| t.use_dora);
        Load {
            precision,
            engine,
            trainable_parameters: self.parameters(),
            initial_parameters: self.initial_parameters(),
            adapted: self.targets.iter().map(elements).sum(),
            saved: shape.saved(config.modules_to_save.as_deref()),
            has_dropout: config.lora_dropout > 0.0,
            magnitudes: with_magnitudes.map(|t| t.module.out_features as u64).sum(),
            accumulates: config.gradient_accumulation_steps > 1,
            checkpoints: config.save_steps > 0,
            start: self.start_bytes(engine, precision),
            tokens: data.batch_tokens(config.batch_size),
            longest: data.batch_tokens(1),
        }
    }
}

/// A trial's own copy of a module, in float32.
#[derive(Debug, Clone)]
pub struct SavedModule {
    /// Its path in the model.
    pub path: String,
    /// What it does.
    pub kind: Kind,
    /// The embedding's `[vocab, hidden]`, a norm's `[width]`, a linear layer's `[out_features, in_features]`.
    pub weight: Tensor,
    /// `[out_features]`
    pub bias: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `weight`.
    pub grad_weight: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `bias`.
    pub grad_bias: Option<Tensor>,
}

impl SavedModule {
    /// The names of its parameters.
    pub const PARAMETERS: [&'static str; 2] = ["weight", "bias"];

    /// A module of those values, without gradients.
    pub fn new(spec: &SavedSpec, weight: Tensor, bias: Option<Tensor>) -> Self {
        let (path, kind) = (spec.path.clone(), spec.kind);
        Self { path, kind, weight, bias, grad_weight: None, grad_bias: None }
    }

    /// The base's own values.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn of(base: &Base, spec: &SavedSpec) -> Result<Self> {
        let (weight, bias) = base.values(spec.kind)?;
        Ok(Self::new(spec, weight, bias))
    }

    /// Its weight as a pass on `base` uses it.
    pub(crate) fn working(&self, base: &Base) -> Result<Weight> {
        let matrix = self.weight.rank() > 1;
        let copy = matrix.then(|| ops::cast(&[&self.weight], base.compute_dtype())).transpose()?;
        Ok(Weight::Dense(copy.and_then(|mut copy| copy.pop()).unwrap_or_else(|| self.weight.clone())))
    }

    /// Its parameters by name.
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        Self::PARAMETERS.into_iter().zip([&self.weight].into_iter().chain(&self.bias))
    }

    /// The same with their gradients, to be changed.
    pub fn trained(&mut self) -> impl Iterator<Item = Trained<'_>> {
        let values = [&mut self.weight].into_iter().chain(&mut self.bias);
        let gradients = [&mut self.grad_weight, &mut self.grad_bias];
        Self::PARAMETERS
            .into_iter()
            .zip(values)
            .zip(gradients)
            .map(|((name, value), grad)| (name, value, grad))
    }

    /// Its gradients so far.
    pub fn gradients(&self) -> impl Iterator<Item = &Tensor> {
        [&self.grad_weight, &self.grad_bias].into_iter().flatten()
    }
}

/// Some of a block's rows, one after the other, that go through the same copy of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    /// The rows, counted from the block's first.
    pub(crate) rows: Range<usize>,
    /// The trial with a copy of its own, and that copy's number; the base's if there is none.
    pub(crate) owner: Option<(usize, usize)>,
}

/// The runs of a block of rows: `trials` are each trial's rows, in order, and its copy.
pub(crate) fn runs(
    block: Range<usize>,
    trials: impl Iterator<Item = (Range<usize>, Option<usize>)>,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, (rows, copy)) in trials.enumerate() {
        let (start, end) = (rows.start.max(block.start), rows.end.min(block.end));
        if start >= end {
            continue;
        }
        let rows = start - block.start..end - block.start;
        let owner = copy.map(|copy| (number, copy));
        match runs.last_mut() {
            Some(last) if last.owner.is_none() && owner.is_none() => last.rows.end = rows.end,
            _ => runs.push(Run { rows, owner }),
        }
    }
    if runs.is_empty() {
        runs.push(Run { rows: 0..block.len(), owner: None });
    }
    runs
}

/// What `f` makes of each run of `x`'s rows, one after the other.
pub(crate) fn by_runs(
    x: &Tensor,
    runs: &[Run],
    mut f: impl FnMut(&Tensor, &Run) -> Result<Tensor>,
) -> Result<Tensor> {
    if let [run] = runs {
        return f(x, run);
    }
    let parts = runs.iter().map(|run| f(&x.narrow(0, run.rows.start, run.rows.len())?, run));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_copy_stand_together() {
        let trials = [(0..3, None), (3..3, Some(1)), (3..5, None), (5..9, Some(2)), (9..12, Some(0))];
        // (block, rows and owner of each run)
        for (block, want) in [
            (0..12, vec![(0..5, None), (5..9, Some((3, 2))), (9..12, Some((4, 0)))]),
            (4..8, vec![(0..1, None), (1..4, Some((3, 2)))]),
            (5..6, vec![(0..1, Some((3, 2)))]),
        ] {
            let runs = runs(block.clone(), trials.iter().cloned());
            let got: Vec<_> = runs.into_iter().map(|run| (run.rows, run.owner)).collect();
            assert_eq!(got, want, "{block:?}");
        }
        assert_eq!(runs(2..5, std::iter::empty()), [Run { rows: 0..3, owner: None }]);
    }
}
