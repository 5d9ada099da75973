//! HTML text in the making. Literal markup is `&'static str`, so that whatever is only known when the program
//! runs (names, samples, messages) can come in through an escaping method alone.

use std::fmt::Display;

/// A growing piece of HTML.
#[derive(Default)]
pub(super) struct Html {
    text: String,
    /// Whether every figure says that its numbers are simulated.
    pub(super) simulated: bool,
}

impl Html {
    /// Literal markup of this program's.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.text.push_str(markup);
        self
    }

    /// Text, escaped for element content and quoted attributes alike.
    pub(super) fn text(&mut self, text: impl Display) -> &mut Self {
        self.text.push_str(&escape(&text.to_string()));
        self
    }

    /// `<tag>text</tag>`.
    pub(super) fn element(&mut self, tag: &'static str, text: impl Display) -> &mut Self {
        self.raw("<").raw(tag).raw(">").text(text).raw("</").raw(tag).raw(">")
    }

    /// An SVG document that plotters wrote (it escapes its own texts), with a description for those who do
    /// not see it.
    pub(super) fn svg(&mut self, svg: &str, description: &str) -> &mut Self {
        self.raw("<svg role=\"img\" aria-label=\"").text(description).raw("\" ");
        self.text.push_str(svg.trim_start().strip_prefix("<svg ").unwrap_or(">"));
        self
    }

    /// The text so far.
    pub(super) fn finish(self) -> String {
        self.text
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // HTML has no place for the other control characters, and a model may well write one.
            c if c.is_control() && !matches!(c, '\n' | '\t') => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_literal_is_escaped() {
        for (text, want) in [
            ("plain", "plain"),
            ("<script>alert('x')</script>", "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"),
            ("\" onload=\"", "&quot; onload=&quot;"),
            ("a & b &amp;", "a &amp; b &amp;amp;"),
            ("two\nlines\u{0}", "two\nlines\u{FFFD}"),
        ] {
            assert_eq!(escape(text), want);
        }
    }
}
