//! What the page reads once and what it changes: the gRPC services' own methods, answered in JSON.

use super::ask::Ask;
use super::{Refusal, form};
use crate::access::Caller;
use crate::grpc::Services;
use domain::{SweepId, TrialId};
use futures::TryStreamExt;
use proto::v1::fleet_service_server::FleetService;
use proto::v1::sweep_service_server::SweepService;
use proto::v1::trial_service_server::TrialService;
use proto::{convert, v1};
use serde_json::{Value, json};
use tonic::{Request, Status};

/// The server, and as whom the page speaks to it.
pub async fn server(services: &Services, caller: &Caller) -> Result<Value, Refusal> {
    let info = services.get_server_info(Request::new(v1::GetServerInfoRequest {})).await?.into_inner();
    let metric = |metric: v1::MetricDefinition| {
        (metric.name, json!({ "unit": metric.unit, "meaning": metric.meaning }))
    };
    Ok(json!({
        "version": info.version,
        "data": info.data_dir,
        "trouble": info.trouble,
        "metrics": info.metrics.into_iter().map(metric).collect::<serde_json::Map<_, _>>(),
        "user": caller.name(),
        "may_change": caller.may(Ask::Pause.method()),
    }))
}

/// One sweep with its document.
pub async fn sweep(services: &Services, sweep: &str) -> Result<Value, Refusal> {
    let request = v1::GetSweepRequest { sweep_id: sweep.into() };
    let sweep = services.get_sweep(Request::new(request)).await?.into_inner().sweep;
    Ok(form::sweep_in_full(sweep.unwrap_or_default()))
}

/// One trial in full.
pub async fn trial(services: &Services, sweep: &str, number: u32) -> Result<Value, Refusal> {
    let record = services.desk.directory.trial(&id(sweep, number)).await?;
    Ok(form::trial(&record))
}

/// A trial's curve.
pub async fn metrics(services: &Services, sweep: &str, number: u32) -> Result<Value, Refusal> {
    let request = v1::GetTrialMetricsRequest { trial_id: id(sweep, number).to_string(), first_step: 0 };
    let pieces = services.get_trial_metrics(Request::new(request)).await?.into_inner();
    let points = pieces.try_fold(Vec::new(), |mut points, piece| {
        points.extend(piece.points);
        std::future::ready(Ok::<_, Status>(points))
    });
    Ok(form::curve(&points.await?))
}

/// Does what is asked of a sweep or a trial.
pub async fn change(
    services: &Services,
    what: Ask,
    sweep_id: String,
    number: u32,
    said: Value,
) -> Result<(), Refusal> {
    let trial_id = id(&sweep_id, number).to_string();
    match what {
        Ask::Pause => drop(services.pause_sweep(Request::new(v1::PauseSweepRequest { sweep_id })).await?),
        Ask::Resume => drop(services.resume_sweep(Request::new(v1::ResumeSweepRequest { sweep_id })).await?),
        Ask::Cancel => drop(services.cancel_sweep(Request::new(v1::CancelSweepRequest { sweep_id })).await?),
        Ask::Extend => {
            let request_id = said["request_id"].as_str().unwrap_or_default().into();
            let spec = said["spec"].as_object().map(convert::to_struct);
            let request = v1::ExtendSweepRequest { sweep_id, request_id, spec };
            drop(services.extend_sweep(Request::new(request)).await?);
        }
        Ask::Stop => drop(services.stop_trial(Request::new(v1::StopTrialRequest { trial_id })).await?),
        Ask::Retry => drop(services.retry_trial(Request::new(v1::RetryTrialRequest { trial_id })).await?),
        Ask::Server | Ask::Overview | Ask::Sweep | Ask::Changes | Ask::Trial | Ask::Metrics | Ask::Log => {}
    }
    Ok(())
}

fn id(sweep: &str, number: u32) -> TrialId {
    TrialId::of(&SweepId::new(sweep), number)
}
