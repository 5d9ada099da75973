//! The optimizer's arithmetic.

use super::read;
use super::vector::{dot, widest};
use crate::error::Result;
use crate::ops::Parameter;
use candle_core::{Device, Tensor};

pub(in crate::ops) fn adamw(parameter: &Parameter, factor: f64) -> Result<[Tensor; 3]> {
    let Parameter { weight, gradient, first, second, step } = *parameter;
    let [factor, beta1, beta2, correction2, epsilon, decay, rate] =
        [factor, step.beta1, step.beta2, step.correction2, step.epsilon, step.decay, step.rate]
            .map(|x| x as f32);
    let (keep1, keep2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let n = weight.elem_count();
    let [mut w, mut m, mut v] = [(); 3].map(|()| vec![0.0f32; n]);
    read([weight, gradient, first, second], |[w0, g, m0, v0]| {
        let old = w0.iter().zip(g).zip(m0).zip(v0);
        let new = w.iter_mut().zip(&mut m).zip(&mut v);
        widest(
            #[inline(always)]
            || {
                for (((w, m), v), (((w0, g), m0), v0)) in new.zip(old) {
                    let g = g * factor;
                    *m = m0 * beta1 + g * keep1;
                    *v = v0 * beta2 + g * g * keep2;
                    *w = w0 * decay - *m / (v.sqrt() / correction2 + epsilon) * rate;
                }
            },
        );
        Ok(())
    })?;
    let tensor = |values| Tensor::from_vec(values, weight.shape(), &Device::Cpu);
    Ok([tensor(w)?, tensor(m)?, tensor(v)?])
}

pub(in crate::ops) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    read([x], |[x]| {
        widest(
            #[inline(always)]
            || Ok(x.chunks(4096).map(|x| f64::from(dot(x, x))).sum()),
        )
    })
}
