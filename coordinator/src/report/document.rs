//! What a report says, apart from how it looks: `html.rs` and `markdown.rs` write it.

use super::chart::Chart;
use std::fmt::Display;

/// The whole report.
pub(super) struct Document {
    pub(super) title: String,
    pub(super) blocks: Vec<Block>,
    /// Names and texts of tables for programs, which lie beside it where it is several files.
    pub(super) files: Vec<(String, String)>,
    /// Whether every figure says that its numbers are simulated.
    pub(super) simulated: bool,
}

/// A piece of a line.
#[derive(Debug, PartialEq)]
pub(super) enum Span {
    Text(String),
    Strong(String),
    Code(String),
    /// A state, a trial's or a sweep's.
    State(&'static str),
}

/// Text with its emphasis.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Line(pub(super) Vec<Span>);

impl Line {
    pub(super) fn text(mut self, text: impl Display) -> Self {
        self.0.push(Span::Text(text.to_string()));
        self
    }

    pub(super) fn strong(mut self, text: impl Display) -> Self {
        self.0.push(Span::Strong(text.to_string()));
        self
    }

    pub(super) fn code(mut self, text: impl Display) -> Self {
        self.0.push(Span::Code(text.to_string()));
        self
    }

    pub(super) fn state(mut self, state: &'static str) -> Self {
        self.0.push(Span::State(state));
        self
    }

    /// Without its emphasis.
    pub(super) fn plain(&self) -> String {
        let text = |span: &Span| match span {
            Span::Text(text) | Span::Strong(text) | Span::Code(text) => text.clone(),
            Span::State(state) => (*state).to_string(),
        };
        self.0.iter().map(text).collect()
    }
}

impl<T: Display> From<T> for Line {
    fn from(text: T) -> Self {
        Self::default().text(text)
    }
}

/// A part of the report, in reading order.
pub(super) enum Block {
    /// The report's own heading: the sweep's name.
    Title(String),
    /// A heading of a section.
    Heading(String),
    /// A heading within one.
    Subheading(String),
    Paragraph(Line),
    /// What a reader must not miss.
    Warning(Line),
    /// What is said small.
    Note(Line),
    List(Vec<Line>),
    /// Names and numbers, large.
    Facts(Vec<(String, String)>),
    /// Figures beside each other.
    Figures(Vec<Figure>),
    Table(Table),
    /// What base and adapter say to a prompt.
    Sample {
        prompt: String,
        before: String,
        /// Texts on the way, each with its step.
        between: Vec<(u64, String)>,
        after: String,
    },
    /// What is read on demand: a summary, and the rest.
    Details(String, Vec<Block>),
    Definitions(Vec<(String, String)>),
}

/// A chart, what it shows, and the numbers that it is drawn from.
pub(super) struct Figure {
    /// The file's name without its ending, where it is a file of its own.
    pub(super) name: String,
    /// What it shows, for those who do not see it.
    pub(super) description: String,
    pub(super) chart: Chart,
    pub(super) caption: Line,
    /// Its numbers, where no other table has them.
    pub(super) data: Option<Table>,
}

/// A table; each row has as many cells as the head.
#[derive(Default)]
pub(super) struct Table {
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Row>,
}

impl Table {
    pub(super) fn new<T: Display>(head: impl IntoIterator<Item = T>) -> Self {
        Self { head: head.into_iter().map(|name| name.to_string()).collect(), rows: Vec::new() }
    }

    /// Adds a row of plain cells.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(Row { cells: cells.into_iter().map(Line::from).collect(), ..Row::default() });
    }
}

/// A row of a table.
#[derive(Default)]
pub(super) struct Row {
    pub(super) cells: Vec<Line>,
    /// The colour that it has in the charts.
    pub(super) swatch: Option<&'static str>,
    /// Whether it stands out.
    pub(super) best: bool,
}
