//! `TrialService`.

use super::{Answers, Services, page, sweep_id, trial_id};
use crate::actors::sweep::Selection;
use domain::trial::TrialState;
use proto::v1;
use proto::v1::trial_service_server::TrialService;
use tonic::{Request, Response, Status};

/// Points of a message.
const POINTS: usize = 1000;

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
        let mut page = self.desk.directory.trials(&sweep_id(request.sweep_id)?, selection).await?;
        let more = page.len() > size;
        page.truncate(size);
        let last = page.last().and_then(|record| record.trial.id.number()).filter(|_| more);
        let next_page_token =
            last.map(|number| page::token(&listing, &number.to_string())).unwrap_or_default();
        let trials = page.into_iter().map(|record| record.trial.into()).collect();
        Ok(Response::new(v1::ListTrialsResponse { trials, next_page_token }))
    }

    type GetTrialMetricsStream = Answers<v1::GetTrialMetricsResponse>;

    async fn get_trial_metrics(
        &self,
        request: Request<v1::GetTrialMetricsRequest>,
    ) -> Result<Response<Self::GetTrialMetricsStream>, Status> {
        let id = trial_id(request.into_inner().trial_id)?;
        let trial = self.desk.directory.trial(&id).await?.trial;
        let curve =
            self.desk.history.curve(&id, &trial.attempts).await.map_err(crate::CoordinatorError::from)?;
        let pieces: Vec<_> = curve
            .chunks(POINTS)
            .map(|points| {
                let points = points.iter().cloned().map(Into::into).collect();
                Ok(v1::GetTrialMetricsResponse { points })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }

    async fn stop_trial(
        &self,
        request: Request<v1::StopTrialRequest>,
    ) -> Result<Response<v1::StopTrialResponse>, Status> {
        let id = trial_id(request.into_inner().trial_id)?;
        let record = self.desk.directory.stop_trial(&id).await?;
        Ok(Response::new(v1::StopTrialResponse { trial: Some(record.trial.into()) }))
    }
}
