//! A pack's optimizer step: micro-batches side by side, then each run's own update, divergence check,
//! evaluation and metric point.

use super::{Good, Loaded, Progress, Run, State, add, mean};
use crate::data;
use crate::error::{Result, TrainError};
use crate::lora::Adapter;
use crate::memory;
use crate::ops;
use crate::optim::{AdamW, Update};
use crate::pack::{self, Found, Member, Outcome, Row, Unread};
use crate::scaler::LossScaler;
use candle_core::Tensor;
use domain::Clock;
use domain::metric::{self, MetricPoint};
use std::time::Duration;

/// What a step gave one run.
#[derive(Debug, Default)]
pub struct Stepped {
    /// The step's metrics, at `logging_steps`, `eval_steps` and the end.
    pub point: Option<MetricPoint>,
    /// Whether `save_steps` or the end asks for a checkpoint.
    pub checkpoint_due: bool,
    /// Why the run cannot go on, if it cannot; its state is the last good one.
    pub diverged: Option<String>,
    /// The time that its evaluation took, if there was one.
    pub evaluation: Option<Duration>,
    /// Why its evaluation failed, if it did. The step is made, its point lacks the evaluation, and the run cannot go on; whoever
    /// resumes it from a checkpoint of here makes up for that first ([`Run::make_up`]).
    pub failed: Option<TrainError>,
}

/// What an update used and found.
struct Updated {
    loss: Option<f64>,
    grad_norm: f64,
    learning_rate: f64,
}

/// One optimizer step for every run of a pack together, their micro-batches side by side on the base. A run
/// that is done is left as it is. `clock` measures speeds.
///
/// # Errors
/// The device runs out of memory; no run's state has changed then.
pub fn step_pack(loaded: &Loaded, runs: &mut [&mut Run], clock: &dyn Clock) -> Result<Vec<Stepped>> {
    crate::on_threads(loaded.base.device(), || step(loaded, runs, clock))
}

fn step(loaded: &Loaded, runs: &mut [&mut Run], clock: &dyn Clock) -> Result<Vec<Stepped>> {
    let started = clock.monotonic();
    let work: Vec<Vec<Vec<Row>>> = runs.iter().map(|run| run.micro_batches()).collect();
    let packed = work.iter().filter(|batches| !batches.is_empty()).count() > 1;
    memory::start_peak(loaded.base.device())?;
    // Of a checkpoint that is being written, what it holds as the step begins.
    let beside: Vec<u64> = runs.iter().map(|run| run.state_bytes()).collect();
    let rounds = forward_backward(loaded, runs, &work)?;
    let squares = runs.iter().map(|run| AdamW::squares(&run.state.adapter)).collect::<Result<Vec<_>>>()?;
    let mut updates = Vec::with_capacity(runs.len());
    for (i, (run, squares)) in runs.iter_mut().zip(&squares).enumerate() {
        updates.push(run.prepare(&rounds, i, squares)?);
    }
    let (owners, passes): (Vec<_>, Vec<_>) =
        rounds.into_iter().map(|round| (round.owners, round.pass)).unzip();
    let found = Found::of(passes, &squares)?;
    if domain::crash::fails("step/memory") {
        return Err(candle_core::Error::Msg("out of memory, because a test wants it".into()).into());
    }
    // From here on a GPU is asked for no more memory: all runs step, or none has. It decides about each update by what it
    // has computed, and is waited for once, at the end of all.
    updates.iter().flatten().try_for_each(Update::launch)?;
    let (outcomes, squares) = found.read()?;
    let mut sums = vec![Outcome::default(); runs.len()];
    for (owners, outcomes) in owners.into_iter().zip(outcomes) {
        owners.into_iter().zip(outcomes).for_each(|(i, outcome)| add(&mut sums[i], outcome));
    }
    let mut updated = Vec::with_capacity(runs.len());
    for (((run, sum), squares), update) in runs.iter_mut().zip(&sums).zip(squares).zip(updates) {
        updated.push(if run.is_done() { None } else { Some(run.update(*sum, squares, update)?) });
    }
    // An update makes weights anew beside the old ones, which may be the most of the whole step.
    let measured = memory::pool(loaded.base.device())?.map(|pool| pool.used_high);
    note_memory(runs, &sums, &beside, measured);
    let seconds = since(clock, started);
    let mut stepped = Vec::with_capacity(runs.len());
    for (i, updated) in updated.into_iter().enumerate() {
        let run = &mut *runs[i];
        let Some(updated) = updated else {
            stepped.push(Stepped { diverged: run.diverged.clone(), ..Stepped::default() });
            continue;
        };
        run.progress.rows += work[i].iter().map(|rows| rows.len() as u64).sum::<u64>();
        run.progress.tokens += sums[i].tokens;
        run.progress.training_seconds += seconds;
        run.progress.packed |= packed;
        stepped.push(run.report(loaded, updated, sums[i], clock));
    }
    Ok(stepped)
}

/// Micro-batches of some runs that made one pass.
struct Round {
    /// The runs, by their numbers.
    owners: Vec<usize>,
    /// What came of it, each run's in that order.
    pass: Unread,
}

/// Runs every micro-batch of the step. A round holds the runs that have one left. A GPU is not waited for.
fn forward_backward(loaded: &Loaded, runs: &mut [&mut Run], work: &[Vec<Vec<Row>>]) -> Result<Vec<Round>> {
    let mut rounds = Vec::new();
    runs.iter_mut().for_each(|run| run.state.adapter.zero_grad());
    for round in 0..work.iter().map(Vec::len).max().unwrap_or(0) {
        let mut owners = Vec::with_capacity(runs.len());
        let mut members = Vec::with_capacity(runs.len());
        for (i, run) in runs.iter_mut().enumerate() {
            let Some(rows) = work[i].get(round) else { continue };
            // From 1 on: mask 0 would repeat the stream that initialised A.
            let counter =
                run.state.step * u64::from(run.config.gradient_accumulation_steps) + round as u64 + 1;
            owners.push(i);
            let (recomputed_layers, loss_scale) = (run.recomputed_layers, run.loss_scale());
            let member = Member::new(&mut run.state.adapter, rows, counter);
            members.push(Member { recomputed_layers, loss_scale, ..member });
        }
        let pass = pack::forward_backward_unread(&loaded.base, &mut members)?;
        rounds.push(Round { owners, pass });
    }
    Ok(rounds)
}

/// Raises each run's high-water marks: what the passes held, and what each run held `beside` them. `measured` is what
/// the device's allocator counted of the whole step, if it does; what is one run's in a pack is by the passes' count.
fn note_memory(runs: &mut [&mut Run], sums: &[Outcome], beside: &[u64], measured: Option<u64>) {
    let all: u64 = beside.iter().sum();
    let solo = runs.len() == 1;
    for ((run, sum), beside) in runs.iter_mut().zip(sums).zip(beside).filter(|((_, sum), _)| sum.tokens > 0) {
        let own = measured.filter(|_| solo).unwrap_or(sum.peak_bytes + beside);
        run.progress.peak_memory_bytes = run.progress.peak_memory_bytes.max(own);
        let pack = measured.unwrap_or(sum.pack_peak_bytes + all);
        run.progress.pack_peak_memory_bytes = run.progress.pack_peak_memory_bytes.max(pack);
    }
}

impl Run {
    fn loss_scale(&self) -> f32 {
        self.state.scaler.map_or(1.0, |scaler| scaler.scale())
    }

    /// Bytes that the run holds while a pass goes on, its adapter aside: the optimizer's moments, the state that it would
    /// fall back to, and earlier ones of which a checkpoint is being written.
    fn state_bytes(&self) -> u64 {
        let State { adapter, optimizer, .. } = &self.state;
        let previous = self.previous.as_ref().map(|good| &good.adapter);
        let adapters: Vec<_> = previous.into_iter().chain([adapter]).collect();
        let on_its_way = self.on_its_way.bytes(&adapters, optimizer);
        optimizer.bytes() + previous.map_or(0, Adapter::trained_bytes) + on_its_way
    }

    /// The rows of the coming step's micro-batches; none if the run is done.
    fn micro_batches(&self) -> Vec<Vec<Row>> {
        if self.is_done() {
            return Vec::new();
        }
        data::step_batches(&self.config, self.data.len(), self.state.step)
            .into_iter()
            .map(|batch| batch.into_iter().map(|i| self.data.row(i).clone()).collect())
            .collect()
    }

    /// What the gradients of a step of so many targets are divided by.
    fn divisor(&self, targets: u64) -> f64 {
        targets as f64 * f64::from(self.loss_scale())
    }

    /// Prepares the update by the accumulated gradients, whose squares sum up to `squares`, and by the losses of run
    /// `number` in `rounds`, both of which a GPU may still compute. None without a target, which teaches nothing.
    fn prepare(&mut self, rounds: &[Round], number: usize, squares: &Tensor) -> Result<Option<Update>> {
        let (mut targets, mut losses) = (0, Vec::new());
        for Round { owners, pass } in rounds {
            let Some(place) = owners.iter().position(|owner| *owner == number) else { continue };
            targets += pass.targets(place);
            losses.extend(pass.losses(place)?);
        }
        if targets == 0 {
            return Ok(None);
        }
        let losses = ops::squares(&losses.iter().collect::<Vec<_>>())?;
        let (learning_rate, divisor) = (self.schedule.learning_rate(self.state.step), self.divisor(targets));
        let State { adapter, optimizer, .. } = &mut self.state;
        optimizer.prepare(adapter, learning_rate, divisor, [squares, &losses]).map(Some)
    }

    /// Takes over a step's update by gradients whose squares sum up to `squares`, or finds that the run diverged. What
    /// [`crate::ops::adamw_ahead`] has left out is not taken over either.
    fn update(&mut self, sum: Outcome, squares: f64, update: Option<Update>) -> Result<Updated> {
        let learning_rate = self.schedule.learning_rate(self.state.step);
        let (Some(loss), Some(update)) = (mean(sum), update) else {
            // A step whose rows hold no target at all teaches nothing.
            self.state.adapter.zero_grad();
            self.state.step += 1;
            return Ok(Updated { loss: None, grad_norm: 0.0, learning_rate });
        };
        let grad_norm = squares.sqrt() / self.divisor(sum.targets);
        let step = self.state.step + 1;
        if !loss.is_finite() {
            self.give_up(format!("the loss of step {step} is {loss}"), true);
        } else if let Some(scaler) = self.state.scaler.as_mut().filter(|_| !grad_norm.is_finite()) {
            if scaler.overflowed() {
                // The step is left out, the next one tries with half the scale.
                self.state.adapter.zero_grad();
                self.state.step = step;
                self.progress.loss = Some(loss);
            } else {
                self.give_up(format!("the gradients of step {step} overflow float16 at any scale"), false);
            }
        } else if !grad_norm.is_finite() {
            self.give_up(format!("the gradient norm of step {step} is {grad_norm}"), false);
        } else {
            // Without its gradients, which the update is about to use up.
            let State { step: before, adapter, scaler, .. } = &self.state;
            let mut good = Good { step: *before, adapter: adapter.clone(), scaler: *scaler };
            good.adapter.zero_grad();
            let State { adapter, optimizer, scaler, .. } = &mut self.state;
            optimizer.finish(adapter, update, grad_norm)?;
            scaler.iter_mut().for_each(LossScaler::stepped);
            self.state.step = step;
            self.previous = Some(good);
            self.progress.loss = Some(loss);
        }
        Ok(Updated { loss: Some(loss), grad_norm, learning_rate })
    }

    /// Ends the run as diverged. `weights` says that the weights themselves give no finite loss, so that
    /// the state before them is the last good one.
    fn give_up(&mut self, what: String, weights: bool) {
        if weights && let Some(Good { step, adapter, scaler }) = self.previous.take() {
            (self.state.step, self.state.adapter, self.state.scaler) = (step, adapter, scaler);
        }
        self.state.adapter.zero_grad();
        let kept = self.state.step;
        self.diverged =
            Some(format!("{what}; the state after step {kept} is kept: try a lower learning_rate"));
    }

    /// Evaluates where it is due and makes the step's metric point.
    fn report(&mut self, loaded: &Loaded, updated: Updated, sum: Outcome, clock: &dyn Clock) -> Stepped {
        let step = self.state.step;
        if let Some(diverged) = &self.diverged {
            return Stepped { diverged: Some(diverged.clone()), ..Stepped::default() };
        }
        let due = |every: u32| every > 0 && step.is_multiple_of(u64::from(every));
        let end = step >= self.total_steps;
        let evaluates = !self.data.eval.is_empty() && (end || due(self.config.eval_steps));
        let logs = end || evaluates || due(self.config.logging_steps);
        let checkpoint_due = end || due(self.config.save_steps);
        let stepped = match logs.then(|| self.point(&updated, sum, clock)) {
            Some(point) if evaluates => self.evaluated(loaded, point, clock),
            point => Stepped { point, ..Stepped::default() },
        };
        Stepped { checkpoint_due: checkpoint_due && stepped.diverged.is_none(), ..stepped }
    }

    /// Evaluates after a step, whose point lacks nothing but that. If it fails the whole point is owed.
    fn evaluated(&mut self, loaded: &Loaded, mut point: MetricPoint, clock: &dyn Clock) -> Stepped {
        let started = clock.monotonic();
        let evaluated = match domain::crash::fails("evaluate/memory") {
            true => Err(candle_core::Error::Msg("out of memory, because a test wants it".into()).into()),
            false => self.evaluate(loaded).and_then(|loss| {
                // A run that diverges has nothing to say.
                if loss.is_none_or(f64::is_finite) {
                    self.sample(loaded)?;
                }
                Ok(loss)
            }),
        };
        let eval_loss = match evaluated {
            Ok(loss) => loss,
            Err(error) => {
                self.owed = Some(point.clone());
                return Stepped { point: Some(point), failed: Some(error), ..Stepped::default() };
            }
        };
        let took = clock.monotonic().saturating_sub(started);
        self.progress.evaluation_seconds += took.as_secs_f64();
        let evaluation = Some(took);
        if let Some(loss) = eval_loss.filter(|loss| !loss.is_finite()) {
            self.progress.eval_loss = None;
            self.give_up(format!("eval/loss after step {} is {loss}", self.state.step), true);
            return Stepped { diverged: self.diverged.clone(), evaluation, ..Stepped::default() };
        }
        point.time = clock.now();
        point.values.extend(eval_loss.map(|loss| (metric::EVAL_LOSS.to_string(), loss)));
        Stepped { point: Some(point), evaluation, ..Stepped::default() }
    }

    /// Makes up for the evaluation that failed after the step of the checkpoint from which the run goes on, with the step's
    /// whole point; it may fail again. `None` if none had failed. `clock` dates the point.
    pub fn make_up(&mut self, loaded: &Loaded, clock: &dyn Clock) -> Option<Stepped> {
        let point = self.owed.take()?;
        Some(self.evaluated(loaded, point, clock))
    }

    /// A step's point, without what an evaluation adds to it.
    fn point(&mut self, updated: &Updated, sum: Outcome, clock: &dyn Clock) -> MetricPoint {
        let mut values = Vec::with_capacity(9);
        let mut put = |name: &str, value: Option<f64>| {
            values.extend(value.filter(|v| v.is_finite()).map(|value| (name.to_string(), value)));
        };
        put(metric::LOSS, updated.loss);
        put(metric::GRAD_NORM, Some(updated.grad_norm));
        put(metric::LEARNING_RATE, Some(updated.learning_rate));
        put(metric::TOKENS, Some(sum.targets as f64));
        let (samples, tokens) = self.progress.speed_since(&self.at_last_point);
        put(metric::SAMPLES_PER_SECOND, samples);
        put(metric::TOKENS_PER_SECOND, tokens);
        put(metric::PEAK_MEMORY_BYTES, Some(self.progress.peak_memory_bytes as f64));
        let pack = self.progress.packed.then_some(self.progress.pack_peak_memory_bytes as f64);
        put(metric::PACK_PEAK_MEMORY_BYTES, pack);
        self.at_last_point = self.progress.clone();
        MetricPoint { step: self.state.step, time: clock.now(), values }
    }
}

impl Progress {
    /// Rows and tokens a second of training time since an earlier state of the counters.
    pub(super) fn speed_since(&self, earlier: &Progress) -> (Option<f64>, Option<f64>) {
        let seconds = self.training_seconds - earlier.training_seconds;
        let rate = |now: u64, then: u64| (seconds > 0.0).then(|| (now - then) as f64 / seconds);
        (rate(self.rows, earlier.rows), rate(self.tokens, earlier.tokens))
    }
}

fn since(clock: &dyn Clock, started: Duration) -> f64 {
    clock.monotonic().saturating_sub(started).as_secs_f64()
}
