//! Python's regular expressions.

use fancy_regex::{Captures, Error, Regex, RegexBuilder};
use std::borrow::Cow;
use std::iter::Peekable;
use std::str::Chars;

/// How often a search may go back, and the bytes of what an expression is compiled to: whoever writes a task does not
/// keep a machine busy, nor fill it.
const MOST_TRIES: usize = 100_000;
const MOST_BYTES: usize = 4 << 20;

/// An expression that is written for Python's `re`.
#[derive(Debug, Clone)]
pub(crate) struct Pattern {
    /// For texts whose last line has no end: `$` is where they end.
    usual: Regex,
    /// For the others: `$` also stands before that end. To see it is to look ahead, for which searches go back and forth.
    of_lines: Regex,
}

impl Pattern {
    /// Compiles an expression.
    ///
    /// # Errors
    /// It is none, or too large, in words.
    pub(crate) fn new(pattern: &str) -> Result<Self, String> {
        if let Some(letter) = unknown_escape(pattern) {
            return Err(format!("{pattern:?} is no regular expression: Python has no \\{letter}"));
        }
        let compiled = |end: &str| {
            RegexBuilder::new(&translated(pattern, end))
                .backtrack_limit(MOST_TRIES)
                .delegate_size_limit(MOST_BYTES)
                .build()
                .map_err(|error| format!("{pattern:?} is no regular expression: {error}"))
        };
        Ok(Self { usual: compiled("$")?, of_lines: compiled("(?:$|(?=\\n\\z))")? })
    }

    fn of(&self, text: &str) -> &Regex {
        if text.ends_with('\n') { &self.of_lines } else { &self.usual }
    }

    /// Python's `re.sub`.
    ///
    /// # Errors
    /// The search goes back too often, in words.
    pub(crate) fn replaced(&self, text: &str, replacement: &str) -> Result<String, String> {
        let replaced = self.of(text).try_replacen(text, 0, replacement);
        replaced.map(Cow::into_owned).map_err(|error| self.failed(&error))
    }

    /// All that Python's `re.findall` finds: an empty place right behind another one is found too.
    ///
    /// # Errors
    /// The search goes back too often, in words.
    pub(crate) fn all<'t>(&self, text: &'t str) -> Result<Vec<Captures<'t>>, String> {
        let (regex, mut all, mut at) = (self.of(text), Vec::new(), 0);
        while at <= text.len() {
            let found = regex.captures_from_pos(text, at).map_err(|error| self.failed(&error))?;
            let Some(captures) = found else { break };
            let (start, end) = captures.get(0).map_or((at, at), |whole| (whole.start(), whole.end()));
            let further = text[end..].chars().next().map_or(1, char::len_utf8);
            at = if start == end { end + further } else { end };
            all.push(captures);
        }
        Ok(all)
    }

    fn failed(&self, error: &Error) -> String {
        format!("{:?} cannot be looked for: {error}", self.usual.as_str())
    }
}

/// A letter behind a backslash that Python's `re` refuses. Rust's `\K` would let a place begin behind its own end.
fn unknown_escape(pattern: &str) -> Option<char> {
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        let escaped = if character == '\\' { characters.next() } else { None };
        let unknown =
            escaped.filter(|letter| letter.is_ascii_alphabetic() && !"AbBdDsSwWZafnrtvxuU".contains(*letter));
        if unknown.is_some() {
            return unknown;
        }
    }
    None
}

/// What Python means otherwise than Rust: `$` is `end`, `\Z` is the text's end itself, `\<` and `\>` are characters.
fn translated(pattern: &str, end: &str) -> String {
    let mut rust = String::with_capacity(pattern.len());
    let mut characters = pattern.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('Z') => rust.push_str("\\z"),
                Some(bracket @ ('<' | '>')) => rust.push(bracket),
                escaped => rust.extend([Some('\\'), escaped].into_iter().flatten()),
            },
            '[' => class(&mut characters, &mut rust),
            '$' => rust.push_str(end),
            other => rust.push(other),
        }
    }
    rust
}

/// A class, of which the first bracket is read: it has characters and ranges alone, no classes and operations on them.
fn class(characters: &mut Peekable<Chars>, rust: &mut String) {
    rust.push('[');
    rust.extend(characters.next_if_eq(&'^'));
    // Whether nothing stands before a character, what may begin a range, or a range's beginning.
    let (mut is_first, mut may_begin, mut begun) = (true, false, false);
    while let Some(character) = characters.next() {
        match character {
            ']' if !is_first => return rust.push(']'),
            '-' if may_begin && characters.peek() != Some(&']') => {
                rust.push('-');
                (may_begin, begun) = (false, true);
                continue;
            }
            '\\' => rust.extend([Some('\\'), characters.next()].into_iter().flatten()),
            '[' | ']' | '&' | '~' | '-' => rust.extend(['\\', character]),
            other => rust.push(other),
        }
        (is_first, may_begin, begun) = (false, !begun, false);
    }
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
            (r"\<b\>", "a <b> b", "a - b"),
            ("[a&&b]+", "xa&bx", "x-x"),
            ("[~~a]+", "x~a", "x-"),
            ("[--/]+", "a-./b", "a-b"),
            ("[+--]+", "a+,-b", "a-b"),
            ("[a-c-e]+", "abc-ed", "-d"),
            ("[-a]+", "x-a", "x-"),
            (r"[\w-]+", "a-b c", "- -"),
        ] {
            let got = Pattern::new(pattern).unwrap().replaced(text, "-").unwrap();
            assert_eq!(got, want, "{pattern} in {text:?}");
        }
        assert!(Pattern::new("(").unwrap_err().starts_with("\"(\" is no regular expression: "));
        for (pattern, want) in
            [(r"a(?=b\K)", Some('K')), (r"\\K", None), (r"[\p]", Some('p')), (r"\d\.", None)]
        {
            assert_eq!(unknown_escape(pattern), want, "{pattern}");
        }
        assert!(Pattern::new(r"a(?=b\K)").unwrap_err().ends_with(r"Python has no \K"));
    }

    /// `re.findall(pattern, text)` of CPython 3.11.
    #[test]
    fn all_places_are_those_that_python_finds() {
        for (pattern, text, want) in [
            (".*", "a\nb", &["a", "", "b", ""][..]),
            ("x*", "axxb", &["", "xx", "", ""]),
            ("(?:a)?", "a\u{e9}", &["a", "", ""]),
            ("a", "", &[]),
            ("", "", &[""]),
            ("a+$", "aa a\n", &["a"]),
        ] {
            let all = Pattern::new(pattern).unwrap().all(text).unwrap();
            let got: Vec<_> = all.iter().map(|captures| captures.get(0).unwrap().as_str()).collect();
            assert_eq!(got, want, "{pattern} in {text:?}");
        }
    }

    #[test]
    fn the_end_of_a_long_line_is_looked_for_without_going_back() {
        let long = "a".repeat(1500);
        let pattern = Pattern::new(r".*?([0-9]+)\s*$").unwrap();
        assert!(pattern.all(&long).unwrap().is_empty());
        assert_eq!(pattern.all(&format!("{long}7")).unwrap().len(), 1);
    }

    /// 200,000 states, each of some 20 bytes and more.
    #[test]
    fn expressions_that_fill_a_machine_are_refused() {
        assert!(Pattern::new("(?:a{1000}){200}").is_err());
    }
}
