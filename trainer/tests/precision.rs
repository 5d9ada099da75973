//! Bases in fewer bits, and layers that are computed again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Tensor};
use common::{FAMILIES, device, family, write_tiny_model};
use domain::trial::{ComputeDtype, Precision, PrecisionMode};
use std::path::{Path, PathBuf};
use trainer::lora::{Adapter, Target};
use trainer::model::Base;
use trainer::pack::{self, Member, Outcome, Row};
use trainer::weight::Weight;

fn rows() -> Vec<Row> {
    (0..5u32).map(|r| Row::whole((0..9 + r).map(|i| (7 * i + 11 * r) % 40).collect())).collect()
}

/// An adapter on every linear layer and the head, with dropout, whose B is not zero.
fn adapter(base: &Base, seed: u64) -> Adapter {
    let modules = [base.linear_modules(), vec![base.head_module()]].concat();
    let targets = Target::all(&modules, 4, 8.0);
    let mut adapter = Adapter::new(base, &targets.into(), 0.2, seed).unwrap();
    for module in &mut adapter.modules {
        let source = module.a.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values: Vec<f32> = source.iter().cycle().take(module.b.elem_count()).map(|x| x / 3.0).collect();
        module.b = Tensor::from_vec(values, module.b.shape(), device()).unwrap();
    }
    adapter
}

fn gradients(adapter: &Adapter) -> Vec<f32> {
    let tensors =
        adapter.modules.iter().flat_map(|m| [m.grad_a.as_ref().unwrap(), m.grad_b.as_ref().unwrap()]);
    tensors.flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

/// A step's outcome and gradients, with some layers computed again and a scaled loss.
fn step(base: &Base, recomputed_layers: usize, loss_scale: f32) -> (Outcome, Vec<f32>) {
    let (mut adapter, rows) = (adapter(base, 3), rows());
    let member = Member { recomputed_layers, loss_scale, ..Member::new(&mut adapter, &rows, 7) };
    let outcome = pack::forward_backward(base, &mut [member]).unwrap()[0];
    (outcome, gradients(&adapter))
}

/// The tiny Llama, written into `dir`, and its kin.
fn models(dir: &Path) -> Vec<PathBuf> {
    write_tiny_model(dir);
    FAMILIES.iter().map(|name| family(name).join("base")).chain([dir.to_path_buf()]).collect()
}

fn tiny(dir: &Path, mode: PrecisionMode, compute_dtype: Option<ComputeDtype>) -> Base {
    Base::load(dir, Precision { mode, compute_dtype, double_quant: true }, device()).unwrap()
}

#[test]
fn layers_computed_again_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let models = models(dir.path());
    let modes = [PrecisionMode::Float32, PrecisionMode::FourBit];
    for (model, mode) in models.iter().flat_map(|model| modes.map(|mode| (model, mode))) {
        let base = tiny(model, mode, None);
        let (kept, want) = step(&base, 0, 1.0);
        for layers in [1, 2, 99] {
            let (again, got) = step(&base, layers, 1.0);
            assert_eq!((got == want, again.nll), (true, kept.nll), "{layers} layers, {mode:?}, {model:?}");
            assert!(again.peak_bytes <= kept.peak_bytes);
        }
        assert!(step(&base, 1, 1.0).0.peak_bytes < kept.peak_bytes, "memory is what it is for");
        // A pack goes by its most demanding member, and each has the numbers that it has alone.
        let (mut first, mut second, rows) = (adapter(&base, 3), adapter(&base, 4), rows());
        let member =
            |adapter, recomputed_layers| Member { recomputed_layers, ..Member::new(adapter, &rows, 7) };
        pack::forward_backward(&base, &mut [member(&mut first, 0), member(&mut second, 2)]).unwrap();
        let (mut alone, mut other) = (adapter(&base, 3), adapter(&base, 4));
        pack::forward_backward(&base, &mut [member(&mut alone, 0), member(&mut other, 0)]).unwrap();
        assert!(gradients(&first) == gradients(&alone) && gradients(&second) == gradients(&other));
    }
}

/// A power of two goes through every product to the gradients and leaves the loss alone.
#[test]
fn a_scaled_loss_scales_gradients_alone() {
    let base = common::tiny_base();
    let (plain, want) = step(&base, 0, 1.0);
    let (scaled, got) = step(&base, 0, 1024.0);
    assert_eq!(plain.nll, scaled.nll);
    assert!(want.iter().zip(&got).all(|(want, got)| *got == 1024.0 * want));
}

/// A base in fewer bits is the base of the rounded weights: the same loss and gradients but for the order of sums.
#[test]
fn a_base_in_fewer_bits_is_that_of_the_rounded_weights() {
    let dir = tempfile::tempdir().unwrap();
    models(dir.path()).iter().for_each(|model| check_rounded(model));
}

fn check_rounded(model: &Path) {
    let whole = tiny(model, PrecisionMode::Float32, None).bytes();
    for (mode, compute_dtype) in [
        (PrecisionMode::Bfloat16, None),
        (PrecisionMode::Float16, None),
        (PrecisionMode::FourBit, Some(ComputeDtype::Float32)),
        (PrecisionMode::FourBit, Some(ComputeDtype::Bfloat16)),
    ] {
        let base = tiny(model, mode, compute_dtype);
        let mut rounded = tiny(model, PrecisionMode::Float32, None);
        let float32 = |weight: &Weight| Weight::from(weight.to_float32().unwrap());
        rounded.embedding = base.embedding.to_dtype(DType::F32).unwrap();
        rounded.head.weight = float32(&base.head.weight);
        for (layer, held) in rounded.layers.iter_mut().zip(&base.layers) {
            for (linear, held) in layer.linears.iter_mut().zip(&held.linears) {
                linear.weight = float32(&held.weight);
            }
        }
        let ((got_loss, got), (want_loss, want)) = (step(&base, 0, 1.0), step(&rounded, 0, 1.0));
        let what = format!("{} of {model:?}", base.precision);
        assert!((got_loss.nll - want_loss.nll).abs() < 1e-5 * want_loss.nll, "{what}: the loss");
        let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        assert!(off < 1e-5 * largest, "{what}: gradients differ by {off} of {largest}");
        assert!(base.bytes() < whole * 6 / 10 || compute_dtype == Some(ComputeDtype::Float32), "{what}");
        let full = step(&tiny(model, PrecisionMode::Float32, None), 0, 1.0).0.nll;
        let change = (got_loss.nll - full).abs() / full;
        assert!(change > 1e-7 && change < 0.1, "{what}: the loss moves by {change}");
    }
}
