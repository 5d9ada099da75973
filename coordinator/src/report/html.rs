//! A document as one HTML page. Literal markup is `&'static str`, so that whatever is only known when the program
//! runs (names, samples, messages) can come in through an escaping method alone.

use super::document::{Block, Document, Figure, Line, Row, Span, Table};
use std::fmt::Display;

/// The page.
pub(super) fn page(document: &Document) -> String {
    let mut page = Html { text: String::new(), simulated: document.simulated, tables: 0 };
    page.raw("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    page.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    page.raw("<meta name=\"color-scheme\" content=\"light dark\">");
    page.raw("<title>").text(&document.title).raw(" – LoraFleet</title>\n<style>");
    page.raw(include_str!("style.css")).raw("</style></head><body><main>\n");
    page.blocks(&document.blocks);
    page.raw("</main></body></html>\n");
    page.text
}

/// A growing piece of HTML.
struct Html {
    text: String,
    simulated: bool,
    /// Those that there are so far.
    tables: usize,
}

impl Html {
    /// Literal markup of this program's.
    fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.text.push_str(markup);
        self
    }

    /// Text, escaped for element content and quoted attributes alike.
    fn text(&mut self, text: impl Display) -> &mut Self {
        self.text.push_str(&escape(&text.to_string()));
        self
    }

    /// `<tag>text</tag>`.
    fn element(&mut self, tag: &'static str, text: impl Display) -> &mut Self {
        self.raw("<").raw(tag).raw(">").text(text).raw("</").raw(tag).raw(">")
    }

    fn line(&mut self, line: &Line) -> &mut Self {
        for span in &line.0 {
            match span {
                Span::Text(text) => self.text(text),
                Span::Strong(text) => self.element("strong", text),
                Span::Code(text) => self.element("code", text),
                Span::State(state) => {
                    self.raw("<span class=\"state ").raw(state).raw("\">").text(state).raw("</span>")
                }
            };
        }
        self
    }

    fn blocks(&mut self, blocks: &[Block]) {
        blocks.iter().for_each(|block| self.block(block));
    }

    fn block(&mut self, block: &Block) {
        match block {
            Block::Title(text) => {
                self.raw("<p class=\"eyebrow\">LoraFleet sweep</p>").element("h1", text);
            }
            Block::Heading(text) => _ = self.element("h2", text),
            Block::Subheading(text) => _ = self.element("h3", text),
            Block::Paragraph(line) => _ = self.raw("<p>").line(line).raw("</p>"),
            Block::Warning(line) => _ = self.raw("<p class=\"failure\">").line(line).raw("</p>"),
            Block::Note(line) => _ = self.raw("<p class=\"note\">").line(line).raw("</p>"),
            Block::List(lines) => {
                self.raw("<ul>");
                lines.iter().for_each(|line| _ = self.raw("<li>").line(line).raw("</li>\n"));
                self.raw("</ul>");
            }
            Block::Facts(facts) => {
                self.raw("<dl class=\"facts\">");
                for (name, value) in facts {
                    self.raw("<div>").element("dt", name).element("dd", value).raw("</div>");
                }
                self.raw("</dl>");
            }
            Block::Figures(figures) => {
                self.raw("<div class=\"charts\">");
                figures.iter().for_each(|figure| self.figure(figure));
                self.raw("</div>");
            }
            Block::Table(table) => self.table(table),
            Block::Sample { prompt, before, between, after } => self.sample(prompt, before, between, after),
            Block::Details(summary, blocks) => {
                self.raw("<details>").element("summary", summary);
                self.blocks(blocks);
                self.raw("</details>");
            }
            Block::Definitions(definitions) => {
                self.raw("<dl>");
                for (name, meaning) in definitions {
                    self.element("dt", name).element("dd", meaning);
                }
                self.raw("</dl>");
            }
        }
        self.raw("\n");
    }

    /// plotters escapes the texts of a chart itself.
    fn figure(&mut self, figure: &Figure) {
        self.raw(if figure.chart.is_broad() { "<figure class=\"broad\">" } else { "<figure>" });
        match figure.chart.draw(self.simulated) {
            Ok(svg) => {
                self.raw("<svg role=\"img\" aria-label=\"").text(&figure.description).raw("\" ");
                self.text.push_str(svg.trim_start().strip_prefix("<svg ").unwrap_or(">"));
            }
            Err(error) => {
                self.raw("<p>This chart could not be drawn: ").text(error).raw("</p>");
            }
        }
        self.raw("<figcaption>");
        if self.simulated {
            self.raw("<strong>Simulated.</strong> ");
        }
        self.line(&figure.caption);
        if let Some(data) = &figure.data {
            self.raw("<details><summary>Its numbers</summary>");
            self.table(data);
            self.raw("</details>");
        }
        self.raw("</figcaption></figure>\n");
    }

    fn table(&mut self, table: &Table) {
        // A wide one is scrolled, with the keyboard, too; its number tells it from the others.
        self.tables += 1;
        let label = format!("Table {}: {}", self.tables, table.head.join(", "));
        self.raw("<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"").text(label);
        self.raw("\"><table><thead><tr>");
        table.head.iter().for_each(|name| _ = self.raw("<th scope=\"col\">").text(name).raw("</th>"));
        self.raw("</tr></thead><tbody>\n");
        for Row { cells, swatch, best } in &table.rows {
            self.raw(if *best { "<tr class=\"best\">" } else { "<tr>" });
            for (i, cell) in cells.iter().enumerate() {
                let tag = if i == 0 { "th" } else { "td" };
                self.raw(if i == 0 { "<th scope=\"row\">" } else { "<td>" });
                if let (0, Some(colour)) = (i, swatch) {
                    self.raw("<i class=\"swatch\" style=\"background:").raw(colour).raw("\"></i>");
                }
                self.line(cell).raw("</").raw(tag).raw(">");
            }
            self.raw("</tr>\n");
        }
        self.raw("</tbody></table></div>");
    }

    fn sample(&mut self, prompt: &str, before: &str, between: &[(u64, String)], after: &str) {
        self.raw("<figure class=\"sample\"><figcaption>What it says to a held-out prompt");
        self.raw("</figcaption>\n<blockquote class=\"prompt\">").text(prompt).raw("</blockquote><div>");
        self.raw("<blockquote><h3>Before: the base</h3><p>").text(before).raw("</p></blockquote>");
        for (step, text) in between {
            self.raw("<blockquote><h3>After step ").text(step).raw("</h3><p>").text(text);
            self.raw("</p></blockquote>");
        }
        self.raw("<blockquote class=\"after\"><h3>After: with the adapter</h3><p>").text(after);
        self.raw("</p></blockquote></div></figure>");
    }
}

/// Text for element content and quoted attributes, of HTML and XML.
pub(super) fn escape(text: &str) -> String {
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
