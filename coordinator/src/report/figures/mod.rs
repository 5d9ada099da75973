//! The figures, a kind a file.

pub(super) mod accuracy;
pub(super) mod benchmark;
pub(super) mod curves;
pub(super) mod parallel;
pub(super) mod parameters;
pub(super) mod predicted;
pub(super) mod progress;
pub(super) mod timeline;
pub(super) mod tradeoffs;

/// Trials that have a line of their own in a figure: of more, nobody could follow any.
const MOST_LINES: usize = 200;

/// What a caption says where there are more trials than lines.
fn of_how_many(trials: usize) -> String {
    if trials > MOST_LINES { format!(" The best {MOST_LINES} of {trials} trials.") } else { String::new() }
}

/// A file's name made of a text: small letters, digits and dashes.
fn file_name(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_is_a_plain_one() {
        for (text, want) in [("eval/loss over steps", "eval-loss-over-steps"), ("../ä_B", "b"), ("", "")] {
            assert_eq!(file_name(text), want);
        }
    }
}
