//! What base and adapter say to the sample prompt: at a run's end, and after some of its evaluations.

use super::{Loaded, Run};
use crate::error::Result;
use crate::lora::Adapter;
use crate::pack;
use crate::tokenizer::Tokenizer;
use domain::trial::SampleText;

/// Tokens of a sample text at the end.
const TOKENS: usize = 40;

/// Tokens of one on the way, for which training waits: its beginning.
const TOKENS_ON_THE_WAY: usize = 20;

/// Texts on the way at most. A trial's record holds them, ten thousand of which are to fit into etcd.
const MOST: usize = 4;

/// Bytes of each of those at most.
const MOST_BYTES: usize = 80;

impl Run {
    /// What the base and the adapter say to the sample prompt; nothing without prompt or tokenizer.
    pub(super) fn samples(&self, loaded: &Loaded) -> Result<(Option<String>, Option<String>)> {
        let (Some(prompt), Some(tokenizer)) = (&self.data.sample_prompt, &loaded.tokenizer) else {
            return Ok((None, None));
        };
        let known = loaded.alone().texts.get(prompt).cloned();
        let before = match known {
            Some(text) => text,
            None => {
                let text = continuation(loaded, tokenizer, None, prompt, TOKENS)?;
                loaded.alone().texts.insert(prompt.clone(), text.clone());
                text
            }
        };
        let after = continuation(loaded, tokenizer, Some(&self.state.adapter), prompt, TOKENS)?;
        Ok((Some(before), Some(after)))
    }

    /// Has the adapter say something to the sample prompt after an evaluation, if it is one of those after which it does. The
    /// checkpoint carries it on, so that a run that goes on from there says nothing twice.
    ///
    /// # Errors
    /// The device runs out of memory, or the tokenizer cannot read its own ids.
    pub(super) fn sample(&mut self, loaded: &Loaded) -> Result<()> {
        let step = self.state.step;
        let (Some(prompt), Some(tokenizer)) = (&self.data.sample_prompt, &loaded.tokenizer) else {
            return Ok(());
        };
        if !is_sampled(step, self.total_steps, u64::from(self.config.eval_steps)) {
            return Ok(());
        }
        let adapter = Some(&self.state.adapter);
        let text = continuation(loaded, tokenizer, adapter, prompt, TOKENS_ON_THE_WAY)?;
        let samples = &mut self.progress.samples;
        samples.retain(|sample| sample.step < step);
        samples.push(SampleText { step, text: beginning(text) });
        // Of a run that was made longer, the last and every second before it.
        while samples.len() > MOST {
            let mut behind = samples.len();
            samples.retain(|_| {
                behind -= 1;
                behind.is_multiple_of(2)
            });
        }
        Ok(())
    }

    /// The texts of the way to where the run is, which has a text of its own.
    pub(super) fn samples_before_its_end(&self) -> Vec<SampleText> {
        let end = self.state.step;
        self.progress.samples.iter().filter(|sample| sample.step < end).cloned().collect()
    }
}

/// Whether there is a text after a step that is evaluated: after so many of the evaluations before the end as there may be texts,
/// evenly spread.
fn is_sampled(step: u64, total_steps: u64, eval_steps: u64) -> bool {
    if eval_steps == 0 || step >= total_steps || !step.is_multiple_of(eval_steps) {
        return false;
    }
    let evaluations = (total_steps - 1) / eval_steps;
    (step / eval_steps).is_multiple_of(evaluations.div_ceil(MOST as u64).max(1))
}

/// The beginning of a text, if it is long.
fn beginning(mut text: String) -> String {
    if text.len() > MOST_BYTES {
        text.truncate((0..=MOST_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
    }
    text
}

fn continuation(
    loaded: &Loaded,
    tokenizer: &Tokenizer,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    tokens: usize,
) -> Result<String> {
    let ids = pack::generate(&loaded.base, adapter, prompt, tokens, tokenizer.eos())?;
    tokenizer.decode(&ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_spread_over_the_evaluations() {
        // (steps, eval_steps, steps with a text)
        for (total, every, want) in [
            (100, 20, &[20, 40, 60, 80][..]),
            (100, 25, &[25, 50, 75]),
            // The end has its own.
            (100, 50, &[50]),
            (100, 100, &[]),
            (100, 0, &[]),
            (100, 10, &[30, 60, 90]),
            (101, 10, &[30, 60, 90]),
            (1000, 1, &[250, 500, 750]),
            (7, 3, &[3, 6]),
            (0, 3, &[]),
        ] {
            let steps: Vec<u64> = (1..=total + 5).filter(|step| is_sampled(*step, total, every)).collect();
            assert_eq!(steps, want, "{total} {every}");
            assert!(steps.len() <= MOST);
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        for (text, want) in [
            ("a".repeat(MOST_BYTES), MOST_BYTES),
            ("a".repeat(MOST_BYTES + 1), MOST_BYTES),
            ("é".repeat(MOST_BYTES), MOST_BYTES),
            (format!("a{}", "é".repeat(MOST_BYTES)), MOST_BYTES - 1),
        ] {
            assert_eq!(beginning(text).len(), want);
        }
    }
}
