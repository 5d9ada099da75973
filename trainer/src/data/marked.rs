//! A text of which it is known what the assistant says.

use super::assistant;
use std::ops::Range;

/// A text and its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The text.
    pub text: String,
    /// The characters of each of the assistant's parts. A part that ends with the text is open, so that it holds an
    /// EOS behind the text too.
    pub parts: Vec<Range<usize>>,
    /// Bytes of the text up to where the assistant first begins; 0 if it never does.
    pub prompt: usize,
    /// Whether the text spells out BOS and EOS itself, as a chat template does.
    pub whole: bool,
}

impl Marked {
    /// A text in which guanaco's marks, if any, say whose turn it is.
    pub fn of_text(text: String) -> Self {
        let prompt = assistant::prompt(&text).map_or(0, str::len);
        Self { parts: assistant::parts(&text), prompt, text, whole: false }
    }

    /// A prompt and what is to follow it.
    pub fn of_completion(prompt: String, completion: &str) -> Self {
        let parts = std::iter::once(prompt.chars().count()..usize::MAX).collect();
        let bytes = prompt.len();
        Self { text: prompt + completion, parts, prompt: bytes, whole: false }
    }

    /// An instruction in the words that Alpaca's models were trained with.
    pub fn of_instruction(instruction: &str, input: &str, output: &str) -> Self {
        let (context, section) = match input {
            "" => (". Write", String::new()),
            input => (
                ", paired with an input that provides further context. Write",
                format!("\n\n### Input:\n{input}"),
            ),
        };
        let prompt = format!(
            "Below is an instruction that describes a task{context} a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}{section}\n\n### Response:\n"
        );
        Self::of_completion(prompt, output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_and_what_follows() {
        let task = "Below is an instruction that describes a task";
        let rest = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.";
        let input = ", paired with an input that provides further context. ";
        for (marked, prompt, completion) in [
            (Marked::of_completion("é: ".into(), "x"), "é: ".to_string(), "x"),
            (Marked::of_completion(String::new(), "x"), String::new(), "x"),
            (Marked::of_instruction("Add.", "", "3"), format!("{task}. {rest}\n\n### Response:\n"), "3"),
            (
                Marked::of_instruction("Add.", "1, 2", "3"),
                format!("{task}{input}{rest}\n\n### Input:\n1, 2\n\n### Response:\n"),
                "3",
            ),
        ] {
            assert_eq!(marked.text, prompt.clone() + completion);
            assert_eq!(marked.parts, std::slice::from_ref(&(prompt.chars().count()..usize::MAX)));
            assert_eq!(&marked.text[..marked.prompt], prompt);
            assert!(!marked.whole);
        }
    }
}
