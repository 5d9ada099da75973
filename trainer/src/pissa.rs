//! A weight's largest singular values as the beginning of an adapter: PiSSA (Meng, Wang and Zhang 2024,
//! <https://arxiv.org/abs/2404.02948>), as PEFT has it.
//!
//! With W = U·diag(σ)·Vᵀ, A = √(σ/s)·Vᵀ and B = U·√(σ/s) of the first `rank` of them, s the adapter's scaling. What is
//! trained beside them is the rest of the weight, W − s·B·A. A base is shared by the trials of a pack, so here it stays
//! whole and the first product is taken from the layer's output instead ([`crate::lora::LoraMatrix::initial`]).

use crate::error::{Result, TrainError};
use crate::lora::Target;
use crate::weight::Weight;
use crate::{ops, rng};
use candle_core::{Device, Tensor};
use faer::{Mat, MatRef};

/// A `[rank, in_features]` and B `[out_features, rank]` of a layer's `weight`, on the weight's device. `iterations` are
/// those of the subspace; without them the decomposition is whole. `key` names the random vectors that the subspace
/// begins with. On one machine the same weight gives the same bits. Meanwhile the CPU holds what
/// [`domain::footprint::start_bytes`] says.
///
/// # Errors
/// The weight holds NaN or infinity; the device runs out of memory.
pub fn principal(weight: &Weight, target: &Target, iterations: Option<u32>, key: u64) -> Result<[Tensor; 2]> {
    let [rows, columns] = weight.dims();
    let values = weight.to_float32()?.to_device(&Device::Cpu)?;
    let rank = target.rank;
    let decomposed = ops::with_elements(&values, |values| {
        let matrix = MatRef::from_row_major_slice(values, rows, columns);
        Ok(match iterations {
            None => decompose(matrix, rank),
            Some(iterations) => subspace(matrix, rank, iterations, key),
        })
    })?;
    let Some(Decomposed { left, singular, right }) = decomposed else {
        return Err(TrainError::parameter(
            "init_lora_weights",
            format!("the singular values of {} are no numbers: it holds NaN or infinity", target.module.path),
            "use a base model whose weights are finite",
        ));
    };
    let root = |i: usize| (singular[i] / target.scaling as f32).sqrt();
    let a = (0..rank).flat_map(|i| (0..columns).map(move |j| (i, j)));
    let a: Vec<f32> = a.map(|(i, j)| root(i) * right[(j, i)]).collect();
    let b = (0..rows).flat_map(|j| (0..rank).map(move |i| (i, j)));
    let b: Vec<f32> = b.map(|(i, j)| left[(j, i)] * root(i)).collect();
    let device = weight.device();
    Ok([Tensor::from_vec(a, (rank, columns), device)?, Tensor::from_vec(b, (rows, rank), device)?])
}

/// `rank` dimensions of U·diag(σ)·Vᵀ, the largest σ first.
struct Decomposed {
    /// `[rows, rank]`
    left: Mat<f32>,
    singular: Vec<f32>,
    /// `[columns, rank]`
    right: Mat<f32>,
}

fn decompose(matrix: MatRef<f32>, rank: usize) -> Option<Decomposed> {
    let svd = matrix.thin_svd().ok()?;
    let singular: Vec<f32> = svd.S().column_vector().iter().copied().collect();
    let sound = singular.iter().all(|value| value.is_finite());
    let first = |vectors: MatRef<f32>| vectors.subcols(0, rank).to_owned();
    sound.then(|| Decomposed { left: first(svd.U()), singular, right: first(svd.V()) })
}

/// The decomposition of what a subspace of `rank` dimensions holds of a matrix (Halko, Martinsson and Tropp 2011,
/// <https://arxiv.org/abs/0909.4061>, algorithms 4.4 and 5.1), as torch's `svd_lowrank` computes it.
fn subspace(matrix: MatRef<f32>, rank: usize, iterations: u32, key: u64) -> Option<Decomposed> {
    if matrix.nrows() < matrix.ncols() {
        let Decomposed { left, singular, right } = subspace(matrix.transpose(), rank, iterations, key)?;
        return Some(Decomposed { left: right, singular, right: left });
    }
    let basis = |of: Mat<f32>| of.qr().compute_thin_Q();
    let random = |i: usize, j: usize| rng::normal(key, (i * rank + j) as u64) as f32;
    let mut q = basis(matrix * Mat::from_fn(matrix.ncols(), rank, random));
    for _ in 0..iterations {
        let p = basis(matrix.transpose() * &q);
        q = basis(matrix * p);
    }
    let Decomposed { left, singular, right } = decompose((q.transpose() * matrix).as_ref(), rank)?;
    Some(Decomposed { left: &q * left, singular, right })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::ModuleSpec;

    /// A matrix with singular values 8, 4, 2, … in random directions.
    fn matrix(rows: usize, columns: usize) -> Weight {
        let random = |name: &str, of: usize| {
            let key = rng::key(1, name);
            Mat::from_fn(of, rows.min(columns), |i, j| rng::normal(key, (100 * i + j) as u64) as f32)
                .qr()
                .compute_thin_Q()
        };
        let (left, right) = (random("left", rows), random("right", columns));
        let scaled = Mat::from_fn(rows, left.ncols(), |i, j| left[(i, j)] * 0.5f32.powi(j as i32 - 3));
        let product = scaled * right.transpose();
        let values: Vec<f32> =
            (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))).map(|at| product[at]).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap().into()
    }

    fn target(rows: usize, columns: usize) -> Target {
        let module = ModuleSpec { path: "layer".into(), in_features: columns, out_features: rows };
        Target::all(&[module], 3, 6.0).remove(0)
    }

    /// B·A, times the scaling, is the nearest matrix of its rank: the rest has the next singular value for its norm.
    #[test]
    fn the_rest_is_as_small_as_it_can_be() {
        for (rows, columns) in [(12, 7), (7, 12), (9, 9)] {
            for iterations in [None, Some(8)] {
                let (weight, target) = (matrix(rows, columns), target(rows, columns));
                let [a, b] = principal(&weight, &target, iterations, 5).unwrap();
                assert_eq!((a.dims(), b.dims()), ([3, columns].as_slice(), [rows, 3].as_slice()));
                let product = (b.matmul(&a).unwrap() * target.scaling).unwrap();
                let rest = (weight.to_float32().unwrap() - product).unwrap();
                let values: Vec<f32> = rest.flatten_all().unwrap().to_vec1().unwrap();
                let largest = decompose(MatRef::from_row_major_slice(&values, rows, columns), 1).unwrap();
                let largest = largest.singular[0];
                assert!((largest - 1.0).abs() < 1e-4, "{rows} x {columns}, {iterations:?}: {largest}");
                let again = principal(&weight, &target, iterations, 5).unwrap();
                let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!((bits(&a), bits(&b)), (bits(&again[0]), bits(&again[1])));
            }
        }
    }

    #[test]
    fn weights_that_are_no_numbers_are_refused() {
        let weight = Tensor::full(f32::NAN, (4, 4), &Device::Cpu).unwrap().into();
        for iterations in [None, Some(2)] {
            let message = principal(&weight, &target(4, 4), iterations, 5).unwrap_err().to_string();
            assert!(message.starts_with("init_lora_weights: the singular values of layer"), "{message}");
        }
    }
}
