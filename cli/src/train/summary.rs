//! What a run prints at its end: a table for people, a document for programs.

use crate::Failure;
use crate::output::{self, Format};
use domain::trial::TrialSummary;
use serde_json::json;
use std::path::Path;
use trainer::run::Run;

/// Prints the summary of a run whose adapter lies in `adapter`.
///
/// # Errors
/// Standard output cannot be written to.
pub(crate) fn print(
    format: Format,
    adapter: &Path,
    run: &Run,
    summary: &TrialSummary,
) -> Result<(), Failure> {
    let document = json!({
        "adapter": adapter,
        "summary": summary,
        "digests": run.digests(),
        "config": run.config().in_force(Some(run.total_steps())),
    });
    output::print(format, &document, || table(adapter, summary))
}

fn table(adapter: &Path, s: &TrialSummary) -> String {
    let share = 100.0 * s.trainable_parameters as f64 / s.total_parameters.max(1) as f64;
    let loss = |value| or_none(value, |v: f64| format!("{v:.4}"));
    let rate = |value| or_none(value, |v: f64| format!("{v:.1}"));
    let rows = vec![
        ("steps", s.steps.to_string()),
        ("loss", loss(s.loss)),
        ("eval/loss", format!("{} (base {})", loss(s.eval_loss), loss(s.base_eval_loss))),
        ("trainable parameters", format!("{} ({share:.2} %)", s.trainable_parameters)),
        ("samples/s, tokens/s", format!("{}, {}", rate(s.samples_per_second), rate(s.tokens_per_second))),
        ("peak memory", or_none(s.peak_memory_bytes, megabytes)),
        ("peak RSS", or_none(s.peak_rss_bytes, megabytes)),
        ("time", format!("{:.1} s", s.device_seconds)),
        ("adapter", format!("{} ({})", adapter.display(), megabytes(s.adapter_bytes))),
    ];
    let said = |name: &str, text: &Option<String>| text.clone().map(|text| (name.to_string(), text));
    let between = s.samples.iter().map(|sample| (format!("after step {}", sample.step), sample.text.clone()));
    let mut rows: Vec<_> = rows.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    rows.extend(said("prompt", &s.sample_prompt).into_iter().chain(said("base says", &s.sample_before)));
    rows.extend(between.chain(said("adapter says", &s.sample_after)));
    let rows: Vec<String> = rows.iter().map(|(name, value)| format!("{name:<22}{value}")).collect();
    rows.join("\n")
}

fn or_none<T>(value: Option<T>, shown: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".to_string(), shown)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}
