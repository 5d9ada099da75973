//! The thread that hosts an engine: commands in, events out, both over bounded channels. A panic of the
//! engine fails the trials it held and a fresh engine takes its place, a bounded number of times.

use super::{Admission, Command, Engine, Event, Happening, How};
use crate::Assignment;
use domain::trial::{Failure, FailureClass};
use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

/// Panics after which an engine is not started again.
const MAX_PANICS: u32 = 5;
/// Commands and events that may wait on either side.
const CHANNEL: usize = 64;

/// Makes an engine, on the thread that will step it.
pub type Factory = Box<dyn FnMut() -> Box<dyn Engine> + Send>;

/// The agent's ends of the two channels. The engine's thread or process ends when `commands` is dropped.
#[derive(Debug)]
pub struct Host {
    /// To the engine.
    pub commands: mpsc::Sender<Command>,
    /// From the engine.
    pub events: mpsc::Receiver<Event>,
}

impl Host {
    /// Starts a thread of that name.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(name: &str, factory: Factory) -> std::io::Result<Self> {
        let (host, inbox, outbox) = Self::channels();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            Worker { factory, engine: None, held: BTreeSet::new(), events: outbox, panics: 0 }.run(inbox);
        })?;
        Ok(host)
    }

    /// A host's handle and the engine's ends of its channels.
    pub(super) fn channels() -> (Self, mpsc::Receiver<Command>, mpsc::Sender<Event>) {
        let (commands, inbox) = mpsc::channel(CHANNEL);
        let (outbox, events) = mpsc::channel(CHANNEL);
        (Self { commands, events }, inbox, outbox)
    }
}

struct Worker {
    factory: Factory,
    engine: Option<Box<dyn Engine>>,
    held: BTreeSet<Assignment>,
    events: mpsc::Sender<Event>,
    panics: u32,
}

impl Worker {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let idle = self.engine.as_ref().is_none_or(|engine| engine.is_idle());
            let command = if idle {
                commands.blocking_recv().ok_or(TryRecvError::Disconnected)
            } else {
                commands.try_recv()
            };
            match command {
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return,
                Ok(Command::Admit(admission)) => self.admit(*admission),
                Ok(Command::Stop(assignment, how)) => self.stop(&assignment, how),
                // A thread logs what its process does.
                Ok(Command::Log(_)) => {}
                Ok(Command::Keep(draft)) => self.guarded(|worker| {
                    if let Some(engine) = &mut worker.engine {
                        engine.keep(draft);
                    }
                }),
                Err(TryRecvError::Empty) => self.step(),
            }
        }
    }

    fn admit(&mut self, admission: Admission) {
        let assignment = admission.assignment.clone();
        if self.panics >= MAX_PANICS {
            let why = format!("the engine ended {} times by a defect and is not started again", self.panics);
            return self.fail(assignment, format!("{why}; restart the agent"));
        }
        self.held.insert(assignment);
        self.guarded(|worker| worker.engine.get_or_insert_with(&mut worker.factory).admit(admission));
    }

    fn stop(&mut self, assignment: &Assignment, how: How) {
        if how == How::Drop {
            self.held.remove(assignment);
        }
        self.guarded(|worker| {
            if let Some(engine) = &mut worker.engine {
                engine.stop(assignment, how);
            }
        });
    }

    fn step(&mut self) {
        self.guarded(|worker| {
            let Self { engine: Some(engine), held, events, .. } = worker else { return };
            engine.step(&mut |event| {
                if let Event::Trial(assignment, happening) = &event
                    && happening.is_last()
                {
                    held.remove(assignment);
                }
                // The agent's side is gone only when it shuts down; `run` sees that next.
                let _ = events.blocking_send(event);
            });
        });
    }

    /// Runs the engine's code. If it panics, its trials fail and it is made anew for the next one.
    fn guarded(&mut self, work: impl FnOnce(&mut Self)) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(self))) else { return };
        let message = panic_message(&*panic);
        tracing::error!(message, "the engine panicked");
        self.engine = None;
        self.panics += 1;
        let _ = self.events.blocking_send(Event::BaseResident(None));
        for assignment in std::mem::take(&mut self.held) {
            self.fail(assignment, format!("the engine ended by a defect: {message}"));
        }
    }

    fn fail(&mut self, assignment: Assignment, message: String) {
        let failure = Failure { class: FailureClass::Infrastructure, message };
        let _ = self.events.blocking_send(Event::Trial(assignment, Happening::Failed(failure)));
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::trial::TrialConfig;

    /// Panics on the trial `bad`, and finishes nothing.
    struct Fragile(Vec<Admission>);

    impl Engine for Fragile {
        fn admit(&mut self, admission: Admission) {
            self.0.push(admission);
        }
        fn stop(&mut self, assignment: &Assignment, _: How) {
            self.0.retain(|a| a.assignment != *assignment);
        }
        fn step(&mut self, emit: &mut dyn FnMut(Event)) {
            if self.0.iter().any(|a| a.assignment.trial.as_str() == "bad") {
                panic!("on purpose");
            }
            for admission in self.0.drain(..) {
                emit(Event::Trial(admission.assignment, Happening::Released));
            }
        }
        fn is_idle(&self) -> bool {
            self.0.is_empty()
        }
    }

    fn admit(trial: &str) -> Command {
        Command::Admit(Box::new(Admission {
            assignment: Assignment::new(trial, 1),
            config: TrialConfig::default(),
            resume: None,
            digests: None,
            evaluations: None,
            places: Default::default(),
            cache: None,
            work_dir: "nowhere".into(),
            belongs: None,
        }))
    }

    /// What the host says about the next trial.
    async fn next(host: &mut Host) -> (String, Happening) {
        loop {
            match host.events.recv().await.expect("the host lives") {
                Event::Trial(assignment, happening) => return (assignment.trial.to_string(), happening),
                Event::BaseResident(base) => assert_eq!(base, None),
                Event::Phase(..) | Event::Steps(_) | Event::Quantised { .. } => {}
            }
        }
    }

    #[tokio::test]
    async fn a_panic_fails_its_trials_and_the_next_one_trains() {
        let mut host = Host::start("test", Box::new(|| Box::new(Fragile(Vec::new())))).unwrap();
        for round in 1..=MAX_PANICS + 1 {
            host.commands.send(admit("bad")).await.unwrap();
            let (trial, Happening::Failed(failure)) = next(&mut host).await else { panic!("it failed") };
            assert_eq!((trial.as_str(), failure.class), ("bad", FailureClass::Infrastructure));
            let given_up = failure.message.contains("not started again");
            assert_eq!(given_up, round > MAX_PANICS, "{}", failure.message);
            if round < MAX_PANICS {
                host.commands.send(admit("good")).await.unwrap();
                assert_eq!(next(&mut host).await, ("good".into(), Happening::Released));
            }
        }
    }

    #[tokio::test]
    async fn the_thread_ends_with_its_commands() {
        let Host { commands, mut events } =
            Host::start("test", Box::new(|| Box::new(Fragile(Vec::new())))).unwrap();
        drop(commands);
        assert_eq!(events.recv().await, None);
    }
}
