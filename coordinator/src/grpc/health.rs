//! gRPC's health service. Of each service, and of all by the empty name, it says whether this coordinator leads: what holds
//! streams to one whose disk is full is not to be sent elsewhere. Two names of its own say what an orchestrator asks,
//! [`LIVE`] and [`READY`].

use super::Answers;
use actor::Scope;
use futures::stream::{self, StreamExt};
use proto::v1::adapter_service_server;
use proto::v1::agent_service_server;
use proto::v1::data_service_server;
use proto::v1::fleet_service_server;
use proto::v1::sweep_service_server;
use proto::v1::trial_service_server;
use std::time::Duration;
use telemetry::http::Readiness;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{self, Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb as reflection;

/// Whether the process answers, as `/healthz` says it.
pub const LIVE: &str = "lorafleet.live";

/// Whether it leads, can read its state and can write to its disk or store, as `/readyz` says it.
pub const READY: &str = "lorafleet.ready";

/// Every service of the server.
const SERVED: [&str; 9] = [
    sweep_service_server::SERVICE_NAME,
    trial_service_server::SERVICE_NAME,
    adapter_service_server::SERVICE_NAME,
    fleet_service_server::SERVICE_NAME,
    agent_service_server::SERVICE_NAME,
    data_service_server::SERVICE_NAME,
    health_server::SERVICE_NAME,
    reflection::v1::server_reflection_server::SERVICE_NAME,
    reflection::v1alpha::server_reflection_server::SERVICE_NAME,
];

/// The pause between two looks for somebody who watches.
const PAUSE: Duration = Duration::from_secs(5);

/// The health service of a coordinator that leads, or does not. What is watched ends with the scope, which would wait for it
/// otherwise.
pub(crate) fn service(leads: bool, ready: Readiness, scope: &Scope) -> HealthServer<impl Health> {
    HealthServer::new(State { leads, ready, scope: scope.clone() })
}

#[derive(Clone)]
struct State {
    leads: bool,
    ready: Readiness,
    scope: Scope,
}

impl State {
    /// How it stands with what has this name, if something has.
    async fn of(&self, name: &str) -> Option<ServingStatus> {
        let serves = match name {
            LIVE => true,
            READY => self.ready.ask().await.is_ok(),
            name if name.is_empty() || SERVED.contains(&name) => self.leads,
            _ => return None,
        };
        Some(if serves { ServingStatus::Serving } else { ServingStatus::NotServing })
    }
}

fn unknown(name: &str) -> Status {
    let message =
        format!("there is no service {name:?}; ask for one that is served, {LIVE}, {READY} or none");
    Status::not_found(message)
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for State {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let name = request.into_inner().service;
        let status = self.of(&name).await.ok_or_else(|| unknown(&name))?;
        Ok(Response::new(answer(status)))
    }

    type WatchStream = Answers<HealthCheckResponse>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().service;
        let first = self.of(&name).await.ok_or_else(|| unknown(&name))?;
        let (state, scope) = (self.clone(), self.scope.clone());
        let later = stream::unfold((state, name, first), |(state, name, last)| async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                let now = state.of(&name).await?;
                if now != last {
                    return Some((now, (state, name, now)));
                }
            }
        });
        let told = stream::iter([first]).chain(later).map(|status| Ok(answer(status)));
        let over = async move { scope.cancelled().await };
        Ok(Response::new(Box::pin(told.take_until(over))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tonic::Code;

    const GOOD: ServingStatus = ServingStatus::Serving;
    const BAD: ServingStatus = ServingStatus::NotServing;

    /// A coordinator that is ready as a switch says.
    fn state(leads: bool) -> (State, Arc<AtomicBool>) {
        let switch = Arc::new(AtomicBool::new(false));
        let asked = switch.clone();
        let ready = Readiness::of(Arc::new(move || {
            let is = if asked.load(Ordering::Relaxed) { Ok(()) } else { Err("it is not".to_string()) };
            Box::pin(std::future::ready(is))
        }));
        (State { leads, ready, scope: Scope::new() }, switch)
    }

    fn request(name: &str) -> Request<HealthCheckRequest> {
        Request::new(HealthCheckRequest { service: name.into() })
    }

    #[tokio::test]
    async fn each_name_has_its_meaning() {
        for (leads, name, want) in [
            (true, "", Some(GOOD)),
            (true, sweep_service_server::SERVICE_NAME, Some(GOOD)),
            (true, LIVE, Some(GOOD)),
            // Its disk is full.
            (true, READY, Some(BAD)),
            (false, "", Some(BAD)),
            (false, sweep_service_server::SERVICE_NAME, Some(BAD)),
            (false, LIVE, Some(GOOD)),
            (false, READY, Some(BAD)),
            (true, "lorafleet.v1.Other", None),
        ] {
            let (state, _) = state(leads);
            let found = state.check(request(name)).await.map(|answer| answer.into_inner().status());
            let watched = state.watch(request(name)).await.map(drop).map_err(|status| status.code());
            let refused = Err(Code::NotFound);
            assert_eq!(found.map_err(|status| status.code()), want.ok_or(Code::NotFound), "{name}");
            assert_eq!(watched, if want.is_some() { Ok(()) } else { refused }, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_watches_hears_of_each_change_until_the_server_ends() {
        let (state, switch) = state(true);
        let mut told = state.watch(request(READY)).await.unwrap().into_inner();
        assert_eq!(told.next().await.unwrap().unwrap().status(), BAD);
        for (is, want) in [(true, GOOD), (false, BAD)] {
            switch.store(is, Ordering::Relaxed);
            assert_eq!(told.next().await.unwrap().unwrap().status(), want);
        }
        state.scope.cancel();
        assert!(told.next().await.is_none());
    }
}
