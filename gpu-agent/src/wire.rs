//! Between the agent's words and the protocol's.

use crate::actors::device::{Assign, Status};
use crate::engine::{Ending, Happening, How};
use crate::{Assignment, DeviceOptions};
use domain::fleet::{Beginning, Feature};
use domain::metric::MetricPoint;
use domain::trial::{Digests, Failure, Note, TrialSummary};
use domain::{Attempt, DeviceId, TrialId};
use proto::convert::{self, ConvertError};
use proto::v1;
use std::collections::BTreeSet;
use std::time::Duration;
use v1::session_request::Message as Request;
use v1::trial_event::Event;

/// What the agent says about a trial, kept in the spool until it is acknowledged.
#[derive(Debug, Clone, PartialEq)]
pub enum Saying {
    /// Numbers, in the order of steps.
    Points(Vec<MetricPoint>),
    /// It trains.
    Started {
        /// Steps it will make if nothing ends it.
        total_steps: u64,
        /// Finished steps it starts from.
        start_step: u64,
        /// What is trained on what.
        digests: Digests,
    },
    /// A line for its log.
    Noted(Note),
    /// It ended, with its last checkpoint uploaded.
    Finished {
        /// How.
        ending: Ending,
        /// Its numbers.
        summary: Box<TrialSummary>,
        /// More about a divergence.
        message: String,
    },
    /// It could not go on.
    Failed(Failure),
    /// It is given back, with its last checkpoint uploaded.
    Released {
        /// Why.
        reason: String,
    },
}

impl Saying {
    /// Whether nothing more is said after it.
    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Points(_) | Self::Started { .. } | Self::Noted(_))
    }

    /// The message, numbered.
    pub fn request(self, assignment: &Assignment, sequence: u64) -> v1::SessionRequest {
        let event = match self {
            Self::Points(points) => {
                return request(Request::Metrics(v1::MetricBatch {
                    trial_id: assignment.trial.to_string(),
                    attempt: assignment.attempt.0,
                    sequence,
                    points: points.into_iter().map(Into::into).collect(),
                }));
            }
            Self::Started { total_steps, start_step, digests } => {
                Event::Started(v1::Started { total_steps, start_step, digests: Some(digests.into()) })
            }
            Self::Finished { ending, summary, message } => Event::Finished(v1::Finished {
                ending: wire_ending(ending).into(),
                summary: Some((*summary).into()),
                message,
            }),
            Self::Noted(note) => Event::Noted(note.into()),
            Self::Failed(failure) => Event::Failed(failure.into()),
            Self::Released { reason } => Event::Released(v1::Released { reason }),
        };
        request(Request::Event(v1::TrialEvent {
            trial_id: assignment.trial.to_string(),
            attempt: assignment.attempt.0,
            sequence,
            event: Some(event),
        }))
    }
}

/// A message as a coordinator that understands so much is told it. A note that it would not understand becomes a batch of no
/// points, which every version takes and acknowledges under the same number: what comes after it must not wait.
pub fn understandable(message: v1::SessionRequest, by: &BTreeSet<Feature>) -> v1::SessionRequest {
    match message.message {
        Some(Request::Event(v1::TrialEvent {
            trial_id,
            attempt,
            sequence,
            event: Some(Event::Noted(_)),
        })) if !by.contains(&Feature::Notes) => {
            request(Request::Metrics(v1::MetricBatch { trial_id, attempt, sequence, points: Vec::new() }))
        }
        _ => message,
    }
}

fn request(message: Request) -> v1::SessionRequest {
    v1::SessionRequest { message: Some(message) }
}

fn wire_ending(ending: Ending) -> v1::Ending {
    match ending {
        Ending::Completed => v1::Ending::Completed,
        Ending::Stopped => v1::Ending::Stopped,
        Ending::Diverged => v1::Ending::Diverged,
    }
}

/// What is said of something that happened; a checkpoint is uploaded instead, and a note is numbered first.
pub fn saying(happening: Happening, reason: &str) -> Option<Saying> {
    Some(match happening {
        Happening::Checkpoint(_) | Happening::Note(..) => return None,
        Happening::Points(points) => Saying::Points(points),
        Happening::Started { total_steps, start_step, digests } => {
            Saying::Started { total_steps, start_step, digests }
        }
        Happening::Finished { ending, summary, message } => Saying::Finished { ending, summary, message },
        Happening::Failed(failure) => Saying::Failed(failure),
        Happening::Released => Saying::Released { reason: reason.into() },
    })
}

/// A device as the coordinator sees it.
pub fn device(options: &DeviceOptions, resident_base: Option<String>) -> v1::Device {
    v1::Device {
        id: options.id.to_string(),
        accelerator: options.accelerator.clone(),
        memory_bytes: options.memory_bytes,
        max_pack_size: options.max_pack_size,
        price_per_hour: options.price_per_hour,
        price_from: options.price_from.clone().map(Into::into),
        resident_base: resident_base.unwrap_or_default(),
        simulated_speed: options.simulated_speed(),
        compute_capability: options.compute_capability.map(String::from).unwrap_or_default(),
    }
}

/// A trial that is held, and for how long it was until now, where that is known.
pub fn holding(assignment: &Assignment, step: u64, held: Option<Duration>) -> v1::Holding {
    let (trial_id, attempt) = (assignment.trial.to_string(), assignment.attempt.0);
    v1::Holding { trial_id, attempt, step, held_seconds: held.map(|held| held.as_secs_f64()) }
}

/// The assignment that a holding names.
pub fn held(holding: v1::Holding) -> Assignment {
    Assignment::new(holding.trial_id, holding.attempt)
}

/// A sign of life.
pub fn heartbeat<'a>(
    holdings: Vec<v1::Holding>,
    beginning: Beginning,
    devices: impl Iterator<Item = (&'a DeviceId, &'a Status)>,
) -> v1::SessionRequest {
    let resident = |(id, status): (&DeviceId, &Status)| Some((id.to_string(), status.resident_base.clone()?));
    request(Request::Heartbeat(v1::Heartbeat {
        holdings,
        resident_bases: devices.filter_map(resident).collect(),
        first_trial_seconds: beginning.first_trial_seconds,
        first_step_seconds: beginning.first_step_seconds,
    }))
}

/// The first word.
pub fn hello(agent: v1::Agent, holdings: Vec<v1::Holding>) -> v1::SessionRequest {
    request(Request::Hello(v1::Hello { agent: Some(agent), holdings }))
}

/// An assignment, and the device that it is for.
pub fn assign(assign: v1::Assign) -> (Assignment, DeviceId, Result<Assign, ConvertError>) {
    let assignment = Assignment { trial: TrialId::new(assign.trial_id), attempt: Attempt(assign.attempt) };
    let evaluations = match assign.evaluations {
        None => Ok(None),
        evaluations => convert::from_document("evaluations", evaluations).map(Some),
    };
    let config = convert::from_document("config", assign.config);
    let command = config.and_then(|config| Ok((config, evaluations?))).map(|(config, evaluations)| Assign {
        assignment: assignment.clone(),
        config,
        evaluations,
        resume_step: assign.resume_step,
        digests: assign.digests.map(Into::into),
        predicted_peak_memory_bytes: assign.predicted_peak_memory_bytes,
        belongs: assign.traceparent.parse().ok(),
    });
    (assignment, DeviceId::new(assign.device_id), command)
}

/// How a trial is to end. A reason from a later version of the protocol releases it: nothing is lost.
pub fn how(reason: v1::StopReason) -> How {
    match reason {
        v1::StopReason::Search | v1::StopReason::Cancelled => How::Stop,
        v1::StopReason::Release | v1::StopReason::Unspecified => How::Release,
        v1::StopReason::Fenced => How::Drop,
    }
}
