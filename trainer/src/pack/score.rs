//! How likely a model finds given continuations. Texts that begin alike (a question with its choices, all questions
//! below one preamble) go through the layers as a tree: what they share is computed once, and each branch attends to
//! what it goes on after.

use super::pass::Pass;
use super::tokens::{Tokens, known};
use super::{head, segments};
use crate::error::Result;
use crate::lora::Adapter;
use crate::model::Base;
use crate::ops::{self, Branch};
use std::ops::Range;

/// A text, of which the last tokens are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// How many of the last ones are asked for. The first never is, having nothing before it.
    pub asked: usize,
}

impl Question {
    /// What the model reads: the last token is only asked for.
    fn read(&self) -> &[u32] {
        self.input_ids.split_last().map_or(&[], |(_, read)| read)
    }

    fn asked(&self) -> Range<usize> {
        let end = self.input_ids.len();
        end - self.asked.min(end.saturating_sub(1))..end
    }
}

/// What a model makes of a question.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// The sum of the natural logarithms of the asked tokens' probabilities.
    pub log_likelihood: f64,
    /// Whether each asked token is the likeliest one.
    pub is_greedy: bool,
}

/// How many times a pass's tokens its texts may have, written out: what a device needs that attends to them so.
const WRITTEN_OUT: usize = 16;

/// The answers to all questions, in their order. A pass takes `batch_tokens` tokens at most (or one longer text),
/// shared ones counted once; `watch` is told after each how many questions are answered.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn score(
    base: &Base,
    adapter: Option<&Adapter>,
    questions: &[Question],
    batch_tokens: usize,
    watch: &mut dyn FnMut(usize),
) -> Result<Vec<Answer>> {
    for id in questions.iter().flat_map(|question| &question.input_ids) {
        known(*id, base.config.vocab_size)?;
    }
    let mut answers = vec![Answer { log_likelihood: 0.0, is_greedy: true }; questions.len()];
    // In the order of their tokens, those that begin alike stand together.
    let mut order: Vec<_> = questions.iter().enumerate().collect();
    order.sort_by_key(|(_, question)| question.read());
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(fitting(rest, batch_tokens));
        answer(base, adapter, batch, &mut answers)?;
        rest = after;
        watch(questions.len() - rest.len());
    }
    Ok(answers)
}

/// The number of tokens that two texts begin alike with.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How many of the first questions go into a pass.
fn fitting(questions: &[(usize, &Question)], batch_tokens: usize) -> usize {
    let (mut tokens, mut written, mut last): (usize, usize, &[u32]) = (0, 0, &[]);
    let full = questions.iter().position(|(_, question)| {
        let read = question.read();
        tokens += read.len() - common(last, read);
        written += read.len();
        last = read;
        tokens > batch_tokens || written > WRITTEN_OUT * batch_tokens
    });
    full.map_or(questions.len(), |full| full.max(1))
}

fn answer(
    base: &Base,
    adapter: Option<&Adapter>,
    batch: &[(usize, &Question)],
    answers: &mut [Answer],
) -> Result<()> {
    let mut tree = Tree::default();
    tree.grow(batch, 0, &mut Vec::new());
    let Tree { tokens, branches, places } = tree;
    if tokens.wanted.is_empty() {
        return Ok(());
    }
    let segments = segments(base, adapter, tokens.ids.len(), tokens.wanted.len())?;
    let hidden = Pass::new(base, &tokens, 0)?.branched(&tokens.ids, &segments, &branches)?;
    let predicting = ops::gather(&hidden, &tokens.predicting)?;
    drop(hidden);
    let (nll, greedy) = head::nll_and_greedy(base, &predicting, &tokens.wanted, &segments)?;
    for (number, wanted) in places {
        answers[number] = Answer {
            log_likelihood: -nll[wanted.clone()].iter().map(|x| f64::from(*x)).sum::<f64>(),
            is_greedy: greedy[wanted].iter().all(|greedy| *greedy),
        };
    }
    Ok(())
}

/// The texts of a pass, what they share standing once.
#[derive(Default)]
struct Tree {
    tokens: Tokens,
    branches: Vec<Branch>,
    /// Each question's number and its range among the wanted tokens.
    places: Vec<(usize, Range<usize>)>,
}

impl Tree {
    /// Adds questions in the order of their tokens, of which the first `depth` stand in the runs of `path`.
    fn grow(&mut self, questions: &[(usize, &Question)], depth: usize, path: &mut Vec<Range<usize>>) {
        let (Some((_, first)), Some((_, last))) = (questions.first(), questions.last()) else { return };
        // What the first and the last share, those between them share too.
        let shared = common(first.read(), last.read());
        if shared > depth {
            let start = self.tokens.ids.len();
            self.tokens.ids.extend(&first.read()[depth..shared]);
            self.tokens.positions.extend(depth as u32..shared as u32);
            let own = start..self.tokens.ids.len();
            self.branches.push(Branch { seen: path.clone(), own: own.clone() });
            path.push(own);
        }
        // A text that ends here stands before those that go on.
        let ended = questions.iter().take_while(|(_, question)| question.read().len() == shared).count();
        let (here, on) = questions.split_at(ended);
        here.iter().for_each(|(number, question)| self.ask(*number, question, path));
        for same in on.chunk_by(|(_, a), (_, b)| a.read()[shared] == b.read()[shared]) {
            self.grow(same, shared, path);
        }
        if shared > depth {
            path.pop();
        }
    }

    fn ask(&mut self, number: usize, question: &Question, path: &[Range<usize>]) {
        let (start, asked) = (self.tokens.wanted.len(), question.asked());
        let rows = path.iter().cloned().flatten().skip(asked.start.saturating_sub(1));
        self.tokens.predicting.extend(rows.map(|row| row as u32).take(asked.len()));
        self.tokens.wanted.extend(&question.input_ids[asked]);
        self.places.push((number, start..self.tokens.wanted.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(ids: &[u32], asked: usize) -> Question {
        Question { input_ids: ids.to_vec(), asked }
    }

    #[test]
    fn what_texts_share_stands_once() {
        // (texts with the number asked, tokens of the pass, runs)
        let check = |texts: &[(&[u32], usize)], ids: &[u32], runs: usize| {
            let questions: Vec<_> = texts.iter().map(|(ids, asked)| question(ids, *asked)).collect();
            let mut order: Vec<_> = questions.iter().enumerate().collect();
            order.sort_by_key(|(_, question)| question.read());
            let mut tree = Tree::default();
            tree.grow(&order, 0, &mut Vec::new());
            assert_eq!((tree.tokens.ids.as_slice(), tree.branches.len()), (ids, runs), "{texts:?}");
            for (number, wanted) in &tree.places {
                // From a predicting row back through its branch stands the text.
                let question = &questions[*number];
                for (i, at) in question.asked().zip(wanted.clone()) {
                    let row = tree.tokens.predicting[at] as usize;
                    let branch = tree.branches.iter().find(|branch| branch.own.contains(&row)).unwrap();
                    let text = branch.runs().cloned().flatten().take_while(|r| *r <= row);
                    let text: Vec<_> = text.map(|row| tree.tokens.ids[row]).collect();
                    assert_eq!(text, question.input_ids[..i], "{texts:?}");
                    assert_eq!(tree.tokens.wanted[at], question.input_ids[i], "{texts:?}");
                    assert_eq!(tree.tokens.positions[row] as usize, i - 1, "{texts:?}");
                }
            }
            assert_eq!(tree.places.len(), texts.len());
        };
        check(&[(&[1, 2, 3, 4], 2)], &[1, 2, 3], 1);
        check(&[(&[1, 2, 3, 4], 2), (&[1, 2, 5, 6], 2)], &[1, 2, 3, 5], 3);
        check(&[(&[1, 2, 3], 1), (&[1, 2, 4], 1)], &[1, 2], 1);
        check(&[(&[1, 2, 3], 1), (&[1, 2, 4, 5], 2), (&[6, 7], 1)], &[1, 2, 4, 6], 3);
        check(&[(&[1, 2, 3, 9], 1), (&[1, 2, 3, 9], 3), (&[1, 5, 9], 2)], &[1, 2, 3, 5], 3);
        check(&[(&[1], 0), (&[1], 7)], &[], 0);
    }
}
