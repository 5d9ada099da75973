//! What must be true in the end.

use crate::agent::{FENCED, PRICE_PER_HOUR, diverges_at, loss};
use crate::world::World;
use coordinator::fsck;
use coordinator::history::{self, Inspection};
use coordinator::store::{LogEntry, TrialRecord};
use domain::metric::LOSS;
use domain::sweep::{Replicates, SweepState};
use domain::trial::TrialState;
use domain::{Clock, TrialId};
use registry::{Entries, Registry, SqliteRegistry, Write};
use std::collections::BTreeMap;
use std::path::Path;

/// Looks at the durable state as `lorafleet fsck` does: laid out where a coordinator keeps it, by a thread of its own, so
/// that no time goes by meanwhile.
pub fn look(world: &World) -> fsck::Findings {
    let look = || {
        let dir = tempfile::tempdir_in(world.history.parent().unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(lay_out(world, dir.path()));
        fsck::check(dir.path()).unwrap()
    };
    let findings = std::thread::scope(|scope| scope.spawn(look).join().unwrap());
    for problem in &findings.problems {
        world.find(format_args!("fsck: {}: {}", problem.place, problem.what));
    }
    findings
}

async fn lay_out(world: &World, dir: &Path) {
    std::os::unix::fs::symlink(&world.history, dir.join("history")).unwrap();
    let registry = SqliteRegistry::open(&dir.join("coordinator.db")).unwrap();
    let fence = registry.lead("simulated").await.unwrap();
    let puts = entries(world).await.into_iter().map(|(key, value)| Write::Put(key, value)).collect();
    registry.commit(fence, puts).await.unwrap();
    for (path, bytes) in world.all_objects().await {
        let file = dir.join("artifacts").join(path.as_ref());
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, bytes).unwrap();
    }
}

async fn entries(world: &World) -> Entries {
    world.truth.list("", None, usize::MAX).await.unwrap()
}

/// Looks as [`look`] does, then at what fsck does not know: what each value must be, how often a trial ended, what it
/// cost.
pub async fn check(world: &World, agents: usize) {
    let unused = "no record points at it";
    for note in look(world).notes.iter().filter(|note| note.what.starts_with(unused)) {
        world.find(format_args!("after a restart: {}: {}", note.place, note.what));
    }
    let entries = entries(world).await;
    let history = history::inspect(&world.history).unwrap();
    let trials: Vec<_> = world.seen().trials.values().cloned().collect();
    for record in &trials {
        let log = log_of(&entries, record);
        check_trial(world, record, &history, &log);
    }
    check_runs(world, &trials);
    let costs: f64 = trials.iter().filter_map(|record| record.trial.cost_usd).sum();
    let sweep = world.seen().sweep.clone().unwrap().sweep;
    if (costs - sweep.cost_usd).abs() > 1e-6 {
        world.find(format_args!("the sweep costs ${}, and its trials ${costs}", sweep.cost_usd));
    }
    // Of an agent that lost its disk another takes the place, while the lease of the one before runs on.
    let most = 2.0 * agents as f64 * PRICE_PER_HOUR / 3600.0 * world.clock.monotonic().as_secs_f64();
    if !(0.0..=most).contains(&costs) {
        world
            .find(format_args!("the trials cost ${costs}, and ${most} is all that the agents can have cost"));
    }
}

/// Each run with another seed is there once, and every one that the sweep asks for, whatever was killed meanwhile.
fn check_runs(world: &World, trials: &[TrialRecord]) {
    let record = world.seen().sweep.clone().unwrap();
    let mut again: BTreeMap<&TrialId, BTreeMap<u32, u64>> = BTreeMap::new();
    for run in trials.iter().map(|record| &record.trial) {
        if let Some(of) = &run.replicate_of {
            again.entry(of).or_default().insert(run.id.number().unwrap(), run.config.seed);
        }
    }
    let first = |id: &TrialId| trials.iter().find(|record| record.trial.id == *id).unwrap();
    for (of, seeds) in &again {
        let seed = first(of).trial.config.seed;
        let due: Vec<_> = (2..).take(seeds.len()).map(|run| Replicates::seed(seed, run)).collect();
        if !seeds.values().eq(&due) {
            world.find(format_args!("{of} was run again with the seeds {seeds:?}, and not {due:?}"));
        }
    }
    // What ended it before its time left runs out.
    let whole = record.sweep.state == SweepState::Completed && record.stop.is_none();
    let Some(asked) = record.sweep.spec.replicates.filter(|_| whole) else { return };
    let searched = trials.iter().filter(|record| record.trial.replicate_of.is_none());
    let completed = searched.filter(|record| record.trial.state == TrialState::Completed);
    let mut best: Vec<_> = completed
        .filter_map(|record| Some((record.value?, record.trial.id.number()?, &record.trial.id)))
        .filter(|(value, ..)| value.is_finite())
        .collect();
    // These schedules minimize; of equals the earlier.
    best.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    for (_, _, id) in best.iter().take(asked.finalists as usize) {
        let runs = 1 + again.get(id).map_or(0, BTreeMap::len);
        if runs < asked.runs as usize {
            world.find(format_args!("{id} is a finalist of {runs} runs, and {} are asked for", asked.runs));
        }
    }
}

fn log_of(entries: &Entries, record: &TrialRecord) -> Vec<LogEntry> {
    let (sweep, number) = (record.trial.id.sweep().unwrap(), record.trial.id.number().unwrap());
    let prefix = format!("logs/{sweep}/{number:010}/");
    let of_trial = entries.iter().filter(|(key, _)| key.starts_with(&prefix));
    of_trial.map(|(_, value)| serde_json::from_slice(value).unwrap()).collect()
}

fn check_trial(world: &World, record: &TrialRecord, history: &Inspection, log: &[LogEntry]) {
    let trial = &record.trial;
    let find = |what: String| world.find(format_args!("trial {}: {what}", trial.id.number().unwrap()));
    if !trial.state.is_terminal() {
        return find(format!("is {} in the end", trial.state));
    }
    // Each life ends once; another begins when somebody asks for it.
    let is_end =
        |entry: &&LogEntry| TrialState::ALL.iter().any(|s| s.is_terminal() && s.as_str() == entry.event);
    let turns: Vec<_> = log.iter().filter(|entry| is_end(entry) || entry.event == "queued_again").collect();
    let alternate = turns.iter().enumerate().all(|(i, entry)| is_end(entry) == (i % 2 == 0));
    let last = turns.last().map(|entry| entry.event.as_str());
    if !alternate || last != Some(trial.state.as_str()) {
        let told: Vec<_> = turns.iter().map(|entry| entry.event.as_str()).collect();
        find(format!("is {}, and its log tells of {told:?}", trial.state));
    }

    let every = u64::from(trial.config.logging_steps);
    let curve = history.curve(&trial.id, &trial.attempts);
    let steps: Vec<_> = curve.iter().map(|point| point.step).collect();
    let total = trial.total_steps.unwrap_or_default();
    if trial.state == TrialState::Completed {
        if trial.step != total {
            find(format!("is completed at step {} of {total}", trial.step));
        }
        if trial.cost_usd.is_none_or(|cost| cost <= 0.0) {
            find(format!("is completed and costs {:?}", trial.cost_usd));
        }
    }
    // The last step has a point whatever its number.
    let due =
        |step: &u64| step.is_multiple_of(every) || trial.state == TrialState::Completed && *step == total;
    let first = u64::from(trial.step == 0);
    let missing: Vec<_> = (first..=trial.step).filter(due).filter(|step| !steps.contains(step)).collect();
    let excess: Vec<_> =
        steps.iter().filter(|s| **s > trial.step || !(s.is_multiple_of(every) || **s == total)).collect();
    if !missing.is_empty() || !excess.is_empty() {
        find(format!("ended at {}; its curve lacks {missing:?} and has {excess:?}", trial.step));
    }
    for point in &curve {
        let (is, right) = (point.get(LOSS).unwrap(), loss(&trial.config, point.step));
        if is != right {
            let whose = if is > FENCED { "an attempt's that was not current" } else { "nobody's" };
            find(format!("its loss at step {} is {is}, {whose}; it must be {right}", point.step));
        }
    }
    if let Some((summary, value)) = trial.summary.as_ref().and_then(|s| Some((s, s.eval_loss?)))
        && value != loss(&trial.config, summary.steps)
    {
        find(format!("its summary of {} steps says {value}", summary.steps));
    }
    let diverged = trial.state == TrialState::Diverged;
    if diverged && diverges_at(&trial.config).is_none_or(|step| trial.step >= step) {
        find(format!("is diverged at step {}", trial.step));
    }
}
