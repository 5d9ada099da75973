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

    /// A trial's number of targets.
    pub(crate) fn targets(&self, trial: usize) -> u64 {
        self.outcomes[trial].targets
    }

    /// The losses of a trial's targets that a GPU may still compute, in blocks.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub(crate) fn losses(&self, trial: usize) -> Result<Vec<Tensor>> {
        let (mut losses, mut first) = (Vec::with_capacity(self.nll.len()), 0);
        for block in &self.nll {
            let (wanted, count) = (&self.wanted[trial], block.elem_count());
            let (start, end) = (wanted.start.max(first), wanted.end.min(first + count));
            if start < end {
                losses.push(block.narrow(0, start - first, end - start)?);
            }
            first += count;
        }
        Ok(losses)
    }

    fn fill(&mut self, nll: impl Iterator<Item = f64>) {
        let nll: Vec<f64> = nll.collect();
        for (outcome, wanted) in self.outcomes.iter_mut().zip(&self.wanted) {
            outcome.nll = nll[wanted.clone()].iter().sum();
        }
    }
}

/// What is still to be read of some passes, in one vector on the device: reading it asks for no memory.
pub(crate) struct Found {
    passes: Vec<Unread>,
    numbers: Option<Tensor>,
}

impl Found {
    /// Of `passes`, and the numbers of the vectors `beside` them.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub(crate) fn of(passes: Vec<Unread>, beside: &[Tensor]) -> Result<Self> {
        let unread = passes.iter().flat_map(|pass| &pass.nll).chain(beside);
        let numbers = ops::join(&unread.cloned().collect::<Vec<_>>())?;
        Ok(Self { passes, numbers })
    }

    /// The outcomes of each pass, and the numbers beside them. A GPU is waited for.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn read(self) -> Result<(Vec<Vec<Outcome>>, Vec<f64>)> {
        let mut numbers = ops::read(self.numbers.as_ref())?.into_iter();
        let mut outcomes = Vec::with_capacity(self.passes.len());
        for mut pass in self.passes {
            if !pass.nll.is_empty() {
                let count = pass.nll.iter().map(Tensor::elem_count).sum();
                pass.fill(numbers.by_ref().take(count));
            }
            outcomes.push(pass.outcomes);
        }
        Ok((outcomes, numbers.collect()))
    }
}
