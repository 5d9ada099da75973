//! The layers of a pass, forward and backward.

use super::linear::{adapters_backward, copies_backward, linear, linear_backward};
use super::segment::{Norm, Segment, runs};
use super::tokens::Tokens;
use crate::error::Result;
use crate::lora::Adapter;
use crate::memory::{Held, Meter};
use crate::model::{Base, NormNumbers};
use crate::ops::{self, Branch, Branches, Documents, Heads, Rotary};
use crate::saved::{Kind, Run};
use crate::weight::Weight;
use candle_core::Tensor;
use std::borrow::Borrow;

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
    documents: Documents,
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
            return ops::attention(q, k, v, &Documents::new(vec![whole]), heads);
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
        let documents = Documents::new(tokens.documents.clone());
        Ok(Self { base, documents, rotary, meter })
    }

    /// Runs all layers; `keep` receives what each layer's backward needs.
    pub(super) fn hidden<A: Borrow<Adapter>>(
        &self,
        ids: &[u32],
        segments: &[Segment<A>],
        keep: impl FnMut(Saved),
    ) -> Result<Held> {
        let attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            ops::attention(q, k, v, &self.documents, Heads::of(self.base, index))
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
        let branches = Branches::new(branches);
        let attend = |index, q: &Tensor, k: &Tensor, v: &Tensor| {
            ops::branched_attention(q, k, v, &branches, Heads::of(self.base, index))
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
            ops::attention(q, k, v, &self.documents, Heads::of(self.base, index))
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
            &self.documents,
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
