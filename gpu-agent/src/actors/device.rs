//! A device: its engine and the trials it holds. It turns what happens to a trial into words for the
//! coordinator, in this order: metrics are spooled as they come; a checkpoint is uploaded once everything
//! spooled before it is acknowledged; a trial's last word is spooled once its last checkpoint is uploaded.
//!
//! While the spool cannot be written (a full disk), nothing more is heard of the engine, so that it comes to a
//! halt; what it had said is said as soon as there is room.
//!
//! What is fetched before a trial begins, and what is uploaded of it, is in `transfers`.

mod transfers;

use super::traced::Traced;
use crate::beginning::Stopwatch;
use crate::cache::quantised::Room;
use crate::cache::{Cache, Pinned};
use crate::engine::host::Host;
use crate::engine::{self, Admission, Checkpoint, Ending, Event, Happening, How};
use crate::home::Home;
use crate::spool::Spool;
use crate::transfer::Transfers;
use crate::wire::{self, Saying};
use crate::{Assignment, SHUTDOWN_GRACE};
use actor::{Mailbox, Scope, mailbox};
use domain::DeviceId;
use domain::metric::MetricPoint;
use domain::sweep::Evaluations;
use domain::trial::{Digests, Failure, Note, Severity, TrialConfig, TrialSummary};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use prost::Message;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use telemetry::metrics;
use telemetry::trace::{Place, at_place};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use transfers::Transferred;

/// Events that are looked at together: neighbouring points of a trial become one message.
const EVENTS: usize = 64;
/// Commands that may wait.
const MAILBOX: usize = 64;
/// The pause between two tries to write to the spool.
const SPOOL_PAUSE: Duration = Duration::from_secs(1);
/// Why an agent that ends gives trials back.
pub(super) const SHUTS_DOWN: &str = "the agent shuts down";

/// A trial to train here.
#[derive(Debug, Clone, PartialEq)]
pub struct Assign {
    /// The trial and its attempt.
    pub assignment: Assignment,
    /// Every parameter with the value in force.
    pub config: TrialConfig,
    /// What its sweep asks of it once it is trained.
    pub evaluations: Option<Evaluations>,
    /// The step of the checkpoint to go on from; `None` starts anew.
    pub resume_step: Option<u64>,
    /// What earlier attempts were trained on.
    pub digests: Option<Digests>,
    /// What the footprint model predicts; 0 if it predicts nothing.
    pub predicted_peak_memory_bytes: u64,
    /// Where in a trace it belongs what is told of it.
    pub belongs: Option<Place>,
}

/// What a device is told.
#[derive(Debug)]
pub enum Command {
    /// Train this.
    Assign(Box<Assign>),
    /// End this. Trials that it does not hold are ignored.
    Stop(Assignment, How),
}

/// How a device stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// What it holds, each one's finished steps, and since when it is held.
    pub holdings: Vec<(Assignment, u64, Instant)>,
    /// The base in its memory.
    pub resident_base: Option<String>,
}

/// A device's handle.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its name.
    pub id: DeviceId,
    /// Takes its commands.
    pub mailbox: Mailbox<Command>,
    /// Shows how it stands; closed when the device has ended.
    pub status: watch::Receiver<Status>,
}

impl Device {
    /// Starts a device's actor. When the scope is cancelled, it gives its trials back, and ends when that is
    /// done or [`SHUTDOWN_GRACE`] is over.
    pub fn start(
        id: DeviceId,
        host: Host,
        transfers: Transfers,
        (spool, cache, home): (Spool, Cache, Home),
        stopwatch: Stopwatch,
        scope: &Scope,
    ) -> Self {
        let (sender, inbox) = mailbox(MAILBOX);
        let (status, seen) = watch::channel(Status::default());
        let actor = Actor {
            id: id.to_string(),
            outgoing: VecDeque::new(),
            arrived: VecDeque::new(),
            unsaid: VecDeque::new(),
            retry_at: None,
            held: BTreeMap::new(),
            resident_base: None,
            room: None,
            transfers_under_way: FuturesUnordered::new(),
            status,
            spool,
            cache,
            transfers,
            home,
            stopwatch,
        };
        scope.spawn("device", actor.run(inbox, host, scope.clone()));
        Self { id, mailbox: sender, status: seen }
    }
}

/// Uploaded data that lies on this machine, by the names that a trial has for it.
type Data = BTreeMap<String, Pinned>;

/// A trial that the device holds.
struct Held {
    step: u64,
    since: Instant,
    predicted_peak_memory_bytes: u64,
    /// What it reads, kept from being removed.
    data: Data,
    /// Whether the engine has it; before, its data or its checkpoint is being downloaded.
    admitted: bool,
    /// Whether an upload is under way.
    uploading: bool,
    /// The newest checkpoint that waits for its upload, and the number of the last message before it.
    newest: Option<(Checkpoint, u64)>,
    /// Transfers that failed since the last that did not.
    failures: u32,
    /// Notes that were said.
    notes: u32,
    /// Why it is given back, if it is.
    reason: &'static str,
    /// Its last word, said once nothing is left to upload.
    last: Option<Saying>,
    /// What is told of it.
    traced: Traced,
}

struct Actor {
    /// The device's name.
    id: String,
    outgoing: VecDeque<engine::Command>,
    /// What the engine said and was not looked at yet.
    arrived: VecDeque<Event>,
    /// What the spool did not take, in order, and when it is asked again.
    unsaid: VecDeque<(Assignment, Saying)>,
    retry_at: Option<Instant>,
    held: BTreeMap<Assignment, Held>,
    resident_base: Option<String>,
    /// Where the engine writes that base, if it was quantised.
    room: Option<Room>,
    transfers_under_way: FuturesUnordered<BoxFuture<'static, Transferred>>,
    status: watch::Sender<Status>,
    spool: Spool,
    cache: Cache,
    transfers: Transfers,
    home: Home,
    stopwatch: Stopwatch,
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, mut host: Host, scope: Scope) {
        let mut batch = Vec::new();
        let mut open = true;
        let mut deadline = None;
        while deadline.is_none() || !self.held.is_empty() {
            tokio::select! {
                () = scope.cancelled(), if deadline.is_none() => {
                    deadline = Some(Instant::now() + SHUTDOWN_GRACE);
                    self.release_all();
                }
                () = until(deadline) => break,
                command = inbox.recv(), if open => match command {
                    Some(Command::Assign(assign)) => self.assign(assign, deadline.is_some()),
                    Some(Command::Stop(assignment, how)) => self.stop(&assignment, how, "the coordinator asked for it"),
                    None => open = false,
                },
                count = host.events.recv_many(&mut batch, EVENTS), if self.unsaid.is_empty() => {
                    if count == 0 {
                        tracing::error!("the engine's thread has ended");
                        break;
                    }
                    self.arrived.extend(batch.drain(..));
                    self.events();
                }
                () = until(self.retry_at), if !self.unsaid.is_empty() => {
                    self.say_again();
                    self.events();
                }
                permit = host.commands.reserve(), if !self.outgoing.is_empty() => {
                    if let (Ok(permit), Some(command)) = (permit, self.outgoing.pop_front()) {
                        permit.send(command);
                    }
                }
                Some(transferred) = self.transfers_under_way.next(), if !self.transfers_under_way.is_empty() => {
                    self.transferred(transferred);
                }
            }
            self.publish();
        }
        // It has waited for them long enough, or there is no engine any more.
        self.held.values_mut().for_each(|held| held.traced.over(Some("its agent ended first")));
        // Dropping the host ends its thread.
    }

    fn publish(&self) {
        let holding = |(assignment, held): (&Assignment, &Held)| (assignment.clone(), held.step, held.since);
        let holdings = self.held.iter().map(holding).collect();
        let status = Status { holdings, resident_base: self.resident_base.clone() };
        self.status.send_if_modified(|old| std::mem::replace(old, status.clone()) != status);
    }

    fn assign(&mut self, assign: Box<Assign>, ending: bool) {
        let assignment = assign.assignment.clone();
        let known = self.held.contains_key(&assignment) || self.spool.assignments().contains(&assignment);
        if known {
            return; // The coordinator repeats what it is not sure that we heard.
        }
        let older: Vec<_> = self.held.keys().filter(|h| h.trial == assignment.trial).cloned().collect();
        if older.iter().any(|h| h.attempt > assignment.attempt) {
            return;
        }
        for old in older {
            self.stop(&old, How::Drop, "");
        }
        at_place(assign.belongs, || tracing::info!(trial = %assignment, "assigned"));
        self.stopwatch.assigned();
        let held = Held {
            step: assign.resume_step.unwrap_or(0),
            since: Instant::now(),
            predicted_peak_memory_bytes: assign.predicted_peak_memory_bytes,
            data: Data::new(),
            admitted: false,
            uploading: false,
            newest: None,
            failures: 0,
            notes: 0,
            reason: "",
            last: None,
            traced: Traced::new(assign.belongs),
        };
        self.held.insert(assignment.clone(), held);
        if ending {
            self.stop(&assignment, How::Release, SHUTS_DOWN);
        } else {
            self.fetch(assign, 0);
        }
    }

    fn admit(&mut self, assign: Assign, checkpoint: Option<Checkpoint>) {
        let mut places = BTreeMap::new();
        if let Some(held) = self.held.get_mut(&assign.assignment) {
            held.admitted = true;
            held.failures = 0;
            places.extend(held.data.iter().map(|(name, pinned)| (name.clone(), pinned.path.clone())));
        }
        let admission = Admission {
            places,
            cache: Some(self.cache.root().into()),
            work_dir: self.home.work_dir(&assign.assignment),
            belongs: assign.belongs.map(|place| place.to_string()),
            assignment: assign.assignment,
            config: assign.config,
            evaluations: assign.evaluations,
            resume: checkpoint.map(|c| c.dirs),
            digests: assign.digests,
        };
        self.outgoing.push_back(engine::Command::Admit(Box::new(admission)));
    }

    fn release_all(&mut self) {
        let held: Vec<_> = self.held.keys().cloned().collect();
        for assignment in held {
            self.stop(&assignment, How::Release, SHUTS_DOWN);
        }
    }

    fn stop(&mut self, assignment: &Assignment, how: How, reason: &'static str) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        if held.admitted {
            held.reason = reason;
            self.outgoing.push_back(engine::Command::Stop(assignment.clone(), how));
        } else if how != How::Drop {
            held.last = Some(before_it_began(how, held.step, reason));
            self.conclude(assignment);
        }
        if how == How::Drop {
            self.forget(assignment);
        }
    }

    /// Drops an assignment that is not current, with all that is kept of it.
    fn forget(&mut self, assignment: &Assignment) {
        let held = self.held.remove(assignment);
        at_place(held.as_ref().and_then(|held| held.traced.belongs()), || {
            tracing::info!(trial = %assignment, "dropped: the assignment is not current");
        });
        if let Some(mut held) = held {
            held.traced.over(Some("the assignment is not current"));
        }
        self.unsaid.retain(|(other, _)| other != assignment);
        self.spool.forget(assignment);
        self.home.remove_work_dir(assignment);
    }

    /// Looks at what the engine said, as long as the spool takes what is to be said of it.
    fn events(&mut self) {
        while self.unsaid.is_empty()
            && let Some(event) = self.arrived.pop_front()
        {
            match event {
                Event::Trial(assignment, Happening::Points(mut points)) => {
                    points.append(&mut more_points(&mut self.arrived, &assignment));
                    self.say_points(&assignment, points);
                }
                Event::Trial(assignment, happening) => self.happened(&assignment, happening),
                Event::Phase(assignment, phase) => {
                    if let Some(held) = self.held.get_mut(&assignment) {
                        held.traced.phase(&phase);
                    }
                }
                Event::Steps(seconds) => {
                    self.stopwatch.stepped();
                    for seconds in seconds {
                        metrics::STEP_DURATION.record(seconds, &[("device", self.id.as_str())]);
                    }
                }
                Event::Quantised { key, bytes: None } => self.cache.used(key),
                Event::Quantised { key, bytes: Some(bytes) } => {
                    self.room = self.cache.room(key, bytes);
                    self.outgoing.extend(self.room.iter().map(|room| engine::Command::Keep(room.draft())));
                }
                Event::BaseResident(base) => {
                    if base.is_none() {
                        // The engine that wrote it has ended, or is about to load another.
                        self.room = None;
                    }
                    self.resident_base = base;
                }
            }
        }
    }

    fn say_points(&mut self, assignment: &Assignment, points: Vec<MetricPoint>) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        held.step = points.last().map_or(held.step, |point| point.step);
        points.iter().for_each(|point| held.traced.point(point, &self.id));
        self.say(assignment, Saying::Points(points));
    }

    fn happened(&mut self, assignment: &Assignment, happening: Happening) {
        let Some(held) = self.held.get_mut(assignment) else {
            // It was dropped, and the engine ended it before it heard of that.
            if happening.is_last() {
                self.home.remove_work_dir(assignment);
            }
            return;
        };
        let reason = held.reason;
        match happening {
            Happening::Checkpoint(checkpoint) => {
                // It trained on while that was written.
                held.step = held.step.max(checkpoint.step);
                let before = self.spool.last_sequence(assignment);
                if let Some((old, _)) = held.newest.replace((checkpoint, before)) {
                    old.remove();
                }
                self.upload(assignment);
            }
            Happening::Note(severity, message) => self.note(assignment, severity, &message),
            happening => {
                let last = happening.is_last();
                match &happening {
                    Happening::Started { .. } => held.traced.started(),
                    Happening::Failed(failure) => held.traced.over(Some(&failure.message)),
                    _ if last => held.traced.over(None),
                    _ => {}
                }
                let Some(mut saying) = wire::saying(happening, reason) else { return };
                if !last {
                    return self.say(assignment, saying);
                }
                if let Saying::Finished { summary, .. } = &mut saying {
                    // The engine has read the data; the coordinator's prediction takes every row for full.
                    let placed_by = Some(held.predicted_peak_memory_bytes).filter(|bytes| *bytes > 0);
                    summary.predicted_peak_memory_bytes = summary.predicted_peak_memory_bytes.or(placed_by);
                }
                held.last = Some(saying);
                self.conclude(assignment);
            }
        }
    }

    /// Says a trial's last word once nothing of it is left to upload.
    fn conclude(&mut self, assignment: &Assignment) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        if held.uploading || held.newest.is_some() {
            return;
        }
        if let Some(last) = held.last.take() {
            let since = held.since;
            self.say(assignment, last);
            self.spool.let_go(assignment, since.elapsed());
            self.held.remove(assignment);
        }
    }

    /// Says something in the agent's log, and in the trial's.
    fn note(&mut self, assignment: &Assignment, severity: Severity, message: &str) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        let message = telemetry::secrets::redact(message).into_owned();
        at_place(held.traced.belongs(), || match severity {
            Severity::Info => tracing::info!(trial = %assignment, "{message}"),
            Severity::Warning => tracing::warn!(trial = %assignment, "{message}"),
            Severity::Error => tracing::error!(trial = %assignment, "{message}"),
        });
        if held.notes < Note::MOST {
            held.notes += 1;
            let note = Note { number: held.notes, severity, message };
            self.say(assignment, Saying::Noted(note));
        }
    }

    /// A transfer of a trial failed, so many times in a row by now. Its log tells of the first.
    fn failed_again(&mut self, assignment: &Assignment, failures: u32, what: &str) {
        if failures == 1 {
            return self.note(assignment, Severity::Warning, what);
        }
        let belongs = self.belongs(assignment);
        at_place(belongs, || tracing::warn!(trial = %assignment, failures, "{what}"));
    }

    /// Where in a trace it belongs what is logged of a trial.
    fn belongs(&self, assignment: &Assignment) -> Option<Place> {
        self.held.get(assignment).and_then(|held| held.traced.belongs())
    }

    fn say(&mut self, assignment: &Assignment, saying: Saying) {
        self.unsaid.push_back((assignment.clone(), saying));
        if self.unsaid.len() == 1 {
            self.say_again();
        }
    }

    /// Says what waits, up to the first that the disk refuses.
    fn say_again(&mut self) {
        while let Some((assignment, saying)) = self.unsaid.front() {
            let encode = |sequence| saying.clone().request(assignment, sequence).encode_to_vec();
            let Err(error) = self.spool.append(assignment, saying.is_last(), encode) else {
                self.unsaid.pop_front();
                continue;
            };
            let assignment = assignment.clone();
            if error.raw_os_error().is_some() {
                at_place(self.belongs(&assignment), || {
                    tracing::error!(trial = %assignment, %error, "the spool cannot be written; training waits");
                });
                self.retry_at = Some(Instant::now() + SPOOL_PAUSE);
                return;
            }
            // Not held any more, its lease ends and it goes on elsewhere from its last checkpoint.
            at_place(self.belongs(&assignment), || {
                tracing::error!(trial = %assignment, %error, "it cannot be spooled; the trial is dropped");
            });
            self.unsaid.pop_front();
            self.stop(&assignment, How::Drop, "");
        }
    }

    /// Ends a trial whose files this machine or the coordinator cannot handle.
    fn fail(&mut self, assignment: &Assignment, failure: Failure) {
        self.outgoing.push_back(engine::Command::Stop(assignment.clone(), How::Drop));
        if let Some(held) = self.held.get_mut(assignment) {
            held.traced.over(Some(&failure.message));
        }
        self.say(assignment, Saying::Failed(failure));
        self.held.remove(assignment);
    }
}

/// Takes a trial's points out of what arrived, up to the next that is more than a measurement: each message costs a write
/// to the disk and an acknowledgement.
fn more_points(arrived: &mut VecDeque<Event>, assignment: &Assignment) -> Vec<MetricPoint> {
    let (mut found, mut i) = (Vec::new(), 0);
    while let Some(event) = arrived.get_mut(i) {
        match event {
            Event::Trial(of, Happening::Points(points)) if of == assignment => {
                found.append(points);
                arrived.remove(i);
            }
            Event::Trial(_, Happening::Points(_)) | Event::Phase(..) | Event::Steps(_) => i += 1,
            Event::Trial(..) | Event::Quantised { .. } | Event::BaseResident(_) => break,
        }
    }
    found
}

/// The last word of a trial that is ended while its data or its checkpoint is still being downloaded.
fn before_it_began(how: How, step: u64, reason: &str) -> Saying {
    match how {
        How::Stop => Saying::Finished {
            ending: Ending::Stopped,
            summary: Box::new(TrialSummary { steps: step, ..TrialSummary::default() }),
            message: "stopped before it went on".into(),
        },
        How::Release | How::Drop => Saying::Released { reason: reason.into() },
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Phase, Work};
    use domain::Timestamp;

    fn points(trial: &str, step: u64) -> Event {
        let point = MetricPoint { step, time: Timestamp(step), values: Vec::new() };
        Event::Trial(Assignment::new(trial, 1), Happening::Points(vec![point]))
    }

    fn measured(trial: &str, step: u64) -> [Event; 2] {
        let (start, took) = (Timestamp(step), Duration::ZERO);
        let phase = Phase { work: Work::Evaluate, start, took, step, four_bits: None };
        [Event::Steps(vec![0.1]), Event::Phase(Assignment::new(trial, 1), phase)]
    }

    #[test]
    fn points_become_one_message_whatever_is_measured_between_them() {
        let released = Event::Trial(Assignment::new("a", 1), Happening::Released);
        let mut arrived: VecDeque<_> = (1..=20)
            .flat_map(|step| measured("a", step).into_iter().chain([points("a", step), points("b", step)]))
            .chain([released, points("a", 21)])
            .collect();
        let steps = |points: Vec<MetricPoint>| points.iter().map(|point| point.step).collect::<Vec<_>>();
        let wanted: Vec<_> = (1..=20).collect();
        assert_eq!(steps(more_points(&mut arrived, &Assignment::new("a", 1))), wanted);
        assert_eq!(steps(more_points(&mut arrived, &Assignment::new("b", 1))), wanted);
        // What was measured is still there, and nothing passes a trial's last word.
        assert_eq!(arrived.len(), 2 * 20 + 2);
        assert!(arrived.iter().take(40).all(|event| matches!(event, Event::Steps(_) | Event::Phase(..))));
    }
}
