//! A collector in the test's process: it receives OTLP over gRPC and keeps what it was sent.

#![allow(dead_code, reason = "not every test looks at everything")]

use actor::Scope;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::trace::v1::Span;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was received, each with the name of the service that sent it.
#[derive(Debug, Default, Clone)]
pub struct Received {
    pub spans: Vec<(String, Span)>,
    pub metrics: Vec<(String, Metric)>,
    pub logs: Vec<(String, LogRecord)>,
}

/// A running collector.
pub struct Collector {
    pub endpoint: String,
    kept: Arc<Kept>,
    scope: Scope,
}

#[derive(Default)]
struct Kept {
    received: Mutex<Received>,
    changed: watch::Sender<()>,
}

impl Kept {
    fn add(&self, add: impl FnOnce(&mut Received)) {
        add(&mut self.received.lock().unwrap());
        self.changed.send_replace(());
    }
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (kept, scope) = (Arc::new(Kept::default()), Scope::new());
        let (services, stop) = (Services(kept.clone()), scope.clone());
        scope.spawn("collector", async move {
            Server::builder()
                .add_service(TraceServiceServer::new(services.clone()))
                .add_service(MetricsServiceServer::new(services.clone()))
                .add_service(LogsServiceServer::new(services))
                .serve_with_incoming_shutdown(
                    TcpIncoming::from(listener),
                    async move { stop.cancelled().await },
                )
                .await
                .unwrap();
        });
        Self { endpoint, kept, scope }
    }

    /// The variables that have a program send everything here, often.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.endpoint.clone()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".into()),
            ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
            ("OTEL_BLRP_SCHEDULE_DELAY", "100".into()),
            ("OTEL_METRIC_EXPORT_INTERVAL", "200".into()),
        ]
    }

    pub fn received(&self) -> Received {
        self.kept.received.lock().unwrap().clone()
    }

    /// Waits until what was received is enough.
    pub async fn until<T>(&self, what: &str, enough: impl Fn(&Received) -> Option<T>) -> T {
        let mut changes = self.kept.changed.subscribe();
        let wait = async {
            loop {
                changes.mark_unchanged();
                if let Some(found) = enough(&self.kept.received.lock().unwrap()) {
                    return found;
                }
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| {
            let received = self.received();
            let spans: Vec<_> =
                received.spans.iter().map(|(of, span)| format!("{of}: {}", span.name)).collect();
            panic!("waited in vain for {what}; spans: {spans:#?}")
        })
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.scope.cancel();
    }
}

/// An attribute as text.
pub fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.as_ref()?.value.as_ref()?;
    Some(match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::BoolValue(is) => is.to_string(),
        other => format!("{other:?}"),
    })
}

/// What a log record says.
pub fn text(log: &LogRecord) -> String {
    match log.body.as_ref().and_then(|body| body.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        other => format!("{other:?}"),
    }
}

#[derive(Clone)]
struct Services(Arc<Kept>);

fn service(resource: &Option<opentelemetry_proto::tonic::resource::v1::Resource>) -> String {
    let attributes = resource.as_ref().map(|resource| resource.attributes.as_slice()).unwrap_or_default();
    attribute(attributes, "service.name").unwrap_or_default()
}

#[tonic::async_trait]
impl TraceService for Services {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of in request.into_inner().resource_spans {
            let name = service(&of.resource);
            let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.add(|received| received.spans.extend(spans.map(|span| (name.clone(), span))));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Services {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for of in request.into_inner().resource_metrics {
            let name = service(&of.resource);
            let metrics = of.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            self.0.add(|received| received.metrics.extend(metrics.map(|metric| (name.clone(), metric))));
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Services {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        for of in request.into_inner().resource_logs {
            let name = service(&of.resource);
            let logs = of.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            self.0.add(|received| received.logs.extend(logs.map(|log| (name.clone(), log))));
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}
