//! The assistant's turns in a text of guanaco's form: `### Human: …### Assistant: …`.

use std::ops::Range;

const ASSISTANT: &str = "### Assistant:";
const HUMAN: &str = "### Human:";

/// The characters of each assistant part: from just after `### Assistant:` up to the next `### Human:`. A part
/// that no human turn ends is open, so that it holds an EOS behind the text too.
pub fn parts(text: &str) -> Vec<Range<usize>> {
    let chars = |text: &str| text.chars().count();
    let (mut parts, mut rest, mut at) = (Vec::new(), text, 0);
    while let Some((before, after)) = rest.split_once(ASSISTANT) {
        let start = at + chars(before) + chars(ASSISTANT);
        let Some((part, next)) = after.split_once(HUMAN) else {
            parts.push(start..usize::MAX);
            break;
        };
        let end = start + chars(part);
        parts.push(start..end);
        (rest, at) = (next, end + chars(HUMAN));
    }
    parts
}

/// The text up to and including its first `### Assistant:`.
pub fn prompt(text: &str) -> Option<&str> {
    text.find(ASSISTANT).map(|at| &text[..at + ASSISTANT.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_prompts() {
        const OPEN: usize = usize::MAX;
        type Row<'a> = (&'a str, &'a [(usize, usize)], Option<usize>);
        let rows: [Row; 9] = [
            ("", &[], None),
            ("no marks", &[], None),
            ("### Human: a### Assistant: b", &[(26, OPEN)], Some(26)),
            ("### Human: ä€🙂### Assistant: b", &[(28, OPEN)], Some(28)),
            ("### Assistant:", &[(14, OPEN)], Some(14)),
            ("### Human: a### Assistant: b### Human: c", &[(26, 28)], Some(26)),
            ("### Human: a### Assistant:é### Human: c### Assistant: d", &[(26, 27), (53, OPEN)], Some(26)),
            ("### Assistant: a### Assistant: b### Human:", &[(14, 32)], Some(14)),
            ("### assistant: a", &[], None),
        ];
        for (text, want, prompt_length) in rows {
            let got: Vec<_> = parts(text).into_iter().map(|part| (part.start, part.end)).collect();
            assert_eq!(got, want, "{text}");
            assert_eq!(prompt(text).map(|p| p.chars().count()), prompt_length, "{text}");
        }
    }
}
