//! A pack's step: gradients against finite differences, packs against solo runs, dropout, isolation.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::Tensor;
use common::{FAMILIES, device, family, shared, tiny_base};
use domain::trial::{InitLoraWeights, Precision};
use trainer::lora::{Adapter, Target};
use trainer::model::Base;
use trainer::pack::{self, Member, Outcome, Row, Sampler, Sampling};
use trainer::rng;
use trainer::saved::SavedModule;

/// The tiny models of Llama's kin.
fn families() -> Vec<Base> {
    let load = |name| Base::load(&family(name).join("base"), Precision::default(), device()).unwrap();
    FAMILIES.into_iter().map(load).collect()
}

/// An adapter on every linear layer and the head, whose A and B are both random: with B zero, A has no gradient.
fn adapter(base: &Base, rank: usize, dropout: f64, seed: u64) -> Adapter {
    let modules = [base.linear_modules(), vec![base.head_module()]].concat();
    of_targets(base, Target::all(&modules, rank, 2.0 * rank as f64), dropout, seed)
}

fn of_targets(base: &Base, targets: Vec<Target>, dropout: f64, seed: u64) -> Adapter {
    let mut adapter = Adapter::new(base, &targets.into(), dropout, seed).unwrap();
    for module in &mut adapter.modules {
        module.b = (random(&module.b, seed + 1, &module.path) * 0.1).unwrap();
    }
    adapter
}

/// An adapter on half of the linear layers, and all else trained whole.
fn with_whole_modules(base: &Base, rank: usize, dropout: f64, seed: u64) -> Adapter {
    let mut adapter = adapter(base, rank, dropout, seed);
    adapter.modules.retain(|module| ["q_proj", "k_proj", "up_proj"].iter().any(|n| module.path.ends_with(n)));
    let saved = base.modules().into_iter().filter(|m| adapter.modules.iter().all(|a| a.path != m.path));
    let mut saved: Vec<_> = saved.map(|spec| SavedModule::of(base, &spec).unwrap()).collect();
    for module in &mut saved {
        let change = (random(&module.weight, seed + 2, &module.path) * 0.05).unwrap();
        module.weight = (&module.weight + change).unwrap();
    }
    Adapter { saved, ..adapter }
}

/// A tensor like `like` of numbers uniform in ±1.
fn random(like: &Tensor, seed: u64, name: &str) -> Tensor {
    let key = rng::key(seed, name);
    let values: Vec<f32> =
        (0..like.elem_count() as u64).map(|i| (2.0 * rng::uniform(key, i) - 1.0) as f32).collect();
    Tensor::from_vec(values, like.shape(), device()).unwrap()
}

/// Rows of different lengths, some tokens of which are not predicted.
fn rows(base: &Base, count: u64, seed: u64) -> Vec<Row> {
    let vocab = base.config.vocab_size as u64;
    let row = |r: u64| {
        let at = |i: u64| rng::bits(rng::key(seed, "row"), 1000 * r + i);
        let length = 5 + at(999) % 9;
        Row {
            input_ids: (0..length).map(|i| (at(i) % vocab) as u32).collect(),
            targets: (0..length).map(|i| i > 0 && at(500 + i) % 4 > 0).collect(),
        }
    };
    (0..count).map(row).collect()
}

/// One micro-batch of one adapter, its gradients fresh.
fn solo(base: &Base, adapter: &mut Adapter, rows: &[Row], counter: u64) -> Outcome {
    adapter.zero_grad();
    let mut members = [Member::new(adapter, rows, counter)];
    pack::forward_backward(base, &mut members).unwrap()[0]
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    flat(a).iter().zip(flat(b)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
}

fn gradients(adapter: &Adapter) -> Vec<Tensor> {
    adapter.gradients().cloned().collect()
}

/// The largest difference of two lists of gradients, relative to the norm of each.
fn difference(a: &[Tensor], b: &[Tensor]) -> f64 {
    let relative = |(a, b): (&Tensor, &Tensor)| {
        let d = (a - b).unwrap();
        (dot(&d, &d) / dot(b, b).max(1e-30)).sqrt()
    };
    a.iter().zip(b).map(relative).fold(0.0, f64::max)
}

/// Every matrix of every layer: the slope of the loss along a random direction, measured and computed.
fn check_gradients(name: &str, base: &Base, adapter: Adapter) {
    let all: Vec<_> = (0..adapter.named().count()).collect();
    check_some(name, base, adapter, &all);
}

/// Those of the parameters of these numbers.
fn check_some(name: &str, base: &Base, mut adapter: Adapter, which: &[usize]) {
    let rows = rows(base, 4, 7);
    solo(base, &mut adapter, &rows, 3);
    let all = gradients(&adapter);
    let names: Vec<_> = adapter.named().map(|(path, part, _)| format!("{name}: {path} {part}")).collect();
    assert_eq!(all.len(), names.len(), "{name}: a parameter without a gradient");
    for i in which.iter().copied() {
        let (gradient, what) = (&all[i], &names[i]);
        // No further than matrices of adapters go: the loss is no parabola.
        let scale = (7.0 / (gradient.elem_count() as f64).sqrt()).min(1.0);
        let direction = (random(gradient, 11, what) * scale).unwrap();
        let loss_at = |distance: f64| {
            let mut moved = adapter.clone();
            let (_, weight, _) = moved.trained().nth(i).unwrap();
            *weight = (&*weight + (&direction * distance).unwrap()).unwrap();
            solo(base, &mut moved, &rows, 3).nll
        };
        // Two step lengths take the cubic term out (Richardson).
        let slope = |h: f64| (loss_at(h) - loss_at(-h)) / (2.0 * h);
        let measured = (4.0 * slope(4e-3) - slope(8e-3)) / 3.0;
        let computed = dot(gradient, &direction);
        let norm = scale * dot(gradient, gradient).sqrt();
        let off = (measured - computed).abs();
        assert!(off < 3e-3 * norm, "{what}: slope {measured}, gradient says {computed}, norm {norm}");
    }
}

#[test]
fn every_adapter_matrix_has_the_gradient_that_finite_differences_have() {
    let check = |name: &str, base: &Base, dropout: f64| {
        check_gradients(name, base, adapter(base, 3, dropout, 5));
    };
    check("tiny", &tiny_base(), 0.0);
    check("tiny with dropout", &tiny_base(), 0.3);
    FAMILIES.iter().zip(families()).for_each(|(name, base)| check(name, &base, 0.2));
    if let Some(dir) = shared("reference/gqa/base") {
        check("gqa", &Base::load(&dir, Precision::default(), device()).unwrap(), 0.0);
    }
}

/// PEFT takes the norms for constants, which a loss does not: so that they are, A and B do not move them here.
#[test]
fn magnitudes_have_the_gradient_that_finite_differences_have_with_dropout() {
    for (init, dropout) in [
        (InitLoraWeights::Default, 0.0),
        (InitLoraWeights::Default, 0.3),
        (InitLoraWeights::Pissa, 0.0),
        (InitLoraWeights::Pissa, 0.3),
    ] {
        check_magnitudes(init, dropout);
    }
}

/// The slope of the loss along a random direction of what is given to every layer of the model: of its magnitudes; and
/// of the embedding's rows, whose gradient goes through the magnitudes and the dropped inputs of all layers.
fn check_magnitudes(init: InitLoraWeights, dropout: f64) {
    let base = tiny_base();
    let mut targets = Target::all(&[base.linear_modules(), vec![base.head_module()]].concat(), 3, 6.0);
    targets.iter_mut().for_each(|target| (target.use_dora, target.init) = (true, init));
    let mut adapter = of_targets(&base, targets, dropout, 5);
    for module in &mut adapter.modules {
        let change = (random(module.magnitude.as_ref().unwrap(), 6, &module.path) * 0.2).unwrap();
        module.magnitude = Some((module.magnitude.as_ref().unwrap() * (change + 1.0).unwrap()).unwrap());
    }
    let embedding = base.modules().remove(0);
    adapter.saved.push(SavedModule::of(&base, &embedding).unwrap());
    let steady = |(_, (_, part, _)): &(usize, (&str, &str, &Tensor))| {
        !part.starts_with("lora_A") && !part.starts_with("lora_B")
    };
    let which: Vec<_> = adapter.named().enumerate().filter(steady).map(|(i, _)| i).collect();
    assert_eq!(which.len(), adapter.modules.len() + 1);
    check_some(&format!("{init}, dropout {dropout}"), &base, adapter, &which);
}

#[test]
fn every_module_that_is_trained_whole_has_the_gradient_that_finite_differences_have() {
    let check = |name: &str, base: &Base| check_gradients(name, base, with_whole_modules(base, 3, 0.2, 5));
    check("tiny", &tiny_base());
    FAMILIES.iter().zip(families()).for_each(|(name, base)| check(name, &base));
}

#[test]
fn a_step_leaves_the_frozen_weights_alone() {
    let base = tiny_base();
    let linears = base.layers.iter().flat_map(|l| l.linears.iter().map(|l| &l.weight));
    let matrices = linears.chain([&base.head.weight]).map(|weight| weight.clone().dense().unwrap());
    let frozen: Vec<Tensor> = matrices.chain([base.embedding.clone(), base.norm.clone()]).collect();
    let bits =
        || -> Vec<Vec<f32>> { frozen.iter().map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect() };
    let before = bits();
    solo(&base, &mut adapter(&base, 4, 0.0, 1), &rows(&base, 3, 1), 0);
    assert_eq!(before, bits());
    assert!(frozen.iter().all(|t| !t.is_variable() && !t.track_op()), "a frozen weight can have a gradient");
}

/// The tiny model with so wide a head that targets go through it in blocks of some forty.
fn wide_base() -> Base {
    let mut base = tiny_base();
    base.head.weight = base.head.weight.dense().unwrap().repeat((5000, 1)).unwrap().into();
    base.config.vocab_size *= 5000;
    base
}

/// An adapter of the head is a change of its weight: for logits, evaluation and generation.
#[test]
fn an_adapted_head_is_the_merged_one() {
    let base = tiny_base();
    let mut adapter = adapter(&base, 4, 0.0, 3);
    adapter.modules.retain(|m| m.path == "lm_head");
    let change = adapter.modules[0].b.matmul(&adapter.modules[0].a).unwrap();
    let mut merged = tiny_base();
    let head = merged.head.weight.dense().unwrap();
    merged.head.weight = (head + (change * adapter.modules[0].scaling).unwrap()).unwrap().into();

    let rows = rows(&base, 5, 3);
    let prompt = &rows[0].input_ids;
    let (got, want) =
        (pack::logits(&base, Some(&adapter), prompt).unwrap(), pack::logits(&merged, None, prompt).unwrap());
    assert!(difference(&[got], &[want]) < 1e-6);
    let loss = |base, adapter| pack::evaluate(base, adapter, &rows).unwrap().nll;
    let (got, want) = (loss(&base, Some(&adapter)), loss(&merged, None));
    assert!((got - want).abs() < 1e-6 * want && (want - loss(&base, None)).abs() > 1e-2, "{got} {want}");
    let text = |base, adapter| pack::generate(base, adapter, prompt, 12, None).unwrap();
    assert_eq!(text(&base, Some(&adapter)), text(&merged, None));
    assert_ne!(text(&base, Some(&adapter)), text(&base, None));
    // It ends where it is told to, with what ended it.
    let whole = text(&base, None);
    let mut is_over = |new: &[u32]| Ok(new.len() == 5);
    assert_eq!(pack::generate_until(&base, None, prompt, 12, &[], &mut is_over).unwrap(), whole[..5]);
}

/// Drawn tokens follow their seed; at temperature 0, or with a nucleus of one token, they are the greedy ones.
#[test]
fn drawn_texts_follow_their_seed() {
    let base = tiny_base();
    let adapter = adapter(&base, 4, 0.0, 3);
    let prompt = &rows(&base, 5, 3)[0].input_ids;
    for adapter in [None, Some(&adapter)] {
        let greedy = pack::generate(&base, adapter, prompt, 12, None).unwrap();
        let text = |temperature, top_p, seed| {
            let sampler = Sampler::new(Sampling { temperature, top_p, seed }, "text").unwrap();
            pack::sample_until(&base, adapter, prompt, 12, &[], &sampler, &mut |_| Ok(false)).unwrap()
        };
        for (temperature, top_p) in [(0.0, 1.0), (0.0, 0.5), (1.0, 1e-9), (1e-6, 1.0)] {
            assert_eq!(text(temperature, top_p, 1), greedy, "{temperature} {top_p}");
        }
        let drawn = text(1.0, 0.9, 1);
        assert_eq!(text(1.0, 0.9, 1), drawn);
        assert!(drawn != greedy && drawn != text(1.0, 0.9, 2), "{drawn:?}");
    }
}

/// Trials of other rank, rows, scaling and dropout side by side have the losses and gradients of each alone.
#[test]
fn a_pack_has_its_members_solo_numbers() {
    let (tiny, wide, kin) = (tiny_base(), wide_base(), families());
    let llamas =
        [(&tiny, [2, 3, 1]), (&tiny, [1, 5, 2]), (&tiny, [4, 0, 3]), (&wide, [4, 9, 8]), (&wide, [7, 0, 12])];
    // Sums in another order are further off with the kin's larger weights.
    let llamas = llamas.map(|(base, sizes)| (base, sizes, 2e-6));
    for (base, sizes, tolerance) in llamas.into_iter().chain(kin.iter().map(|base| (base, [2, 4, 3], 1e-5))) {
        let data: Vec<_> = sizes.iter().zip(20..).map(|(n, seed)| rows(&tiny, *n, seed)).collect();
        let make = |whole: bool| {
            let of = if whole { with_whole_modules } else { adapter };
            [of(base, 2, 0.0, 1), adapter(base, 7, 0.2, 2), of(base, 4, 0.5, 3)]
        };
        // Copies of a head that is that wide would take a while.
        let (mut together, mut alone) =
            (make(base.config.vocab_size < 1000), make(base.config.vocab_size < 1000));
        let mut members: Vec<Member> = together
            .iter_mut()
            .zip(&data)
            .enumerate()
            .map(|(i, (adapter, rows))| Member::new(adapter, rows, i as u64))
            .collect();
        let outcomes = pack::forward_backward(base, &mut members).unwrap();
        for (i, adapter) in alone.iter_mut().enumerate() {
            let want = solo(base, adapter, &data[i], i as u64);
            let (got, what) =
                (outcomes[i], format!("vocab {}, {sizes:?}, member {i}", base.config.vocab_size));
            assert_eq!((got.targets, got.tokens), (want.targets, want.tokens), "{what}");
            assert!((got.nll - want.nll).abs() <= 1e-6 * want.nll, "{what}: {} {}", got.nll, want.nll);
            if want.targets > 0 {
                let off = difference(&gradients(&together[i]), &gradients(adapter));
                assert!(off < tolerance, "{what}: gradients differ by {off}");
            }
        }
    }
}

#[test]
fn one_members_nan_stays_its_own() {
    let base = tiny_base();
    let (sick_rows, sound_rows) = (rows(&base, 2, 1), rows(&base, 3, 2));
    let (mut sick, mut sound) = (adapter(&base, 4, 0.0, 1), adapter(&base, 4, 0.0, 2));
    sick.modules[3].b = (&sick.modules[3].b * f64::NAN).unwrap();
    let mut alone = sound.clone();
    let mut members = [Member::new(&mut sick, &sick_rows, 0), Member::new(&mut sound, &sound_rows, 0)];
    let outcomes = pack::forward_backward(&base, &mut members).unwrap();
    let want = solo(&base, &mut alone, &sound_rows, 0);
    assert!(outcomes[0].nll.is_nan());
    assert!((outcomes[1].nll - want.nll).abs() <= 1e-6 * want.nll);
    assert!(difference(&gradients(&sound), &gradients(&alone)) < 2e-6);
}

#[test]
fn a_dropout_mask_is_its_counters() {
    let base = tiny_base();
    let rows = rows(&base, 3, 4);
    let at = |dropout, counter| {
        let mut adapter = adapter(&base, 4, dropout, 9);
        let outcome = solo(&base, &mut adapter, &rows, counter);
        (outcome.nll, gradients(&adapter))
    };
    let (loss, first) = at(0.4, 1);
    let (again, second) = at(0.4, 1);
    assert_eq!((loss, difference(&first, &second)), (again, 0.0), "a replayed step differs");
    let (other, third) = at(0.4, 2);
    assert!(loss != other && difference(&first, &third) > 0.01, "another micro-batch has the same masks");
    assert_eq!(at(0.0, 1).0, at(0.0, 2).0, "without dropout the counter matters");
    // Evaluation drops nothing.
    let outcome = pack::evaluate(&base, Some(&adapter(&base, 4, 0.4, 9)), &rows).unwrap();
    assert!((outcome.nll - at(0.0, 1).0).abs() < 1e-6 * outcome.nll);
}

#[test]
fn rows_do_not_see_each_other() {
    let base = tiny_base();
    let (mut adapter, rows) = (adapter(&base, 4, 0.0, 1), rows(&base, 4, 8));
    let together = solo(&base, &mut adapter, &rows, 0);
    let sum = gradients(&adapter);
    let mut alone = Outcome::default();
    let mut parts: Vec<Tensor> = sum.iter().map(|t| t.zeros_like().unwrap()).collect();
    for row in &rows {
        let outcome = solo(&base, &mut adapter, std::slice::from_ref(row), 0);
        alone.nll += outcome.nll;
        alone.targets += outcome.targets;
        parts = parts.iter().zip(gradients(&adapter)).map(|(a, b)| (a + b).unwrap()).collect();
    }
    assert_eq!(together.targets, alone.targets);
    assert!((together.nll - alone.nll).abs() < 1e-6 * alone.nll);
    assert!(difference(&sum, &parts) < 2e-6);
}
