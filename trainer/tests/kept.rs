//! A base in 4 bits that is kept in files: what is read back is what was held, and what it was made of.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{CPU, FAMILIES, device, family, flat, tiny_run, write_tiny_model};
use domain::SystemClock;
use domain::metric::{GRAD_NORM, LOSS};
use domain::trial::{ComputeDtype, Precision, PrecisionMode, TrialConfig};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use trainer::Tensor;
use trainer::kept::{Kept, Origin};
use trainer::model::{Base, LoadProgress};
use trainer::run::{Loaded, Run, step_pack};
use trainer::weight::Weight;

fn four_bit(compute_dtype: ComputeDtype, double_quant: bool) -> Precision {
    Precision { mode: PrecisionMode::FourBit, compute_dtype: Some(compute_dtype), double_quant }
}

fn origin(model: &Path, precision: Precision) -> Origin {
    Origin::of(model, None, precision).unwrap().expect("it is quantised as it is loaded")
}

/// A base loaded from a model, and once more from what was kept of it.
fn both(model: &Path, precision: Precision, to: &Path) -> [Loaded; 2] {
    let origin = origin(model, precision);
    let fresh = Loaded::load(model, precision, device()).unwrap();
    std::fs::create_dir_all(to).unwrap();
    let kept = Kept::of(&origin, &fresh);
    assert!(kept.write(to, &AtomicBool::new(false)).unwrap());
    let files = std::fs::read_dir(to).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    let bytes = files.sum::<u64>();
    assert!(bytes <= kept.bytes(), "{bytes} bytes, and {} at most were said", kept.bytes());
    [fresh, Loaded::load_kept(model, to, precision, device()).unwrap()]
}

/// A tensor's numbers, to the last bit.
fn bits(tensor: &Tensor) -> Vec<u64> {
    let floats = tensor.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap();
    floats.to_vec1::<f64>().unwrap().into_iter().map(f64::to_bits).collect()
}

fn expect_same(a: &Weight, b: &Weight, what: &str) {
    match (a, b) {
        (Weight::Dense(a), Weight::Dense(b)) => {
            assert!(a.dtype() == b.dtype() && bits(a) == bits(b), "{what}");
        }
        (Weight::Nf4(a), Weight::Nf4(b)) => {
            let parts = |matrix: &trainer::quant::Nf4| {
                let matrix = matrix.to_device(&CPU).unwrap();
                let (codes, nested) = matrix.parts().unwrap();
                let nested = nested.map(|(codes, absmax, offset)| {
                    (codes, absmax.into_iter().map(f32::to_bits).collect::<Vec<_>>(), offset.to_bits())
                });
                let magnitudes: Vec<_> = matrix.magnitudes().unwrap().into_iter().map(f32::to_bits).collect();
                (matrix.dims(), codes, nested, magnitudes)
            };
            assert!(parts(a) == parts(b), "{what}");
        }
        _ => panic!("{what}: one is quantised, the other is not"),
    }
}

fn expect_same_base(a: &Base, b: &Base) {
    assert_eq!((&a.config, a.precision, a.bytes()), (&b.config, b.precision, b.bytes()));
    let dense = |tensor: &Tensor| Weight::Dense(tensor.clone());
    expect_same(&dense(&a.embedding), &dense(&b.embedding), "embedding");
    expect_same(&dense(&a.norm), &dense(&b.norm), "norm");
    expect_same(&a.head.weight, &b.head.weight, "head");
    for (i, (a, b)) in a.layers.iter().zip(&b.layers).enumerate() {
        for (a, b) in a.linears.iter().zip(&b.linears) {
            assert!(matches!(a.weight, Weight::Nf4(_)), "{}", a.path);
            expect_same(&a.weight, &b.weight, &a.path);
            assert_eq!(a.bias.as_ref().map(bits), b.bias.as_ref().map(bits), "{}", a.path);
        }
        let norms = |layer: &trainer::model::Layer| {
            let heads = layer.head_norms().into_iter().flatten().map(bits);
            heads.chain([bits(&layer.input_norm), bits(&layer.post_attention_norm)]).collect::<Vec<_>>()
        };
        assert_eq!(norms(a), norms(b), "layer {i}");
        assert_eq!(a.window, b.window, "layer {i}");
    }
}

#[test]
fn what_is_read_back_is_what_was_held() {
    for compute in [ComputeDtype::Float32, ComputeDtype::Bfloat16, ComputeDtype::Float16] {
        for double in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let config = TrialConfig {
                precision_mode: PrecisionMode::FourBit,
                compute_dtype: Some(compute),
                double_quant: double,
                ..tiny_run(dir.path())
            };
            let model = PathBuf::from(&config.pretrained_model_id);
            let precision = config.base_model().precision;
            let [fresh, kept] = both(&model, precision, &dir.path().join("kept"));
            expect_same_base(&fresh.base, &kept.base);
            assert_eq!(fresh.digest, kept.digest, "trials record the same");
            // And so every step is the same.
            let trained = |loaded: &Loaded| {
                let (mut run, clock) = (Run::new(loaded, config.clone()).unwrap(), SystemClock::new());
                let mut numbers = Vec::new();
                for _ in 0..3 {
                    let stepped = step_pack(loaded, &mut [&mut run], &clock).unwrap().remove(0);
                    let point = stepped.point.expect("each step is told of");
                    numbers.extend([LOSS, GRAD_NORM].map(|name| point.get(name).map(f64::to_bits)));
                }
                let weights: Vec<_> = flat(run.adapter()).into_iter().map(f32::to_bits).collect();
                (numbers, weights)
            };
            assert!(trained(&fresh) == trained(&kept), "{compute:?}, double quantisation {double}");
        }
    }
}

#[test]
fn biases_head_norms_and_windows_are_kept() {
    for name in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let [fresh, kept] =
            both(&family(name).join("base"), four_bit(ComputeDtype::Bfloat16, true), dir.path());
        expect_same_base(&fresh.base, &kept.base);
    }
}

/// Each matrix is told of once as it is quantised, and none where nothing is.
#[test]
fn what_is_quantised_is_told() {
    let dir = tempfile::tempdir().unwrap();
    write_tiny_model(dir.path());
    for (precision, quantises) in
        [(four_bit(ComputeDtype::Float32, true), true), (Precision::default(), false)]
    {
        let (mut begun, mut over, mut taken) = (0, 0, 0);
        let base = Base::load_watched(dir.path(), precision, device(), &mut |progress| match progress {
            LoadProgress::Read { bytes, of } => assert!(bytes <= of && begun == over),
            LoadProgress::Quantising => begun += 1,
            LoadProgress::Quantised { bytes } => {
                over += 1;
                taken += bytes;
            }
        })
        .unwrap();
        let linears: Vec<_> = base.layers.iter().flat_map(|layer| &layer.linears).collect();
        let bytes: u64 = linears.iter().map(|linear| linear.weight.bytes()).sum();
        let want = if quantises { (linears.len(), bytes) } else { (0, 0) };
        assert_eq!((over, taken), want, "{precision}");
        assert_eq!(begun, over, "{precision}");
    }
}

#[test]
fn what_a_base_is_made_of() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_tiny_model(&model);
    let four = four_bit(ComputeDtype::Float32, true);
    let before = origin(&model, four);
    assert!(before.is_unchanged());
    assert_eq!(origin(&model, four).text(), before.text());
    // Other numbers are another base.
    for other in [four_bit(ComputeDtype::Bfloat16, true), four_bit(ComputeDtype::Float32, false)] {
        assert_ne!(origin(&model, other).text(), before.text());
    }
    // So are other files: of another time with the same bytes, of another length, of other names.
    let weights = model.join("model.safetensors");
    let file = || std::fs::File::options().append(true).open(&weights).unwrap();
    let written = weights.metadata().unwrap().modified().unwrap();
    file().set_modified(written - std::time::Duration::from_secs(5)).unwrap();
    let touched = origin(&model, four);
    assert!(!before.is_unchanged() && touched.text() != before.text());
    file().set_len(weights.metadata().unwrap().len() + 1).unwrap();
    assert!(!touched.is_unchanged());
    let longer = origin(&model, four);
    std::fs::write(model.join("model.safetensors.index.json"), r#"{"weight_map": {}}"#).unwrap();
    assert!(!longer.is_unchanged());
    // What has a name of its own is that, wherever it lies.
    let named = |content| Origin::of(&model, Some(content), four).unwrap().unwrap();
    let a = named("a");
    file().set_len(weights.metadata().unwrap().len() + 1).unwrap();
    assert!(a.is_unchanged() && a.text() == named("a").text() && a.text() != named("b").text());
    // What is not quantised as it is loaded has nothing to be kept.
    let quantized = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized/double");
    for (model, precision) in [(&model, Precision::default()), (&quantized, four)] {
        assert!(Origin::of(model, None, precision).unwrap().is_none(), "{}", model.display());
    }
}

#[test]
fn what_is_stopped_is_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (model, to) = (dir.path().join("model"), dir.path().join("kept"));
    write_tiny_model(&model);
    std::fs::create_dir(&to).unwrap();
    let precision = four_bit(ComputeDtype::Float32, true);
    let fresh = Loaded::load(&model, precision, device()).unwrap();
    let kept = Kept::of(&origin(&model, precision), &fresh);
    assert!(!kept.write(&to, &AtomicBool::new(true)).unwrap());
    assert!(Loaded::load_kept(&model, &to, precision, device()).is_err());
}
