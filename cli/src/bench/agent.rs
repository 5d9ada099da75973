//! An agent that trains nothing. It speaks the agents' protocol over real gRPC, says at once all that a trial's
//! training would have said over time, or says it at a pace, and counts what is acknowledged.

use crate::Failure;
use crate::client::Channel;
use domain::{Clock, SystemClock};
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval};
use tokio_stream::wrappers::ReceiverStream;
use v1::session_request::Message as Request;
use v1::session_response::Message as Response;
use v1::trial_event::Event;

/// The name of its one device: trials that ask for this accelerator go to no other.
pub(super) const ACCELERATOR: &str = "SIMULATED";

/// Messages of a trial that may be sent before the first of them is acknowledged, as a real agent's.
const WINDOW: u64 = 64;

/// Messages that may wait for the network.
const OUTGOING: usize = 1024;

/// What a simulated agent does.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Its id.
    pub(super) id: String,
    /// Trials that it holds at a time.
    pub(super) pack: u32,
    /// Reports of one metric point each that a trial makes.
    pub(super) reports: u64,
    /// Reports that were acknowledged, over all agents.
    pub(super) acknowledged: Arc<AtomicU64>,
    /// How it takes its time; `None`: it says all at once.
    pub(super) pace: Option<Pace>,
}

/// One report of each trial at a time.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// The time between two.
    pub(super) every: Duration,
    /// The time until the first.
    pub(super) first: Duration,
    /// What measures.
    pub(super) clock: SystemClock,
    /// Seconds from a report to its acknowledgement, of all agents.
    pub(super) waits: Arc<Mutex<Vec<f32>>>,
}

impl Pace {
    fn waited(&self, since: Duration) {
        let seconds = self.clock.monotonic().saturating_sub(since).as_secs_f32();
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).push(seconds);
    }
}

/// A trial that it holds.
struct Held {
    attempt: u32,
    /// The last number sent, and the last acknowledged. Number 1 says that it trains, the last that it ended.
    sent: u64,
    acknowledged: u64,
    /// The last number that its pace allows.
    allowed: u64,
    /// Reports at a pace that are not acknowledged, and when each was sent.
    waiting: VecDeque<(u64, Duration)>,
}

/// Serves until the coordinator closes the stream.
///
/// # Errors
/// The coordinator refuses the stream.
pub(super) async fn serve(plan: Plan, channel: Channel) -> Result<(), Failure> {
    let (outgoing, requests) = mpsc::channel(OUTGOING);
    let hello = Request::Hello(v1::Hello { agent: Some(agent(&plan)), holdings: Vec::new() });
    let closed = || Failure::failed("the coordinator closed an agent's stream");
    let gone = |_| closed();
    outgoing.send(request(hello)).await.map_err(gone)?;
    let mut incoming =
        AgentServiceClient::new(channel).session(ReceiverStream::new(requests)).await?.into_inner();
    let mut held: HashMap<String, Held> = HashMap::new();
    let mut heartbeat = tokio::time::interval(Duration::from_secs(2));
    let ticks = |pace: &Pace| tokio::time::interval_at(Instant::now() + pace.first, pace.every);
    let mut ticks = plan.pace.as_ref().map(ticks);
    loop {
        let message = tokio::select! {
            message = incoming.message() => message?,
            _ = heartbeat.tick() => {
                outgoing.send(beat(&held)).await.map_err(gone)?;
                continue;
            }
            () = next(&mut ticks) => {
                for (trial_id, trial) in &mut held {
                    trial.allowed += 1;
                    speak(&plan, trial_id, trial, &outgoing).await.map_err(gone)?;
                }
                continue;
            }
        };
        match message.ok_or_else(closed)?.message {
            Some(Response::Assign(assign)) => {
                let allowed = if plan.pace.is_some() { 1 } else { u64::MAX };
                let waiting = VecDeque::new();
                let mut trial = Held { attempt: assign.attempt, sent: 0, acknowledged: 0, allowed, waiting };
                speak(&plan, &assign.trial_id, &mut trial, &outgoing).await.map_err(gone)?;
                held.insert(assign.trial_id, trial);
            }
            Some(Response::Acknowledge(ack)) => {
                let Some(trial) = held.get_mut(&ack.trial_id).filter(|t| t.attempt == ack.attempt) else {
                    continue;
                };
                let reports = |sequence: u64| sequence.saturating_sub(1).min(plan.reports);
                let newly = reports(ack.sequence) - reports(trial.acknowledged);
                plan.acknowledged.fetch_add(newly, Ordering::Relaxed);
                trial.acknowledged = ack.sequence;
                while let (Some(pace), Some((sequence, at))) = (&plan.pace, trial.waiting.front())
                    && *sequence <= ack.sequence
                {
                    pace.waited(*at);
                    trial.waiting.pop_front();
                }
                if trial.acknowledged == plan.reports + 2 {
                    held.remove(&ack.trial_id);
                } else {
                    speak(&plan, &ack.trial_id, trial, &outgoing).await.map_err(gone)?;
                }
            }
            Some(Response::Stop(stop)) => {
                held.remove(&stop.trial_id);
            }
            Some(Response::Welcome(_) | Response::Prefetch(_)) | None => {}
        }
    }
}

/// The next moment to report; never without a pace.
async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => drop(ticks.tick().await),
        None => std::future::pending().await,
    }
}

/// Sends what window and pace allow.
async fn speak(
    plan: &Plan,
    trial_id: &str,
    trial: &mut Held,
    outgoing: &mpsc::Sender<v1::SessionRequest>,
) -> Result<(), mpsc::error::SendError<v1::SessionRequest>> {
    let last = plan.reports + 2;
    while trial.sent < last.min(trial.allowed) && trial.sent < trial.acknowledged + WINDOW {
        trial.sent += 1;
        let (sequence, attempt, trial_id) = (trial.sent, trial.attempt, trial_id.to_string());
        let event = |event| {
            Request::Event(v1::TrialEvent {
                trial_id: trial_id.clone(),
                attempt,
                sequence,
                event: Some(event),
            })
        };
        let message = if sequence == 1 {
            event(Event::Started(v1::Started { total_steps: plan.reports, start_step: 0, digests: None }))
        } else if sequence == last {
            let summary = Some(v1::TrialSummary { steps: plan.reports, ..v1::TrialSummary::default() });
            let ending = v1::Ending::Completed.into();
            event(Event::Finished(v1::Finished { ending, summary, message: String::new() }))
        } else {
            let point = point(sequence - 1);
            trial.waiting.extend(plan.pace.as_ref().map(|pace| (sequence, pace.clock.monotonic())));
            Request::Metrics(v1::MetricBatch { trial_id, attempt, sequence, points: vec![point] })
        };
        outgoing.send(request(message)).await?;
    }
    Ok(())
}

fn point(step: u64) -> v1::MetricPoint {
    let value = |name: &str, value| v1::MetricValue { name: name.into(), value };
    let loss = 1.0 + 1.0 / step as f64;
    v1::MetricPoint {
        step,
        time: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
        values: vec![value(domain::metric::LOSS, loss), value(domain::metric::EVAL_LOSS, loss)],
    }
}

fn agent(plan: &Plan) -> v1::Agent {
    let device = v1::Device {
        id: "simulated".into(),
        accelerator: ACCELERATOR.into(),
        memory_bytes: 1 << 40,
        max_pack_size: plan.pack,
        ..v1::Device::default()
    };
    v1::Agent {
        id: plan.id.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        hostname: "simulated".into(),
        devices: vec![device],
        ..v1::Agent::default()
    }
}

fn beat(held: &HashMap<String, Held>) -> v1::SessionRequest {
    let holding = |(trial_id, trial): (&String, &Held)| v1::Holding {
        trial_id: trial_id.clone(),
        attempt: trial.attempt,
        step: trial.acknowledged.saturating_sub(1),
        held_seconds: None,
    };
    let holdings = held.iter().map(holding).collect();
    request(Request::Heartbeat(v1::Heartbeat { holdings, ..v1::Heartbeat::default() }))
}

fn request(message: Request) -> v1::SessionRequest {
    v1::SessionRequest { message: Some(message) }
}
