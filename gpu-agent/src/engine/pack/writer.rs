//! The thread that writes a pack's checkpoints, so that no step waits for the disk: one for all of its trials, in the order
//! in which they come. The pack gives it one of a trial at a time.

use crate::Assignment;
use domain::Clock;
use domain::trial::{Failure, FailureClass};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Writes a checkpoint's files, on another thread than the one that trains. What it holds is let go of with its end.
pub type Write = Box<dyn FnOnce() -> Result<(), Failure> + Send>;

/// What became of a write, or the panic that it ended with.
type Done = Result<Result<(), Failure>, Box<dyn Any + Send>>;

/// A write that is over.
#[derive(Debug, PartialEq)]
pub(super) struct Written {
    pub(super) assignment: Assignment,
    pub(super) result: Result<(), Failure>,
    /// When it was, on the monotonic clock: it may be heard of a long step later.
    pub(super) ended: Duration,
}

/// The thread, once there was something to write.
pub(super) struct Writer {
    clock: Arc<dyn Clock>,
    running: Option<Running>,
}

struct Running {
    /// At most one for each trial is on its way in both channels together. `None` while it is dropped.
    work: Option<Sender<(Assignment, Write)>>,
    done: Receiver<(Assignment, Done, Duration)>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// No thread yet. `clock` says when a write ended.
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, running: None }
    }

    /// Has a checkpoint of a trial written.
    ///
    /// # Errors
    /// The system gives no thread; that may change.
    pub(super) fn write(&mut self, assignment: Assignment, write: Write) -> Result<(), Failure> {
        let running = match self.running.take() {
            Some(running) => running,
            None => Running::start(self.clock.clone()).map_err(no_thread)?,
        };
        let running = self.running.insert(running);
        let sent = running.work.as_ref().map(|work| work.send((assignment, write)));
        match sent {
            Some(Ok(())) => Ok(()),
            // It ends when its channel does, and by nothing else.
            _ => Err(no_thread(std::io::Error::other("it has ended"))),
        }
    }

    /// What became of the next write, waited for at most so long. A write that panicked panics here.
    pub(super) fn next(&self, longest: Duration) -> Option<Written> {
        let Some(running) = &self.running else {
            thread::sleep(longest);
            return None;
        };
        let (assignment, done, ended) = running.done.recv_timeout(longest).ok()?;
        let result = done.unwrap_or_else(|panic| resume_unwind(panic));
        Some(Written { assignment, result, ended })
    }
}

fn no_thread(error: std::io::Error) -> Failure {
    let message = format!("no thread writes checkpoints: {error}");
    Failure { class: FailureClass::Infrastructure, message }
}

impl Running {
    fn start(clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let (work, to_write) = channel::<(Assignment, Write)>();
        let (told, done) = channel();
        let run = move || {
            for (assignment, write) in to_write {
                let result = catch_unwind(AssertUnwindSafe(write));
                // Whoever does not listen any more needs no word.
                let _ = told.send((assignment, result, clock.monotonic()));
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
    use crate::hand::Hand;
    use domain::SystemClock;
    use std::sync::atomic::{AtomicBool, Ordering};

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn writes_are_done_in_order_and_a_panic_is_passed_on() {
        let mut writer = Writer::new(Arc::new(SystemClock::new()));
        assert!(writer.next(Duration::ZERO).is_none(), "nothing was to be written");
        for number in 1..=3 {
            let write: Write = Box::new(move || match number {
                1 => Ok(()),
                2 => Err(no_thread(std::io::Error::other("refused"))),
                _ => resume_unwind(Box::new("a defect")),
            });
            writer.write(Assignment::new("one", number), write).unwrap();
        }
        let first = writer.next(PATIENCE).unwrap();
        assert_eq!((first.assignment, first.result), (Assignment::new("one", 1), Ok(())));
        let second = writer.next(PATIENCE).unwrap();
        assert_eq!(second.assignment, Assignment::new("one", 2));
        assert!(second.result.unwrap_err().message.ends_with("refused"));
        let panic = catch_unwind(AssertUnwindSafe(|| writer.next(PATIENCE))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"a defect"));
        // The thread outlives it.
        writer.write(Assignment::new("one", 4), Box::new(|| Ok(()))).unwrap();
        assert!(writer.next(PATIENCE).is_some_and(|written| written.result.is_ok()));
    }

    #[test]
    fn a_write_ends_when_it_does_and_not_when_it_is_heard_of() {
        let clock = Arc::new(Hand::default());
        let mut writer = Writer::new(clock.clone());
        let (later, begun) = channel();
        for (number, ends) in [(1, 5), (2, 9)] {
            let (clock, later) = (clock.clone(), later.clone());
            let write = move || {
                clock.0.store(ends, Ordering::Relaxed);
                let _ = later.send(());
                Ok(())
            };
            writer.write(Assignment::new("one", number), Box::new(write)).unwrap();
        }
        // The second is at its end before the first is heard of.
        (0..2).for_each(|_| begun.recv_timeout(PATIENCE).unwrap());
        let ended = [(); 2].map(|()| writer.next(PATIENCE).unwrap().ended.as_secs());
        assert_eq!(ended, [5, 9]);
    }

    #[test]
    fn what_was_to_be_written_is_when_the_engine_is_gone() {
        let mut writer = Writer::new(Arc::new(SystemClock::new()));
        let is_written = Arc::new(AtomicBool::new(false));
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
