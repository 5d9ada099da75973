//! The layers of a pass, forward and backward, and the products with their adapters.

use super::tokens::Tokens;
use crate::error::{Result, TrainError};
use crate::lora::{Adapter, DropoutCounter, MaskPlace, Working, accumulate};
use crate::memory::{Held, Meter};
use crate::model::{Base, Linear, NormNumbers};
use crate::ops::{self, Branch, Heads, Rotary};
use crate::saved::{self, Kind, Run, by_runs};
use crate::weight::Weight;
use candle_core::{DType, Tensor};
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
    working: Vec<Working>,
    /// The trial's own copies of modules, each by its number.
    copies: HashMap<Kind, usize>,
    /// Their weights in the pass's numbers.
    weights: Vec<Weight>,
    /// The number of the norm before the head.
    last_norm: usize,
}

/// A trial's share of a product's rows.
struct Share {
    /// The adapter's matrix.
    module: usize,
    /// Its first row.
    start: usize,
    /// The number of its rows.
    rows: usize,
    mask: Option<MaskPlace>,
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
    fn share(&self, number: usize, block: Range<usize>) -> Option<Share> {
        let module = self.modules[number]?;
        let own = self.rows(Kind::Linear(number));
        let (first, end) = (own.start.max(block.start), own.end.min(block.end));
        let mask = self.dropout.map(|counter| MaskPlace { counter, first_row: first - own.start });
        (first < end).then(|| Share { module, start: first - block.start, rows: end - first, mask })
    }
}

/// Which rows of a `block` of those that go through a module go through whose copy of it.
fn runs<A: Borrow<Adapter>>(segments: &[Segment<A>], kind: Kind, block: Range<usize>) -> Vec<Run> {
    let trial = |segment: &Segment<A>| (segment.rows(kind).clone(), segment.copies.get(&kind).copied());
    saved::runs(block, segments.iter().map(trial))
}

impl Run {
    /// The weight that its rows are multiplied by, if it is not the base's.
    fn weight<'a, A>(&self, segments: &'a [Segment<A>]) -> Option<&'a Weight> {
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
fn part(into: &mut Option<Tensor>, run: &Run, runs: usize) -> Result<Option<Tensor>> {
    if runs == 1 {
        return Ok(into.take());
    }
    let rows = into.as_ref().map(|into| into.narrow(0, run.rows.start, run.rows.len())?.copy());
    Ok(rows.transpose()?)
}

/// What a layer's backward needs of its forward. Norms and activations are computed again.
pub(super) struct Saved {
    input: Held,
    /// As attention takes them; where heads are normed, as they were before that.
    q: Held,
    k: Held,
    v: Held,
    attended: Held,
    middle: Held,
    gate: Held,
    up: Held,
}

impl Saved {
    /// The layer's input, all else forgotten.
    pub(super) fn into_input(self) -> Held {
        self.input
    }
}

/// What is kept of a layer's forward until its backward.
pub(super) enum Kept {
    /// All that the backward needs.
    All(Saved),
    /// The input, from which the rest is computed again.
    Input(Held),
}

/// What is the same in all layers of a pass.
pub(super) struct Pass<'a> {
    base: &'a Base,
    documents: &'a [Range<usize>],
    rotary: Rotary,
    pub(super) meter: Meter,
}

/// The keys and values of a text that is read piece by piece, by layer.
#[derive(Default)]
pub(super) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
}

impl Cache {
    /// The number of tokens read.
    pub(super) fn length(&self) -> usize {
        self.layers.first().map_or(0, |(keys, _)| keys.dims()[0])
    }

    /// Attention of new tokens to themselves and all before them. After the first piece, which may be long,
    /// come single tokens.
    fn attend(&mut self, index: usize, q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
        let Some((keys, values)) = self.layers.get_mut(index) else {
            self.layers.push((k.clone(), v.clone()));
            let whole = 0..q.dims()[0];
            return ops::attention(q, k, v, std::slice::from_ref(&whole), heads);
        };
        *keys = Tensor::cat(&[&*keys, k], 0)?;
        *values = Tensor::cat(&[&*values, v], 0)?;
        ops::attention_of_one(q, keys, values, heads)
    }
}

/// The places of the linear layers within a layer.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

impl<'a> Pass<'a> {
    /// A pass over some tokens, beside `resident` bytes that are held throughout.
    pub(super) fn new(base: &'a Base, tokens: &'a Tokens, resident: u64) -> Result<Self> {
        let rotary = Rotary::new(&base.inverse_frequencies, &tokens.positions, base.device())?;
        let meter = Meter::new(resident);
        Ok(Self { base, documents: &tokens.documents, rotary, meter })
    }

    /// Runs all layers; `keep` receives what each layer's backward needs.
    pub(super) fn hidden<A: Borrow<Adapter>>(
        &self,
        ids: &[u32],
        segments: &[Segment<A>],
        keep: impl FnMut(Saved),
    ) -> Result<Held> {
        let attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            ops::attention(q, k, v, self.documents, Heads::of(self.base, index))
        };
        self.through(ids, segments, attend, keep)
    }

    /// Runs all layers on the next tokens of a text whose earlier ones are in `cache`.
    pub(super) fn continued<A: Borrow<Adapter>>(
        &self,
        ids: &[u32],
        segments: &[Segment<A>],
        cache: &mut Cache,
    ) -> Result<Held> {
        let attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            cache.attend(index, q, k, v, Heads::of(self.base, index))
        };
        self.through(ids, segments, attend, drop)
    }

    /// Runs all layers on texts that share their beginnings.
    pub(super) fn branched<A: Borrow<Adapter>>(
        &self,
        ids: &[u32],
        segments: &[Segment<A>],
        branches: &[Branch],
    ) -> Result<Held> {
        let attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            ops::branched_attention(q, k, v, branches, Heads::of(self.base, index))
        };
        self.through(ids, segments, attend, drop)
    }

    fn through<A: Borrow<Adapter>>(
        &self,
        ids: &[u32],
        segments: &[Segment<A>],
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
        mut keep: impl FnMut(Saved),
    ) -> Result<Held> {
        let mut x = self.hold(self.embedded(ids, segments)?);
        for index in 0..self.base.layers.len() {
            let saved = self.layer(index, x, segments, &mut attend)?;
            x = self.output(index, &saved, segments)?;
            keep(saved);
        }
        Ok(x)
    }

    /// The rows of the embedding, or of a trial's own, that tokens have.
    fn embedded<A: Borrow<Adapter>>(&self, ids: &[u32], segments: &[Segment<A>]) -> Result<Tensor> {
        let rows = |run: &Run| match run.weight(segments) {
            Some(Weight::Dense(own)) => ops::gather(own, &ids[run.rows.clone()]),
            _ => ops::gather(&self.base.embedding, &ids[run.rows.clone()]),
        };
        let runs = runs(segments, Kind::Embedding, 0..ids.len());
        match runs.as_slice() {
            [run] => rows(run),
            runs => Ok(Tensor::cat(&runs.iter().map(rows).collect::<Result<Vec<_>>>()?, 0)?),
        }
    }

    /// Adds the gradients by the trials' own embeddings, given that by the first layer's input.
    pub(super) fn embedding_backward(
        &self,
        ids: &[u32],
        dx: &Tensor,
        segments: &mut [Segment<&mut Adapter>],
    ) -> Result<()> {
        for Run { rows, owner } in runs(segments, Kind::Embedding, 0..ids.len()) {
            let Some((trial, copy)) = owner else { continue };
            let module = &mut segments[trial].adapter.saved[copy];
            let into = module.grad_weight.take().map_or_else(|| module.weight.zeros_like(), Ok)?;
            let dy = dx.narrow(0, rows.start, rows.len())?;
            module.grad_weight = Some(ops::scatter_add(into, &dy, &ids[rows])?);
        }
        Ok(())
    }

    fn norm<'b>(&self, weight: &'b Tensor, number: usize) -> Norm<'b> {
        Norm { weight, number, eps: self.base.config.rms_norm_eps, of_heads: false }
    }

    fn hold(&self, tensor: Tensor) -> Held {
        self.meter.hold(tensor)
    }

    /// What is kept of a product that makes queries or keys.
    fn kept(&self, product: Tensor, norm: Option<Norm>) -> Result<Held> {
        let dim = self.base.config.head_dim;
        Ok(self.hold(if norm.is_none() { self.rotary.forward(product, dim)? } else { product }))
    }

    /// What attention takes of that, if it is something else.
    fn normed<A: Borrow<Adapter>>(
        &self,
        kept: &Tensor,
        norm: Option<Norm>,
        segments: &[Segment<A>],
    ) -> Result<Option<Held>> {
        let Some(norm) = norm else { return Ok(None) };
        let normed = norm.forward(kept, 0, segments)?;
        Ok(Some(self.hold(self.rotary.forward(normed, self.base.config.head_dim)?)))
    }

    /// The gradient by the product, given that by what attention takes.
    fn normed_backward(
        &self,
        kept: Held,
        norm: Option<Norm>,
        dy: Tensor,
        segments: &mut [Segment<&mut Adapter>],
    ) -> Result<Held> {
        let dy = self.hold(self.rotary.backward(dy, self.base.config.head_dim)?);
        let Some(norm) = norm else { return Ok(dy) };
        Ok(self.hold(norm.backward(None, &kept, 0, &dy, segments)?))
    }

    /// The norms of a layer's query heads and key heads, if it has them.
    fn head_norms(&self, index: usize) -> [Option<Norm<'_>>; 2] {
        let numbers = NormNumbers::of(index).heads;
        let [q, k] = self.base.layers[index].head_norms();
        let of = |weight: &'a Tensor, number| Norm { of_heads: true, ..self.norm(weight, number) };
        [q.map(|weight| of(weight, numbers[0])), k.map(|weight| of(weight, numbers[1]))]
    }

    /// A layer's forward once more, up to what its backward needs: its last product is not among that.
    pub(super) fn again<A: Borrow<Adapter>>(
        &self,
        index: usize,
        input: Held,
        segments: &[Segment<A>],
    ) -> Result<Saved> {
        let mut attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            ops::attention(q, k, v, self.documents, Heads::of(self.base, index))
        };
        self.layer(index, input, segments, &mut attend)
    }

    /// A layer but for its last product.
    fn layer<A: Borrow<Adapter>>(
        &self,
        index: usize,
        input: Held,
        segments: &[Segment<A>],
        attend: &mut impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Saved> {
        let layer = &self.base.layers[index];
        let ([q_norm, k_norm], numbers) = (self.head_norms(index), NormNumbers::of(index));
        let number = |place: usize| index * layer.linears.len() + place;
        let linear = |place: usize, x: &Tensor| {
            linear(&layer.linears[place], number(place), x, 0, x.dtype(), segments)
        };

        let norm = self.norm(&layer.input_norm, numbers.input);
        let normed = self.hold(norm.forward(&input, 0, segments)?);
        let q = self.kept(linear(Q, &normed)?, q_norm)?;
        let k = self.kept(linear(K, &normed)?, k_norm)?;
        let v = self.hold(linear(V, &normed)?);
        drop(normed);
        let (seen_q, seen_k) = (self.normed(&q, q_norm, segments)?, self.normed(&k, k_norm, segments)?);
        let (seen_q, seen_k) = (seen_q.as_deref().unwrap_or(&q), seen_k.as_deref().unwrap_or(&k));
        let attended = self.hold(attend(index, seen_q, seen_k, &v)?);
        let middle = self.hold(ops::add(linear(O, &attended)?, &input)?);
        let norm = self.norm(&layer.post_attention_norm, numbers.post_attention);
        let normed = self.hold(norm.forward(&middle, 0, segments)?);
        let gate = self.hold(linear(GATE, &normed)?);
        let up = self.hold(linear(UP, &normed)?);
        drop(normed);
        Ok(Saved { input, q, k, v, attended, middle, gate, up })
    }

    /// A layer's last product, and with it its output.
    fn output<A: Borrow<Adapter>>(
        &self,
        index: usize,
        saved: &Saved,
        segments: &[Segment<A>],
    ) -> Result<Held> {
        let layer = &self.base.layers[index];
        let number = index * layer.linears.len() + DOWN;
        let activated = self.hold(ops::swiglu(&saved.gate, &saved.up)?);
        let dtype = activated.dtype();
        let down = linear(&layer.linears[DOWN], number, &activated, 0, dtype, segments)?;
        Ok(self.hold(ops::add(down, &saved.middle)?))
    }

    /// The gradient by the layer's input, given that by its output; adds the trials' gradients. Where nobody asks
    /// for the first layer's, the gradient by embedding rows, it is `None`.
    pub(super) fn layer_backward(
        &self,
        index: usize,
        saved: Saved,
        dy: Held,
        segments: &mut [Segment<&mut Adapter>],
    ) -> Result<Option<Held>> {
        let layer = &self.base.layers[index];
        let ([q_norm, k_norm], numbers) = (self.head_norms(index), NormNumbers::of(index));
        let Saved { input, q, k, v, attended, middle, gate, up } = saved;
        let number = |place: usize| index * layer.linears.len() + place;
        let back = |place: usize,
                    x: &Tensor,
                    dy: &Tensor,
                    into: Option<Held>,
                    segments: &mut [Segment<&mut Adapter>]|
         -> Result<Held> {
            let (linear, into) = (&layer.linears[place], into.map(Held::release));
            Ok(self.hold(linear_backward(linear, number(place), x, 0, dy, into, segments)?))
        };

        let activated = self.hold(ops::swiglu(&gate, &up)?);
        let d_activated = back(DOWN, &activated, &dy, None, segments)?;
        let (activated, d_activated) = (activated.release(), d_activated.release());
        let (d_gate, d_up) = ops::swiglu_backward(&gate, &up, activated, d_activated)?;
        let (d_gate, d_up) = (self.hold(d_gate), self.hold(d_up));
        drop((gate, up));
        let norm = self.norm(&layer.post_attention_norm, numbers.post_attention);
        let normed = self.hold(norm.forward(&middle, 0, segments)?);
        let d_normed = back(GATE, &normed, &d_gate, None, segments)?;
        drop(d_gate);
        let d_normed = back(UP, &normed, &d_up, Some(d_normed), segments)?;
        drop((normed, d_up));
        let d_middle = self.hold(norm.backward(Some(dy.release()), &middle, 0, &d_normed, segments)?);
        drop((d_normed, middle));

        let d_attended = back(O, &attended, &d_middle, None, segments)?;
        drop(attended);
        let normed = (self.normed(&q, q_norm, segments)?, self.normed(&k, k_norm, segments)?);
        let (dq, dk, dv) = ops::attention_backward(
            normed.0.as_deref().unwrap_or(&q),
            normed.1.as_deref().unwrap_or(&k),
            &v,
            self.documents,
            Heads::of(self.base, index),
            &d_attended,
        )?;
        drop((d_attended, normed, v));
        let dq = self.normed_backward(q, q_norm, dq, segments)?;
        let dk = self.normed_backward(k, k_norm, dk, segments)?;
        let dv = self.hold(dv);
        let norm = self.norm(&layer.input_norm, numbers.input);
        let normed = self.hold(norm.forward(&input, 0, segments)?);
        let asked = |s: &Segment<_>| s.has(Kind::Embedding) || s.has(Kind::Norm(numbers.input));
        if index == 0 && !segments.iter().any(asked) {
            for (place, dy) in [(Q, &dq), (K, &dk), (V, &dv)] {
                adapters_backward(&layer.linears[place], number(place), &normed, 0, dy, segments)?;
                copies_backward(number(place), &normed, 0, dy, segments)?;
            }
            return Ok(None);
        }
        let d_normed = back(Q, &normed, &dq, None, segments)?;
        let d_normed = back(K, &normed, &dk, Some(d_normed), segments)?;
        let d_normed = back(V, &normed, &dv, Some(d_normed), segments)?;
        drop((normed, dq, dk, dv));
        Ok(Some(self.hold(norm.backward(Some(d_middle.release()), &input, 0, &d_normed, segments)?)))
    }
}

/// `x · Wᵀ` once for all rows but those of trials with a W of their own, plus each trial's low-rank product for its own
/// rows, plus the bias, which magnitudes leave alone. `number` is the layer's among all
/// linear layers; `x` holds the rows from `first` on of all that go through it. The results are in `dtype`.
pub(super) fn linear<A: Borrow<Adapter>>(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dtype: DType,
    segments: &[Segment<A>],
) -> Result<Tensor> {
    let block = first..first + x.dims()[0];
    let runs = runs(segments, Kind::Linear(number), block.clone());
    let mut y =
        by_runs(x, &runs, |x, run| ops::linear(x, run.weight(segments).unwrap_or(&linear.weight), dtype))?;
    for segment in segments {
        let Some(share) = segment.share(number, block.clone()) else { continue };
        let x = x.narrow(0, share.start, share.rows)?;
        let working = &segment.working[share.module];
        let dropped = segment.adapter.borrow().dropped(share.module, &x, share.mask)?;
        y = working.add(false, &x, y, share.start)?;
        y = match (&working.columns, dropped) {
            (None, dropped) => working.add(true, dropped.as_ref().unwrap_or(&x), y, share.start)?,
            (Some(columns), None) => {
                let y = working.add(true, &x, y, share.start)?;
                ops::scale_columns(y, share.start, share.rows, &columns.factor)?
            }
            (Some(columns), Some(dropped)) => {
                let frozen =
                    working.add(false, &dropped, ops::linear(&dropped, &linear.weight, dtype)?, 0)?;
                let product = working.add(true, &dropped, frozen.zeros_like()?, 0)?;
                let frozen = ops::scale_columns(frozen, 0, share.rows, &columns.surplus)?;
                let product = ops::scale_columns(product, 0, share.rows, &columns.factor)?;
                ops::add_rows(ops::add_rows(y, share.start, &frozen)?, share.start, &product)?
            }
        };
    }
    let Some(bias) = &linear.bias else { return Ok(y) };
    if let [Run { owner: None, .. }] = runs.as_slice() {
        return ops::add_bias(y, bias);
    }
    by_runs(&y, &runs, |y, run| {
        let own = run.owner.map(|(trial, copy)| &segments[trial].adapter.borrow().saved[copy]);
        ops::add_bias(y.copy()?, own.and_then(|module| module.bias.as_ref()).unwrap_or(bias))
    })
}

/// `dy · W` once for all rows (a frozen weight has no gradient of its own), plus each trial's part, added to
/// `into` if there is one.
pub(super) fn linear_backward(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    into: Option<Tensor>,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<Tensor> {
    let (dz, narrow) = adapters_backward(linear, number, x, first, dy, segments)?;
    copies_backward(number, x, first, dy, segments)?;
    let runs = runs(segments, Kind::Linear(number), first..first + x.dims()[0]);
    let mut into = into;
    let mut dx = by_runs(dz.as_ref().unwrap_or(dy), &runs, |dy, run| {
        let weight = run.weight(segments).unwrap_or(&linear.weight);
        ops::linear_backward(dy, weight, part(&mut into, run, runs.len())?)
    })?;
    for Narrow { segment, share, dh, dropped } in narrow {
        let Segment { adapter, working, .. } = &segments[segment];
        let working = &working[share.module];
        dx = adapter.add_input_gradient(share.module, working, &dh, dx, share.start, share.mask)?;
        if let Some(dropped) = dropped {
            let part = adapter.dropped_backward(share.module, dropped, share.mask)?;
            dx = ops::add_rows(dx, share.start, &part)?;
        }
    }
    Ok(dx)
}

/// Adds the gradients by the trials' own copies of linear layer `number`, whose output has the gradient `dy`.
fn copies_backward(
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<()> {
    for Run { rows, owner } in runs(segments, Kind::Linear(number), first..first + x.dims()[0]) {
        let Some((trial, copy)) = owner else { continue };
        let (x, dy) = (x.narrow(0, rows.start, rows.len())?, dy.narrow(0, rows.start, rows.len())?);
        let module = &mut segments[trial].adapter.saved[copy];
        let sum = module.grad_weight.take();
        module.grad_weight = Some(ops::linear_weight_gradient(sum, &x, &dy)?);
        if module.bias.is_some() {
            accumulate(&mut module.grad_bias, dy.to_dtype(DType::F32)?.sum(0)?)?;
        }
    }
    Ok(())
}

/// A gradient on the narrow side of a trial's adapter.
struct Narrow {
    segment: usize,
    share: Share,
    /// `[rows, rank]` of each of its products.
    dh: Vec<Tensor>,
    /// `[rows, in]`: with magnitudes and dropout, the gradient by what the frozen product saw of the dropped input.
    dropped: Option<Tensor>,
}

/// Adds the gradients of the trials' adapters of linear layer `number`, whose output has the gradient `dy`. Where a
/// trial has magnitudes and no dropout, the gradient before them comes back too: it is what goes on through the frozen product.
fn adapters_backward(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<(Option<Tensor>, Vec<Narrow>)> {
    let mut dz: Option<Tensor> = None;
    let mut narrow = Vec::with_capacity(segments.len());
    let whole_dy = dy;
    let block = first..first + x.dims()[0];
    for (place, segment) in segments.iter_mut().enumerate() {
        let Some(share) = segment.share(number, block.clone()) else { continue };
        let (x, dy) = (x.narrow(0, share.start, share.rows)?, dy.narrow(0, share.start, share.rows)?);
        let working = &segment.working[share.module];
        let (mut d_product, mut d_initial, mut d_dropped) = (dy.clone(), dy.clone(), None);
        let seen = segment.adapter.dropped(share.module, &x, share.mask)?;
        let is_dropped = seen.is_some();
        let seen = seen.unwrap_or(x);
        if let Some(columns) = &working.columns {
            // The outputs before the magnitudes were not kept.
            let z = ops::linear(&seen, &linear.weight, seen.dtype())?;
            let z = working.add(true, &seen, working.add(false, &seen, z, 0)?, 0)?;
            segment.adapter.magnitude_backward(share.module, columns, &z, &dy)?;
            drop(z);
            let scaled = |factors| ops::scale_columns(dy.copy()?, 0, share.rows, factors);
            if is_dropped {
                d_product = scaled(&columns.factor)?;
                let surplus = scaled(&columns.surplus)?;
                let frozen = ops::linear_backward(&surplus, &linear.weight, None)?;
                d_dropped = Some(working.add_initial_backward(&surplus, frozen)?);
            } else {
                let whole = dz.take().map_or_else(|| whole_dy.copy(), Ok)?;
                let whole = ops::scale_columns(whole, share.start, share.rows, &columns.factor)?;
                d_product = whole.narrow(0, share.start, share.rows)?;
                d_initial = d_product.clone();
                dz = Some(whole);
            }
        }
        let dh = segment.adapter.backward(share.module, working, &seen, &d_product, &d_initial)?;
        narrow.push(Narrow { segment: place, share, dh, dropped: d_dropped });
    }
    Ok((dz, narrow))
}
