//! The child process that hosts an engine: the other host, for devices whose driver can end the process that uses it.
//!
//! Commands go to the child's standard input and events come from its standard output, one JSON value a line; its
//! standard error is ours, for its log. A child that ends, is killed or says something else fails the trials it held,
//! so that the coordinator gives them out again. The next admission starts another, after a pause that doubles with each
//! death in a row; after [`MAX_DEATHS`] of them there is no other. A trial that comes to its end sets the count back.

use super::host::Host;
use super::lines::{self, Lines};
use super::pack::end_waiting;
use super::{Admission, Command, Event, Happening, How};
use crate::Assignment;
use actor::Scope;
use domain::trial::{Failure, FailureClass};
use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io::Cursor;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Deaths in a row after which a child is not started again.
pub const MAX_DEATHS: u32 = 5;
/// The longest pause before a child is started again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The time in which a child that is told to end does, before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// How a child is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The device, for messages.
    pub device: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables that it gets beside ours.
    pub variables: Vec<(OsString, OsString)>,
    /// The pause after the first death; it doubles with each further one.
    pub first_pause: Duration,
}

/// Starts the host; its first child comes with its first trial. The task ends, as a host's thread does, when `commands`
/// is dropped or says so, and not with the scope: a device that gives its trials back needs its engine for that.
pub fn start(launch: Launch, scope: &Scope) -> Host {
    start_logging(launch, telemetry::log::changes(), scope)
}

/// [`start`], with what its children are to log, whenever that changes.
fn start_logging(launch: Launch, levels: watch::Receiver<Option<String>>, scope: &Scope) -> Host {
    let (host, inbox, outbox) = Host::channels();
    let supervisor = Supervisor {
        launch,
        levels,
        events: outbox,
        waiting: VecDeque::new(),
        held: BTreeSet::new(),
        deaths: 0,
        not_before: Instant::now(),
    };
    scope.spawn("engine process", supervisor.run(inbox));
    host
}

/// A child and our ends of its pipes. Dropped, it is killed.
struct Running {
    child: Child,
    /// `None` once it takes nothing more.
    stdin: Option<ChildStdin>,
    lines: Lines<ChildStdout>,
    /// What it has not taken yet.
    unsent: Cursor<Vec<u8>>,
}

impl Running {
    fn start(launch: &Launch) -> std::io::Result<Self> {
        let mut command = tokio::process::Command::new(&launch.program);
        command.args(&launch.arguments).envs(launch.variables.iter().cloned());
        // It calls nobody.
        command.env_remove(security::args::TOKEN_VARIABLE);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        // A Ctrl-C in the terminal is for the agent, which has its engines write checkpoints.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command.spawn()?;
        let no_pipe = || std::io::Error::other("the system gives no pipe");
        let stdout = child.stdout.take().ok_or_else(no_pipe)?;
        let stdin = Some(child.stdin.take().ok_or_else(no_pipe)?);
        Ok(Self { child, stdin, lines: Lines::new(stdout), unsent: Cursor::default() })
    }

    fn has_unsent(&self) -> bool {
        self.stdin.is_some() && self.unsent.position() < self.unsent.get_ref().len() as u64
    }

    fn tell(&mut self, command: &Command) {
        if !self.has_unsent() {
            self.unsent = Cursor::default();
        }
        match lines::encode(command) {
            Ok(line) => self.unsent.get_mut().extend(line),
            Err(error) => tracing::error!(%error, "a command cannot be written"),
        }
    }

    /// Sends it some of what is unsent, or hears a line of it, or that there is no more. Nothing is lost when this is
    /// dropped half-way.
    async fn talk(&mut self) -> Talk {
        let unsent = self.has_unsent();
        let Self { stdin, lines, unsent: buffer, .. } = self;
        let send = async {
            match stdin {
                Some(stdin) => stdin.write_buf(buffer).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            sent = send, if unsent => {
                if sent.is_err() {
                    // It is about to end; what it still has to say is heard first.
                    *stdin = None;
                }
                Talk::Sent
            }
            line = lines.next() => Talk::Heard(line),
        }
    }

    /// Tells it to end, waits a little, and kills it.
    async fn end(mut self) {
        self.tell(&Command::Shutdown);
        let Self { mut child, stdin, mut lines, mut unsent } = self;
        let tell = async move {
            if let Some(mut stdin) = stdin {
                let _ = stdin.write_all_buf(&mut unsent).await;
            }
        };
        // What it still says is heard by nobody, but a full pipe would keep it from ending.
        let listen = async move { while let Ok(Some(_)) = lines.next().await {} };
        let ended = async {
            tokio::join!(tell, listen);
            child.wait().await
        };
        if tokio::time::timeout(GRACE, ended).await.is_err() {
            let _ = child.kill().await;
        }
    }
}

enum Talk {
    Sent,
    Heard(std::io::Result<Option<Vec<u8>>>),
}

struct Supervisor {
    launch: Launch,
    levels: watch::Receiver<Option<String>>,
    events: mpsc::Sender<Event>,
    /// Trials for the next child.
    waiting: VecDeque<Admission>,
    /// Trials that the child has.
    held: BTreeSet<Assignment>,
    /// Deaths since a trial came to its end.
    deaths: u32,
    /// When the next child may start.
    not_before: Instant,
}

impl Supervisor {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut running: Option<Running> = None;
        loop {
            let (busy, starts) = (running.is_some(), !self.waiting.is_empty());
            let unsent = running.as_ref().is_some_and(Running::has_unsent);
            tokio::select! {
                // A child that takes nothing gets no more until it does: the channel fills, and the device waits.
                command = commands.recv(), if !unsent => match command {
                    None | Some(Command::Shutdown) => break,
                    Some(Command::Admit(admission)) => self.admit(&mut running, *admission).await,
                    Some(Command::Stop(assignment, how)) => self.stop(&mut running, &assignment, how).await,
                    // It is told by whoever changes it.
                    Some(Command::Log(_)) => {}
                    Some(keep @ Command::Keep(_)) => if let Some(running) = &mut running {
                        running.tell(&keep);
                    },
                },
                Ok(()) = self.levels.changed(), if busy && !unsent => {
                    if let Some(running) = &mut running {
                        self.tell_levels(running);
                    }
                }
                talk = talk(&mut running), if busy => match talk {
                    Talk::Sent => {}
                    Talk::Heard(Ok(None)) => self.died(running.take(), None).await,
                    Talk::Heard(line) => match line.and_then(|line| Ok(lines::decode(&line.unwrap_or_default())?)) {
                        Ok(event) => self.said(event).await,
                        Err(error) => self.died(running.take(), Some(error.to_string())).await,
                    },
                },
                () = tokio::time::sleep_until(self.not_before), if !busy && starts => {
                    running = self.start_child().await;
                }
            }
        }
        if let Some(running) = running {
            running.end().await;
        }
    }

    async fn admit(&mut self, running: &mut Option<Running>, admission: Admission) {
        if self.deaths >= MAX_DEATHS {
            let Launch { device, .. } = &self.launch;
            let why = format!("the engine process of {device} ended {MAX_DEATHS} times in a row");
            let what = format!("{why} and is not started again; see its log, then restart the agent");
            return self.fail(admission.assignment, what).await;
        }
        match running {
            Some(running) => {
                self.held.insert(admission.assignment.clone());
                running.tell(&Command::Admit(Box::new(admission)));
            }
            None => self.waiting.push_back(admission),
        }
    }

    async fn stop(&mut self, running: &mut Option<Running>, assignment: &Assignment, how: How) {
        if how == How::Drop {
            self.held.remove(assignment);
        }
        if let Some(i) = self.waiting.iter().position(|a| a.assignment == *assignment)
            && let Some(admission) = self.waiting.remove(i)
        {
            let mut said = None;
            end_waiting(admission, how, &mut |event| said = Some(event));
            if let Some(event) = said {
                self.emit(event).await;
            }
        } else if let Some(running) = running {
            running.tell(&Command::Stop(assignment.clone(), how));
        }
    }

    /// Has a child log what this process does, if that is not what both were started with.
    fn tell_levels(&mut self, running: &mut Running) {
        if let Some(directives) = &*self.levels.borrow_and_update() {
            running.tell(&Command::Log(directives.clone()));
        }
    }

    async fn start_child(&mut self) -> Option<Running> {
        match Running::start(&self.launch) {
            Ok(mut running) => {
                tracing::info!(
                    device = self.launch.device,
                    pid = running.child.id(),
                    "an engine process started"
                );
                self.tell_levels(&mut running);
                for admission in std::mem::take(&mut self.waiting) {
                    self.held.insert(admission.assignment.clone());
                    running.tell(&Command::Admit(Box::new(admission)));
                }
                Some(running)
            }
            Err(error) => {
                self.held.extend(self.waiting.drain(..).map(|admission| admission.assignment));
                let program = self.launch.program.display();
                self.lost(&format!("cannot be started: {program}: {error}")).await;
                None
            }
        }
    }

    async fn said(&mut self, event: Event) {
        if let Event::Trial(assignment, happening) = &event
            && happening.is_last()
        {
            self.held.remove(assignment);
            if matches!(happening, Happening::Finished { .. }) {
                self.deaths = 0;
            }
        }
        self.emit(event).await;
    }

    /// What follows on a child's end, or on its saying what is no event.
    async fn died(&mut self, running: Option<Running>, garbage: Option<String>) {
        let Some(Running { mut child, stdin, lines, .. }) = running else { return };
        if garbage.is_some() {
            let _ = child.start_kill();
        }
        drop((stdin, lines));
        // Its output is closed: it is ending, or it is killed.
        let status = match tokio::time::timeout(GRACE, child.wait()).await {
            Ok(status) => status,
            Err(_) => child.kill().await.and(child.wait().await),
        };
        let ended = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        let why =
            garbage.map_or(format!("ended ({ended})"), |garbage| format!("said what is no event: {garbage}"));
        self.lost(&why).await;
    }

    async fn lost(&mut self, why: &str) {
        self.deaths += 1;
        let pause = pause(self.launch.first_pause, self.deaths);
        self.not_before = Instant::now() + pause;
        let device = self.launch.device.clone();
        tracing::error!(
            device,
            why,
            trials = self.held.len(),
            "an engine process is gone; its trials go back"
        );
        self.emit(Event::BaseResident(None)).await;
        for assignment in std::mem::take(&mut self.held) {
            self.fail(assignment, format!("the engine process of {device} {why}")).await;
        }
    }

    async fn fail(&self, assignment: Assignment, message: String) {
        let failure = Failure { class: FailureClass::Infrastructure, message };
        self.emit(Event::Trial(assignment, Happening::Failed(failure))).await;
    }

    async fn emit(&self, event: Event) {
        // The agent's side is gone only when it shuts down; `run` sees that next.
        let _ = self.events.send(event).await;
    }
}

async fn talk(running: &mut Option<Running>) -> Talk {
    match running {
        Some(running) => running.talk().await,
        None => std::future::pending().await,
    }
}

/// The pause after so many deaths in a row.
fn pause(first: Duration, deaths: u32) -> Duration {
    first.saturating_mul(2u32.saturating_pow(deaths.saturating_sub(1))).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests;
