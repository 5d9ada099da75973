//! `TrialService`.

use super::{Answers, Services, page, sweep_id, trial_id};
use crate::actors::sweep::{Change, Operation, Selection};
use crate::error::CoordinatorError;
use crate::store::LogEntry;
use domain::TrialId;
use domain::trial::TrialState;
use prost::Message;
use proto::v1::trial_service_server::TrialService;
use proto::{convert, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Points of a message.
const POINTS: usize = 1000;

/// Entries of a log that may wait for a slow reader.
const LOG_BUFFER: usize = 16;

#[tonic::async_trait]
impl TrialService for Services {
    async fn get_trial(
        &self,
        request: Request<v1::GetTrialRequest>,
    ) -> Result<Response<v1::GetTrialResponse>, Status> {
        let id = trial_id(request.into_inner().trial_id)?;
        let record = self.desk.directory.trial(&id).await?;
        Ok(Response::new(v1::GetTrialResponse { trial: Some(record.trial.into()) }))
    }

    async fn list_trials(
        &self,
        request: Request<v1::ListTrialsRequest>,
    ) -> Result<Response<v1::ListTrialsResponse>, Status> {
        let request = request.into_inner();
        let states = request.states().map(TrialState::try_from).collect::<Result<Vec<_>, _>>()?;
        let listing = format!("trials {} {:?}", request.sweep_id, request.states);
        let after = page::position(&listing, &request.page_token)?;
        let after = after.and_then(|number| number.parse().ok()).unwrap_or(0);
        let size = page::size(request.page_size);
        // One more than the page has, to know whether there is a next one.
        let selection = Selection { after, limit: size + 1, states };
        let found = self.desk.directory.trials(&sweep_id(request.sweep_id)?, selection).await?;
        let (all, mut room) = (found.len(), page::Room::new());
        let trials = found.into_iter().take(size).map(|record| match request.without_config {
            true => convert::trial_without_config(record.trial),
            false => record.trial.into(),
        });
        let trials: Vec<v1::Trial> = trials.take_while(|trial| room.take(trial.encoded_len())).collect();
        let last = trials.last().filter(|_| trials.len() < all);
        let next_page_token =
            last.map(|trial| page::token(&listing, &trial.number.to_string())).unwrap_or_default();
        Ok(Response::new(v1::ListTrialsResponse { trials, next_page_token }))
    }

    type GetTrialMetricsStream = Answers<v1::GetTrialMetricsResponse>;

    async fn get_trial_metrics(
        &self,
        request: Request<v1::GetTrialMetricsRequest>,
    ) -> Result<Response<Self::GetTrialMetricsStream>, Status> {
        let request = request.into_inner();
        let id = trial_id(request.trial_id)?;
        let trial = self.desk.directory.trial(&id).await?.trial;
        let curve =
            self.desk.history.curve(&id, &trial.attempts).await.map_err(crate::CoordinatorError::from)?;
        // They stand in the order of their steps.
        let before = curve.partition_point(|point| point.step < request.first_step);
        let pieces: Vec<_> = curve[before..]
            .chunks(POINTS)
            .map(|points| {
                let points = points.iter().cloned().map(Into::into).collect();
                Ok(v1::GetTrialMetricsResponse { points })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }

    type GetTrialLogStream = Answers<v1::GetTrialLogResponse>;

    async fn get_trial_log(
        &self,
        request: Request<v1::GetTrialLogRequest>,
    ) -> Result<Response<Self::GetTrialLogStream>, Status> {
        let request = request.into_inner();
        let id = trial_id(request.trial_id)?;
        self.desk.directory.trial(&id).await?;
        let (entries, stream) = mpsc::channel(LOG_BUFFER);
        let services = self.clone();
        self.scope.spawn("trial log", async move {
            let over = tokio::select! {
                () = services.scope.cancelled() => Err(Status::unavailable("shutting down")),
                () = entries.closed() => return,
                over = services.log(&id, request.follow, &entries) => over.map_err(Status::from),
            };
            if let Err(status) = over {
                // A reader that is gone does not ask why.
                let _ = entries.try_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn stop_trial(
        &self,
        request: Request<v1::StopTrialRequest>,
    ) -> Result<Response<v1::StopTrialResponse>, Status> {
        self.writable().await?;
        let id = trial_id(request.into_inner().trial_id)?;
        let record = self.desk.directory.stop_trial(&id).await?;
        Ok(Response::new(v1::StopTrialResponse { trial: Some(record.trial.into()) }))
    }

    async fn retry_trial(
        &self,
        request: Request<v1::RetryTrialRequest>,
    ) -> Result<Response<v1::RetryTrialResponse>, Status> {
        self.writable().await?;
        let id = trial_id(request.into_inner().trial_id)?;
        let unknown = || CoordinatorError::not_found("trial", &id);
        let (sweep, number) = id.sweep().zip(id.number()).ok_or_else(unknown)?;
        // A trial of a sweep that is not there is no trial.
        self.desk.directory.trial(&id).await?;
        self.desk.directory.operate(&sweep, Operation::Retry(number)).await?;
        let record = self.desk.directory.trial(&id).await?;
        Ok(Response::new(v1::RetryTrialResponse { trial: Some(record.trial.into()) }))
    }
}

type Entries = mpsc::Sender<Result<v1::GetTrialLogResponse, Status>>;

impl Services {
    /// Sends a trial's log, and what is added to it until the trial is over if it is to be followed.
    async fn log(&self, id: &TrialId, follow: bool, entries: &Entries) -> crate::error::Result<()> {
        let mut next = 0;
        let unknown = || CoordinatorError::not_found("trial", id);
        loop {
            // Before the log is read: what is added later shows as a change.
            let changes = self.desk.directory.subscribe(&id.sweep().ok_or_else(unknown)?).await;
            // What is durable alone: of a trial that is over there, the last entry is there too.
            let record = self.desk.directory.store().trial(id).await?.ok_or_else(unknown)?;
            for entry in self.desk.directory.store().log(id, next).await? {
                next += 1;
                if entries.send(Ok(wire(entry))).await.is_err() {
                    return Ok(());
                }
            }
            let Some(mut changes) = changes.filter(|_| follow && !record.trial.state.is_terminal()) else {
                return Ok(());
            };
            // Until the trial changes, or changes were missed.
            loop {
                match changes.recv().await {
                    Ok(Change::Trial(trial, _)) if trial.id == *id => break,
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

fn wire(entry: LogEntry) -> v1::GetTrialLogResponse {
    v1::GetTrialLogResponse {
        time: Some(convert::timestamp(entry.time)),
        event: entry.event,
        attempt: entry.attempt.0,
        step: entry.step,
        message: entry.message,
    }
}
