//! The report of a sweep: which configuration to use, what it costs, and the numbers behind the answer. One HTML file
//! that needs nothing else, neither script nor network; or Markdown beside SVG figures. It is made of records alone.
//!
//! | file | holds |
//! |---|---|
//! | this one | the report, section by section |
//! | `slice.rs` | which trials may be compared: slices, pairs |
//! | `takeaways.rs`, `quality.rs`, `recommendation.rs` | sentences that are computed from the trials |
//! | `figures/` | a kind of figure a file |
//! | `importance.rs` | how much each parameter matters |
//! | `tables.rs` | trials, what their numbers mean, the configuration in force |
//! | `evaluations.rs` | what tasks say of base and adapters |
//! | `replicates.rs`, `differences.rs` | means over runs with other seeds; what they differ by |
//! | `published.rs` | published numbers beside the sweep's |
//! | `statistics.rs`, `student.rs` | how sure a mean is; Student's t |
//! | `paired.rs` | differences document by document; the paired bootstrap |
//! | `axis.rs`, `chart.rs` | axes and marks → SVG |
//! | `series.rs` | rank order, curves, smoothing |
//! | `document.rs` | what a report is made of: paragraphs, tables, figures |
//! | `html.rs`, `style.css`, `markdown.rs` | how that looks |
//! | `numbers.rs` | how numbers read |

mod axis;
mod chart;
mod differences;
mod document;
mod evaluations;
mod figures;
mod html;
mod importance;
#[cfg(test)]
pub(crate) mod made;
mod markdown;
mod numbers;
mod paired;
mod published;
mod quality;
mod recommendation;
mod replicates;
mod series;
mod slice;
mod statistics;
mod student;
mod tables;
mod takeaways;

pub use importance::{Observed, importance};
pub use markdown::File;

use differences::Difference;
use document::{Block, Document, Line};
use domain::TrialId;
use domain::data::shown;
use domain::metric::{self, MetricPoint};
use domain::sweep::Sweep;
use domain::trial::{ItemScores, Trial, TrialState};
use paired::Items;
use published::Beside;
use replicates::Finalist;
use serde_json::Value;
use series::Entry;
use slice::Facts;
use std::collections::BTreeMap;
use std::time::Duration;

/// Trials of which a report has what single documents made of them, some 50 kB each.
pub const MOST_ITEMS: usize = 500;
/// The bytes of all of it.
pub const ITEMS_BYTES: usize = 64 << 20;
/// A report waits no longer for it.
pub const ITEMS_WAIT: Duration = Duration::from_secs(20);

/// What a report is made from: a sweep, its trials, the metric points of each trial in step order, and what single
/// documents made of it; where a trial is missing of which that is kept, it was left out.
#[derive(Debug, Clone, Copy)]
pub struct Records<'a> {
    /// The sweep.
    pub sweep: &'a Sweep,
    /// Its trials.
    pub trials: &'a [Trial],
    /// Their points.
    pub curves: &'a [(TrialId, Vec<MetricPoint>)],
    /// What is kept of single documents.
    pub items: &'a [(TrialId, Vec<ItemScores>)],
}

/// The report as a self-contained HTML page.
pub fn html(records: Records) -> String {
    html::page(&document(records))
}

/// The report as Markdown, `report.md`, and the figures that it shows, `figures/*.svg`.
pub fn markdown(records: Records) -> Vec<File> {
    markdown::files(&document(records))
}

/// The records, put in order.
struct Sources<'a> {
    sweep: &'a Sweep,
    /// The trials that the search proposed, the best first.
    entries: Vec<Entry<'a>>,
    /// Further runs of some of them with other seeds, the best first: no other configurations, so that only the table of
    /// trials and what is said of seeds has them.
    replicates: Vec<Entry<'a>>,
    /// Those trials that were run again, the best mean first.
    finalists: Vec<Finalist<'a>>,
    /// What the first of them differs from the others by.
    differences: Vec<Difference>,
    /// The colour of each entry.
    colours: Vec<&'static str>,
    facts: Facts<'a>,
    /// What is kept of single documents.
    items: Items<'a>,
    /// What was published of the same base.
    published: Option<Beside>,
    /// The sweep's best trial, or the cheapest of those that came to their end and are as good.
    best: Option<&'a TrialId>,
    /// Where each trial stands among the entries.
    places: BTreeMap<&'a TrialId, usize>,
}

impl<'a> Sources<'a> {
    fn of(Records { sweep, trials, curves, items }: Records<'a>) -> Self {
        let (again, searched): (Vec<_>, Vec<_>) =
            trials.iter().partition(|trial| trial.replicate_of.is_some());
        let facts = Facts::of(searched.iter().copied());
        let (entries, replicates) =
            (series::ranked(sweep, searched, curves), series::ranked(sweep, again, curves));
        let finalists = replicates::finalists(sweep, &entries, &replicates);
        let items = Items::of(items);
        let differences = differences::from_others(&sweep.spec.search, &finalists, &items);
        let colours = colours(&entries);
        let places = entries.iter().enumerate().map(|(place, entry)| (&entry.trial.id, place)).collect();
        let best = best(sweep, &entries);
        let published = Beside::of(&sweep.spec.base.pretrained_model_id, &facts);
        Self {
            sweep,
            entries,
            replicates,
            finalists,
            differences,
            colours,
            facts,
            items,
            published,
            best,
            places,
        }
    }

    /// A trial's entry and its colour.
    fn entry(&self, trial: &Trial) -> Option<(&Entry<'a>, &'static str)> {
        let place = *self.places.get(&trial.id)?;
        Some((self.entries.get(place)?, self.colours.get(place)?))
    }

    fn is_best(&self, trial: &Trial) -> bool {
        self.best.is_some_and(|id| *id == trial.id)
    }

    fn best(&self) -> Option<&Entry<'a>> {
        self.entries.iter().find(|entry| self.is_best(entry.trial))
    }

    /// The best completed trial of each precision mode, by the mode's name, of those that `counts`.
    fn best_of_modes(&self, counts: impl Fn(&Trial) -> bool) -> Vec<(String, &Entry<'a>)> {
        let best = |mode: &Value| {
            let of_it = |entry: &&Entry| {
                entry.trial.state == TrialState::Completed
                    && counts(entry.trial)
                    && slice::fields(&entry.trial.config).get(slice::PRECISION) == Some(mode)
            };
            // Entries stand in rank order.
            Some((numbers::value(mode), self.entries.iter().find(of_it)?))
        };
        self.facts.values(slice::PRECISION).into_iter().filter_map(best).collect()
    }
}

/// The sweep's best trial; of several that are as good, to the digits in which it is told, the first in rank order.
fn best<'a>(sweep: &'a Sweep, entries: &[Entry<'a>]) -> Option<&'a TrialId> {
    let (recorded, _) = sweep.best.as_ref()?;
    let value = |entry: &Entry| entry.value.map(series::told);
    let of_it = entries.iter().find(|entry| entry.trial.id == *recorded).and_then(value);
    let as_good = |entry: &&Entry| {
        entry.trial.state == TrialState::Completed && of_it.is_some() && value(entry) == of_it
    };
    Some(entries.iter().find(as_good).map_or(recorded, |entry| &entry.trial.id))
}

/// The first trials in rank order have a colour each, the others share grey.
fn colours(entries: &[Entry]) -> Vec<&'static str> {
    let colour = |(i, entry): (usize, &Entry)| match entry.value {
        Some(_) => chart::PALETTE.get(i).copied().unwrap_or(chart::OTHERS),
        None => chart::OTHERS,
    };
    entries.iter().enumerate().map(colour).collect()
}

fn document(records: Records) -> Document {
    let sources = Sources::of(records);
    let mut blocks = heading(records);
    let mut section = |name: &str, content: Vec<Block>| {
        if !content.is_empty() {
            blocks.push(Block::Heading(name.into()));
            blocks.extend(content);
        }
    };
    if let Some(best) = sources.best() {
        let number = numbers::or_dash(best.trial.id.number(), |n| n.to_string());
        let of = if sources.replicates.is_empty() { "Best" } else { "Best single run" };
        section(&format!("{of}: trial {number}"), the_best(&sources, best));
    }
    section("Key takeaways", takeaways::blocks(&sources));
    section("Which one to use", lines(recommendation::recommendations(&sources)));
    section("Runs with other seeds", replicates::blocks(&sources));
    let published = sources.published.map(|beside| beside.published);
    section("Memory, speed and cost", figures_of(figures::benchmark::figures(&sources.facts, published)));
    section("Trainable parameters", tables::by_rank(&sources.facts).into_iter().collect());
    section("Base against adapters", tables::accuracy(&sources).into_iter().collect());
    section("What tasks say of them", evaluations::blocks(&sources));
    section("Beside the published numbers", published::blocks(&sources));
    section("Quality against its price", figures_of(figures::tradeoffs::figures(&sources)));
    section("Learning curves", figures::curves::blocks(&sources));
    let name = format!("Parameters against {}", sources.sweep.spec.search.metric);
    section(&name, figures::parameters::blocks(&sources));
    section("The search", figures_of(figures::progress::figure(&sources).into_iter().collect()));
    section("Timeline of devices", figures_of(figures::timeline::figure(&sources).into_iter().collect()));
    section("Predicted and measured memory and time", figures_of(figures::predicted::figures(&sources)));
    section("Trials", tables::trials(&sources));
    Document {
        title: sources.sweep.spec.name.clone(),
        blocks,
        files: published::file(&sources).into_iter().collect(),
        simulated: records.trials.iter().any(Trial::is_simulated),
    }
}

fn lines(lines: Vec<Line>) -> Vec<Block> {
    if lines.is_empty() { Vec::new() } else { vec![Block::List(lines)] }
}

fn figures_of(figures: Vec<document::Figure>) -> Vec<Block> {
    if figures.is_empty() { Vec::new() } else { vec![Block::Figures(figures)] }
}

fn heading(Records { sweep, trials, .. }: Records) -> Vec<Block> {
    let mut blocks = vec![Block::Title(sweep.spec.name.clone())];
    let mut line = Line::default().state(sweep.state.as_str()).text(" ").code(&sweep.id);
    line = line.text(" · submitted ").text(numbers::date(sweep.created_at));
    if let Some(finished) = sweep.finished_at {
        line = line.text(" · took ").text(numbers::duration(finished.since(sweep.created_at)));
    }
    blocks.push(Block::Paragraph(line));
    let count = |state| trials.iter().filter(|t| t.state == state).count();
    let mut facts = vec![("trials".to_string(), trials.len().to_string())];
    facts.extend(TrialState::ALL.into_iter().filter_map(|state| {
        Some(count(state)).filter(|n| *n > 0).map(|n| (state.to_string(), n.to_string()))
    }));
    facts.push(("cost".into(), numbers::usd(sweep.cost_usd)));
    blocks.push(Block::Facts(facts));
    let base = &sweep.spec.base;
    let on =
        Line::default().code(shown(&base.pretrained_model_id)).text(" on ").code(shown(&base.dataset_name));
    blocks.push(Block::Note(on));
    blocks.extend(tables::prices(trials).map(Block::Note));
    let simulated = trials.iter().filter(|trial| trial.is_simulated()).count();
    if simulated > 0 {
        let of =
            if simulated == trials.len() { "All".into() } else { format!("{simulated} of {}", trials.len()) };
        blocks.push(Block::Warning(Line::from(format!(
            "{of} trials ran on simulated devices: nothing was trained. Memory and time are what models predict, \
             losses follow a formula."
        ))));
    }
    blocks.extend(sweep.failure.as_ref().map(|failure| Block::Warning(Line::from(failure))));
    blocks
}

fn the_best(sources: &Sources, best: &Entry) -> Vec<Block> {
    let (sweep, trial) = (sources.sweep, best.trial);
    let value = numbers::or_dash(sweep.best.as_ref().map(|(_, value)| *value), numbers::loss);
    let mut line = Line::from(&sweep.spec.search.metric).text(" ").strong(value);
    let summary = trial.summary.as_ref();
    if sweep.spec.search.metric == metric::EVAL_LOSS
        && let Some(base) = summary.and_then(|s| s.base_eval_loss)
    {
        line = line.text(", where the base has ").text(numbers::loss(base));
    }
    for name in tables::searched(sweep) {
        let value = numbers::or_dash(trial.parameters.get(name), numbers::value);
        line = line.text(" · ").text(name).text(" ").strong(value);
    }
    let mut blocks = vec![Block::Paragraph(line)];
    if let Some(adapter) = &trial.adapter {
        blocks.push(Block::Paragraph(Line::from("Its adapter, in PEFT's format: ").code(adapter)));
    }
    let sample = summary.and_then(|s| Some((s.sample_before.clone()?, s.sample_after.clone()?, s)));
    blocks.extend(sample.map(|(before, after, summary)| Block::Sample {
        prompt: summary.sample_prompt.clone().unwrap_or_default(),
        before,
        between: summary.samples.iter().map(|sample| (sample.step, sample.text.clone())).collect(),
        after,
    }));
    blocks
}
