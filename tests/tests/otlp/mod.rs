//! A collector in the test's process: it receives OTLP over gRPC and HTTP, in plain or over TLS, and keeps what it was sent.

#![allow(dead_code, reason = "not every test looks at everything")]

use actor::Scope;
use http_body_util::BodyExt;
use hyper::body::Bytes;
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
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tests::certificates::Pair;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use tower::{Layer, Service};

/// What a test waits for at most.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A header that a test has programs send.
pub const TENANT: &str = "x-tenant";

/// What was received, each with the name of the service that sent it.
#[derive(Debug, Default, Clone)]
pub struct Received {
    /// The paths that were called, and what their last call had as [`TENANT`].
    pub calls: BTreeMap<String, Option<String>>,
    /// What each service says of itself.
    pub resources: BTreeMap<String, Vec<KeyValue>>,
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

    /// The name of a service, of which it is kept what it says of itself.
    fn service(&self, resource: Option<Resource>) -> String {
        let attributes = resource.map(|resource| resource.attributes).unwrap_or_default();
        let name = attribute(&attributes, "service.name").unwrap_or_default();
        self.add(|received| _ = received.resources.insert(name.clone(), attributes));
        name
    }

    fn traces(&self, request: ExportTraceServiceRequest) {
        for of in request.resource_spans {
            let name = self.service(of.resource);
            let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.add(|received| received.spans.extend(spans.map(|span| (name.clone(), span))));
        }
    }

    fn metrics(&self, request: ExportMetricsServiceRequest) {
        for of in request.resource_metrics {
            let name = self.service(of.resource);
            let metrics = of.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            self.add(|received| received.metrics.extend(metrics.map(|metric| (name.clone(), metric))));
        }
    }

    fn logs(&self, request: ExportLogsServiceRequest) {
        for of in request.resource_logs {
            let name = self.service(of.resource);
            let logs = of.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            self.add(|received| received.logs.extend(logs.map(|log| (name.clone(), log))));
        }
    }

    /// What is sent to a path of OTLP over HTTP.
    fn posted(&self, path: &str, body: Bytes) -> Result<(), prost::DecodeError> {
        match path {
            "/v1/traces" => self.traces(ExportTraceServiceRequest::decode(body)?),
            "/v1/metrics" => self.metrics(ExportMetricsServiceRequest::decode(body)?),
            _ => self.logs(ExportLogsServiceRequest::decode(body)?),
        }
        Ok(())
    }
}

impl Collector {
    pub async fn start() -> Self {
        Self::serve(None).await
    }

    /// One that speaks TLS.
    pub async fn with_certificate(pair: &Pair) -> Self {
        let [cert, key] = [&pair.cert, &pair.key].map(|file| std::fs::read(file).unwrap());
        Self::serve(Some(Identity::from_pem(cert, key))).await
    }

    async fn serve(identity: Option<Identity>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if identity.is_some() { "https" } else { "http" };
        let endpoint = format!("{scheme}://{}", listener.local_addr().unwrap());
        let (kept, scope) = (Arc::new(Kept::default()), Scope::new());
        let (services, stop) = (Services(kept.clone()), scope.clone());
        let mut server = Server::builder().accept_http1(true);
        if let Some(identity) = identity {
            server = server.tls_config(ServerTlsConfig::new().identity(identity)).unwrap();
        }
        scope.spawn("collector", async move {
            server
                .layer(Http(services.0.clone()))
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

#[tonic::async_trait]
impl TraceService for Services {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.traces(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Services {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.0.metrics(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Services {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        self.0.logs(request.into_inner());
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

/// Takes what comes over HTTP, and lets gRPC's calls through.
#[derive(Clone)]
struct Http<S = Arc<Kept>>(S);

impl<S> Layer<S> for Http {
    type Service = Http<(Arc<Kept>, S)>;

    fn layer(&self, inner: S) -> Self::Service {
        Http((self.0.clone(), inner))
    }
}

impl<S> Service<hyper::Request<Body>> for Http<(Arc<Kept>, S)>
where
    S: Service<hyper::Request<Body>, Response = hyper::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.1.poll_ready(cx)
    }

    fn call(&mut self, request: hyper::Request<Body>) -> Self::Future {
        let (kept, inner) = &mut self.0;
        let path = request.uri().path().to_string();
        let tenant = request.headers().get(TENANT).and_then(|tenant| tenant.to_str().ok()).map(String::from);
        kept.add(|received| _ = received.calls.insert(path.clone(), tenant));
        if !path.starts_with("/v1/") {
            return Box::pin(inner.call(request));
        }
        let kept = kept.clone();
        Box::pin(async move {
            let body = request.into_body().collect().await.map(|body| body.to_bytes());
            let taken = body.is_ok_and(|body| kept.posted(&path, body).is_ok());
            let mut answer = hyper::Response::new(Body::empty());
            *answer.status_mut() = if taken { hyper::StatusCode::OK } else { hyper::StatusCode::BAD_REQUEST };
            Ok(answer)
        })
    }
}
