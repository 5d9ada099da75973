//! How the trials of a pack are checkpointed and end: asked what their sweep asks, with their numbers; and what waits for a disk.
//!
//! A trial goes on while its checkpoint is written. It stands still if the next one is due before that, so that at most one
//! of a trial's is on its way; if as many of the pack's are as may be ([`Backend::most_writes`]); and if the disk refused it.
//! What ends stands still until its last one is written; what failed or is not wanted any more leaves the device's memory at
//! once. What failed although its state is sound, in an evaluation, is checkpointed all the same.

use super::writer::Written;
use super::{Asking, Backend, Begun, Member, Pack, Write, Writing};
use crate::Assignment;
use crate::engine::{Admission, Checkpoint, CheckpointDirs, Ending, Event, Happening, How, Work};
use domain::trial::{Failure, FailureClass, Severity, Throughput, TrialSummary};
use std::time::Duration;

/// The pause between two tries to write checkpoints that the disk refused.
pub(super) const SAVE_PAUSE: Duration = Duration::from_secs(1);

/// What is to become of a trial once nothing of it is left to be written.
pub(super) enum Then {
    GoOn,
    /// It has made all its steps: it is asked what its sweep asks, unless there is a reason why not.
    Complete(Option<String>),
    Finish(Ending, String),
    Release,
}

/// A trial that stands still: until its checkpoint is written, until it is its turn for one, or until the disk is asked again
/// that refused it. Turns are taken in the order in which these stand.
pub(super) struct Unsaved<R> {
    pub(super) member: Member<R>,
    then: Then,
}

/// A trial of which nothing is in memory but what is being written, or is to be.
pub(super) struct Leaving {
    pub(super) admission: Admission,
    writing: Writing,
    /// Its last state, if one of an earlier step is being written.
    last: Option<Taken>,
    /// Why it cannot go on: what is being written counts. `None` if nobody wants it any more.
    failure: Option<Failure>,
}

/// A run's state at a step, whatever becomes of the run.
struct Taken {
    begun: Begun,
    checkpoint: Checkpoint,
    write: Write,
}

/// A trial that has made all its steps, and is asked what its sweep asks.
pub(super) struct Candidate<R> {
    pub(super) member: Member<R>,
    begun: Begun,
}

/// Why a trial is not asked that is to end before it was.
pub(super) const ENDED: &str = "it was to end before it was asked everything";

impl<B: Backend> Pack<B> {
    /// Checkpoints a trial, and does with it what is to be done: if it goes on, at once, else when the checkpoint is
    /// written. A disk that refuses is asked again later; until then the trial stands still. A trial whose state cannot be
    /// taken fails: its device does not get better by being asked again.
    pub(super) fn checkpoint_then(
        &mut self,
        member: Member<B::Run>,
        then: Then,
        emit: &mut dyn FnMut(Event),
    ) {
        if member.writing.is_some() {
            return self.unsaved.push(Unsaved { member, then });
        }
        if member.saved == Some(self.backend.step(&member.run)) {
            return self.go_on(member, then, emit);
        }
        if self.writes() >= self.backend.most_writes() || self.unsaved.iter().any(Unsaved::waits_its_turn) {
            return self.unsaved.push(Unsaved { member, then });
        }
        self.write_then(member, then, emit);
    }

    /// Has a checkpoint of a trial written as it stands.
    fn write_then(&mut self, mut member: Member<B::Run>, then: Then, emit: &mut dyn FnMut(Event)) {
        let taken = match self.take(&mut member) {
            Ok(taken) => taken,
            Err(failure) => return self.let_go(member, Some(failure), emit),
        };
        match (self.begin_writing(&member.admission.assignment, taken), then) {
            (Err(failure), then) => self.not_written(member, then, failure, emit),
            (Ok(writing), then) => {
                member.writing = Some(writing);
                match then {
                    Then::GoOn if !member.refused => self.members.push(member),
                    then => self.unsaved.push(Unsaved { member, then }),
                }
            }
        }
    }

    /// Takes a trial's state as it stands.
    fn take(&mut self, member: &mut Member<B::Run>) -> Result<Taken, Failure> {
        let step = self.backend.step(&member.run);
        let dirs = CheckpointDirs::within(&member.admission.work_dir, step);
        let begun = Begun::now(&*self.clock);
        let write = self.backend.save(&mut member.run, dirs.clone())?;
        Ok(Taken { begun, checkpoint: Checkpoint { step, dirs }, write })
    }

    /// Has a state written.
    fn begin_writing(&mut self, assignment: &Assignment, taken: Taken) -> Result<Writing, Failure> {
        let Taken { begun, checkpoint, write } = taken;
        self.writer.write(assignment.clone(), write)?;
        Ok(Writing { begun, checkpoint })
    }

    /// How many checkpoints are on their way.
    pub(super) fn writes(&self) -> usize {
        let members = self.members.iter().chain(self.unsaved.iter().map(|unsaved| &unsaved.member));
        members.filter(|member| member.writing.is_some()).count() + self.leaving.len()
    }

    /// Ends a trial that cannot go on although its state is sound, and checkpoints that: whoever tries it again, where there is
    /// more memory perhaps, does not make its last steps again. Its run is let go of at once all the same, so its state does not wait
    /// for its turn among [`Backend::most_writes`].
    pub(super) fn fail(&mut self, mut member: Member<B::Run>, failure: Failure, emit: &mut dyn FnMut(Event)) {
        let is_saved = member.saved == Some(self.backend.step(&member.run));
        // It fails whether or not its state can be taken and written.
        let mut last = if is_saved { None } else { self.take(&mut member).ok() };
        if member.writing.is_none()
            && let Some(taken) = last.take()
        {
            member.writing = self.begin_writing(&member.admission.assignment, taken).ok();
        }
        member.tell_kept_back(emit);
        self.leave(member, last, Some(failure), emit);
    }

    /// Ends a trial that cannot go on, or that nobody wants any more if there is no reason why not. Its run is let go of at
    /// once, so that the others have its memory; its last word comes when nothing of it is being written any more.
    pub(super) fn let_go(
        &mut self,
        mut member: Member<B::Run>,
        failure: Option<Failure>,
        emit: &mut dyn FnMut(Event),
    ) {
        if failure.is_some() {
            member.tell_kept_back(emit);
        }
        self.leave(member, None, failure, emit);
    }

    /// Lets go of a trial's run. Its `last` state is written after what is being written.
    fn leave(
        &mut self,
        member: Member<B::Run>,
        last: Option<Taken>,
        failure: Option<Failure>,
        emit: &mut dyn FnMut(Event),
    ) {
        let Member { admission, writing, .. } = member;
        match writing {
            Some(writing) => self.leaving.push(Leaving { admission, writing, last, failure }),
            None => end_left(&admission, failure, emit),
        }
    }

    /// Hears which checkpoints are written, waiting for the first at most so long.
    pub(super) fn hear_of_writes(&mut self, mut longest: Duration, emit: &mut dyn FnMut(Event)) {
        while let Some(written) = self.writer.next(longest) {
            longest = Duration::ZERO;
            let is_it = |admission: &Admission| admission.assignment == written.assignment;
            if let Some(i) = self.members.iter().position(|member| is_it(&member.admission)) {
                if let Err(failure) = self.members[i].written(written, false, emit) {
                    let member = self.members.remove(i);
                    self.not_written(member, Then::GoOn, failure, emit);
                }
            } else if let Some(i) = self.unsaved.iter().position(|u| is_it(&u.member.admission)) {
                let Unsaved { mut member, then } = self.unsaved.remove(i);
                // It has little time: what lies behind would be uploaded first, and hold up what is to go on elsewhere.
                let goes_further = member.saves_before(self.backend.step(&member.run));
                let keep_back = matches!(then, Then::Release) && goes_further;
                match member.written(written, keep_back, emit) {
                    Ok(()) => self.checkpoint_then(member, then, emit),
                    Err(failure) => self.not_written(member, then, failure, emit),
                }
            } else if let Some(i) = self.leaving.iter().position(|leaving| is_it(&leaving.admission)) {
                let Leaving { admission, writing, last, failure } = self.leaving.remove(i);
                let mut next = None;
                if failure.is_some() {
                    // It fails whether or not that was written.
                    if let Ok(checkpoint) = writing.over(written, emit) {
                        emit(Event::Trial(admission.assignment.clone(), Happening::Checkpoint(checkpoint)));
                    }
                    let last = last.map(|taken| Taken { begun: Begun::now(&*self.clock), ..taken });
                    next = last.and_then(|last| self.begin_writing(&admission.assignment, last).ok());
                }
                match next {
                    Some(writing) => {
                        self.leaving.push(Leaving { admission, writing, last: None, failure });
                    }
                    None => end_left(&admission, failure, emit),
                }
            }
        }
    }

    /// A trial whose checkpoint was not written stands still until the disk takes it, if that may change.
    fn not_written(
        &mut self,
        mut member: Member<B::Run>,
        then: Then,
        failure: Failure,
        emit: &mut dyn FnMut(Event),
    ) {
        member.tell_kept_back(emit);
        let assignment = member.admission.assignment.clone();
        if failure.class != FailureClass::Infrastructure {
            return emit(Event::Trial(assignment, Happening::Failed(failure)));
        }
        if !std::mem::replace(&mut member.refused, true) {
            let message = format!("no checkpoint can be written; it waits: {}", failure.message);
            emit(Event::Trial(assignment, Happening::Note(Severity::Error, message)));
        }
        self.unsaved.push(Unsaved { member, then });
        self.save_again_at = self.clock.monotonic() + SAVE_PAUSE;
    }

    /// Does with a trial what was to be done once its checkpoint is written.
    fn go_on(&mut self, mut member: Member<B::Run>, then: Then, emit: &mut dyn FnMut(Event)) {
        let assignment = member.admission.assignment.clone();
        let last = match then {
            Then::GoOn => return self.members.push(member),
            Then::Complete(None) => {
                let begun = Begun::now(&*self.clock);
                return self.ask(Candidate { member, begun }, emit);
            }
            Then::Complete(unasked) => self.completed(&mut member, unasked),
            Then::Finish(ending, message) => self.last_word(&mut member, ending, message),
            Then::Release => Happening::Released,
        };
        emit(Event::Trial(assignment, last));
    }

    /// Asks a trial a little of what its sweep asks; it ends once that was all.
    pub(super) fn ask(&mut self, mut candidate: Candidate<B::Run>, emit: &mut dyn FnMut(Event)) {
        let Some((_, base)) = &self.base else { return };
        let assignment = candidate.member.admission.assignment.clone();
        let last = match self.backend.ask(base, &mut candidate.member.run) {
            Ok(Asking::More) => return self.candidates.push_back(candidate),
            Ok(asking) => {
                let Candidate { mut member, begun } = candidate;
                if asking == Asking::Over {
                    let step = self.backend.step(&member.run);
                    emit(begun.over(&*self.clock, &assignment, Work::Evaluate, step));
                }
                self.completed(&mut member, None)
            }
            // It is trained all the same.
            Err(Failure { message, .. }) => {
                let note = format!("it is trained, and could not be asked what its sweep asks: {message}");
                emit(Event::Trial(assignment.clone(), Happening::Note(Severity::Warning, note)));
                self.completed(&mut candidate.member, Some(message))
            }
        };
        emit(Event::Trial(assignment, last));
    }

    /// The end of a trial that made all its steps, and, if it was not asked everything, why.
    fn completed(&mut self, member: &mut Member<B::Run>, unasked: Option<String>) -> Happening {
        match self.last_word(member, Ending::Completed, String::new()) {
            Happening::Finished { ending, mut summary, message } => {
                if unasked.is_some() {
                    summary.evaluations.clear();
                    summary.item_scores.clear();
                    summary.unasked = unasked;
                }
                Happening::Finished { ending, summary, message }
            }
            failed => failed,
        }
    }

    /// A trial's end, with its numbers.
    fn last_word(&mut self, member: &mut Member<B::Run>, ending: Ending, message: String) -> Happening {
        self.summary(member).map_or_else(Happening::Failed, |summary| Happening::Finished {
            ending,
            summary: Box::new(summary),
            message,
        })
    }

    /// Has the checkpoints written whose turn it is, and those that the disk refused a while ago.
    pub(super) fn save_again(&mut self, emit: &mut dyn FnMut(Event)) {
        let refused_too = self.clock.monotonic() >= self.save_again_at;
        let may = |u: &Unsaved<B::Run>| u.waits_its_turn() || u.is_refused() && refused_too;
        // Each at most once: what is refused again stands last.
        for _ in 0..self.unsaved.iter().filter(|unsaved| may(unsaved)).count() {
            if self.writes() >= self.backend.most_writes() {
                return;
            }
            let Some(i) = self.unsaved.iter().position(may) else { return };
            let Unsaved { member, then } = self.unsaved.remove(i);
            self.write_then(member, then, emit);
        }
    }

    pub(super) fn finish(
        &mut self,
        member: Member<B::Run>,
        ending: Ending,
        message: String,
        emit: &mut dyn FnMut(Event),
    ) {
        self.checkpoint_then(member, Then::Finish(ending, message), emit);
    }

    fn summary(&mut self, member: &mut Member<B::Run>) -> Result<TrialSummary, Failure> {
        let Some((_, base)) = &self.base else { return Ok(TrialSummary::default()) };
        let mut summary = self.backend.summary(base, &mut member.run)?;
        // What a model says that a device took, no clock knows better.
        if summary.simulated_seconds.is_none() {
            summary.device_seconds = self.clock.monotonic().saturating_sub(member.since).as_secs_f64();
        }
        if member.packed {
            summary.throughput = Throughput::Packed;
        }
        Ok(summary)
    }

    pub(super) fn carry_out(&mut self, assignment: &Assignment, how: How, emit: &mut dyn FnMut(Event)) {
        if let Some(i) = self.members.iter().position(|m| m.admission.assignment == *assignment) {
            let member = self.members.remove(i);
            self.end_member(member, how, emit);
        } else if let Some(i) = self.unsaved.iter().position(|u| u.member.admission.assignment == *assignment)
        {
            // It keeps its turn.
            let Unsaved { member, then } = &mut self.unsaved[i];
            match (&mut *then, how) {
                // It has come to its end, and only its last checkpoint is missing.
                (Then::Complete(_), How::Stop | How::Release) if !member.refused => {
                    // Which is soon written: it ends thereafter.
                    self.stops.push((assignment.clone(), how));
                }
                (Then::Complete(unasked), How::Stop | How::Release) => {
                    unasked.get_or_insert_with(|| ENDED.into());
                }
                (Then::Finish(..), How::Stop | How::Release) => {}
                (_, How::Drop) => {
                    let Unsaved { member, .. } = self.unsaved.remove(i);
                    self.let_go(member, None, emit);
                }
                (_, How::Stop) => *then = Then::Finish(Ending::Stopped, String::new()),
                (_, How::Release) => *then = Then::Release,
            }
        } else if let Some(leaving) = self.leaving.iter_mut().find(|l| l.admission.assignment == *assignment)
        {
            // It ends by itself, without a word if it is not wanted any more.
            if let How::Drop = how {
                leaving.failure = None;
            }
        } else if let Some(i) =
            self.candidates.iter().position(|c| c.member.admission.assignment == *assignment)
        {
            if let Some(Candidate { member, .. }) = self.candidates.remove(i) {
                match how {
                    How::Stop => self.checkpoint_then(member, Then::Complete(Some(ENDED.into())), emit),
                    How::Release | How::Drop => self.end_member(member, how, emit),
                }
            }
        } else if let Some(i) = self.waiting.iter().position(|a| a.assignment == *assignment)
            && let Some(admission) = self.waiting.remove(i)
        {
            end_waiting(admission, how, emit);
        }
    }

    fn end_member(&mut self, member: Member<B::Run>, how: How, emit: &mut dyn FnMut(Event)) {
        match how {
            How::Stop => self.finish(member, Ending::Stopped, String::new(), emit),
            How::Release => self.checkpoint_then(member, Then::Release, emit),
            How::Drop => self.let_go(member, None, emit),
        }
    }
}

impl<R> Unsaved<R> {
    /// Whether as many checkpoints were on their way as may be when its own was due.
    fn waits_its_turn(&self) -> bool {
        self.member.writing.is_none() && !self.member.refused
    }

    /// Whether the disk refused its checkpoint.
    fn is_refused(&self) -> bool {
        self.member.writing.is_none() && self.member.refused
    }
}

impl<R> Member<R> {
    /// Whether the checkpoint that is being written is of an earlier step than this.
    fn saves_before(&self, step: u64) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.checkpoint.step < step)
    }

    /// Takes note of what became of its checkpoint. If it was written, tells of it, unless it is to be kept back.
    fn written(
        &mut self,
        written: Written,
        keep_back: bool,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(), Failure> {
        let Some(writing) = self.writing.take() else { return written.result };
        let checkpoint = writing.over(written, emit)?;
        (self.saved, self.refused) = (Some(checkpoint.step), false);
        if let Some(earlier) = self.kept_back.replace(checkpoint) {
            earlier.remove();
        }
        if !keep_back {
            self.tell_kept_back(emit);
        }
        Ok(())
    }

    /// Tells of a checkpoint that was kept back, if there is one.
    fn tell_kept_back(&mut self, emit: &mut dyn FnMut(Event)) {
        if let Some(checkpoint) = self.kept_back.take() {
            emit(Event::Trial(self.admission.assignment.clone(), Happening::Checkpoint(checkpoint)));
        }
    }
}

impl Writing {
    /// Tells how long it took, and answers with the checkpoint if it was written. What was refused leaves nothing: the next try
    /// is of a later step.
    fn over(self, written: Written, emit: &mut dyn FnMut(Event)) -> Result<Checkpoint, Failure> {
        let Self { begun, checkpoint } = self;
        let Written { assignment, result, ended } = written;
        if let Err(failure) = result {
            checkpoint.remove();
            return Err(failure);
        }
        emit(Event::Phase(assignment, begun.phase(ended, Work::Checkpoint, checkpoint.step)));
        Ok(checkpoint)
    }
}

/// The last of a trial of which nothing is being written any more: why it cannot go on, if it was wanted.
fn end_left(admission: &Admission, failure: Option<Failure>, emit: &mut dyn FnMut(Event)) {
    match failure {
        Some(failure) => emit(Event::Trial(admission.assignment.clone(), Happening::Failed(failure))),
        None => forget(admission),
    }
}

/// Ends a trial that never began here: there is nothing to checkpoint.
pub(in crate::engine) fn end_waiting(admission: Admission, how: How, emit: &mut dyn FnMut(Event)) {
    let last = match how {
        How::Stop => Happening::Finished {
            ending: Ending::Stopped,
            summary: Box::default(),
            message: "stopped before its first step".into(),
        },
        How::Release => Happening::Released,
        How::Drop => return forget(&admission),
    };
    emit(Event::Trial(admission.assignment, last));
}

fn forget(admission: &Admission) {
    // What cannot be removed now is removed when the agent starts again.
    let _ = std::fs::remove_dir_all(&admission.work_dir);
}
