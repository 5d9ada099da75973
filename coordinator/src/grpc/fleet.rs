//! `FleetService`.

use super::{Services, page};
use crate::CoordinatorError;
use crate::actors::dispatcher::AgentView;
use domain::metric::DEFINITIONS;
use proto::convert;
use proto::v1;
use proto::v1::fleet_service_server::FleetService;
use tonic::{Request, Response, Status};

#[tonic::async_trait]
impl FleetService for Services {
    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let metrics = DEFINITIONS.iter().map(|d| v1::MetricDefinition {
            name: d.name.into(),
            unit: d.unit.into(),
            meaning: d.meaning.into(),
        });
        Ok(Response::new(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            data_dir: self.data_dir.display().to_string(),
            metrics: metrics.collect(),
        }))
    }

    async fn list_agents(
        &self,
        request: Request<v1::ListAgentsRequest>,
    ) -> Result<Response<v1::ListAgentsResponse>, Status> {
        let request = request.into_inner();
        let agents = self.desk.dispatcher.agents().await.map_err(CoordinatorError::from)?;
        let id = |view: &AgentView| view.agent.id.to_string();
        let (page, next_page_token) = page::of("agents", &request.page_token, request.page_size, agents, id)?;
        let agents = page.into_iter().map(wire).collect();
        Ok(Response::new(v1::ListAgentsResponse { agents, next_page_token }))
    }
}

fn wire(view: AgentView) -> v1::Agent {
    v1::Agent {
        id: view.agent.id.to_string(),
        version: view.agent.version,
        hostname: view.agent.hostname,
        devices: view.agent.devices.into_iter().map(Into::into).collect(),
        connected: view.connected,
        last_seen: Some(convert::timestamp(view.last_seen)),
        trial_ids: view.trials.iter().map(ToString::to_string).collect(),
    }
}
