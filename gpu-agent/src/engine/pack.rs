//! The engine: the trials of one base, stepped together. What it does to a trial (join, step, checkpoint,
//! stop, end) is the same whatever trains it, so that is a [`Backend`]. How trials are checkpointed and end is in `ending`,
//! the thread that writes checkpoints in `writer`.

mod ending;
mod writer;

pub(super) use ending::end_waiting;
pub use writer::Write;

use super::{
    Admission, Checkpoint, CheckpointDirs, Ending, Engine, Event, FourBits, Happening, How, Phase, Work,
};
use crate::Assignment;
use crate::cache::quantised::Draft;
use domain::metric::{self, MetricPoint};
use domain::trial::{BaseModel, Digests, Failure, FailureClass, Severity, Shortage, TrialSummary};
use domain::{Clock, Timestamp};
use ending::{Candidate, Leaving, SAVE_PAUSE, Then, Unsaved};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use telemetry::trace::at_place;
use writer::Writer;

/// What a step of a pack did to one of its trials.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stepped {
    /// Numbers, at logging and evaluation steps and at the end.
    pub point: Option<MetricPoint>,
    /// Whether `save_steps` asks for a checkpoint here.
    pub checkpoint_due: bool,
    /// What became NaN or infinite, if something did.
    pub diverged: Option<String>,
    /// The time that its evaluation took, if there was one.
    pub evaluation: Option<Duration>,
    /// Why it cannot go on although the step is made, if it cannot: its evaluation failed, which its numbers lack. Its state is
    /// sound.
    pub failed: Option<Failure>,
}

/// How far a trial is with what it is asked after its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    /// It is asked nothing.
    Nothing,
    /// There is more to ask.
    More,
    /// That was all.
    Over,
}

/// What trains: a frozen base and runs on it.
pub trait Backend {
    /// A base in memory.
    type Base;
    /// A trial's training state.
    type Run;

    /// Bytes that a base will take, before it is loaded; `None` if nothing predicts it.
    fn base_bytes(&mut self, base: &BaseModel) -> Result<Option<u64>, Failure>;
    /// Lets a run spend time for memory until it fits a device of `memory_bytes`, if it may and can. Returns the most
    /// bytes that it will hold beside the base; `None` if nothing predicts it.
    fn fit(&self, base: &Self::Base, run: &mut Self::Run, memory_bytes: u64) -> Option<u64>;
    /// Lets a run spend all the time for memory that it may, after the device ran out of it although everything was
    /// predicted to fit. False if it does so already.
    fn spare(&self, base: &Self::Base, run: &mut Self::Run) -> bool;
    /// Loads a base, named as it lies on this machine, for a trial; `emit` takes what there is to say of it. Answers also with
    /// how it came to be in 4 bits, if its files are in more.
    fn load(
        &mut self,
        base: &BaseModel,
        admission: &Admission,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(Self::Base, Option<FourBits>), Failure>;
    /// Writes the base that was loaded to the agent's cache, beside what else it does.
    fn keep(&mut self, _: &Self::Base, _: Draft) {}
    /// Starts a run, or goes on from the admission's checkpoint.
    fn start(&mut self, base: &Self::Base, admission: &Admission) -> Result<Self::Run, Failure>;
    /// What it is trained on.
    fn digests(&self, run: &Self::Run) -> Digests;
    /// Finished steps; of a diverged run, those of its last good state.
    fn step(&self, run: &Self::Run) -> u64;
    /// Steps in all.
    fn total_steps(&self, run: &Self::Run) -> u64;
    /// Held-out loss of the base alone; `None` without held-out rows.
    fn base_eval(&mut self, base: &Self::Base, run: &mut Self::Run) -> Result<Option<f64>, Failure>;
    /// What was left of the step of the checkpoint from which a run goes on, the evaluation that failed then, and all of that
    /// step's numbers. `None` if none had failed.
    fn make_up(&mut self, _: &Self::Base, _: &mut Self::Run) -> Option<Stepped> {
        None
    }
    /// One optimizer step of every run. One answer a run, in their order; after an error nobody has stepped.
    fn step_pack(&mut self, base: &Self::Base, runs: &mut [&mut Self::Run]) -> Result<Vec<Stepped>, Failure>;
    /// What writes a checkpoint of a run as it stands, whatever the run does meanwhile; of a diverged run, of the last good
    /// state. An error, of the device, ends the run; one of the write itself may pass.
    fn save(&mut self, run: &mut Self::Run, dirs: CheckpointDirs) -> Result<Write, Failure>;
    /// How many checkpoints may be on their way to the disk at once, at least one; whose is one more stands still until it is
    /// its turn. No bound where what [`Backend::fit`] says of a run counts its checkpoint on its way.
    fn most_writes(&self) -> usize {
        usize::MAX
    }
    /// Asks a run that has made all its steps, or the base for it, the next of what its sweep asks.
    fn ask(&mut self, base: &Self::Base, run: &mut Self::Run) -> Result<Asking, Failure>;
    /// The run's numbers at its end.
    fn summary(&mut self, base: &Self::Base, run: &mut Self::Run) -> Result<TrialSummary, Failure>;
}

struct Member<R> {
    admission: Admission,
    run: R,
    own_bytes: u64,
    since: Duration,
    packed: bool,
    /// The step of its last checkpoint that was written.
    saved: Option<u64>,
    /// The checkpoint that is being written.
    writing: Option<Writing>,
    /// A checkpoint that was written and not told of: one of a later step is to take its place.
    kept_back: Option<Checkpoint>,
    /// Whether the disk refuses its checkpoint, which was told.
    refused: bool,
}

/// A checkpoint that is being written.
struct Writing {
    begun: Begun,
    checkpoint: Checkpoint,
}

/// Trials that share a base.
pub struct Pack<B: Backend> {
    backend: B,
    clock: Arc<dyn Clock>,
    /// Bytes that base and trials may take together.
    memory_bytes: u64,
    base: Option<(BaseModel, B::Base)>,
    /// What [`Backend::base_bytes`] said of that base.
    base_bytes: u64,
    members: Vec<Member<B::Run>>,
    waiting: VecDeque<Admission>,
    /// Bytes that the first in line holds beside the base, if it waits for as many to be free.
    wanted_bytes: u64,
    stops: Vec<(Assignment, How)>,
    writer: Writer,
    unsaved: Vec<Unsaved<B::Run>>,
    leaving: Vec<Leaving>,
    /// Each is asked a little in its turn.
    candidates: VecDeque<Candidate<B::Run>>,
    /// When, on the monotonic clock, the disk is asked again.
    save_again_at: Duration,
    /// The seconds of steps that were not told of yet.
    step_seconds: Vec<f64>,
}

/// Steps that are told of together at most, and the seconds of them after which they are not waited for any longer.
const STEPS: usize = 64;
const STEPS_SECONDS: f64 = 10.0;

impl<B: Backend> Pack<B> {
    /// An empty pack on a device of so much memory.
    pub fn new(backend: B, memory_bytes: u64, clock: Arc<dyn Clock>) -> Self {
        Self {
            backend,
            writer: Writer::new(clock.clone()),
            clock,
            memory_bytes,
            base: None,
            base_bytes: 0,
            members: Vec::new(),
            waiting: VecDeque::new(),
            wanted_bytes: 0,
            stops: Vec::new(),
            unsaved: Vec::new(),
            leaving: Vec::new(),
            candidates: VecDeque::new(),
            save_again_at: Duration::ZERO,
            step_seconds: Vec::new(),
        }
    }
}

impl<B: Backend> Engine for Pack<B> {
    fn admit(&mut self, admission: Admission) {
        self.waiting.push_back(admission);
    }

    fn stop(&mut self, assignment: &Assignment, how: How) {
        self.stops.push((assignment.clone(), how));
    }

    fn keep(&mut self, draft: Draft) {
        if let Some((_, base)) = &self.base {
            self.backend.keep(base, draft);
        }
    }

    fn step(&mut self, emit: &mut dyn FnMut(Event)) {
        for (assignment, how) in std::mem::take(&mut self.stops) {
            self.carry_out(&assignment, how, emit);
        }
        self.hear_of_writes(Duration::ZERO, emit);
        self.save_again(emit);
        if let Some(admission) = self.next_admission() {
            self.join(admission, emit);
        } else if !self.members.is_empty() {
            self.train(emit);
        } else if !(self.unsaved.is_empty() && self.leaving.is_empty()) && self.candidates.is_empty() {
            // Nothing to do but to wait for the disk, not too long to hear of a stop.
            self.hear_of_writes(SAVE_PAUSE / 10, emit);
        }
        // Between the steps of the others, which are not held up for long.
        if let Some(candidate) = self.candidates.pop_front() {
            self.ask(candidate, emit);
        }
        self.tell_steps(emit);
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && self.leaving.is_empty() && self.waiting.is_empty() && self.stops.is_empty()
    }
}

impl<B: Backend> Pack<B> {
    /// The first trial in line, if its base is in memory and it fits beside the others, or if there are none.
    /// Strictly in order, so that a trial of another base, or a large one, is not passed by for ever.
    fn next_admission(&mut self) -> Option<Admission> {
        let base = self.waiting.front()?.config.base_model();
        let resident = self.base.as_ref().is_some_and(|(resident, _)| *resident == base);
        let joins = resident && self.wanted_bytes <= self.free_bytes();
        if joins || self.is_empty() { self.waiting.pop_front() } else { None }
    }

    /// Whether no trial is in memory.
    fn is_empty(&self) -> bool {
        self.members.is_empty() && self.unsaved.is_empty() && self.candidates.is_empty()
    }

    /// Bytes that are left beside the base and its trials.
    fn free_bytes(&self) -> u64 {
        let members = self.members.iter().chain(self.unsaved.iter().map(|unsaved| &unsaved.member));
        let members = members.chain(self.candidates.iter().map(|candidate| &candidate.member));
        let held = members.map(|member| member.own_bytes).fold(self.base_bytes, u64::saturating_add);
        self.memory_bytes.saturating_sub(held)
    }

    fn join(&mut self, admission: Admission, emit: &mut dyn FnMut(Event)) {
        let assignment = admission.assignment.clone();
        let belongs = admission.belongs.as_deref().and_then(|place| place.parse().ok());
        if let Err(failure) = at_place(belongs, || self.try_join(admission, emit)) {
            emit(Event::Trial(assignment, Happening::Failed(failure)));
        }
    }

    fn try_join(&mut self, admission: Admission, emit: &mut dyn FnMut(Event)) -> Result<(), Failure> {
        let since = self.clock.monotonic();
        self.make_resident(&admission, emit)?;
        let Some((_, base)) = &self.base else { return Ok(()) };
        let begun = Begun::now(&*self.clock);
        let mut run = self.backend.start(base, &admission)?;
        emit(begun.over(&*self.clock, &admission.assignment, Work::Prepare, self.backend.step(&run)));
        let own_bytes = self.backend.fit(base, &mut run, self.memory_bytes).unwrap_or_default();
        if own_bytes > self.free_bytes() {
            if self.is_empty() {
                return Err(does_not_fit(self.base_bytes, own_bytes, self.memory_bytes));
            }
            // It starts again when there is room.
            self.wanted_bytes = own_bytes;
            self.waiting.push_front(admission);
            return Ok(());
        }
        self.wanted_bytes = 0;
        let digests = self.backend.digests(&run);
        if let Some(expected) = &admission.digests {
            same_bytes(expected, &digests)?;
        }
        let (start_step, total_steps) = (self.backend.step(&run), self.backend.total_steps(&run));
        let assignment = admission.assignment.clone();
        let started = Happening::Started { total_steps, start_step, digests };
        emit(Event::Trial(assignment.clone(), started));
        let begun = Begun::now(&*self.clock);
        let base_eval = self.backend.base_eval(base, &mut run)?;
        // A run that goes on has it in its checkpoint, and computes nothing.
        if base_eval.is_some() && start_step == 0 {
            emit(begun.over(&*self.clock, &assignment, Work::Evaluate, start_step));
        }
        if let (Some(loss), 0) = (base_eval, start_step) {
            let values = vec![(metric::EVAL_LOSS.to_string(), loss)];
            let point = MetricPoint { step: 0, time: self.clock.now(), values };
            emit(Event::Trial(assignment, Happening::Points(vec![point])));
        }
        let left = self.backend.make_up(base, &mut run);
        let done = start_step >= total_steps;
        let (packed, saved, writing, kept_back, refused) = (false, None, None, None, false);
        let member = Member { admission, run, own_bytes, since, packed, saved, writing, kept_back, refused };
        match left {
            Some(stepped) => self.after_step(member, stepped, emit),
            None if done => self.checkpoint_then(member, Then::Complete(None), emit),
            None => self.members.push(member),
        }
        Ok(())
    }

    /// Loads the base of a trial, unless it is in memory.
    fn make_resident(&mut self, admission: &Admission, emit: &mut dyn FnMut(Event)) -> Result<(), Failure> {
        let base = admission.config.base_model();
        if self.base.as_ref().is_some_and(|(resident, _)| *resident == base) {
            return Ok(());
        }
        // The old base goes first: the device need not hold two.
        if self.base.take().is_some() {
            emit(Event::BaseResident(None));
        }
        let here = admission.placed().base_model();
        let bytes = self.backend.base_bytes(&here)?.unwrap_or_default();
        if bytes > self.memory_bytes {
            return Err(does_not_fit(bytes, 0, self.memory_bytes));
        }
        let begun = Begun::now(&*self.clock);
        let (loaded, four_bits) = self.backend.load(&here, admission, emit)?;
        let phase = Phase { four_bits, ..begun.phase(self.clock.monotonic(), Work::Load, 0) };
        emit(Event::Phase(admission.assignment.clone(), phase));
        emit(Event::BaseResident(Some(base.to_string())));
        self.base = Some((base, loaded));
        self.base_bytes = bytes;
        Ok(())
    }

    fn train(&mut self, emit: &mut dyn FnMut(Event)) {
        let Some((_, base)) = &self.base else { return };
        let mut runs: Vec<_> = self.members.iter_mut().map(|member| &mut member.run).collect();
        let packed = runs.len() > 1;
        domain::crash::point("engine/step");
        let begun = self.clock.monotonic();
        match self.backend.step_pack(base, &mut runs) {
            Ok(stepped) => {
                let evaluated: Duration = stepped.iter().filter_map(|stepped| stepped.evaluation).sum();
                let took = self.clock.monotonic().saturating_sub(begun).saturating_sub(evaluated);
                self.step_seconds.push(took.as_secs_f64());
                for (mut member, stepped) in std::mem::take(&mut self.members).into_iter().zip(stepped) {
                    member.packed |= packed;
                    self.after_step(member, stepped, emit);
                }
            }
            Err(failure) => {
                // Nobody has stepped. Out of memory, a trial tries once more with less of it where that is allowed.
                let out_of_memory = failure.class == FailureClass::OutOfMemory;
                let mut members = self.members.iter_mut().rev().filter(|_| out_of_memory);
                let spared = members.find_map(|member| {
                    let spares = self.backend.spare(base, &mut member.run);
                    spares.then(|| member.admission.assignment.clone())
                });
                if let Some(assignment) = spared {
                    let message = format!("layers are computed again from here on: {}", failure.message);
                    emit(Event::Trial(assignment, Happening::Note(Severity::Warning, message)));
                } else if let Some(last) = self.members.pop() {
                    // The last to join was one too many: the others go on without it.
                    self.let_go(last, Some(failure), emit);
                }
            }
        }
    }

    /// Tells how long steps took, once they are enough or no more come.
    fn tell_steps(&mut self, emit: &mut dyn FnMut(Event)) {
        let steps = &mut self.step_seconds;
        let enough = steps.len() >= STEPS || steps.iter().sum::<f64>() >= STEPS_SECONDS;
        if enough || (self.members.is_empty() && !steps.is_empty()) {
            emit(Event::Steps(std::mem::take(steps)));
        }
    }

    fn after_step(&mut self, member: Member<B::Run>, stepped: Stepped, emit: &mut dyn FnMut(Event)) {
        let assignment = member.admission.assignment.clone();
        if let Some(took) = stepped.evaluation {
            let (now, step) = (self.clock.now(), self.backend.step(&member.run));
            let start = Timestamp(now.0.saturating_sub(took.as_millis() as u64));
            let phase = Phase { work: Work::Evaluate, start, took, step, four_bits: None };
            emit(Event::Phase(assignment.clone(), phase));
        }
        if let Some(point) = stepped.point {
            emit(Event::Trial(assignment.clone(), Happening::Points(vec![point])));
        }
        if let Some(failure) = stepped.failed {
            return self.fail(member, failure, emit);
        }
        if let Some(what) = stepped.diverged {
            return self.finish(member, Ending::Diverged, what, emit);
        }
        if self.backend.step(&member.run) >= self.backend.total_steps(&member.run) {
            return self.checkpoint_then(member, Then::Complete(None), emit);
        }
        if stepped.checkpoint_due {
            self.checkpoint_then(member, Then::GoOn, emit);
        } else {
            self.members.push(member);
        }
    }
}

/// Work that has begun.
struct Begun {
    start: Timestamp,
    since: Duration,
}

impl Begun {
    fn now(clock: &dyn Clock) -> Self {
        Self { start: clock.now(), since: clock.monotonic() }
    }

    fn over(self, clock: &dyn Clock, assignment: &Assignment, work: Work, step: u64) -> Event {
        Event::Phase(assignment.clone(), self.phase(clock.monotonic(), work, step))
    }

    /// The work that ended at `ended` on the monotonic clock.
    fn phase(self, ended: Duration, work: Work, step: u64) -> Phase {
        let took = ended.saturating_sub(self.since);
        Phase { work, start: self.start, took, step, four_bits: None }
    }
}

/// The result of a trial that the device cannot hold, even alone.
fn does_not_fit(base: u64, own: u64, device: u64) -> Failure {
    let message = format!(
        "{}; lower batch_size or max_sequence_length, or take a smaller base",
        Shortage { base, own, device }
    );
    Failure { class: FailureClass::OutOfMemory, message }
}

/// Refuses to go on with other bytes than those that earlier attempts were trained on.
fn same_bytes(expected: &Digests, found: &Digests) -> Result<(), Failure> {
    let Some((what, expected, found)) = expected.difference(found) else { return Ok(()) };
    let message = format!(
        "the {what} on this machine is not the one that the trial began with ({found}, not {expected}); \
         put the original back, or submit the sweep again"
    );
    Err(Failure { class: FailureClass::User, message })
}

#[cfg(test)]
mod tests;
