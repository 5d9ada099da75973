//! A document as Markdown (GitHub's: with tables) beside a folder of SVG figures.

use super::chart;
use super::document::{Block, Document, Figure, Line, Span, Table};
use std::fmt::Write;

/// A file of a report: its path below the report's directory, with `/`, and its text.
pub type File = (String, String);

/// The files: `report.md` first, then its figures, then tables for programs.
pub(super) fn files(document: &Document) -> Vec<File> {
    let mut writer = Writer { text: String::new(), figures: Vec::new(), simulated: document.simulated };
    writer.blocks(&document.blocks);
    let text = writer.text.trim_end().to_string() + "\n";
    let files = document.files.iter().cloned();
    [("report.md".to_string(), text)].into_iter().chain(writer.figures).chain(files).collect()
}

struct Writer {
    text: String,
    figures: Vec<File>,
    simulated: bool,
}

impl Writer {
    /// A paragraph of its own.
    fn paragraph(&mut self, text: impl AsRef<str>) {
        self.text.push_str(text.as_ref());
        self.text.push_str("\n\n");
    }

    fn blocks(&mut self, blocks: &[Block]) {
        blocks.iter().for_each(|block| self.block(block));
    }

    fn block(&mut self, block: &Block) {
        match block {
            Block::Title(text) => self.paragraph(format!("# {}", escape(text))),
            Block::Heading(text) => self.paragraph(format!("## {}", escape(text))),
            Block::Subheading(text) => self.paragraph(format!("### {}", escape(text))),
            Block::Paragraph(text) | Block::Note(text) => self.paragraph(line(text)),
            Block::Warning(text) => self.paragraph(format!("> {}", line(text))),
            Block::List(lines) => {
                let items: Vec<_> = lines.iter().map(|item| format!("- {}", line(item))).collect();
                self.paragraph(items.join("\n"));
            }
            Block::Facts(facts) => {
                let facts: Vec<_> = facts
                    .iter()
                    .map(|(name, value)| format!("{} **{}**", escape(name), escape(value)))
                    .collect();
                self.paragraph(facts.join(" · "));
            }
            Block::Figures(figures) => figures.iter().for_each(|figure| self.figure(figure)),
            Block::Table(table) => self.table(table),
            Block::Sample { prompt, before, between, after } => {
                self.paragraph("What it says to a held-out prompt:");
                self.paragraph(quote(prompt));
                self.paragraph("Before, the base:");
                self.paragraph(quote(before));
                for (step, text) in between {
                    self.paragraph(format!("After step {step}:"));
                    self.paragraph(quote(text));
                }
                self.paragraph("After, with the adapter:");
                self.paragraph(quote(after));
            }
            Block::Details(summary, blocks) => {
                self.paragraph(format!("### {}", escape(summary)));
                self.blocks(blocks);
            }
            Block::Definitions(definitions) => {
                let items: Vec<_> = definitions
                    .iter()
                    .map(|(name, meaning)| format!("- **{}**: {}", escape(name), escape(meaning)))
                    .collect();
                self.paragraph(items.join("\n"));
            }
        }
    }

    fn figure(&mut self, figure: &Figure) {
        match figure.chart.draw(self.simulated) {
            Ok(svg) => {
                let path = format!("figures/{}.svg", figure.name);
                let mark = if self.simulated { "Simulated. " } else { "" };
                let svg = chart::standalone(
                    &svg,
                    &figure.description,
                    &format!("{mark}{}", figure.caption.plain()),
                );
                self.paragraph(format!("![{}]({path})", escape(&figure.description)));
                self.figures.push((path, svg));
            }
            Err(error) => self.paragraph(format!("This chart could not be drawn: {}", escape(&error))),
        }
        let mark = if self.simulated { "**Simulated.** " } else { "" };
        self.paragraph(format!("{mark}{}", line(&figure.caption)));
        if let Some(data) = &figure.data {
            self.table(data);
        }
    }

    fn table(&mut self, table: &Table) {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        self.text += &row(table.head.iter().map(|name| escape(name)).collect());
        self.text += &row(table.head.iter().map(|_| "---".to_string()).collect());
        for r in &table.rows {
            let cell = |cell: &Line| match (line(cell), r.best) {
                (text, true) if !text.is_empty() => format!("**{}**", text.replace("**", "")),
                (text, _) => text,
            };
            self.text += &row(r.cells.iter().map(cell).collect());
        }
        self.text.push('\n');
    }
}

fn line(line: &Line) -> String {
    let mut text = String::new();
    for span in &line.0 {
        // Writing to a string cannot fail.
        let _ = match span {
            Span::Text(part) => write!(text, "{}", escape(part)),
            Span::Strong(part) => write!(text, "**{}**", escape(part)),
            Span::Code(part) => write!(text, "{}", code(part)),
            Span::State(state) => write!(text, "{state}"),
        };
    }
    text
}

/// Text that means nothing but itself, on one line.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '#' | '|' | '~' | '!' | '$' => escaped.extend(['\\', c]),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Code on one line, with as many backticks around it as it takes; a pipe would end a table's cell even there.
fn code(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    let room = if text.starts_with('`') || text.ends_with('`') { " " } else { "" };
    format!("{fence}{room}{}{room}{fence}", text.replace('|', "\\|"))
}

/// A text as it is, in as long a fence as it takes: a model's words would be headings and lists otherwise.
fn quote(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    let plain = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { ' ' } else { c };
    format!("{fence}text\n{}\n{fence}", text.chars().map(plain).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_means_nothing_else() {
        for (got, want) in [
            (escape("a_b | <script> *c*"), "a\\_b \\| &lt;script&gt; \\*c\\*"),
            (escape("two\nlines"), "two lines"),
            (code("plain"), "`plain`"),
            (code("a`b|c"), "``a`b\\|c``"),
            (code("`"), "`` ` ``"),
            (quote("one\n# two\r"), "```text\none\n# two \n```"),
            (quote("```\nx"), "````text\n```\nx\n````"),
        ] {
            assert_eq!(got, want);
        }
    }

    #[test]
    fn a_table_has_its_rule_and_what_stands_out() {
        let mut table = Table::new(["trial", "loss"]);
        table.row(["1".to_string(), "2.5".to_string()]);
        table.rows[0].best = true;
        let document = Document {
            title: "t".into(),
            blocks: vec![Block::Table(table)],
            files: Vec::new(),
            simulated: false,
        };
        assert_eq!(
            files(&document),
            [("report.md".into(), "| trial | loss |\n| --- | --- |\n| **1** | **2.5** |\n".into())]
        );
    }
}
