//! Log-likelihoods of continuations, what texts share computed once, against the logits of each text alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::Tensor;
use common::{device, tiny_base};
use trainer::lora::{Adapter, Target};
use trainer::model::Base;
use trainer::pack::{self, Answer, Question};
use trainer::rng;

/// An adapter on every linear layer and the head that changes something.
fn adapter(base: &Base) -> Adapter {
    let modules = [base.linear_modules(), vec![base.head_module()]].concat();
    let targets = Target::all(&modules, 4, 8.0);
    let mut adapter = Adapter::new(base, &targets.into(), 0.0, 5).unwrap();
    for module in &mut adapter.modules {
        let key = rng::key(6, &module.path);
        let value = |i: u64| (0.4 * rng::uniform(key, i) - 0.2) as f32;
        let values: Vec<f32> = (0..module.b.elem_count() as u64).map(value).collect();
        module.b = Tensor::from_vec(values, module.b.shape(), device()).unwrap();
    }
    adapter
}

/// The answer by the logits after each token of the text alone.
fn alone(base: &Base, adapter: Option<&Adapter>, question: &Question) -> Answer {
    let logits = pack::logits(base, adapter, &question.input_ids).unwrap().to_vec2::<f32>().unwrap();
    let (mut log_likelihood, mut is_greedy) = (0.0, true);
    for at in question.input_ids.len() - question.asked..question.input_ids.len() {
        let (row, wanted) = (&logits[at - 1], question.input_ids[at] as usize);
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        log_likelihood += f64::from(row[wanted]) - sum.ln();
        is_greedy &= row.iter().all(|x| *x <= row[wanted]);
    }
    Answer { log_likelihood, is_greedy }
}

/// Some texts in an order of no meaning: with long and short common beginnings, one the beginning of another, twice the
/// same, asked for other parts, and the greedy continuation of one.
fn questions(base: &Base, adapter: Option<&Adapter>) -> Vec<Question> {
    let vocab = base.config.vocab_size as u64;
    let tokens = |key: u64, count: u64| -> Vec<u32> {
        (0..count).map(|i| (rng::bits(rng::key(key, "text"), i) % vocab) as u32).collect()
    };
    let mut questions = Vec::new();
    for r in 0..30 {
        let shared = [tokens(r % 3, 6 + r % 2), tokens(3 + r % 5, 4)].concat();
        let own = tokens(100 + r, 1 + r % 4);
        questions.push(Question { asked: own.len(), input_ids: [shared, own].concat() });
    }
    let (first, longest) = (questions[0].clone(), questions[3].input_ids.clone());
    questions.push(first.clone());
    questions.push(Question { asked: 1, input_ids: longest[..longest.len() - 1].to_vec() });
    questions.push(Question { asked: first.input_ids.len() - 1, ..first.clone() });
    let greedy = pack::generate(base, adapter, &first.input_ids, 3, None).unwrap();
    questions.push(Question { asked: greedy.len(), input_ids: [first.input_ids, greedy].concat() });
    questions
}

#[test]
fn shared_beginnings_change_nothing() {
    let base = tiny_base();
    let adapter = adapter(&base);
    for adapter in [None, Some(&adapter)] {
        let questions = questions(&base, adapter);
        for batch_tokens in [1, 40, 4096] {
            let mut told = Vec::new();
            let answers =
                pack::score(&base, adapter, &questions, batch_tokens, &mut |done| told.push(done)).unwrap();
            for (question, got) in questions.iter().zip(&answers) {
                let want = alone(&base, adapter, question);
                let close = (got.log_likelihood - want.log_likelihood).abs() < 1e-4;
                assert!(close, "{question:?} in passes of {batch_tokens}: {got:?}, not {want:?}");
                assert_eq!(got.is_greedy, want.is_greedy, "{question:?}");
            }
            assert!(answers.last().unwrap().is_greedy);
            assert!(told.is_sorted() && told.last() == Some(&questions.len()), "{told:?}");
            assert_eq!(told.len() == 1, batch_tokens == 4096, "{told:?}");
        }
    }
    assert!(pack::score(&base, None, &[], 8, &mut |_| ()).unwrap().is_empty());
    let foreign = Question { input_ids: vec![1, 40], asked: 1 };
    let refused = pack::score(&base, None, &[foreign], 8, &mut |_| ()).unwrap_err();
    assert!(refused.to_string().contains("token id 40"), "{refused}");
}
