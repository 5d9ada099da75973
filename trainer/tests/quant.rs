//! NF4 beside bitsandbytes' own codes, magnitudes and dequantised numbers, on the device under test. Where those are not
//! on the machine, a test says so and checks nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Tensor};
use common::{CPU, bitsandbytes_on_a_cpu, device, shared};
use std::collections::HashMap;
use trainer::quant::{CODE, Nf4, dynamic};

fn floats(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    // −0 and 0 are one number.
    values.iter().map(|x| (x + 0.0).to_bits()).collect()
}

/// What is quantised; the tensors that bitsandbytes made of it under `prefix`; the type that it dequantises to.
fn check(prefix: &str, input: &Tensor, want: &HashMap<String, Tensor>, dtype: DType) {
    let double = want.contains_key(&format!("{prefix}.absmax_u8"));
    let input = input.to_dtype(DType::F32).unwrap().to_device(device()).unwrap();
    let got = Nf4::quantize(&input, double).unwrap().to_device(&CPU).unwrap();
    let of = |part: &str| want.get(&format!("{prefix}.{part}"));
    let codes: Vec<u8> = of("codes").unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let (got_codes, nested) = got.parts().unwrap();
    assert_eq!(got_codes, codes, "{prefix}: codes");
    let magnitudes = got.magnitudes().unwrap();
    let Some((got_nested, got_absmax, got_offset)) = nested else {
        assert_eq!(bits(&magnitudes), bits(&floats(of("absmax").unwrap())), "{prefix}: absmax");
        return check_dequantized(prefix, &got, of("dequantized"), dtype);
    };
    let offset = floats(of("offset").unwrap())[0];
    assert!((got_offset - offset).abs() <= 2e-7 * offset.abs(), "{prefix}: offset {got_offset}, {offset}");
    let absmax = floats(of("nested_absmax").unwrap());
    for (got, want) in got_absmax.iter().zip(&absmax) {
        assert!((got - want).abs() <= 4e-7 * offset.abs().max(*want), "{prefix}: nested {got}, {want}");
    }
    let nested: Vec<u8> = of("absmax_u8").unwrap().flatten_all().unwrap().to_vec1().unwrap();
    // Where all magnitudes are alike, nothing is left beside their mean and any code says it.
    let near = |(i, (a, b)): (usize, (&u8, &u8))| absmax[i / 256] == 0.0 || a.abs_diff(*b) <= 1;
    assert!(got_nested.iter().zip(&nested).enumerate().all(near), "{prefix}: nested codes");
    // From the reference's own codes its numbers must come out to the last bit.
    let theirs = Nf4::from_parts(got.dims(), codes, Some((nested, absmax, offset)), Vec::new()).unwrap();
    let restored = bits(&theirs.magnitudes().unwrap());
    assert_eq!(restored, bits(&floats(of("absmax_restored").unwrap())), "{prefix}: restored");
    check_dequantized(prefix, &theirs, of("dequantized"), dtype);
}

fn check_dequantized(prefix: &str, got: &Nf4, want: Option<&Tensor>, dtype: DType) {
    let Some(want) = want else { return };
    let got = match bitsandbytes_on_a_cpu(got) {
        None => got.to_device(device()).unwrap().dequantize().unwrap(),
        Some(theirs) => theirs,
    };
    let got = floats(&got.to_dtype(dtype).unwrap());
    assert_eq!(bits(&got), bits(&floats(want)), "{prefix}: dequantised");
}

#[test]
fn cases_are_bitsandbytes() {
    let Some(file) = shared("reference/quant_cases.safetensors") else { return };
    let want = candle_core::safetensors::load(file, &CPU).unwrap();
    assert_eq!(bits(&CODE), bits(&floats(&want["nf4_code"])));
    let mut cases = 0;
    for key in want.keys().filter(|key| key.ends_with(".codes")) {
        let prefix = key.trim_end_matches(".codes");
        let [case, dtype, _] = prefix.split('.').collect::<Vec<_>>()[..] else { panic!("{prefix}") };
        let dtype = match dtype {
            "float32" => DType::F32,
            "bfloat16" => DType::BF16,
            _ => DType::F16,
        };
        let input = want[&format!("{case}.input")].to_dtype(dtype).unwrap();
        check(prefix, &input, &want, dtype);
        if let Some(table) = want.get(&format!("{prefix}.nested_code")) {
            assert_eq!(bits(&*dynamic::TABLE), bits(&floats(table)), "{prefix}: the 8-bit table");
        }
        cases += 1;
    }
    assert!(cases >= 20, "{cases}");
}

#[test]
fn a_model_is_quantised_as_bitsandbytes_does() {
    let Some(gqa) = shared("reference/gqa") else { return };
    let base = candle_core::safetensors::load(gqa.join("base/model.safetensors"), &CPU).unwrap();
    for file in ["base_nf4_sq.safetensors", "base_nf4_dq.safetensors"] {
        let want = candle_core::safetensors::load(gqa.join(file), &CPU).unwrap();
        let layers: Vec<_> = want.keys().filter_map(|key| key.strip_suffix(".codes")).collect();
        assert_eq!(layers.len(), 28);
        for layer in layers {
            check(layer, &base[&format!("{layer}.weight")], &want, DType::F32);
        }
    }
}
