//! A step of a pack: one frozen base and N ≥ 1 trials. The rows of all trials stand one after the other in one
//! sequence of tokens; the frozen products run once over all of it, the low-rank products trial by trial over
//! each trial's own rows. Nothing is padded, and nothing of one trial enters another's numbers.

use crate::error::{Result, TrainError};
use crate::lora::{Adapter, DropoutCounter};
use crate::model::{Base, Layer, Linear};
use crate::ops::{self, Heads, Rotary};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// One row of text: its tokens, and which of them are predicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Whether token i counts in the loss (predicted from the tokens before it). The first never does.
    pub targets: Vec<bool>,
}

impl Row {
    /// A row whose every token but the first is a target.
    pub fn whole(input_ids: Vec<u32>) -> Self {
        let targets = (0..input_ids.len()).map(|i| i > 0).collect();
        Self { input_ids, targets }
    }
}

/// What a trial brings to a step.
pub struct Member<'a> {
    /// Its adapter, whose gradients the step adds to.
    pub adapter: &'a mut Adapter,
    /// The rows of its micro-batch.
    pub rows: &'a [Row],
    /// The micro-batch's running number in the run: names its dropout masks.
    pub dropout_counter: DropoutCounter,
}

/// What a trial gets out of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    /// Sum of its targets' negative log-likelihoods.
    pub nll: f64,
    /// Number of its targets.
    pub targets: u64,
    /// Number of its tokens.
    pub tokens: u64,
}

/// A trial's adapter for a pass, and the tokens it applies to.
struct Segment<'a> {
    adapter: Option<&'a Adapter>,
    tokens: Range<usize>,
    dropout: Option<DropoutCounter>,
}

/// The tokens of a pass.
struct Tokens {
    ids: Vec<u32>,
    positions: Vec<u32>,
    /// Each row's range of tokens.
    documents: Vec<Range<usize>>,
    /// Positions whose next token counts, in order.
    predicting: Vec<u32>,
    /// The token that each of them predicts.
    wanted: Vec<u32>,
    /// For each trial, its range in `ids` and its range in `wanted`.
    trials: Vec<(Range<usize>, Range<usize>)>,
}

impl Tokens {
    fn new<'a>(trials: impl Iterator<Item = &'a [Row]>, vocab: usize) -> Result<Self> {
        let mut t = Self {
            ids: Vec::new(),
            positions: Vec::new(),
            documents: Vec::new(),
            predicting: Vec::new(),
            wanted: Vec::new(),
            trials: Vec::new(),
        };
        for rows in trials {
            let (tokens, wanted) = (t.ids.len(), t.wanted.len());
            for row in rows.iter().filter(|row| !row.input_ids.is_empty()) {
                let start = t.ids.len();
                for (i, id) in row.input_ids.iter().enumerate() {
                    if *id as usize >= vocab {
                        return Err(TrainError::parameter(
                            "dataset_name",
                            format!("token id {id} is not below the model's vocab_size {vocab}"),
                            "tokenise with the model's own tokenizer",
                        ));
                    }
                    if i > 0 && row.targets[i] {
                        t.predicting.push((start + i - 1) as u32);
                        t.wanted.push(*id);
                    }
                }
                t.ids.extend(&row.input_ids);
                t.positions.extend(0..row.input_ids.len() as u32);
                t.documents.push(start..t.ids.len());
            }
            t.trials.push((tokens..t.ids.len(), wanted..t.wanted.len()));
        }
        Ok(t)
    }

    fn outcomes(&self, nll: &[f32]) -> Vec<Outcome> {
        let outcome = |(tokens, wanted): &(Range<usize>, Range<usize>)| Outcome {
            nll: nll[wanted.clone()].iter().map(|x| f64::from(*x)).sum(),
            targets: wanted.len() as u64,
            tokens: tokens.len() as u64,
        };
        self.trials.iter().map(outcome).collect()
    }
}

/// What a layer's backward needs of its forward. Norms and activations are computed again.
struct Saved {
    input: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    middle: Tensor,
    gate: Tensor,
    up: Tensor,
}

/// What is the same in all layers of a pass.
struct Pass<'a> {
    base: &'a Base,
    documents: &'a [Range<usize>],
    rotary: Rotary,
    heads: Heads,
}

impl<'a> Pass<'a> {
    fn new(base: &'a Base, tokens: &'a Tokens) -> Result<Self> {
        let rotary = Rotary::new(&base.inverse_frequencies, &tokens.positions, base.device())?;
        Ok(Self { base, documents: &tokens.documents, rotary, heads: Heads::of(base) })
    }

    /// Runs all layers; `keep` receives what each layer's backward needs.
    fn hidden(&self, ids: &[u32], segments: &[Segment], mut keep: impl FnMut(Saved)) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, ids.len(), self.base.device())?;
        let mut x = self.base.embedding.index_select(&ids, 0)?;
        for layer in &self.base.layers {
            let (output, saved) = self.layer(layer, x, segments)?;
            keep(saved);
            x = output;
        }
        Ok(x)
    }

    fn layer(&self, layer: &Layer, input: Tensor, segments: &[Segment]) -> Result<(Tensor, Saved)> {
        let eps = self.base.config.rms_norm_eps;
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = &layer.linears;
        let normed = ops::rms_norm(&input, &layer.input_norm, eps)?;
        let q = self.rotary.forward(&linear(q_proj, &normed, segments)?, self.heads.dim)?;
        let k = self.rotary.forward(&linear(k_proj, &normed, segments)?, self.heads.dim)?;
        let v = linear(v_proj, &normed, segments)?;
        let attended = ops::attention(&q, &k, &v, self.documents, self.heads)?;
        let middle = input.add(&linear(o_proj, &attended, segments)?)?;
        let normed = ops::rms_norm(&middle, &layer.post_attention_norm, eps)?;
        let gate = linear(gate_proj, &normed, segments)?;
        let up = linear(up_proj, &normed, segments)?;
        let output = middle.add(&linear(down_proj, &ops::swiglu(&gate, &up)?, segments)?)?;
        Ok((output, Saved { input, q, k, v, attended, middle, gate, up }))
    }

    /// The gradient by the layer's input, given that by its output; adds the adapters' gradients.
    fn layer_backward(
        &self,
        layer: &Layer,
        saved: Saved,
        dy: Tensor,
        members: &mut [Member],
        ranges: &[Range<usize>],
    ) -> Result<Tensor> {
        let eps = self.base.config.rms_norm_eps;
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = &layer.linears;
        let Saved { input, q, k, v, attended, middle, gate, up } = saved;
        let mut back = |l: &Linear, x: &Tensor, dy: &Tensor| linear_backward(l, x, dy, members, ranges);

        let d_act = back(down_proj, &ops::swiglu(&gate, &up)?, &dy)?;
        let (d_gate, d_up) = ops::swiglu_backward(&gate, &up, &d_act)?;
        let normed = ops::rms_norm(&middle, &layer.post_attention_norm, eps)?;
        let d_normed = back(gate_proj, &normed, &d_gate)?.add(&back(up_proj, &normed, &d_up)?)?;
        let d_middle =
            dy.add(&ops::rms_norm_backward(&middle, &layer.post_attention_norm, eps, &d_normed)?)?;

        let d_attended = back(o_proj, &attended, &d_middle)?;
        let (dq, dk, dv) = ops::attention_backward(&q, &k, &v, self.documents, self.heads, &d_attended)?;
        let dq = self.rotary.backward(&dq, self.heads.dim)?;
        let dk = self.rotary.backward(&dk, self.heads.dim)?;
        let normed = ops::rms_norm(&input, &layer.input_norm, eps)?;
        let d_normed = back(q_proj, &normed, &dq)?.add(&back(k_proj, &normed, &dk)?)?;
        let d_normed = d_normed.add(&back(v_proj, &normed, &dv)?)?;
        Ok(d_middle.add(&ops::rms_norm_backward(&input, &layer.input_norm, eps, &d_normed)?)?)
    }
}

/// `x · Wᵀ` once for all tokens, plus each trial's low-rank product for its own.
fn linear(layer: &Linear, x: &Tensor, segments: &[Segment]) -> Result<Tensor> {
    let y = x.matmul(&layer.weight.t()?)?;
    let mut parts = Vec::with_capacity(segments.len());
    let mut any = false;
    for segment in segments {
        let rows = segment.tokens.len();
        let found = segment.adapter.and_then(|a| a.position(&layer.path).map(|module| (a, module)));
        parts.push(match found {
            Some((adapter, module)) if rows > 0 => {
                any = true;
                let x = x.narrow(0, segment.tokens.start, rows)?;
                adapter.forward(module, &x, segment.dropout)?
            }
            _ => Tensor::zeros((rows, y.dims()[1]), DType::F32, y.device())?,
        });
    }
    if any { sum_rows(y, parts) } else { Ok(y) }
}

/// `dy · W` once for all tokens (a frozen weight has no gradient of its own), plus each trial's part.
fn linear_backward(
    layer: &Linear,
    x: &Tensor,
    dy: &Tensor,
    members: &mut [Member],
    ranges: &[Range<usize>],
) -> Result<Tensor> {
    let dx = dy.matmul(&layer.weight)?;
    let mut parts = Vec::with_capacity(members.len());
    let mut any = false;
    for (member, range) in members.iter_mut().zip(ranges) {
        parts.push(match member.adapter.position(&layer.path) {
            Some(module) if !range.is_empty() => {
                any = true;
                let x = x.narrow(0, range.start, range.len())?;
                let dy = dy.narrow(0, range.start, range.len())?;
                member.adapter.backward(module, &x, &dy, Some(member.dropout_counter))?
            }
            _ => Tensor::zeros((range.len(), dx.dims()[1]), DType::F32, dx.device())?,
        });
    }
    if any { sum_rows(dx, parts) } else { Ok(dx) }
}

/// Adds parts that stand one below the other.
fn sum_rows(whole: Tensor, mut parts: Vec<Tensor>) -> Result<Tensor> {
    match parts.len() {
        1 => Ok(whole.add(&parts.remove(0))?),
        _ => Ok(whole.add(&Tensor::cat(&parts, 0)?)?),
    }
}

/// One micro-batch of every trial of a pack. Adds to each adapter the gradient of the trial's *summed*
/// negative log-likelihood: the caller divides by the optimizer step's number of targets, over all its
/// micro-batches, when it steps.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn forward_backward(base: &Base, members: &mut [Member]) -> Result<Vec<Outcome>> {
    let tokens = Tokens::new(members.iter().map(|m| m.rows), base.config.vocab_size)?;
    if tokens.wanted.is_empty() {
        return Ok(tokens.outcomes(&[]));
    }
    let pass = Pass::new(base, &tokens)?;
    let ranges: Vec<_> = tokens.trials.iter().map(|(range, _)| range.clone()).collect();
    let mut saved = Vec::with_capacity(base.layers.len());
    let hidden = {
        let segments: Vec<_> = members
            .iter()
            .zip(&ranges)
            .map(|(member, tokens)| Segment {
                adapter: Some(&*member.adapter),
                tokens: tokens.clone(),
                dropout: Some(member.dropout_counter),
            })
            .collect();
        pass.hidden(&tokens.ids, &segments, |layer| saved.push(layer))?
    };
    let predicting = Tensor::from_slice(&tokens.predicting, tokens.predicting.len(), base.device())?;
    let (nll, gradient) =
        ops::cross_entropy(&hidden.index_select(&predicting, 0)?, &tokens.wanted, base, true)?;
    let mut dx = hidden.zeros_like()?;
    if let Some(gradient) = gradient {
        dx = dx.index_add(&predicting, &gradient, 0)?;
    }
    drop(hidden);
    for layer in base.layers.iter().rev() {
        let Some(saved) = saved.pop() else { break };
        dx = pass.layer_backward(layer, saved, dx, members, &ranges)?;
    }
    Ok(tokens.outcomes(&nll))
}

/// The loss on `rows` with an adapter, or of the base alone. Neither dropout nor gradients.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn evaluate(base: &Base, adapter: Option<&Adapter>, rows: &[Row]) -> Result<Outcome> {
    let tokens = Tokens::new([rows].into_iter(), base.config.vocab_size)?;
    if tokens.wanted.is_empty() {
        return Ok(Outcome { tokens: tokens.ids.len() as u64, ..Outcome::default() });
    }
    let hidden = hidden_states(base, adapter, &tokens)?;
    let predicting = Tensor::from_slice(&tokens.predicting, tokens.predicting.len(), base.device())?;
    let (nll, _) = ops::cross_entropy(&hidden.index_select(&predicting, 0)?, &tokens.wanted, base, false)?;
    Ok(tokens.outcomes(&nll)[0])
}

/// The logits after each token of one sequence, `[tokens, vocab]`.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn logits(base: &Base, adapter: Option<&Adapter>, input_ids: &[u32]) -> Result<Tensor> {
    let row = Row::whole(input_ids.to_vec());
    let tokens = Tokens::new([std::slice::from_ref(&row)].into_iter(), base.config.vocab_size)?;
    let hidden = hidden_states(base, adapter, &tokens)?;
    Ok(ops::rms_norm(&hidden, &base.norm, base.config.rms_norm_eps)?.matmul(&base.head.t()?)?)
}

fn hidden_states(base: &Base, adapter: Option<&Adapter>, tokens: &Tokens) -> Result<Tensor> {
    let segment = Segment { adapter, tokens: 0..tokens.ids.len(), dropout: None };
    Pass::new(base, tokens)?.hidden(&tokens.ids, &[segment], drop)
}

/// Continues a prompt greedily, until `eos` or `max_new_tokens`, or the model's length, is reached. Returns
/// the new tokens alone.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn generate(
    base: &Base,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    max_new_tokens: usize,
    eos: Option<u32>,
) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    while ids.len() < (prompt.len() + max_new_tokens).min(base.config.max_position_embeddings) {
        let logits = logits(base, adapter, &ids)?;
        let next = logits.get(ids.len() - 1)?.argmax(0)?.to_scalar::<u32>()?;
        if Some(next) == eos {
            break;
        }
        ids.push(next);
    }
    Ok(ids.split_off(prompt.len()))
}
