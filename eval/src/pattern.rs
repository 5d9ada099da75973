//! Python's regular expressions.

use fancy_regex::{Error, Regex};
use std::borrow::Cow;

/// Compiles an expression that is written for Python's `re`.
pub(crate) fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::new(&translated(pattern)).map_err(|error| format!("{pattern:?} is no regular expression: {error}"))
}

/// What is said of an expression that goes back and forth too often.
pub(crate) fn failed(regex: &Regex, error: &Error) -> String {
    format!("{:?} cannot be looked for: {error}", regex.as_str())
}

/// Python's `re.sub`.
pub(crate) fn replaced(regex: &Regex, text: &str, replacement: &str) -> Result<String, String> {
    let replaced = regex.try_replacen(text, 0, replacement);
    replaced.map(Cow::into_owned).map_err(|error| failed(regex, &error))
}

/// What Python means otherwise than Rust: `$` also stands before a line's end that ends the text, `\Z` is the end itself,
/// and a bracket within a class is a character.
fn translated(pattern: &str) -> String {
    let mut rust = String::with_capacity(pattern.len());
    let mut characters = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('Z') if !in_class => rust.push_str("\\z"),
                escaped => rust.extend([Some('\\'), escaped].into_iter().flatten()),
            },
            '[' if in_class => rust.push_str("\\["),
            '[' => {
                in_class = true;
                rust.push('[');
                rust.extend(characters.next_if_eq(&'^'));
                // One that closes nothing is a character too.
                if characters.next_if_eq(&']').is_some() {
                    rust.push_str("\\]");
                }
            }
            ']' => {
                in_class = false;
                rust.push(']');
            }
            '$' if !in_class => rust.push_str("(?:$|(?=\\n\\z))"),
            other => rust.push(other),
        }
    }
    rust
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `re.sub(pattern, "-", text)` of CPython 3.11.
    #[test]
    fn expressions_mean_what_python_means() {
        for (pattern, text, want) in [
            (r"\.$", "5.", "5-"),
            (r"\.$", "5.\n", "5-\n"),
            (r"\.$", "5.\n\n", "5.\n\n"),
            (r"\.\Z", "5.\n", "5.\n"),
            (r"(?m)\.$", "5.\n6.\n", "5-\n6-\n"),
            (r"\$", "$5", "-5"),
            ("[$]", "$5", "-5"),
            ("[[x]+", "a[[xb", "a-b"),
            ("[]x]+", "a]xb", "a-b"),
            ("[^]x]+", "a]xb", "-]x-"),
            (r"[\]$]+", "a]$b", "a-b"),
            (r"(?s).*#### ", "a\n#### 1\n#### 2", "-2"),
        ] {
            let got = replaced(&compile(pattern).unwrap(), text, "-").unwrap();
            assert_eq!(got, want, "{pattern} in {text:?}");
        }
        assert!(compile("(").unwrap_err().starts_with("\"(\" is no regular expression: "));
    }
}
