//! `AgentService`: the control stream, put into domain words. Checkpoints are in `checkpoints`.

use super::{Answers, Services, checkpoints};
use crate::access::Caller;
use crate::actors::agent_session;
use crate::actors::message::{
    Assignment, Ending, FromAgent, Numbered, Outbox, StopReason, ToAgent, TrialEvent,
};
use domain::data::Reference;
use domain::fleet::{Beginning, Feature};
use domain::{Attempt, DeviceId, TrialId};
use futures::StreamExt;
use proto::convert::{self, ConvertError, required};
use proto::status::RpcError;
use proto::v1;
use proto::v1::agent_service_server::AgentService;
use proto::v1::session_request::Message as Said;
use proto::v1::session_response::Message as Say;
use proto::v1::trial_event::Event;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

#[tonic::async_trait]
impl AgentService for Services {
    type SessionStream = Answers<v1::SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request);
        let said = request.into_inner();
        // A connection that breaks ends the stream like one that is closed: the agent comes back.
        let incoming = said.take_while(|message| std::future::ready(message.is_ok())).map(|message| {
            let message = message.unwrap_or_default();
            from_agent(message).map_err(|e| crate::CoordinatorError::invalid(e.field, e.problem))
        });
        let (outbox, outgoing) = Outbox::new();
        let (desk, scope) = (self.desk.clone(), self.scope.clone());
        self.scope.spawn("agent session", async move {
            agent_session::serve(desk, incoming, outbox, caller, scope).await;
        });
        let answers = ReceiverStream::new(outgoing)
            .map(|message| message.map(to_agent).map_err(|error| Status::from(RpcError::from(error))));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn upload_checkpoint(
        &self,
        request: Request<Streaming<v1::UploadCheckpointRequest>>,
    ) -> Result<Response<v1::UploadCheckpointResponse>, Status> {
        Ok(Response::new(checkpoints::upload(self, request).await?))
    }

    type DownloadCheckpointStream = Answers<v1::DownloadCheckpointResponse>;

    async fn download_checkpoint(
        &self,
        request: Request<v1::DownloadCheckpointRequest>,
    ) -> Result<Response<Self::DownloadCheckpointStream>, Status> {
        Ok(Response::new(checkpoints::download(self, request).await?))
    }
}

fn from_agent(message: v1::SessionRequest) -> Result<FromAgent, ConvertError> {
    Ok(match required("message", message.message)? {
        Said::Hello(hello) => {
            let agent = required("hello.agent", hello.agent)?;
            proto::version::check_agent(&agent.version)?;
            FromAgent::Hello(agent.try_into()?, hello.holdings.into_iter().map(Into::into).collect())
        }
        Said::Heartbeat(beat) => FromAgent::Heartbeat {
            holdings: beat.holdings.into_iter().map(Into::into).collect(),
            resident_bases: beat
                .resident_bases
                .into_iter()
                .map(|(device, base)| (DeviceId::new(device), base))
                .collect(),
            beginning: Beginning {
                first_trial_seconds: beat.first_trial_seconds.filter(is_a_time),
                first_step_seconds: beat.first_step_seconds.filter(is_a_time),
            },
        },
        Said::Metrics(batch) => FromAgent::Metrics(Numbered {
            trial: TrialId::new(batch.trial_id),
            attempt: Attempt(batch.attempt),
            sequence: batch.sequence,
            body: batch.points.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        }),
        Said::Event(event) => FromAgent::Event(Numbered {
            trial: TrialId::new(event.trial_id),
            attempt: Attempt(event.attempt),
            sequence: event.sequence,
            body: trial_event(required("event.event", event.event)?)?,
        }),
    })
}

/// Whether an agent can have taken so many seconds.
fn is_a_time(seconds: &f64) -> bool {
    seconds.is_finite() && *seconds >= 0.0
}

fn trial_event(event: Event) -> Result<TrialEvent, ConvertError> {
    Ok(match event {
        Event::Started(started) => TrialEvent::Started {
            total_steps: started.total_steps,
            start_step: started.start_step,
            digests: started.digests.map(Into::into),
        },
        Event::Finished(finished) => TrialEvent::Finished {
            ending: match finished.ending() {
                v1::Ending::Completed => Ending::Completed,
                v1::Ending::Stopped => Ending::Stopped,
                v1::Ending::Diverged => Ending::Diverged,
                v1::Ending::Unspecified => return Err(ConvertError::new("ending", "is unspecified")),
            },
            summary: Box::new(required("finished.summary", finished.summary)?.into()),
            message: finished.message,
        },
        Event::Failed(failure) => TrialEvent::Failed(failure.try_into()?),
        Event::Released(_) => TrialEvent::Released,
        Event::Noted(note) => TrialEvent::Noted(note.into()),
    })
}

fn to_agent(message: ToAgent) -> v1::SessionResponse {
    let say = match message {
        ToAgent::Welcome { heartbeat, lease, drop } => Say::Welcome(v1::Welcome {
            version: env!("CARGO_PKG_VERSION").into(),
            heartbeat_seconds: heartbeat.as_secs_f64(),
            lease_seconds: lease.as_secs_f64(),
            drop: drop.into_iter().map(Into::into).collect(),
            understands: convert::understood(Feature::OF_COORDINATORS),
        }),
        ToAgent::Assign(assignment) => Say::Assign(assign(*assignment)),
        ToAgent::Stop(trial, attempt, reason) => Say::Stop(v1::Stop {
            trial_id: trial.to_string(),
            attempt: attempt.0,
            reason: stop_reason(reason).into(),
        }),
        ToAgent::Acknowledge(trial, attempt, sequence) => {
            Say::Acknowledge(v1::Acknowledge { trial_id: trial.to_string(), attempt: attempt.0, sequence })
        }
        ToAgent::Prefetch(data) => {
            Say::Prefetch(v1::Prefetch { data: data.iter().map(Reference::to_string).collect() })
        }
    };
    v1::SessionResponse { message: Some(say) }
}

fn assign(assignment: Assignment) -> v1::Assign {
    v1::Assign {
        trial_id: assignment.trial.to_string(),
        attempt: assignment.attempt.0,
        device_id: assignment.device.to_string(),
        // An agent of the version before does not know what is new, and does without as long as that is at its default.
        config: Some(convert::to_struct(&assignment.config.differing())),
        resume_step: assignment.resume_step,
        digests: assignment.digests.map(Into::into),
        predicted_peak_memory_bytes: assignment.predicted_peak_memory_bytes,
        traceparent: assignment.belongs.map(|place| place.to_string()).unwrap_or_default(),
        evaluations: assignment.evaluations.as_ref().map(convert::document),
    }
}

fn stop_reason(reason: StopReason) -> v1::StopReason {
    match reason {
        StopReason::Search => v1::StopReason::Search,
        StopReason::Cancelled => v1::StopReason::Cancelled,
        StopReason::Release => v1::StopReason::Release,
        StopReason::Fenced => v1::StopReason::Fenced,
    }
}
