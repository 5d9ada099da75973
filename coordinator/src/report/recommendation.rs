//! Which configuration to use, for three readers: who wants the best, who pays for it, and who has a certain GPU.

use super::Sources;
use super::document::Line;
use super::replicates::Finalist;
use super::series::Entry;
use super::{numbers, tables};
use domain::trial::{Throughput, TrialState};
use std::collections::BTreeMap;

/// How much worse than the best a trial may be and count as good, as a share of the best value.
const TOLERANCE: f64 = 0.01;
/// Bytes of a GPU that its driver's context takes.
const CONTEXT: u64 = 1_000_000_000;

/// A completed trial and what is weighed.
struct Candidate<'a> {
    entry: &'a Entry<'a>,
    value: f64,
    dollars: f64,
    seconds: f64,
}

impl Candidate<'_> {
    /// What it takes to train it again.
    fn price(&self, in_dollars: bool) -> f64 {
        if in_dollars { self.dollars } else { self.seconds }
    }

    /// `trial 7 (4bit, lora_rank 16)`.
    fn named(&self, sources: &Sources) -> String {
        let trial = self.entry.trial;
        let chosen = tables::searched(sources.sweep)
            .into_iter()
            .map(|name| format!("{name} {}", numbers::or_dash(trial.parameters.get(name), numbers::value)));
        let number = numbers::or_dash(trial.id.number(), |n| n.to_string());
        match chosen.collect::<Vec<_>>().join(", ").as_str() {
            "" => format!("trial {number}"),
            chosen => format!("trial {number} ({chosen})"),
        }
    }

    /// Its bytes when it is alone on a device, and whether they were measured.
    fn memory(&self) -> Option<(u64, bool)> {
        let summary = self.entry.trial.summary.as_ref()?;
        let solo = summary.throughput == Throughput::Solo && summary.pack_peak_memory_bytes.is_none();
        let measured = summary.peak_memory_bytes.filter(|_| solo).map(|bytes| (bytes, true));
        measured.or_else(|| Some((summary.predicted_peak_memory_bytes?, false)))
    }
}

/// The recommendations; none without a trial that came to its end with a value of the sweep's metric.
pub(super) fn recommendations(sources: &Sources) -> Vec<Line> {
    let mut candidates: Vec<_> = sources.entries.iter().filter_map(candidate).collect();
    // Of several runs of one configuration the best is a lucky one: what was run again counts by its mean, and before what
    // was run once. But where it is the best by one run that has no mean, means of others alone say nothing of it.
    let finalists = &sources.finalists;
    let mean =
        |(place, finalist): (usize, &Finalist)| Some((finalist.trial.id.clone(), (place, finalist.value?)));
    let means: BTreeMap<_, _> = finalists.iter().enumerate().filter_map(mean).collect();
    let mean_of = |candidate: &Candidate| means.get(&candidate.entry.trial.id);
    let by_means = candidates.first().and_then(mean_of).is_some();
    if by_means {
        for candidate in &mut candidates {
            candidate.value = mean_of(candidate).map_or(candidate.value, |(_, mean)| mean.mean);
        }
        // Entries stand in rank order, and the sort is stable.
        candidates.sort_by_cached_key(|candidate| mean_of(candidate).map_or(usize::MAX, |(place, _)| *place));
    }
    let Some(best) = candidates.first() else { return Vec::new() };
    let in_dollars = candidates.iter().all(|c| c.dollars > 0.0);
    // What took no time was not measured.
    let known = candidates.iter().all(|c| c.price(in_dollars) > 0.0);
    let show = |candidate: &Candidate| match in_dollars {
        true => numbers::usd(candidate.dollars),
        false => format!("{} of a device", numbers::seconds(candidate.seconds)),
    };
    let metric = &sources.sweep.spec.search.metric;

    let among = match means.len() {
        ..=1 => String::new(),
        means => format!(", the best of {means} such means"),
    };
    let by_one = if finalists.is_empty() { "" } else { ", by one run each" };
    let of = match (mean_of(best).filter(|_| by_means), candidates.len()) {
        (Some((_, mean)), _) => format!("the mean of its {} runs with different seeds{among}", mean.runs),
        (None, 1) => "that of the one trial that came to its end".to_string(),
        (None, n) => format!("the best of {n} trials that came to their end{by_one}"),
    };
    let run_again = finalists.iter().find(|finalist| finalist.trial.id == best.entry.trial.id);
    let lacks = run_again.map_or_else(String::new, Finalist::lacks);
    let took = if known { format!("; it took {}", show(best)) } else { String::new() };
    let mut line = Line::default().strong("The best").text(format!(
        ": {}. Its {metric} of {} is {of}{took}{lacks}.",
        best.named(sources),
        numbers::loss(best.value)
    ));
    let differences = sources.differences.iter().filter(|_| by_means);
    let as_good: Vec<_> = differences.filter(|d| d.is_none()).map(|d| d.from.as_str()).collect();
    if !as_good.is_empty() {
        line = line.text(format!(" No difference shown from {}.", as_good.join(", ")));
    }
    let mut lines = vec![line];

    let good = candidates.iter().filter(|c| (c.value - best.value).abs() <= TOLERANCE * best.value.abs());
    let cheapest = good.min_by(|a, b| a.price(in_dollars).total_cmp(&b.price(in_dollars)));
    if let Some(cheapest) = cheapest.filter(|_| known) {
        let within = format!("within {} % of the best {metric}", TOLERANCE * 100.0);
        let why = if cheapest.entry.trial.id == best.entry.trial.id {
            format!("none that is {within} costs less")
        } else {
            format!(
                "it took {}, {} less than the best, with {metric} {}; it is the cheapest of those {within}",
                show(cheapest),
                numbers::change(cheapest.price(in_dollars) / best.price(in_dollars)),
                numbers::loss(cheapest.value)
            )
        };
        let said = format!(": {}: {why}.", cheapest.named(sources));
        lines.push(Line::default().strong("Cheapest good").text(said));
    }
    lines.extend(by_memory(sources, &candidates));
    lines
}

fn candidate<'a>(entry: &'a Entry<'a>) -> Option<Candidate<'a>> {
    let trial = entry.trial;
    let seconds = trial.summary.as_ref()?.device_seconds;
    let completed = trial.state == TrialState::Completed;
    let dollars = trial.cost_usd.unwrap_or_default();
    entry.value.filter(|_| completed).map(|value| Candidate { entry, value, dollars, seconds })
}

/// The best that fits a GPU of each size, from the smallest up; sizes with the same answer stand together.
fn by_memory(sources: &Sources, candidates: &[Candidate]) -> Vec<Line> {
    let mut lines: Vec<(String, Option<usize>)> = Vec::new();
    for (size, room) in sizes() {
        let fits = |c: &Candidate| c.memory().is_some_and(|(bytes, _)| bytes <= room);
        let choice = candidates.iter().position(fits);
        match lines.last_mut() {
            Some((_, last)) if *last == choice => {}
            _ => lines.push((size, choice)),
        }
    }
    // Where all of it needs more than any GPU has, or nothing is known, there is nothing to say.
    if lines.iter().all(|(_, choice)| choice.is_none()) {
        return Vec::new();
    }
    let say = |(size, choice): (String, Option<usize>)| {
        let line = Line::default().strong(format!("For a GPU of {size}"));
        let Some((candidate, (bytes, measured))) =
            choice.and_then(|i| Some((&candidates[i], candidates[i].memory()?)))
        else {
            return line.text(": none of the trials that came to their end fits.");
        };
        let metric = &sources.sweep.spec.search.metric;
        let said = if measured { "needs" } else { "is predicted to need" };
        line.text(format!(
            ", and larger ones: {}, which {said} {} and has the best {metric} of those that fit, {}.",
            candidate.named(sources),
            numbers::bytes(bytes),
            numbers::loss(candidate.value)
        ))
    };
    lines.into_iter().map(say).collect()
}

/// The sizes of the accelerators that there are, as their names have them, with the bytes that trials may use; the least
/// of those that share a name.
fn sizes() -> Vec<(String, u64)> {
    let accelerators = config::machines::accelerators().into_iter();
    let mut sizes: Vec<_> = accelerators
        .filter_map(|a| {
            Some((a.name.rsplit('-').next()?.replace("GB", " GB"), a.memory_bytes.checked_sub(CONTEXT)?))
        })
        .collect();
    sizes.sort_by_key(|(_, bytes)| *bytes);
    let mut known = std::collections::BTreeSet::new();
    sizes.retain(|(size, _)| known.insert(size.clone()));
    sizes
}

#[cfg(test)]
mod tests {
    use super::super::Records;
    use super::super::made::{self, float16, four_bit};
    use super::*;
    use domain::trial::Trial;

    fn said(trials: &[Trial]) -> Vec<String> {
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[], items: &[] });
        recommendations(&sources).iter().map(Line::plain).collect()
    }

    #[test]
    fn for_three_readers() {
        let mut trials = vec![
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 2.5),
            made::measured(3, float16(1, 16, 512), 20.5, 6.25),
            made::unfit(4, float16(4, 16, 512), 45.0),
        ];
        assert!(said(&trials).is_empty(), "without values there is nothing to recommend");
        for (trial, value) in trials.iter_mut().zip([2.0, 2.01, 2.015]) {
            trial.eval_loss = Some(value);
        }
        assert_eq!(
            said(&trials),
            [
                "The best: trial 1. Its eval/loss of 2.0000 is the best of 3 trials that came to their end; it took $1.00.",
                "Cheapest good: trial 3: it took $0.80, 20 % less than the best, with eval/loss 2.0150; it is the cheapest of \
                 those within 1 % of the best eval/loss.",
                "For a GPU of 16 GB, and larger ones: trial 2, which needs 7 GB and has the best eval/loss of those that fit, \
                 2.0100.",
                "For a GPU of 32 GB, and larger ones: trial 1, which needs 28 GB and has the best eval/loss of those that fit, \
                 2.0000.",
            ]
        );
        trials.truncate(1);
        assert_eq!(
            said(&trials)[1..],
            [
                "Cheapest good: trial 1: none that is within 1 % of the best eval/loss costs less.",
                "For a GPU of 16 GB: none of the trials that came to their end fits.",
                "For a GPU of 32 GB, and larger ones: trial 1, which needs 28 GB and has the best eval/loss of those that fit, \
                 2.0000.",
            ]
        );
    }

    #[test]
    fn what_costs_nothing_is_weighed_by_time() {
        let mut trials = vec![
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 2.5),
        ];
        for trial in &mut trials {
            trial.cost_usd = Some(0.0);
            trial.eval_loss = Some(2.0);
        }
        if let Some(summary) = &mut trials[1].summary {
            summary.device_seconds = 500.0;
        }
        let as_good = said(&trials);
        assert!(as_good[0].starts_with("The best: trial 2."), "of two as good the cheaper: {as_good:#?}");
        trials[1].eval_loss = Some(2.001);
        let said = said(&trials);
        assert!(
            said[1].starts_with("Cheapest good: trial 2: it took 8 min 20 s of a device, 50 % less"),
            "{said:#?}"
        );
    }

    #[test]
    fn sizes_rise_and_leave_room_for_a_context() {
        let sizes = sizes();
        assert!(sizes.len() > 3 && sizes.is_sorted_by_key(|(_, bytes)| *bytes), "{sizes:?}");
        assert_eq!(sizes[0], ("16 GB".to_string(), 15_106_127_360));
    }
}
