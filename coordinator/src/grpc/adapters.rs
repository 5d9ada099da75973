//! `AdapterService`.

use super::{Answers, Services, checkpoints, page, sweep_id, trial_id};
use crate::artifacts::ArtifactError;
use crate::error::{CoordinatorError, Result};
use crate::store::TrialRecord;
use domain::sweep::Goal;
use futures::StreamExt;
use proto::v1;
use proto::v1::adapter_service_server::AdapterService;
use std::cmp::Ordering;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl AdapterService for Services {
    async fn list_adapters(
        &self,
        request: Request<v1::ListAdaptersRequest>,
    ) -> std::result::Result<Response<v1::ListAdaptersResponse>, Status> {
        let request = request.into_inner();
        let listing = format!("adapters {}", request.sweep_id);
        let view = self.desk.directory.view(&sweep_id(request.sweep_id)?).await?;
        let goal = view.sweep.spec.search.goal;
        let mut trials: Vec<_> = view.trials.into_iter().filter(|t| t.trial.adapter.is_some()).collect();
        trials.sort_by(|a, b| best_first(goal, a.ranked_value(), b.ranked_value()));
        let id = |record: &TrialRecord| record.trial.id.to_string();
        let (page, next_page_token) =
            // A line for each, so that a full page is small.
            page::of(&listing, &request.page_token, request.page_size, trials, id, |_| 0)?;
        let mut adapters = Vec::new();
        for record in page {
            adapters.extend(self.adapter(record).await?);
        }
        Ok(Response::new(v1::ListAdaptersResponse { adapters, next_page_token }))
    }

    type DownloadAdapterStream = Answers<v1::DownloadAdapterResponse>;

    async fn download_adapter(
        &self,
        request: Request<v1::DownloadAdapterRequest>,
    ) -> std::result::Result<Response<Self::DownloadAdapterStream>, Status> {
        let id = trial_id(request.into_inner().trial_id)?;
        let trial = self.desk.directory.trial(&id).await?.trial;
        let path = trial.adapter.ok_or_else(|| CoordinatorError::not_found("adapter of trial", &id))?;
        let files = self.desk.artifacts.files(&path).await.map_err(CoordinatorError::from)?;
        let artifacts = self.desk.artifacts.clone();
        let pieces = futures::stream::iter(files).flat_map(move |file| {
            let (name, sha256) = (file.name.clone(), file.sha256.to_vec());
            let last = v1::DownloadAdapterResponse { file: name.clone(), data: Vec::new(), sha256 };
            let data = checkpoints::read(artifacts.clone(), vec![(path.clone(), file)]).map(move |piece| {
                let (_, data) = piece?;
                Ok(v1::DownloadAdapterResponse { file: name.clone(), data: data.into(), sha256: Vec::new() })
            });
            data.chain(futures::stream::iter([Ok(last)]))
        });
        Ok(Response::new(Box::pin(pieces)))
    }
}

impl Services {
    async fn adapter(&self, record: TrialRecord) -> Result<Option<v1::Adapter>> {
        let Some(path) = record.trial.adapter else { return Ok(None) };
        let files = match self.desk.artifacts.files(&path).await {
            Ok(files) => files,
            // The sweep let go of it since.
            Err(ArtifactError::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(v1::Adapter {
            trial_id: record.trial.id.to_string(),
            step: record.adapter_step,
            eval_loss: record.trial.eval_loss,
            bytes: files.iter().map(|f| f.bytes).sum(),
            local_path: self.desk.artifacts.local_path(&path).map(|p| p.display().to_string()),
            path,
        }))
    }
}

/// Trials without a value come last.
fn best_first(goal: Goal, a: Option<f64>, b: Option<f64>) -> Ordering {
    let (a, b) = (a.unwrap_or(f64::NAN), b.unwrap_or(f64::NAN));
    match (a.is_nan(), b.is_nan()) {
        (false, false) if goal.better(a, b) => Ordering::Less,
        (false, false) if goal.better(b, a) => Ordering::Greater,
        (a, b) => a.cmp(&b),
    }
}
