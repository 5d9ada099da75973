//! Outcomes of passes whose losses a GPU may still compute. It is waited for once, for several passes together.

use super::{Outcome, head};
use crate::error::Result;
use crate::ops;
use candle_core::Tensor;
use std::ops::Range;

/// A pass's outcomes, the losses aside.
pub(crate) struct Unread {
    /// One a trial; `nll` is 0 where it is not known yet.
    outcomes: Vec<Outcome>,
    /// Each trial's targets.
    wanted: Vec<Range<usize>>,
    /// All targets' losses, in blocks, one after the other; none if the outcomes are whole.
    nll: Vec<Tensor>,
}

impl Unread {
    /// `outcomes` but for the losses, which are `nll` of the targets `wanted`. What a CPU computed is there at once.
    pub(super) fn new(outcomes: Vec<Outcome>, wanted: Vec<Range<usize>>, nll: Vec<Tensor>) -> Result<Self> {
        let mut pass = Self { outcomes, wanted, nll };
        if pass.nll.first().is_some_and(|nll| !ops::on_gpu(nll.device())) {
            let nll = head::values(&std::mem::take(&mut pass.nll))?;
            pass.fill(nll.into_iter().map(f64::from));
        }
        Ok(pass)
    }

    fn fill(&mut self, nll: impl Iterator<Item = f64>) {
        let nll: Vec<f64> = nll.collect();
        for (outcome, wanted) in self.outcomes.iter_mut().zip(&self.wanted) {
            outcome.nll = nll[wanted.clone()].iter().sum();
        }
    }
}

/// The outcomes of each of some passes, and the numbers of vectors of one `beside`.
///
/// # Errors
/// The device fails.
pub(crate) fn read(passes: Vec<Unread>, beside: &[Tensor]) -> Result<(Vec<Vec<Outcome>>, Vec<f64>)> {
    let unread = passes.iter().flat_map(|pass| &pass.nll).chain(beside);
    let mut numbers = ops::read(&unread.cloned().collect::<Vec<_>>())?.into_iter();
    let mut outcomes = Vec::with_capacity(passes.len());
    for mut pass in passes {
        if !pass.nll.is_empty() {
            let count = pass.nll.iter().map(Tensor::elem_count).sum();
            pass.fill(numbers.by_ref().take(count));
        }
        outcomes.push(pass.outcomes);
    }
    Ok((outcomes, numbers.collect()))
}
