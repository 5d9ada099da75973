//! The layers of a pass, forward and backward, and the products with their adapters.

use super::tokens::Tokens;
use crate::error::Result;
use crate::lora::{Adapter, DropoutCounter, MaskPlace, Working};
use crate::memory::{Held, Meter};
use crate::model::{Base, Linear};
use crate::ops::{self, Branch, Heads, Rotary};
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
        Ok(Self { adapter, tokens, asked, dropout, modules, working })
    }

    /// The trial's share of `block`, some of the rows that go through linear layer `number`; none if its
    /// adapter leaves the layer out.
    fn share(&self, number: usize, block: Range<usize>) -> Option<Share> {
        let module = self.modules[number]?;
        let is_head = number + 1 == self.modules.len();
        let own = if is_head { &self.asked } else { &self.tokens };
        let (first, end) = (own.start.max(block.start), own.end.min(block.end));
        let mask = self.dropout.map(|counter| MaskPlace { counter, first_row: first - own.start });
        (first < end).then(|| Share { module, start: first - block.start, rows: end - first, mask })
    }
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
        let mut x = self.hold(ops::gather(&self.base.embedding, ids)?);
        for index in 0..self.base.layers.len() {
            let saved = self.layer(index, x, segments, &mut attend)?;
            x = self.output(index, &saved, segments)?;
            keep(saved);
        }
        Ok(x)
    }

    fn hold(&self, tensor: Tensor) -> Held {
        self.meter.hold(tensor)
    }

    /// What is kept of a product that makes queries or keys.
    fn kept(&self, product: Tensor, norm: Option<&Tensor>) -> Result<Held> {
        let dim = self.base.config.head_dim;
        Ok(self.hold(if norm.is_none() { self.rotary.forward(product, dim)? } else { product }))
    }

    /// What attention takes of that, if it is something else.
    fn normed(&self, kept: &Tensor, norm: Option<&Tensor>) -> Result<Option<Held>> {
        let Some(weight) = norm else { return Ok(None) };
        let config = &self.base.config;
        let normed = ops::head_norm(kept, weight, config.rms_norm_eps)?;
        Ok(Some(self.hold(self.rotary.forward(normed, config.head_dim)?)))
    }

    /// The gradient by the product, given that by what attention takes.
    fn normed_backward(&self, kept: Held, norm: Option<&Tensor>, dy: Tensor) -> Result<Held> {
        let config = &self.base.config;
        let dy = self.hold(self.rotary.backward(dy, config.head_dim)?);
        let Some(weight) = norm else { return Ok(dy) };
        Ok(self.hold(ops::head_norm_backward(&kept, weight, config.rms_norm_eps, &dy)?))
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
        let eps = self.base.config.rms_norm_eps;
        let [q_norm, k_norm] = layer.head_norms();
        let number = |place: usize| index * layer.linears.len() + place;
        let linear = |place: usize, x: &Tensor| {
            linear(&layer.linears[place], number(place), x, 0, x.dtype(), segments)
        };

        let normed = self.hold(ops::rms_norm(&input, &layer.input_norm, eps)?);
        let q = self.kept(linear(Q, &normed)?, q_norm)?;
        let k = self.kept(linear(K, &normed)?, k_norm)?;
        let v = self.hold(linear(V, &normed)?);
        drop(normed);
        let (seen_q, seen_k) = (self.normed(&q, q_norm)?, self.normed(&k, k_norm)?);
        let (seen_q, seen_k) = (seen_q.as_deref().unwrap_or(&q), seen_k.as_deref().unwrap_or(&k));
        let attended = self.hold(attend(index, seen_q, seen_k, &v)?);
        let middle = self.hold(ops::add(linear(O, &attended)?, &input)?);
        let normed = self.hold(ops::rms_norm(&middle, &layer.post_attention_norm, eps)?);
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

    /// The gradient by the layer's input, given that by its output; adds the adapters' gradients. Nobody asks
    /// for the first layer's, the gradient by embedding rows: there it is `None`.
    pub(super) fn layer_backward(
        &self,
        index: usize,
        saved: Saved,
        dy: Held,
        segments: &mut [Segment<&mut Adapter>],
    ) -> Result<Option<Held>> {
        let layer = &self.base.layers[index];
        let eps = self.base.config.rms_norm_eps;
        let [q_norm, k_norm] = layer.head_norms();
        let Saved { input, q, k, v, attended, middle, gate, up } = saved;
        let number = |place: usize| index * layer.linears.len() + place;
        let mut back = |place: usize, x: &Tensor, dy: &Tensor, into: Option<Held>| -> Result<Held> {
            let (linear, into) = (&layer.linears[place], into.map(Held::release));
            Ok(self.hold(linear_backward(linear, number(place), x, 0, dy, into, segments)?))
        };

        let activated = self.hold(ops::swiglu(&gate, &up)?);
        let d_activated = back(DOWN, &activated, &dy, None)?;
        let (activated, d_activated) = (activated.release(), d_activated.release());
        let (d_gate, d_up) = ops::swiglu_backward(&gate, &up, activated, d_activated)?;
        let (d_gate, d_up) = (self.hold(d_gate), self.hold(d_up));
        drop((gate, up));
        let normed = self.hold(ops::rms_norm(&middle, &layer.post_attention_norm, eps)?);
        let d_normed = back(GATE, &normed, &d_gate, None)?;
        drop(d_gate);
        let d_normed = back(UP, &normed, &d_up, Some(d_normed))?;
        drop((normed, d_up));
        let norm = &layer.post_attention_norm;
        let d_middle = self.hold(ops::add_rms_norm_backward(dy.release(), &middle, norm, eps, &d_normed)?);
        drop((d_normed, middle));

        let d_attended = back(O, &attended, &d_middle, None)?;
        drop(attended);
        let normed = (self.normed(&q, q_norm)?, self.normed(&k, k_norm)?);
        let (dq, dk, dv) = ops::attention_backward(
            normed.0.as_deref().unwrap_or(&q),
            normed.1.as_deref().unwrap_or(&k),
            &v,
            self.documents,
            Heads::of(self.base, index),
            &d_attended,
        )?;
        drop((d_attended, normed, v));
        let dq = self.normed_backward(q, q_norm, dq)?;
        let dk = self.normed_backward(k, k_norm, dk)?;
        let dv = self.hold(dv);
        let normed = self.hold(ops::rms_norm(&input, &layer.input_norm, eps)?);
        if index == 0 {
            for (place, dy) in [(Q, &dq), (K, &dk), (V, &dv)] {
                adapters_backward(&layer.linears[place], number(place), &normed, 0, dy, segments)?;
            }
            return Ok(None);
        }
        let d_normed = back(Q, &normed, &dq, None)?;
        let d_normed = back(K, &normed, &dk, Some(d_normed))?;
        let d_normed = back(V, &normed, &dv, Some(d_normed))?;
        drop((normed, dq, dk, dv));
        let norm = &layer.input_norm;
        Ok(Some(self.hold(ops::add_rms_norm_backward(d_middle.release(), &input, norm, eps, &d_normed)?)))
    }
}

/// `x · Wᵀ` once for all rows, plus each trial's low-rank product for its own, plus the bias, which magnitudes leave
/// alone. `number` is the layer's among all
/// linear layers; `x` holds the rows from `first` on of all that go through it. The results are in `dtype`.
pub(super) fn linear<A: Borrow<Adapter>>(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dtype: DType,
    segments: &[Segment<A>],
) -> Result<Tensor> {
    let mut y = ops::linear(x, &linear.weight, dtype)?;
    let block = first..first + x.dims()[0];
    for segment in segments {
        let Some(share) = segment.share(number, block.clone()) else { continue };
        let x = x.narrow(0, share.start, share.rows)?;
        let working = &segment.working[share.module];
        y = segment.adapter.borrow().forward(share.module, working, &x, y, share.start, share.mask)?;
        if let Some(columns) = &working.columns {
            y = ops::scale_columns(y, share.start, share.rows, &columns.factor)?;
        }
    }
    if let Some(bias) = &linear.bias {
        y = ops::add_bias(y, bias)?;
    }
    Ok(y)
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
    let mut dx = ops::linear_backward(dz.as_ref().unwrap_or(dy), &linear.weight, into)?;
    for Narrow { segment, share, dh } in narrow {
        let Segment { adapter, working, .. } = &segments[segment];
        let working = &working[share.module];
        dx = adapter.add_input_gradient(share.module, working, &dh, dx, share.start, share.mask)?;
    }
    Ok(dx)
}

/// A gradient on the narrow side of a trial's adapter.
struct Narrow {
    segment: usize,
    share: Share,
    /// `[rows, rank]` of each of its products.
    dh: Vec<Tensor>,
}

/// Adds the gradients of the trials' adapters of linear layer `number`, whose output has the gradient `dy`. Where a
/// trial has magnitudes, the gradient before them comes back too: it is what goes on through the frozen product.
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
        let (x, mut dy) = (x.narrow(0, share.start, share.rows)?, dy.narrow(0, share.start, share.rows)?);
        let working = &segment.working[share.module];
        if let Some(columns) = &working.columns {
            // The outputs before the magnitudes were not kept.
            let z = ops::linear(&x, &linear.weight, x.dtype())?;
            let z = segment.adapter.forward(share.module, working, &x, z, 0, share.mask)?;
            segment.adapter.magnitude_backward(share.module, columns, &z, &dy)?;
            let whole = dz.take().map_or_else(|| whole_dy.copy(), Ok)?;
            let whole = ops::scale_columns(whole, share.start, share.rows, &columns.factor)?;
            dy = whole.narrow(0, share.start, share.rows)?;
            dz = Some(whole);
        }
        let dh = segment.adapter.backward(share.module, working, &x, &dy, share.mask)?;
        narrow.push(Narrow { segment: place, share, dh });
    }
    Ok((dz, narrow))
}
