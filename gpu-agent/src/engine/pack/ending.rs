//! How the trials of a pack end: checkpointed, asked what their sweep asks, with their numbers; and what waits for a disk.

use super::{Asking, Backend, Begun, Member, Pack};
use crate::Assignment;
use crate::engine::{Admission, Checkpoint, CheckpointDirs, Ending, Event, Happening, How, Work};
use domain::trial::{Failure, FailureClass, Severity, Throughput, TrialSummary};
use std::time::Duration;

/// The pause between two tries to write checkpoints that the disk refused.
pub(super) const SAVE_PAUSE: Duration = Duration::from_secs(1);

/// What is to become of a trial once its checkpoint is written.
pub(super) enum Then {
    GoOn,
    /// It has made all its steps: it is asked what its sweep asks, unless there is a reason why not.
    Complete(Option<String>),
    Finish(Ending, String),
    Release,
}

/// A trial that stands still because the disk refused its checkpoint.
pub(super) struct Unsaved<R> {
    pub(super) member: Member<R>,
    then: Then,
}

/// A trial that has made all its steps, and is asked what its sweep asks.
pub(super) struct Candidate<R> {
    pub(super) member: Member<R>,
    begun: Begun,
}

/// Why a trial is not asked that is to end before it was.
pub(super) const ENDED: &str = "it was to end before it was asked everything";

impl<B: Backend> Pack<B> {
    /// Checkpoints a trial, then does with it what was to be done. A disk that refuses is asked again later; until
    /// then the trial stands still.
    pub(super) fn checkpoint_then(
        &mut self,
        mut member: Member<B::Run>,
        then: Then,
        emit: &mut dyn FnMut(Event),
    ) {
        let saved = self.checkpoint(&mut member, emit);
        let assignment = member.admission.assignment.clone();
        if let Err(failure) = &saved
            && failure.class == FailureClass::Infrastructure
        {
            if !std::mem::replace(&mut member.refused, true) {
                let message = format!("no checkpoint can be written; it waits: {}", failure.message);
                emit(Event::Trial(assignment, Happening::Note(Severity::Error, message)));
            }
            self.unsaved.push(Unsaved { member, then });
            self.save_again_at = self.clock.monotonic() + SAVE_PAUSE;
            return;
        }
        member.refused = false;
        let last = match (saved, then) {
            (Ok(()), Then::GoOn) => return self.members.push(member),
            (Ok(()), Then::Complete(None)) => {
                let begun = Begun::now(&*self.clock);
                return self.ask(Candidate { member, begun }, emit);
            }
            (Ok(()), Then::Complete(unasked)) => self.completed(&mut member, unasked),
            (Ok(()), Then::Finish(ending, message)) => self.last_word(&mut member, ending, message),
            (Ok(()), Then::Release) => Happening::Released,
            (Err(failure), _) => Happening::Failed(failure),
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

    pub(super) fn save_again(&mut self, emit: &mut dyn FnMut(Event)) {
        if !self.unsaved.is_empty() && self.clock.monotonic() >= self.save_again_at {
            for Unsaved { member, then } in std::mem::take(&mut self.unsaved) {
                self.checkpoint_then(member, then, emit);
            }
        }
    }

    fn checkpoint(
        &mut self,
        member: &mut Member<B::Run>,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(), Failure> {
        let step = self.backend.step(&member.run);
        if member.saved == Some(step) {
            return Ok(());
        }
        let dirs = CheckpointDirs::within(&member.admission.work_dir, step);
        let begun = Begun::now(&*self.clock);
        self.backend.save(&member.run, &dirs)?;
        emit(begun.over(&*self.clock, &member.admission.assignment, Work::Checkpoint, step));
        member.saved = Some(step);
        let checkpoint = Happening::Checkpoint(Checkpoint { step, dirs });
        emit(Event::Trial(member.admission.assignment.clone(), checkpoint));
        Ok(())
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
        summary.device_seconds = self.clock.monotonic().saturating_sub(member.since).as_secs_f64();
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
            let Unsaved { member, mut then } = self.unsaved.remove(i);
            if let Then::Complete(unasked) = &mut then {
                unasked.get_or_insert_with(|| ENDED.into());
            }
            match then {
                // It has come to its end, and only its last checkpoint is missing.
                Then::Complete(_) | Then::Finish(..) if how != How::Drop => {
                    self.unsaved.push(Unsaved { member, then });
                }
                _ => self.end_member(member, how, emit),
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
            How::Drop => forget(&member.admission),
        }
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
