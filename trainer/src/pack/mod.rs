//! A step of a pack: one frozen base and N ≥ 1 trials. The rows of all trials stand one after the other in one
//! sequence of tokens; the frozen products run once over all of it, the low-rank products trial by trial over
//! each trial's own rows. Nothing is padded, and nothing of one trial enters another's numbers.

mod generate;
mod head;
mod linear;
mod pass;
mod sample;
mod score;
mod segment;
mod tokens;
mod unread;

pub use generate::{generate, generate_until, sample_until};
pub use sample::{Sampler, Sampling};
pub use score::{Answer, Question, score};
pub(crate) use unread::{Found, Unread};

use crate::error::Result;
use crate::lora::{Adapter, DropoutCounter};
use crate::model::Base;
use crate::ops;
use candle_core::Tensor;
use pass::{Kept, Pass};
use segment::Segment;
use tokens::Tokens;

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
    /// Layers to compute again in the backward pass, from the first on. A pack goes by its most demanding member;
    /// the numbers are the same either way.
    pub recomputed_layers: usize,
    /// What the gradients are multiplied by from the loss on, so that they do not vanish in float16.
    pub loss_scale: f32,
}

impl<'a> Member<'a> {
    /// A trial that computes no layer again and scales no loss.
    pub fn new(adapter: &'a mut Adapter, rows: &'a [Row], dropout_counter: DropoutCounter) -> Self {
        Self { adapter, rows, dropout_counter, recomputed_layers: 0, loss_scale: 1.0 }
    }
}

/// What a trial gets out of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Outcome {
    /// Sum of its targets' negative log-likelihoods.
    pub nll: f64,
    /// Number of its targets.
    pub targets: u64,
    /// Number of its tokens.
    pub tokens: u64,
    /// The most bytes of tensors that the pass held for this trial: all of them if it was alone; in a pack the
    /// base and its own adapter with gradients, and of the rest its share by tokens. See [`crate::memory`].
    pub peak_bytes: u64,
    /// The most bytes of tensors that the pass held at once for all its trials.
    pub pack_peak_bytes: u64,
}

/// Each trial's outcome: from the targets' losses, which are 0 where none is given, and from what the pass held beside the
/// base and the trials' `adapters`, in bytes.
fn outcomes(base: &Base, tokens: &Tokens, nll: &[f32], adapters: &[u64], peak: u64) -> Vec<Outcome> {
    let base = base.bytes();
    let shared = peak.saturating_sub(base + adapters.iter().sum::<u64>());
    let all = tokens.ids.len().max(1) as u64;
    let outcome = |((ids, wanted), adapter): (&(std::ops::Range<usize>, std::ops::Range<usize>), &u64)| {
        let own = ids.len() as u64;
        Outcome {
            nll: nll.get(wanted.clone()).unwrap_or_default().iter().map(|x| f64::from(*x)).sum(),
            targets: wanted.len() as u64,
            tokens: own,
            peak_bytes: base + adapter + shared * own / all,
            pack_peak_bytes: peak,
        }
    };
    tokens.trials.iter().zip(adapters).map(outcome).collect()
}

/// One micro-batch of every trial of a pack. Adds to each adapter the gradient of the trial's *summed*
/// negative log-likelihood, times its `loss_scale`: the caller divides by the optimizer step's number of targets, over all its
/// micro-batches, when it steps.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn forward_backward(base: &Base, members: &mut [Member]) -> Result<Vec<Outcome>> {
    let (mut outcomes, _) = Found::of(vec![forward_backward_unread(base, members)?], &[])?.read()?;
    Ok(outcomes.remove(0))
}

/// [`forward_backward`] without waiting for a GPU, which is only given work.
///
/// # Errors
/// Those of [`forward_backward`].
pub(crate) fn forward_backward_unread(base: &Base, members: &mut [Member]) -> Result<Unread> {
    let tokens = Tokens::new(members.iter().map(|m| m.rows), base.config.vocab_size)?;
    // With the gradients.
    let adapters: Vec<u64> = members.iter().map(|m| m.adapter.bytes() + m.adapter.trained_bytes()).collect();
    let resident = base.bytes() + adapters.iter().sum::<u64>();
    if tokens.wanted.is_empty() {
        return Unread::new(outcomes(base, &tokens, &[], &adapters, resident), Vec::new(), Vec::new());
    }
    let pass = Pass::new(base, &tokens, resident)?;
    let recomputed = members.iter().map(|m| m.recomputed_layers).max().unwrap_or(0);
    let scales: Vec<_> =
        members.iter().zip(&tokens.trials).map(|(m, (_, wanted))| (wanted.clone(), m.loss_scale)).collect();
    let mut segments: Vec<_> = members
        .iter_mut()
        .zip(&tokens.trials)
        .map(|(m, (ids, wanted))| {
            Segment::new(base, &mut *m.adapter, ids.clone(), wanted.clone(), Some(m.dropout_counter))
        })
        .collect::<Result<_>>()?;
    let mut kept = Vec::with_capacity(base.layers.len());
    let hidden = pass.hidden(&tokens.ids, &segments, |saved| {
        kept.push(if kept.len() < recomputed { Kept::Input(saved.into_input()) } else { Kept::All(saved) });
    })?;
    let predicting = pass.meter.hold(ops::gather(&hidden, &tokens.predicting)?);
    drop(hidden);
    pass.meter.touch(head::working_bytes(base, &tokens.wanted, &segments, true));
    let (nll, gradient) = head::nll_backward(base, &predicting, &tokens.wanted, &scales, &mut segments)?;
    drop(predicting);
    let mut dx = Some(pass.meter.hold(ops::scatter(&gradient, &tokens.predicting, tokens.ids.len())?));
    drop(gradient);
    for (index, kept) in kept.into_iter().enumerate().rev() {
        let Some(dy) = dx else { break };
        let saved = match kept {
            Kept::All(saved) => saved,
            Kept::Input(input) => pass.again(index, input, &segments)?,
        };
        dx = pass.layer_backward(index, saved, dy, &mut segments)?;
    }
    if let Some(dx) = dx {
        pass.embedding_backward(&tokens.ids, &dx, &mut segments)?;
    }
    let wanted = tokens.trials.iter().map(|(_, wanted)| wanted.clone()).collect();
    Unread::new(outcomes(base, &tokens, &[], &adapters, pass.meter.peak()), wanted, nll)
}

/// The loss on `rows` with an adapter, or of the base alone. Neither dropout nor gradients.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn evaluate(base: &Base, adapter: Option<&Adapter>, rows: &[Row]) -> Result<Outcome> {
    let tokens = Tokens::new([rows].into_iter(), base.config.vocab_size)?;
    let own = adapter.map_or(0, Adapter::bytes);
    let resident = base.bytes() + own;
    if tokens.wanted.is_empty() {
        return Ok(outcomes(base, &tokens, &[], &[own], resident)[0]);
    }
    let pass = Pass::new(base, &tokens, resident)?;
    let segments = segments(base, adapter, tokens.ids.len(), tokens.wanted.len())?;
    let hidden = pass.hidden(&tokens.ids, &segments, drop)?;
    let predicting = ops::gather(&hidden, &tokens.predicting)?;
    pass.meter.touch(head::working_bytes(base, &tokens.wanted, &segments, false));
    let nll = head::nll(base, &predicting, &tokens.wanted, &segments)?;
    Ok(outcomes(base, &tokens, &nll, &[own], pass.meter.peak())[0])
}

/// The logits after each token of one sequence, `[tokens, vocab]`.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn logits(base: &Base, adapter: Option<&Adapter>, input_ids: &[u32]) -> Result<Tensor> {
    let row = Row::whole(input_ids.to_vec());
    let tokens = Tokens::new([std::slice::from_ref(&row)].into_iter(), base.config.vocab_size)?;
    let segments = segments(base, adapter, tokens.ids.len(), tokens.ids.len())?;
    let hidden = Pass::new(base, &tokens, 0)?.hidden(&tokens.ids, &segments, drop)?;
    head::logits(base, &hidden, &segments)
}

/// The one segment of a pass that does not train, if there is an adapter: all its tokens, of which `asked` rows
/// go through the head.
fn segments<'a>(
    base: &Base,
    adapter: Option<&'a Adapter>,
    tokens: usize,
    asked: usize,
) -> Result<Vec<Segment<&'a Adapter>>> {
    adapter.map(|adapter| Segment::new(base, adapter, 0..tokens, 0..asked, None)).into_iter().collect()
}
