//! Each fused operation against its formula.

use super::*;
use crate::weight::Numbers;
use candle_core::Device;

const CPU: Device = Device::Cpu;

/// Numbers uniform in ±1.
fn random(shape: (usize, usize), seed: u64) -> Tensor {
    let key = rng::key(seed, "ops");
    let values: Vec<f32> =
        (0..(shape.0 * shape.1) as u64).map(|i| (2.0 * rng::uniform(key, i) - 1.0) as f32).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// A tensor of its own, for an operation to change.
fn copy(t: &Tensor) -> Tensor {
    Tensor::from_vec(values(t), t.shape(), &CPU).unwrap()
}

/// Differences count relative to the largest element.
fn check(what: &str, fused: &Tensor, plain: &Tensor) {
    assert_eq!(fused.dims(), plain.dims(), "{what}");
    let (fused, plain) = (values(fused), values(plain));
    let size = plain.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    let difference = fused.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference <= 1e-6 * size.max(1e-30), "{what}: {difference} off, largest {size}");
}

/// Small ones, and ones large enough to be split among threads, of widths that fill no vector.
const SHAPES: [(usize, usize); 4] = [(1, 8), (5, 24), (37, 172), (700, 90)];

#[test]
fn norms_and_activations_are_their_formulas() {
    for shape in SHAPES {
        let what = |name: &str| format!("{name} {shape:?}");
        let (x, y, z) = (random(shape, 1), random(shape, 2), (random(shape, 3) * 6.0).unwrap());
        let weight = random((1, shape.1), 4).flatten_all().unwrap();
        let fused = rms_norm(&x, &weight, 1e-6).unwrap();
        check(&what("rms_norm"), &fused, &plain::rms_norm(&x, &weight, 1e-6).unwrap());
        let fused = add_rms_norm_backward(copy(&y), &x, &weight, 1e-6, &z).unwrap();
        let plain = y.add(&plain::rms_norm_backward(&x, &weight, 1e-6, &z).unwrap()).unwrap();
        check(&what("rms_norm_backward"), &fused, &plain);
        check(&what("swiglu"), &swiglu(&z, &y).unwrap(), &plain::swiglu(&z, &y).unwrap());
        let fused = swiglu_backward(&z, &y, random(shape, 5), copy(&x)).unwrap();
        let plain = plain::swiglu_backward(&z, &y, &x).unwrap();
        check(&what("swiglu_backward gate"), &fused.0, &plain.0);
        check(&what("swiglu_backward up"), &fused.1, &plain.1);
        check(&what("add"), &add(copy(&x), &y).unwrap(), &x.add(&y).unwrap());
        let sum = x.broadcast_add(&weight).unwrap();
        check(&what("add_bias"), &add_bias(copy(&x), &weight).unwrap(), &sum);
    }
}

#[test]
fn rows_move_as_indices_say() {
    for shape in SHAPES {
        let x = random(shape, 1);
        let rows: Vec<u32> = (0..shape.0 as u32).filter(|r| r % 3 != 1).collect();
        let index = Tensor::new(rows.as_slice(), &CPU).unwrap();
        check("gather", &gather(&x, &rows).unwrap(), &x.index_select(&index, 0).unwrap());
        let dy = random((rows.len(), shape.1), 2);
        let plain = x.zeros_like().unwrap().index_add(&index, &dy, 0).unwrap();
        check("scatter", &scatter(&dy, &rows, shape.0).unwrap(), &plain);
        let part = random((shape.0 - shape.0 / 2, shape.1), 3);
        let fused = add_rows(copy(&x), shape.0 / 2, &part).unwrap();
        check("add_rows", &fused, &plain::add_rows(&x, shape.0 / 2, &part).unwrap());
        let dropped = dropout(&x, 7, 1000, 0.5).unwrap();
        let kept = |i: usize| f32::from(u8::from(rng::uniform(7, 1000 + i as u64) >= 0.5));
        let want = values(&x).iter().enumerate().map(|(i, x)| 2.0 * x * kept(i)).collect();
        check("dropout", &dropped, &Tensor::from_vec::<_, f32>(want, shape, &CPU).unwrap());
    }
}

#[test]
fn frozen_products_are_the_matrix_products() {
    // Empty, single, narrower than a thread's share, and wide enough for several threads.
    for (tokens, inputs, outputs) in [(0, 4, 3), (1, 8, 5), (7, 24, 40), (65, 172, 130), (200, 96, 519)] {
        let what = |name: &str| format!("{name} {tokens}x{inputs}x{outputs}");
        let (x, drawn) = (random((tokens, inputs), 1), random((outputs, inputs), 2));
        let (dy, into) = (random((tokens, outputs), 3), random((tokens, inputs), 4));
        for numbers in [
            Numbers::Float32,
            Numbers::Bfloat16,
            Numbers::Float16,
            Numbers::Nf4 { double_quant: false },
            Numbers::Nf4 { double_quant: true },
        ] {
            let what = |name: &str| format!("{} in {numbers:?}", what(name));
            let weight = numbers.hold(&drawn).unwrap();
            let w = weight.to_float32().unwrap();
            let plain = x.matmul(&w.t().unwrap()).unwrap();
            check(&what("linear"), &linear(&x, &weight, DType::F32).unwrap(), &plain);
            let plain = dy.matmul(&w).unwrap();
            check(&what("linear_backward"), &linear_backward(&dy, &weight, None).unwrap(), &plain);
            let plain = plain.add(&into).unwrap();
            let fused = linear_backward(&dy, &weight, Some(copy(&into))).unwrap();
            check(&what("linear_backward, added"), &fused, &plain);
            let wider = numbers.hold(&random((outputs, inputs + 1), 5)).unwrap();
            assert!(linear(&x, &wider, DType::F32).is_err());
            assert!(linear_backward(&dy, &weight, Some(random((tokens, inputs + 1), 6))).is_err());
        }
    }
}

#[test]
fn low_rank_products_are_the_matrix_products() {
    for ((tokens, width), rank) in [((1, 8), 1), ((5, 24), 4), ((37, 172), 16), ((700, 90), 33)] {
        let what = |name: &str| format!("{name} {tokens}x{width} rank {rank}");
        let (x, h, w) = (random((tokens, width), 1), random((tokens, rank), 2), random((rank, width), 3));
        let turned = w.t().unwrap().contiguous().unwrap();
        let plain = x.matmul(&w.t().unwrap()).unwrap();
        check(&what("project"), &project(&x, &w).unwrap(), &plain);
        check(&what("project_transposed"), &project_transposed(&x, &turned).unwrap(), &plain);
        let plain = (h.t().unwrap().matmul(&x).unwrap() * 0.7).unwrap();
        check(&what("outer"), &outer(&h, &x, 0.7).unwrap(), &plain);
        check(&what("outer_transposed"), &outer_transposed(&h, &x, 0.7).unwrap(), &plain.t().unwrap());
        let into = random((tokens + 3, width), 4);
        let plain = plain::add_product(&into, 2, &h, &w, 0.7).unwrap();
        check(&what("add_product"), &add_product(copy(&into), 2, &h, &w, 0.7).unwrap(), &plain);
        let fused = add_product_transposed(copy(&into), 2, &h, &turned, 0.7).unwrap();
        check(&what("add_product_transposed"), &fused, &plain);
    }
}

#[test]
fn attention_is_its_formula() {
    for (query, key_value, dim, window, lengths) in [
        (1, 1, 2, None, vec![1]),
        (4, 4, 16, None, vec![5, 1, 70]),
        (8, 4, 8, None, vec![64, 65]),
        (6, 2, 10, None, vec![130, 3, 128]),
        // Windows of one key, within a block of queries, of a block, over some, and beyond the longest document.
        (4, 4, 16, Some(1), vec![5, 1, 70]),
        (8, 4, 8, Some(7), vec![64, 65]),
        (4, 2, 8, Some(64), vec![200, 63]),
        (6, 2, 10, Some(100), vec![230, 3, 128]),
        (4, 2, 8, Some(131), vec![130, 3]),
    ] {
        let heads = Heads { query, key_value, dim, window };
        let mut documents = Vec::new();
        let mut tokens = 0;
        for length in lengths {
            documents.push(tokens..tokens + length);
            tokens += length;
        }
        let q = (random((tokens, query * dim), 1) * 3.0).unwrap();
        let (k, v) = (random((tokens, key_value * dim), 2), random((tokens, key_value * dim), 3));
        let dy = random((tokens, query * dim), 4);
        let plain = plain::attention(&q, &k, &v, &documents, heads).unwrap();
        let by_plain = plain::attention_backward(&q, &k, &v, &documents, heads, &dy).unwrap();
        let documents = Documents::new(documents);
        let fused = attention(&q, &k, &v, &documents, heads).unwrap();
        check("attention", &fused, &plain);
        let (fused, plain) = (attention_backward(&q, &k, &v, &documents, heads, &dy).unwrap(), by_plain);
        check("attention dq", &fused.0, &plain.0);
        check("attention dk", &fused.1, &plain.1);
        check("attention dv", &fused.2, &plain.2);

        let positions: Vec<u32> = (0..tokens as u32).map(|p| 5 + p % 40).collect();
        let frequencies: Vec<f32> = (0..dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
        let rotary = Rotary::new(&frequencies, &positions, &CPU).unwrap();
        let rotated = rotary.forward(copy(&q), dim).unwrap();
        let table = (&rotary.cos, &rotary.sin);
        check("rotary", &rotated, &plain::rotate(&q, dim, table, &rotary.positions, 1.0).unwrap());
        check("rotary there and back", &rotary.backward(rotated, dim).unwrap(), &q);
    }
}

#[test]
fn losses_and_updates_are_their_formulas() {
    for shape in SHAPES {
        let logits = (random(shape, 1) * 8.0).unwrap();
        let targets: Vec<u32> = (0..shape.0).map(|i| (i * 7 % shape.1) as u32).collect();
        let (nll, gradient) = cpu::loss::nll_and_gradient(copy(&logits), &targets).unwrap();
        let (plain_nll, plain_gradient) = plain::nll_and_gradient(&logits, &targets).unwrap();
        check("nll", &nll, &plain_nll);
        check("nll gradient", &gradient, &plain_gradient);

        let [w, g, m] = [2, 3, 4].map(|seed| random(shape, seed));
        let v = random(shape, 5).sqr().unwrap();
        let step =
            AdamWStep { beta1: 0.9, beta2: 0.999, correction2: 0.2, epsilon: 1e-8, decay: 0.99, rate: 1e-2 };
        let parameter = Parameter { weight: &w, gradient: &g, first: &m, second: &v, step: &step };
        let fused = adamw(&parameter, 0.3).unwrap();
        let plain = plain::adamw(&parameter, 0.3).unwrap();
        fused.iter().zip(&plain).for_each(|(fused, plain)| check("adamw", fused, plain));
        let squares: f64 = values(&g).iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((sum_of_squares(&[&g]).unwrap() - squares).abs() < 1e-6 * squares);
    }
}

#[test]
fn no_number_stays_none() {
    let shape = (3, 40);
    let broken = |row: usize| {
        let mut x = values(&random(shape, 1));
        x[row * 40 + 7] = f32::NAN;
        Tensor::from_vec(x, shape, &CPU).unwrap()
    };
    let (nll, _) = cpu::loss::nll_and_gradient(broken(1), &[1, 2, 3]).unwrap();
    assert_eq!(values(&nll).iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, false]);
    assert!(sum_of_squares(&[&broken(0)]).unwrap().is_nan());
    assert!(values(&swiglu(&broken(2), &random(shape, 2)).unwrap())[87].is_nan());
}
