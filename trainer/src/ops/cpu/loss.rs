//! Cross-entropy over rows of logits.

use super::vector::{exponentials, widest};
use super::{for_rows2, update};
use crate::error::Result;
use candle_core::{Device, Tensor};

/// Each row's negative log-likelihood of its target. The logits turn into the gradient of their sum:
/// softmax − one-hot.
pub(in crate::ops) fn nll_and_gradient(logits: Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    let vocab = logits.dims2()?.1;
    let mut nll = vec![0.0; targets.len()];
    update(&logits, |logits| {
        for_rows2((logits, vocab), (&mut nll, 1), |first, logits, nll| {
            widest(
                #[inline(always)]
                || {
                    for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
                        let target = targets[first + i] as usize;
                        let wanted = row[target];
                        let (top, sum) = exponentials(row);
                        nll[i] = sum.ln() + top - wanted;
                        let factor = 1.0 / sum;
                        row.iter_mut().for_each(|p| *p *= factor);
                        row[target] -= 1.0;
                    }
                },
            );
        });
    })?;
    Ok((Tensor::from_vec(nll, targets.len(), &Device::Cpu)?, logits))
}
