//! The thread that writes a pack's checkpoints, so that no step waits for the disk: one for all of its trials, in the order
//! in which they come. The pack gives it one of a trial at a time.

use crate::Assignment;
use domain::trial::{Failure, FailureClass};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Writes a checkpoint's files, on another thread than the one that trains. What it holds is let go of with its end.
pub type Write = Box<dyn FnOnce() -> Result<(), Failure> + Send>;

/// What became of a write, or the panic that it ended with.
type Done = Result<Result<(), Failure>, Box<dyn Any + Send>>;

/// The thread, once there was something to write.
#[derive(Default)]
pub(super) struct Writer(Option<Running>);

struct Running {
    /// At most one for each trial is on its way in both channels together. `None` while it is dropped.
    work: Option<Sender<(Assignment, Write)>>,
    done: Receiver<(Assignment, Done)>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Has a checkpoint of a trial written.
    ///
    /// # Errors
    /// The system gives no thread; that may change.
    pub(super) fn write(&mut self, assignment: Assignment, write: Write) -> Result<(), Failure> {
        let running = match self.0.take() {
            Some(running) => running,
            None => Running::start().map_err(no_thread)?,
        };
        let running = self.0.insert(running);
        let sent = running.work.as_ref().map(|work| work.send((assignment, write)));
        match sent {
            Some(Ok(())) => Ok(()),
            // It ends when its channel does, and by nothing else.
            _ => Err(no_thread(std::io::Error::other("it has ended"))),
        }
    }

    /// What became of the next write, waited for at most so long. A write that panicked panics here.
    pub(super) fn next(&self, longest: Duration) -> Option<(Assignment, Result<(), Failure>)> {
        let Some(running) = &self.0 else {
            thread::sleep(longest);
            return None;
        };
        let (assignment, done) = running.done.recv_timeout(longest).ok()?;
        Some((assignment, done.unwrap_or_else(|panic| resume_unwind(panic))))
    }
}

fn no_thread(error: std::io::Error) -> Failure {
    let message = format!("no thread writes checkpoints: {error}");
    Failure { class: FailureClass::Infrastructure, message }
}

impl Running {
    fn start() -> std::io::Result<Self> {
        let (work, to_write) = channel::<(Assignment, Write)>();
        let (told, done) = channel();
        let run = move || {
            for (assignment, write) in to_write {
                let result = catch_unwind(AssertUnwindSafe(write));
                // Whoever does not listen any more needs no word.
                let _ = told.send((assignment, result));
            }
        };
        let thread = thread::Builder::new().name("checkpoints".into()).spawn(run)?;
        Ok(Self { work: Some(work), done, thread: Some(thread) })
    }
}

impl Drop for Running {
    /// Waits for what was given to it: whoever is told that the engine has ended may remove its folders.
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn writes_are_done_in_order_and_a_panic_is_passed_on() {
        let mut writer = Writer::default();
        assert!(writer.next(Duration::ZERO).is_none(), "nothing was to be written");
        for number in 1..=3 {
            let write: Write = Box::new(move || match number {
                1 => Ok(()),
                2 => Err(no_thread(std::io::Error::other("refused"))),
                _ => resume_unwind(Box::new("a defect")),
            });
            writer.write(Assignment::new("one", number), write).unwrap();
        }
        assert_eq!(writer.next(PATIENCE), Some((Assignment::new("one", 1), Ok(()))));
        let (second, result) = writer.next(PATIENCE).unwrap();
        assert_eq!(second, Assignment::new("one", 2));
        assert!(result.unwrap_err().message.ends_with("refused"));
        let panic = catch_unwind(AssertUnwindSafe(|| writer.next(PATIENCE))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"a defect"));
        // The thread outlives it.
        writer.write(Assignment::new("one", 4), Box::new(|| Ok(()))).unwrap();
        assert!(writer.next(PATIENCE).is_some_and(|(_, result)| result.is_ok()));
    }

    #[test]
    fn what_was_to_be_written_is_when_the_engine_is_gone() {
        let (mut writer, is_written) = (Writer::default(), Arc::new(AtomicBool::new(false)));
        let (written, (go, wait)) = (is_written.clone(), channel::<()>());
        let write = move || {
            let _ = wait.recv();
            written.store(true, Ordering::Relaxed);
            Ok(())
        };
        writer.write(Assignment::new("one", 1), Box::new(write)).unwrap();
        let goes_on = thread::spawn(move || drop(go));
        drop(writer);
        assert!(is_written.load(Ordering::Relaxed));
        goes_on.join().unwrap();
    }
}
