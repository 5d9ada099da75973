//! A coordinator on a free port with its data in a temporary directory, and clients for it.

use actor::Scope;
use config::tokens::{self, Principal, Role, Tokens};
use coordinator::{Access, Options, Server};
use domain::{Clock, SystemClock};
use proto::convert;
use proto::v1;
use proto::v1::adapter_service_client::AdapterServiceClient;
use proto::v1::fleet_service_client::FleetServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use security::client::Token;
use security::watched::Watched;
use security::{Client, FileError, Line, Secret};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tonic::{Status, Streaming};

/// Longer than anything here should take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A lease that no test waits for.
pub const LONG: Duration = Duration::from_secs(60);

/// A lease that a test waits for, and that a busy machine does not miss: a sign of life comes every quarter of it.
pub const SHORT: Duration = Duration::from_secs(2);

pub struct Fixture {
    dir: TempDir,
    lease: Duration,
    clock: Arc<dyn Clock>,
    scope: Scope,
    access: Access,
    endpoint: String,
    /// Without a token, or with that of [`Fixture::start_guarded`].
    pub channel: Line,
}

impl Fixture {
    pub async fn start(lease: Duration) -> Self {
        Self::start_at(lease, Arc::new(SystemClock::new())).await
    }

    /// A coordinator with a clock of the test's own.
    pub async fn start_at(lease: Duration, clock: Arc<dyn Clock>) -> Self {
        Self::begin(lease, clock, Access::default(), None).await
    }

    /// A coordinator that asks for tokens, and calls with one.
    pub async fn start_guarded(lease: Duration, access: Access, token: &str) -> Self {
        Self::begin(lease, Arc::new(SystemClock::new()), access, Some(token)).await
    }

    async fn begin(lease: Duration, clock: Arc<dyn Clock>, access: Access, token: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (scope, endpoint) = serve(&dir, lease, clock.clone(), access.clone()).await;
        let channel = line(&endpoint, token).await;
        Self { dir, lease, clock, scope, access, endpoint, channel }
    }

    /// A connection of somebody else's.
    pub async fn line(&self, token: &str) -> Line {
        line(&self.endpoint, Some(token)).await
    }

    /// Ends the coordinator and starts another on the same directory.
    pub async fn restart(&mut self) {
        self.stop_and(|_| std::future::ready(())).await;
    }

    /// Ends the coordinator, does something to its directory, and starts another on it.
    pub async fn stop_and<F: Future<Output = ()>>(&mut self, work: impl FnOnce(std::path::PathBuf) -> F) {
        assert!(self.scope.finish(PATIENCE).await, "the coordinator did not end in time");
        work(self.dir().to_path_buf()).await;
        let begun = serve(&self.dir, self.lease, self.clock.clone(), self.access.clone()).await;
        (self.scope, self.endpoint) = begun;
        self.channel = line(&self.endpoint, None).await;
    }

    /// Where it serves, as `host:port`.
    pub fn address(&self) -> &str {
        self.endpoint.trim_start_matches("http://")
    }

    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub fn sweeps(&self) -> SweepServiceClient<Line> {
        SweepServiceClient::new(self.channel.clone())
    }

    pub fn trials(&self) -> TrialServiceClient<Line> {
        TrialServiceClient::new(self.channel.clone())
    }

    pub fn adapters(&self) -> AdapterServiceClient<Line> {
        AdapterServiceClient::new(self.channel.clone())
    }

    pub fn fleet(&self) -> FleetServiceClient<Line> {
        FleetServiceClient::new(self.channel.clone())
    }

    pub async fn submit_as(&self, request_id: &str, document: &Value) -> Result<v1::Sweep, Status> {
        let spec = Some(convert::to_struct(document.as_object().unwrap()));
        let request = v1::SubmitSweepRequest {
            request_id: request_id.into(),
            spec,
            base_models: [("/models/a".to_string(), shape())].into(),
        };
        Ok(self.sweeps().submit_sweep(request).await?.into_inner().sweep.unwrap())
    }

    pub async fn submit(&self, document: &Value) -> v1::Sweep {
        self.submit_as(&uuid::Uuid::new_v4().to_string(), document).await.unwrap()
    }

    pub async fn sweep(&self, id: &str) -> v1::Sweep {
        let request = v1::GetSweepRequest { sweep_id: id.into() };
        self.sweeps().get_sweep(request).await.unwrap().into_inner().sweep.unwrap()
    }

    pub async fn trial(&self, id: &str) -> v1::Trial {
        let request = v1::GetTrialRequest { trial_id: id.into() };
        self.trials().get_trial(request).await.unwrap().into_inner().trial.unwrap()
    }

    /// Steps and losses of a trial's curve.
    pub async fn curve(&self, id: &str) -> Vec<(u64, f64)> {
        self.curve_from(id, 0).await
    }

    /// The same from a step on.
    pub async fn curve_from(&self, id: &str, first_step: u64) -> Vec<(u64, f64)> {
        let request = v1::GetTrialMetricsRequest { trial_id: id.into(), first_step };
        let mut stream = self.trials().get_trial_metrics(request).await.unwrap().into_inner();
        let mut curve = Vec::new();
        while let Some(response) = stream.message().await.unwrap() {
            curve.extend(response.points.into_iter().map(|p| (p.step, p.values[0].value)));
        }
        curve
    }

    pub async fn watch(&self, id: &str) -> Watch {
        let request = v1::WatchSweepRequest { sweep_id: id.into() };
        Watch(self.sweeps().watch_sweep(request).await.unwrap().into_inner())
    }
}

async fn serve(dir: &TempDir, lease: Duration, clock: Arc<dyn Clock>, access: Access) -> (Scope, String) {
    let scope = Scope::new();
    let options = Options {
        data_dir: dir.path().to_path_buf(),
        listen: "127.0.0.1:0".parse().unwrap(),
        clock,
        heartbeat: lease / 4,
        lease,
        access,
    };
    let Server { address, .. } = coordinator::start(options, scope.clone()).await.unwrap();
    (scope, format!("http://{address}"))
}

/// A connection, with a token or without one.
pub async fn line(endpoint: &str, token: Option<&str>) -> Line {
    let token = token.map(|token| Token::Given(Secret::from(token.to_string())));
    let client = Client { token, ..Client::default() };
    client.line(client.endpoint(endpoint).unwrap().connect().await.unwrap()).unwrap()
}

/// What a watcher hears.
pub struct Watch(Streaming<v1::WatchSweepResponse>);

impl Watch {
    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> Option<v1::watch_sweep_response::Event> {
        let message = tokio::time::timeout(PATIENCE, self.0.message()).await.expect("no event in time");
        message.unwrap().map(|response| response.event.unwrap())
    }

    /// The trial's first state that `wanted` accepts.
    pub async fn trial(&mut self, id: &str, wanted: impl Fn(&v1::Trial) -> bool) -> v1::Trial {
        loop {
            if let v1::watch_sweep_response::Event::Trial(trial) =
                self.next().await.expect("the sweep is over")
                && trial.id == id
                && wanted(&trial)
            {
                return trial;
            }
        }
    }

    /// The sweep as it stands when it is over.
    pub async fn end(&mut self) -> v1::Sweep {
        let mut last = None;
        while let Some(event) = self.next().await {
            if let v1::watch_sweep_response::Event::Sweep(sweep) = event {
                last = Some(sweep);
            }
        }
        last.unwrap()
    }
}

/// The shape of the one base model that trials here name. At rank 2, 2 rows of 512 tokens, a trial needs at most
/// 0.07 GB beside its 0.02 GB.
pub fn shape() -> v1::ModelShape {
    v1::ModelShape {
        vocab_size: 1000,
        hidden_size: 256,
        intermediate_size: 688,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        head_dim: 32,
        tie_word_embeddings: false,
        ..v1::ModelShape::default()
    }
}

/// A sweep document: a grid over the ranks, six steps a trial.
pub fn grid(ranks: &[u32]) -> Value {
    json!({
        "name": "grid", "pretrained_model_id": "/models/a", "dataset_name": "/data/a.jsonl", "max_steps": 6,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": ranks},
    })
}

/// Successive halving from step 1 on over two trials, each halving.
pub fn halving() -> Value {
    json!({
        "name": "halving", "pretrained_model_id": "/models/a", "dataset_name": "/data/a.jsonl",
        "max_steps": 6, "parameters": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}},
        "search": {"algorithm": "asha", "max_trials": 2, "min_steps": 1, "reduction_factor": 2, "seed": 1},
    })
}

/// Writes a file of tokens, each of which is called like its owner.
pub fn write_tokens(path: &Path, known: &[(&str, Role)]) {
    let line = |(name, role): &(&str, Role)| tokens::line(&Principal::new(*name, *role), &tokens::hash(name));
    std::fs::write(path, known.iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
}

/// A server that knows the tokens of a file.
pub fn access_by(path: &Path) -> Access {
    let file = path.to_path_buf();
    let load = move || Ok::<_, FileError>(Tokens::parse(&std::fs::read_to_string(&file).unwrap()).unwrap());
    let tokens = Watched::open(vec![path.into()], load).unwrap();
    Access { tokens: Some(Arc::new(tokens)), ..Access::default() }
}
