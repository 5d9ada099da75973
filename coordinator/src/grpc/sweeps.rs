//! `SweepService`.

use super::{Answers, Services, page, suited, sweep_id};
use crate::access::Caller;
use crate::actors::directory::Submission;
use crate::actors::sweep::{Change, Operation, View};
use crate::error::{CoordinatorError, Result};
use crate::report;
use crate::store::TrialRecord;
use domain::footprint::ModelShape;
use domain::sweep::{Sweep, SweepSpec, SweepState};
use domain::trial::{ItemScores, TrialState};
use domain::{SweepId, TrialId};
use futures::StreamExt;
use prost::Message;
use proto::convert::{self, ConvertError};
use proto::limits;
use proto::v1::sweep_service_server::SweepService;
use proto::v1::watch_sweep_response::Event;
use proto::v1::{self};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Objects of such trials that are read at once.
const ITEMS_AT_ONCE: usize = 8;

/// Events that may wait for a slow watcher before it lags.
const WATCH_BUFFER: usize = 16;

#[tonic::async_trait]
impl SweepService for Services {
    async fn submit_sweep(
        &self,
        request: Request<v1::SubmitSweepRequest>,
    ) -> std::result::Result<Response<v1::SubmitSweepResponse>, Status> {
        self.writable().await?;
        let submitted_by = telemetry::grpc::caller(request.metadata().as_ref());
        let namespace = Caller::of(&request).namespace().to_string();
        let request = request.into_inner();
        let request_id = request_id(&request.request_id)?;
        let spec = self.sweep_spec(request.spec).await?;
        let (count, most) = (request.base_models.len(), limits::BASE_MODELS);
        if count > most {
            return Err(CoordinatorError::invalid("base_models", format!("are {count}, above {most}")).into());
        }
        let shape = |(name, shape)| Ok::<_, ConvertError>((name, ModelShape::try_from(shape)?));
        let base_models =
            request.base_models.into_iter().map(shape).collect::<std::result::Result<_, _>>()?;
        let submission =
            Submission { request_id, namespace, spec: Box::new(spec), base_models, submitted_by };
        let sweep = self.desk.directory.submit(submission).await?;
        Ok(Response::new(v1::SubmitSweepResponse { sweep: Some(convert::sweep(&sweep)) }))
    }

    async fn get_sweep(
        &self,
        request: Request<v1::GetSweepRequest>,
    ) -> std::result::Result<Response<v1::GetSweepResponse>, Status> {
        let id = sweep_id(request.into_inner().sweep_id)?;
        let sweep = self.desk.directory.sweep(&id).await?;
        Ok(Response::new(v1::GetSweepResponse { sweep: Some(self.shown(&sweep).await?) }))
    }

    async fn list_sweeps(
        &self,
        request: Request<v1::ListSweepsRequest>,
    ) -> std::result::Result<Response<v1::ListSweepsResponse>, Status> {
        let request = request.into_inner();
        let states =
            request.states().map(SweepState::try_from).collect::<std::result::Result<Vec<_>, _>>()?;
        let (sweeps, next_page_token) = self.sweeps(&request, &states).await?;
        Ok(Response::new(v1::ListSweepsResponse { sweeps, next_page_token }))
    }

    async fn cancel_sweep(
        &self,
        request: Request<v1::CancelSweepRequest>,
    ) -> std::result::Result<Response<v1::CancelSweepResponse>, Status> {
        self.writable().await?;
        let id = sweep_id(request.into_inner().sweep_id)?;
        let sweep = self.desk.directory.cancel(&id).await?;
        Ok(Response::new(v1::CancelSweepResponse { sweep: Some(convert::sweep(&sweep)) }))
    }

    async fn pause_sweep(
        &self,
        request: Request<v1::PauseSweepRequest>,
    ) -> std::result::Result<Response<v1::PauseSweepResponse>, Status> {
        self.writable().await?;
        let id = sweep_id(request.into_inner().sweep_id)?;
        let sweep = self.desk.directory.operate(&id, Operation::Pause).await?;
        Ok(Response::new(v1::PauseSweepResponse { sweep: Some(convert::sweep(&sweep)) }))
    }

    async fn resume_sweep(
        &self,
        request: Request<v1::ResumeSweepRequest>,
    ) -> std::result::Result<Response<v1::ResumeSweepResponse>, Status> {
        self.writable().await?;
        let id = sweep_id(request.into_inner().sweep_id)?;
        let sweep = self.desk.directory.operate(&id, Operation::Resume).await?;
        Ok(Response::new(v1::ResumeSweepResponse { sweep: Some(convert::sweep(&sweep)) }))
    }

    async fn extend_sweep(
        &self,
        request: Request<v1::ExtendSweepRequest>,
    ) -> std::result::Result<Response<v1::ExtendSweepResponse>, Status> {
        self.writable().await?;
        let request = request.into_inner();
        let id = sweep_id(request.sweep_id)?;
        let request_id = request_id(&request.request_id)?;
        let spec = self.sweep_spec(request.spec).await?;
        let sweep = self.desk.directory.operate(&id, Operation::Extend(request_id, Box::new(spec))).await?;
        Ok(Response::new(v1::ExtendSweepResponse { sweep: Some(convert::sweep(&sweep)) }))
    }

    async fn delete_sweep(
        &self,
        request: Request<v1::DeleteSweepRequest>,
    ) -> std::result::Result<Response<v1::DeleteSweepResponse>, Status> {
        self.writable().await?;
        let request = request.into_inner();
        let id = sweep_id(request.sweep_id)?;
        let tombstone = self.desk.directory.delete(&id, request.force).await?;
        Ok(Response::new(v1::DeleteSweepResponse {
            sweep_id: id.to_string(),
            deleted_at: Some(convert::timestamp(tombstone.deleted_at)),
        }))
    }

    type WatchSweepStream = Answers<v1::WatchSweepResponse>;

    async fn watch_sweep(
        &self,
        request: Request<v1::WatchSweepRequest>,
    ) -> std::result::Result<Response<Self::WatchSweepStream>, Status> {
        let id = sweep_id(request.into_inner().sweep_id)?;
        let first = self.desk.directory.watch(&id).await?;
        let (events, stream) = mpsc::channel(WATCH_BUFFER);
        let services = self.clone();
        self.scope.spawn("watch", async move {
            let over = tokio::select! {
                () = services.scope.cancelled() => Err(Status::unavailable("shutting down")),
                () = events.closed() => return,
                over = services.watch(&id, first, &events) => over.map_err(Status::from),
            };
            if let Err(status) = over {
                // A watcher that is gone does not ask why.
                let _ = events.try_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    type GetReportStream = Answers<v1::GetReportResponse>;

    async fn get_report(
        &self,
        request: Request<v1::GetReportRequest>,
    ) -> std::result::Result<Response<Self::GetReportStream>, Status> {
        let request = request.into_inner();
        let format = request.format();
        let files = self.report(&sweep_id(request.sweep_id)?, format).await?;
        let mut pieces = Vec::new();
        for (file, text) in files {
            let chunks = text.as_bytes().chunks(proto::CHUNK_BYTES);
            pieces.extend(
                chunks.map(|chunk| Ok(v1::GetReportResponse { chunk: chunk.to_vec(), file: file.clone() })),
            );
        }
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }
}

impl Services {
    async fn sweep_spec(&self, spec: Option<prost_types::Struct>) -> Result<SweepSpec> {
        let document =
            convert::sweep_document(spec).map_err(|e| CoordinatorError::invalid(e.field, e.problem))?;
        let spec = SweepSpec::from_document(&document).map_err(CoordinatorError::problems)?;
        suited::check(&spec)?;
        self.access.allow.check(&document)?;
        self.uploaded(&document).await?;
        Ok(spec)
    }
}

/// A caller's UUID in its one spelling: hyphenated, in lower case.
fn request_id(id: &str) -> Result<String> {
    let id = uuid::Uuid::parse_str(id).map_err(|_| {
        CoordinatorError::invalid("request_id", format!("`{id}` is no UUID; make one for each submission"))
    })?;
    Ok(id.to_string())
}

type Events = mpsc::Sender<std::result::Result<v1::WatchSweepResponse, Status>>;
type Watched = (View, Option<broadcast::Receiver<Change>>);

impl Services {
    async fn sweeps(
        &self,
        request: &v1::ListSweepsRequest,
        states: &[SweepState],
    ) -> Result<(Vec<v1::Sweep>, String)> {
        let listing = format!("sweeps {:?}", request.states);
        let size = page::size(request.page_size);
        let mut after = page::position(&listing, &request.page_token)?;
        let (mut page, mut room) = (Vec::new(), page::Room::new());
        loop {
            let ids = self.desk.directory.store().newest(after.as_deref(), size).await?;
            let last = ids.len() < size;
            for (position, id) in ids {
                // Of a full page it is enough that one more exists; whether it passes the filter, the next page will tell.
                let sweep = match page.len() == size {
                    true => None,
                    false => Some(self.listed(&id).await?),
                };
                let wanted = |sweep: &v1::Sweep| {
                    let state = SweepState::try_from(sweep.state());
                    states.is_empty() || state.is_ok_and(|state| states.contains(&state))
                };
                match sweep {
                    Some(sweep) if !wanted(&sweep) => {}
                    Some(sweep) if room.take(sweep.encoded_len()) => page.push(sweep),
                    _ => {
                        let token = after.map(|after| page::token(&listing, &after));
                        return Ok((page, token.unwrap_or_default()));
                    }
                }
                after = Some(position);
            }
            if last {
                return Ok((page, String::new()));
            }
        }
    }

    /// A sweep in a listing, where one that cannot be read is no reason not to see the others.
    async fn listed(&self, id: &SweepId) -> Result<v1::Sweep> {
        let error = match self.desk.directory.sweep(id).await {
            Ok(sweep) => return self.shown(&sweep).await,
            Err(error @ CoordinatorError::Unreadable { .. }) => error,
            Err(error) => return Err(error),
        };
        let head = self.desk.directory.store().sweep_head(id).await?;
        let head = head.ok_or_else(|| CoordinatorError::not_found("sweep", id))?;
        let count = |(state, trials)| v1::StateCount { state: v1::TrialState::from(state).into(), trials };
        Ok(v1::Sweep {
            id: id.to_string(),
            state: v1::SweepState::from(head.state).into(),
            namespace: head.namespace,
            counts: head.counts.iter().map(count).collect(),
            cost_usd: head.cost_usd,
            failure: Some(error.to_string()),
            created_at: Some(convert::timestamp(head.created_at)),
            finished_at: head.finished_at.map(convert::timestamp),
            ..v1::Sweep::default()
        })
    }

    /// Sends a picture, then changes until the sweep is over. A watcher that lags gets a fresh picture.
    async fn watch(&self, id: &SweepId, first: Watched, events: &Events) -> Result<()> {
        let (mut view, mut changes) = first;
        loop {
            let over = view.sweep.state.is_terminal();
            let mut picture = vec![Event::Sweep(self.shown(&view.sweep).await?)];
            picture.extend(view.trials.into_iter().map(|t| Event::Trial(t.trial.into())));
            for event in picture {
                if send(events, event).await.is_err() {
                    return Ok(());
                }
            }
            match changes {
                Some(changes) if !over => match self.follow(changes, events).await? {
                    Followed::ToTheEnd | Followed::WatcherGone => return Ok(()),
                    Followed::Lagged => {}
                },
                _ => return Ok(()),
            }
            (view, changes) = self.desk.directory.watch(id).await?;
        }
    }

    /// Sends changes. A sweep that changed is shown with what it waits for then.
    async fn follow(&self, mut changes: broadcast::Receiver<Change>, events: &Events) -> Result<Followed> {
        loop {
            let change = match changes.recv().await {
                Ok(change) => change,
                // Closed: the sweep's actor is gone, so that a fresh picture is the last.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return Ok(Followed::Lagged),
            };
            let over = matches!(&change, Change::Sweep(sweep) if sweep.state.is_terminal());
            let event = match change {
                Change::Sweep(sweep) => Event::Sweep(self.shown(&sweep).await?),
                Change::Trial(trial, _) => Event::Trial((*trial).into()),
                Change::Progress(trial, attempt, point) => Event::Progress(v1::TrialProgress {
                    trial_id: trial.to_string(),
                    attempt: attempt.0,
                    point: Some(point.into()),
                }),
            };
            if send(events, event).await.is_err() {
                return Ok(Followed::WatcherGone);
            }
            if over {
                return Ok(Followed::ToTheEnd);
            }
        }
    }

    /// A sweep as people see it, with what its trials wait for: what of its namespace is used up, the accelerators that they
    /// need and nobody has, or a device that computes with their numbers.
    pub(crate) async fn shown(&self, sweep: &Sweep) -> Result<v1::Sweep> {
        let mut shown = convert::sweep(sweep);
        let waits = sweep.state == SweepState::Running && sweep.counts.of(TrialState::Queued) > 0;
        let dispatcher = &self.desk.dispatcher;
        if waits && self.access.limits.is_some() {
            shown.waits_for = dispatcher.held_back(&sweep.namespace).await?;
        }
        if waits && shown.waits_for.is_none() {
            shown.waits_for = dispatcher.lacking(sweep.id.clone()).await?;
        }
        Ok(shown)
    }

    async fn report(&self, id: &SweepId, format: v1::ReportFormat) -> Result<Vec<report::File>> {
        let view = self.desk.directory.view(id).await?;
        let items = self.items(&view).await;
        let trials: Vec<_> = view.trials.into_iter().map(|record| record.trial).collect();
        let mut curves = Vec::new();
        for trial in &trials {
            curves.push((trial.id.clone(), self.desk.history.curve(&trial.id, &trial.attempts).await?));
        }
        // Of many trials it takes a while, in which a thread that serves others would serve nobody.
        let made = move || {
            let records =
                report::Records { sweep: &view.sweep, trials: &trials, curves: &curves, items: &items };
            match format {
                v1::ReportFormat::Unspecified | v1::ReportFormat::Html => {
                    vec![(String::new(), report::html(records))]
                }
                v1::ReportFormat::Markdown => report::markdown(records),
            }
        };
        // It panics at no input, and is not aborted but with the runtime.
        tokio::task::spawn_blocking(made).await.map_err(|_| actor::Gone.into())
    }

    /// What single documents made of the best trials. Without those that cannot be read, or not in time, a report is as it
    /// would be of trials of an earlier version.
    async fn items(&self, view: &View) -> Vec<(TrialId, Vec<ItemScores>)> {
        let goal = view.sweep.spec.search.goal;
        let mut asked: Vec<_> = view.trials.iter().filter(|record| items_of(record).is_some()).collect();
        let value = |record: &TrialRecord| record.value.unwrap_or(f64::NAN);
        asked.sort_by(|a, b| goal.better(value(b), value(a)).cmp(&goal.better(value(a), value(b))));
        asked.truncate(report::MOST_ITEMS);
        let read = |record: &TrialRecord| {
            let (trial, path) = (record.trial.id.clone(), items_of(record).unwrap_or_default().to_owned());
            async move {
                let items = self.desk.artifacts.items(&path).await;
                let items = items.inspect_err(|error| {
                    tracing::warn!(%trial, %error, "what single documents made of it cannot be read");
                });
                Some((trial, items.ok()?))
            }
        };
        let reads: Vec<_> = asked.into_iter().map(read).collect();
        let mut left = report::ITEMS_BYTES;
        let fits = |(_, items): &(TrialId, Vec<ItemScores>)| {
            let bytes = items.iter().map(ItemScores::bytes).sum();
            let fits = bytes <= left;
            left = left.saturating_sub(bytes);
            std::future::ready(fits)
        };
        let read = futures::stream::iter(reads).buffered(ITEMS_AT_ONCE);
        let read = read.take_until(tokio::time::sleep(report::ITEMS_WAIT)).filter_map(std::future::ready);
        read.take_while(fits).collect().await
    }
}

/// Where what single documents made of a trial is kept, if it is.
fn items_of(record: &TrialRecord) -> Option<&str> {
    record.trial.summary.as_ref()?.items.as_deref()
}

enum Followed {
    ToTheEnd,
    Lagged,
    WatcherGone,
}

async fn send(
    events: &Events,
    event: Event,
) -> std::result::Result<(), mpsc::error::SendError<std::result::Result<v1::WatchSweepResponse, Status>>> {
    events.send(Ok(v1::WatchSweepResponse { event: Some(event) })).await
}
