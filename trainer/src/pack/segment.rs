//! The trials of a pass: their rows, their adapters, their own copies of modules; and the norms, which have no more to them.

use crate::error::{Result, TrainError};
use crate::lora::{Adapter, DropoutCounter, MaskPlace, Working, accumulate};
use crate::model::Base;
use crate::ops;
use crate::saved::{self, Kind, Run, by_runs};
use crate::weight::Weight;
use candle_core::Tensor;
use std::borrow::Borrow;
use std::collections::HashMap;
use std::ops::Range;

/// A trial's adapter for a pass (`&Adapter` forward, `&mut Adapter` backward), and the rows it applies to.
pub(super) struct Segment<A> {
    pub(super) adapter: A,
    /// The trial's rows in the decoder layers: its tokens.
    tokens: Range<usize>,
    /// The trial's rows in the head: those of its tokens whose next token is asked for.
    asked: Range<usize>,
    /// `None` outside of training.
    dropout: Option<DropoutCounter>,
    /// The adapter's matrix for each of the base's linear layers, in model order, the head last.
    modules: Vec<Option<usize>>,
    /// The adapter's matrices as the pass uses them.
    pub(super) working: Vec<Working>,
    /// The trial's own copies of modules, each by its number.
    copies: HashMap<Kind, usize>,
    /// Their weights in the pass's numbers.
    weights: Vec<Weight>,
    /// The number of the norm before the head.
    last_norm: usize,
}

/// A trial's share of a product's rows.
pub(super) struct Share {
    /// The adapter's matrix.
    pub(super) module: usize,
    /// Its first row.
    pub(super) start: usize,
    /// The number of its rows.
    pub(super) rows: usize,
    pub(super) mask: Option<MaskPlace>,
}

impl<A: Borrow<Adapter>> Segment<A> {
    pub(super) fn new(
        base: &Base,
        adapter: A,
        tokens: Range<usize>,
        asked: Range<usize>,
        dropout: Option<DropoutCounter>,
    ) -> Result<Self> {
        let matrices = adapter.borrow().modules.iter().enumerate();
        let places: HashMap<&str, usize> = matrices.map(|(i, m)| (m.path.as_str(), i)).collect();
        let linears = base.layers.iter().flat_map(|layer| &layer.linears).chain([&base.head]);
        let modules = linears.map(|linear| places.get(linear.path.as_str()).copied()).collect();
        let working = adapter.borrow().working(base)?;
        let saved = &adapter.borrow().saved;
        let copies = saved.iter().enumerate().map(|(number, module)| (module.kind, number)).collect();
        let weights = saved.iter().map(|module| module.working(base)).collect::<Result<_>>()?;
        let last_norm = base.last_norm();
        Ok(Self { adapter, tokens, asked, dropout, modules, working, copies, weights, last_norm })
    }

    /// Whether the trial has its own copy of a module.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.copies.contains_key(&kind)
    }

    /// The trial's rows in a module.
    fn rows(&self, kind: Kind) -> &Range<usize> {
        match kind {
            Kind::Linear(number) if number + 1 == self.modules.len() => &self.asked,
            Kind::Norm(number) if number == self.last_norm => &self.asked,
            _ => &self.tokens,
        }
    }

    /// The trial's share of `block`, some of the rows that go through linear layer `number`; none if its
    /// adapter leaves the layer out.
    pub(super) fn share(&self, number: usize, block: Range<usize>) -> Option<Share> {
        let module = self.modules[number]?;
        let own = self.rows(Kind::Linear(number));
        let (first, end) = (own.start.max(block.start), own.end.min(block.end));
        let mask = self.dropout.map(|counter| MaskPlace { counter, first_row: first - own.start });
        (first < end).then(|| Share { module, start: first - block.start, rows: end - first, mask })
    }
}

/// Which rows of a `block` of those that go through a module go through whose copy of it.
pub(super) fn runs<A: Borrow<Adapter>>(segments: &[Segment<A>], kind: Kind, block: Range<usize>) -> Vec<Run> {
    let trial = |segment: &Segment<A>| (segment.rows(kind).clone(), segment.copies.get(&kind).copied());
    saved::runs(block, segments.iter().map(trial))
}

impl Run {
    /// The weight that its rows are multiplied by, if it is not the base's.
    pub(super) fn weight<'a, A>(&self, segments: &'a [Segment<A>]) -> Option<&'a Weight> {
        self.owner.map(|(trial, copy)| &segments[trial].weights[copy])
    }
}

/// An RMSNorm: the base's weight and its number among all. Of each head within a row, if it is a head's.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) weight: &'a Tensor,
    pub(super) number: usize,
    pub(super) eps: f64,
    pub(super) of_heads: bool,
}

impl Norm<'_> {
    /// Its output; `x` holds the rows from `first` on of all that go through it.
    pub(super) fn forward<A: Borrow<Adapter>>(
        &self,
        x: &Tensor,
        first: usize,
        segments: &[Segment<A>],
    ) -> Result<Tensor> {
        let norm = if self.of_heads { ops::head_norm } else { ops::rms_norm };
        let runs = runs(segments, Kind::Norm(self.number), first..first + x.dims()[0]);
        by_runs(x, &runs, |x, run| norm(x, self.weight(run, segments), self.eps))
    }

    /// The gradient by its input, given that by its output, added to `into`; adds those by the trials' own weights.
    /// Heads have nothing to add to.
    pub(super) fn backward(
        &self,
        into: Option<Tensor>,
        x: &Tensor,
        first: usize,
        dy: &Tensor,
        segments: &mut [Segment<&mut Adapter>],
    ) -> Result<Tensor> {
        let runs = runs(segments, Kind::Norm(self.number), first..first + x.dims()[0]);
        let mut into = into;
        by_runs(x, &runs, |x, run| {
            let dy = dy.narrow(0, run.rows.start, run.rows.len())?;
            if let Some((trial, copy)) = run.owner {
                let weight = self.weight(run, segments);
                let gradient = match self.of_heads {
                    true => ops::head_norm_weight_gradient(x, weight, self.eps, &dy)?,
                    false => ops::rms_norm_weight_gradient(x, self.eps, &dy)?,
                };
                accumulate(&mut segments[trial].adapter.saved[copy].grad_weight, gradient)?;
            }
            let weight = self.weight(run, segments);
            if self.of_heads {
                return ops::head_norm_backward(x, weight, self.eps, &dy);
            }
            let into = part(&mut into, run, runs.len())?;
            let into = into.map_or_else(|| Ok(x.zeros_like()?), Ok::<_, TrainError>)?;
            ops::add_rms_norm_backward(into, x, weight, self.eps, &dy)
        })
    }

    fn weight<'a, A>(&'a self, run: &Run, segments: &'a [Segment<A>]) -> &'a Tensor {
        match run.weight(segments) {
            Some(Weight::Dense(weight)) => weight,
            _ => self.weight,
        }
    }
}

/// A run's rows of what a gradient is added to: all of it, if the run is the only one.
pub(super) fn part(into: &mut Option<Tensor>, run: &Run, runs: usize) -> Result<Option<Tensor>> {
    if runs == 1 {
        return Ok(into.take());
    }
    let rows = into.as_ref().map(|into| into.narrow(0, run.rows.start, run.rows.len())?.force_contiguous());
    Ok(rows.transpose()?)
}
