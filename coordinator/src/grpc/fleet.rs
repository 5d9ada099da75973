//! `FleetService`.

use super::{Services, page};
use crate::CoordinatorError;
use crate::actors::dispatcher::AgentView;
use crate::store::Batch;
use domain::AgentId;
use domain::metric::DEFINITIONS;
use prost::Message;
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
            data_dir: self.place.to_string(),
            metrics: metrics.collect(),
            trouble: self.trouble().await,
        }))
    }

    async fn list_agents(
        &self,
        request: Request<v1::ListAgentsRequest>,
    ) -> Result<Response<v1::ListAgentsResponse>, Status> {
        let request = request.into_inner();
        let agents = self.desk.dispatcher.agents().await.map_err(CoordinatorError::from)?;
        let (agents, next_page_token) = page::of(
            "agents",
            &request.page_token,
            request.page_size,
            self.with_members(agents.into_iter().map(wire)).await,
            |agent| agent.id.clone(),
            v1::Agent::encoded_len,
        )?;
        Ok(Response::new(v1::ListAgentsResponse { agents, next_page_token }))
    }

    async fn get_agent(
        &self,
        request: Request<v1::GetAgentRequest>,
    ) -> Result<Response<v1::GetAgentResponse>, Status> {
        let v1::GetAgentRequest { agent_id } = request.into_inner();
        let agents = self.desk.dispatcher.agents().await.map_err(CoordinatorError::from)?;
        let agents = self.with_members(agents.into_iter().map(wire)).await;
        let agent = agents.into_iter().find(|agent| agent.id == agent_id);
        let agent = agent.ok_or_else(|| CoordinatorError::not_found("agent", &agent_id))?;
        Ok(Response::new(v1::GetAgentResponse { agent: Some(agent) }))
    }

    async fn drain_agent(
        &self,
        request: Request<v1::DrainAgentRequest>,
    ) -> Result<Response<v1::DrainAgentResponse>, Status> {
        self.writable().await?;
        let v1::DrainAgentRequest { agent_id, undo } = request.into_inner();
        let id = AgentId::new(agent_id);
        self.agent(&id).await?;
        let mut batch = Batch::default();
        batch.drain(&id, !undo);
        self.desk.directory.store().commit(batch).await?;
        let view = self.desk.dispatcher.drain(id, !undo).await.map_err(CoordinatorError::from)?;
        Ok(Response::new(v1::DrainAgentResponse { agent: view.map(wire) }))
    }
}

impl Services {
    async fn agent(&self, id: &AgentId) -> crate::error::Result<AgentView> {
        let agents = self.desk.dispatcher.agents().await?;
        let found = agents.into_iter().find(|view| view.agent.id == *id);
        found.ok_or_else(|| CoordinatorError::not_found("agent", id))
    }
}

fn wire(view: AgentView) -> v1::Agent {
    v1::Agent {
        id: view.agent.id.to_string(),
        version: view.agent.version,
        hostname: view.agent.hostname,
        devices: view.agent.devices.into_iter().map(Into::into).collect(),
        connected: view.connected,
        drained: view.drained,
        labels: view.agent.labels.into_iter().collect(),
        last_seen: Some(convert::timestamp(view.last_seen)),
        registered: false,
        understands: convert::understood(view.agent.understands),
        trial_ids: view.trials.iter().map(ToString::to_string).collect(),
        first_trial_seconds: view.beginning.first_trial_seconds,
        first_step_seconds: view.beginning.first_step_seconds,
    }
}
