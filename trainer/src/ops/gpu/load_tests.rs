//! Weights that are read in pieces onto the GPU, beside those that the CPU reads whole.

use super::tests::{gpu, on_gpu};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::model::Base;
use crate::model::incoming::in_pieces;
use crate::weight::{Numbers, Weight};
use candle_core::{DType, Device, Tensor};
use domain::trial::{ComputeDtype, Precision, PrecisionMode};
use safetensors::View;
use std::collections::HashMap;
use std::path::PathBuf;

const NUMBERS: [Numbers; 5] = [
    Numbers::Float32,
    Numbers::Bfloat16,
    Numbers::Float16,
    Numbers::Nf4 { double_quant: false },
    Numbers::Nf4 { double_quant: true },
];

/// The bytes of what a weight is held in.
fn bits(weight: &Weight) -> Vec<Vec<u8>> {
    let bytes = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().data().into_owned();
    match weight {
        Weight::Dense(tensor) => vec![bytes(tensor)],
        Weight::Nf4(matrix) => {
            let (codes, nested) = matrix.parts().unwrap();
            let on_cpu = matrix.to_device(&Device::Cpu).unwrap();
            let magnitudes = on_cpu.magnitudes().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
            let nested = nested.map(|(scales, ..)| scales).unwrap_or_default();
            vec![codes, magnitudes, nested]
        }
    }
}

/// In pieces of whichever size, the device holds the bits that the CPU does.
#[test]
fn weights_in_pieces_have_the_same_bits() {
    let Some(device) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    // One element, an odd number of them, whole blocks of magnitudes, more than one of those, parts at the end.
    let shapes = [[1, 1], [3, 21], [64, 64], [33, 70], [70, 260]];
    let (mut stored, mut wanted) = (HashMap::new(), Vec::new());
    for (s, shape) in shapes.iter().enumerate() {
        let key = crate::rng::key(s as u64, "incoming");
        let value = |i| 0.2 * crate::rng::uniform(key, i) - 0.1;
        let values: Vec<f64> = (0..(shape[0] * shape[1]) as u64).map(value).collect();
        let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu).unwrap();
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for (n, held) in NUMBERS.iter().enumerate() {
                let name = format!("{s} {} {n}", dtype.as_str());
                stored.insert(name.clone(), tensor.to_dtype(dtype).unwrap());
                wanted.push((name, *held));
            }
        }
    }
    candle_core::safetensors::save(&stored, dir.path().join("model.safetensors")).unwrap();
    let tensors = Checkpoint::open(dir.path()).unwrap();
    for piece in [256, 4096, 1 << 20] {
        let mut told = 0;
        let load = || {
            in_pieces(&tensors, &wanted, (device, piece), |next| {
                let mut one = |(name, held): &(String, Numbers)| next(name, *held, &mut |_| told += 1);
                wanted.iter().map(&mut one).collect::<Result<Vec<_>>>()
            })
        };
        let got = on_gpu(load).unwrap();
        for ((name, held), got) in wanted.iter().zip(&got) {
            let want = held.hold(&stored[name]).unwrap();
            assert_eq!(got.bytes(), want.bytes(), "{name}");
            assert!(bits(got) == bits(&want), "{name} as {held:?} in pieces of {piece}");
        }
        // The first and the second word of each that is quantised.
        assert_eq!(told, 2 * 2 * shapes.len() * 4);
    }
}

/// A whole base, with biases, is the one on the CPU.
#[test]
fn a_base_in_pieces_has_the_same_bits() {
    let Some(device) = gpu() else { return };
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let fixtures = std::env::var_os("LORAFLEET_FIXTURES").map_or_else(built, PathBuf::from);
    let dir = fixtures.join("families/qwen2/base");
    let of = |mode, compute_dtype| Precision { mode, compute_dtype, double_quant: true };
    for precision in [
        of(PrecisionMode::Float32, None),
        of(PrecisionMode::Float16, None),
        of(PrecisionMode::FourBit, Some(ComputeDtype::Float16)),
    ] {
        let got = on_gpu(|| Base::load(&dir, precision, device)).unwrap();
        let want = Base::load(&dir, precision, &Device::Cpu).unwrap();
        for ((name, got), (_, want)) in got.tensors().iter().zip(want.tensors()) {
            assert!(bits(got) == bits(&want), "{name} in {precision}");
        }
    }
}

/// What is wrong in a file is said in the turn of the tensor that it is of, and ends the load; so does work that fails, or
/// that asks for another tensor than the next.
#[test]
fn a_load_in_pieces_that_fails() {
    let Some(device) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (file, names) = (dir.path().join("model.safetensors"), ["a", "b", "c", "d"]);
    let tensor = Tensor::zeros((40, 64), DType::F32, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from(names.map(|name| (name, tensor.clone()))), &file).unwrap();
    let tensors = Checkpoint::open(dir.path()).unwrap();
    let wanted = names.map(|name| (name.to_string(), NUMBERS[3]));
    let load = |asked: &[&str], fails: bool| {
        let ended = on_gpu(|| {
            in_pieces(&tensors, &wanted, (device, 1024), |next| {
                for name in asked {
                    next(name, NUMBERS[3], &mut |_| ())?;
                }
                if fails { Err(candle_core::Error::Msg("is not liked".into()).into()) } else { Ok(()) }
            })
        });
        ended.err().map(|error| error.to_string()).unwrap_or_default()
    };
    for taken in 0..=4 {
        assert_eq!(load(&names[..taken], false), "", "ended after {taken}");
        assert!(load(&names[..taken], true).contains("is not liked"), "{taken}");
    }
    assert!(load(&["a", "c"], false).contains("c is not the next that is read"));
    let length = file.metadata().unwrap().len();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(length - 5000).unwrap();
    assert_eq!(load(&names[..3], false), "");
    let message = load(&names, false);
    assert!(message.contains("was cut off while it was used: d starts"), "{message}");
}
