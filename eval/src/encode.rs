//! Texts to the tokens that a model is asked for, as the harness's `hf` backend splits, truncates and begins them.

use trainer::Result;
use trainer::pack::Question;
use trainer::tokenizer::Tokenizer;

/// Makes questions of texts.
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The most tokens that the model reads.
    max_length: usize,
    /// Whether the tokenizer adds the special tokens that it adds by itself.
    add_special: bool,
    /// How the token in front is written.
    prefix_text: Option<String>,
    prefix: Option<u32>,
}

impl<'a> Encoder<'a> {
    /// An encoder for a model that reads `max_length` tokens. `add_bos`: whether the tokenizer may put BOS in front (if
    /// it does so by itself).
    pub fn new(tokenizer: &'a Tokenizer, max_length: usize, add_bos: bool) -> Self {
        let prefix = tokenizer.bos().or(tokenizer.eos());
        let prefix_text = prefix.and_then(|id| tokenizer.piece(id)).filter(|text| !text.is_empty());
        Self { tokenizer, max_length, add_special: add_bos, prefix_text, prefix }
    }

    /// A text's tokens.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // A text that has the token already gets no second one.
        let has = self.prefix_text.as_ref().is_some_and(|prefix| text.starts_with(prefix.as_str()));
        let encoding = match self.add_special && !has {
            true => self.tokenizer.encode(text)?,
            false => self.tokenizer.encode_as_it_is(text)?,
        };
        Ok(encoding.ids)
    }

    /// A context's tokens and each continuation's: those of both together from the context's number on, so that a word
    /// may begin in the context's trailing spaces.
    ///
    /// # Errors
    /// The tokenizer fails on a text.
    pub fn pairs(&self, context: &str, continuations: &[String]) -> Result<Vec<(Vec<u32>, Vec<u32>)>> {
        let kept = context.trim_end();
        let spaces = &context[kept.len()..];
        let before = if context.is_empty() { Vec::new() } else { self.encode(kept)? };
        let pair = |continuation: &String| {
            if context.is_empty() {
                return self.bare(continuation);
            }
            let mut whole = self.encode(&format!("{kept}{spaces}{continuation}"))?;
            let after = whole.split_off(before.len().min(whole.len()));
            Ok((before.clone(), after))
        };
        continuations.iter().map(pair).collect()
    }

    /// A continuation of nothing goes on after BOS (or EOS where there is none).
    fn bare(&self, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let mut ids = self.tokenizer.encode_as_it_is(continuation)?.ids;
        if let Some(prefix) = self.prefix.filter(|prefix| ids.first() != Some(prefix)) {
            return Ok((vec![prefix], ids));
        }
        let after = ids.split_off(1.min(ids.len()));
        Ok((ids, after))
    }

    /// What is asked of a model: both together, cut from the left to what it reads and the last token. `None` if there
    /// is nothing to ask, or more than it reads.
    pub fn question(&self, (mut context, continuation): (Vec<u32>, Vec<u32>)) -> Option<Question> {
        let asked = continuation.len();
        if asked == 0 || asked > self.max_length || context.is_empty() {
            return None;
        }
        context.extend(continuation);
        let cut = context.len().saturating_sub(self.max_length + 1);
        Some(Question { input_ids: context.split_off(cut), asked })
    }

    /// A whole text as questions that ask for each of its tokens once: the first window after BOS, the others after the
    /// token before them.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn windows(&self, text: &str) -> Result<Vec<Question>> {
        let ids = self.encode(text)?;
        Ok(windows(&ids, self.prefix, self.max_length))
    }
}

fn windows(ids: &[u32], prefix: Option<u32>, length: usize) -> Vec<Question> {
    let mut questions = Vec::new();
    let mut done = 0;
    while done < ids.len() {
        let end = (done + length).min(ids.len());
        // A last window that is not full reads what was predicted before as well.
        let start = if done == 0 { 0 } else { end.saturating_sub(length + 1) };
        let mut input_ids: Vec<u32> = prefix.filter(|_| done == 0).into_iter().collect();
        input_ids.extend(&ids[start..end]);
        questions.push(Question { input_ids, asked: end - done });
        done = end;
    }
    questions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The windows of the harness's `get_rolling_token_windows(ids, 100, length, 1)` and `make_disjoint_window`, each as
    /// what is read and asked in one.
    #[test]
    fn windows_cover_each_token_once() {
        let check = |count: u32, length: usize, want: &[(&[u32], usize)]| {
            let ids: Vec<_> = (0..count).collect();
            let got: Vec<_> =
                windows(&ids, Some(100), length).into_iter().map(|q| (q.input_ids, q.asked)).collect();
            let want: Vec<_> = want.iter().map(|(ids, asked)| (ids.to_vec(), *asked)).collect();
            assert_eq!(got, want, "{count} tokens by {length}");
        };
        check(0, 4, &[]);
        check(3, 4, &[(&[100, 0, 1, 2], 3)]);
        check(4, 4, &[(&[100, 0, 1, 2, 3], 4)]);
        check(8, 4, &[(&[100, 0, 1, 2, 3], 4), (&[3, 4, 5, 6, 7], 4)]);
        check(6, 4, &[(&[100, 0, 1, 2, 3], 4), (&[1, 2, 3, 4, 5], 2)]);
    }
}
