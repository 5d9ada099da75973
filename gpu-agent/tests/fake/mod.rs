//! A coordinator that a test plays by hand, over real gRPC on loopback.

use actor::Scope;
use bytes::Bytes;
use domain::data::{ContentHash, Tree, TreeFile};
use domain::fleet::Feature;
use domain::trial::TrialConfig;
use gpu_agent::Assignment;
use proto::convert::data::{files, hash, to_hash};
use proto::status::RpcError;
use proto::v1;
use proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use proto::v1::data_service_server::{DataService, DataServiceServer};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use v1::session_request::Message as Up;
use v1::session_response::Message as Down;
use v1::trial_event::Event;

/// Longer than anything takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// A checkpoint that was uploaded.
#[derive(Debug, Clone)]
pub struct Uploaded {
    pub header: v1::CheckpointHeader,
    pub bytes: Vec<Vec<u8>>,
}

/// What uploads find.
#[derive(Debug, Default)]
pub struct Shelf {
    /// Checkpoints in the order in which they came.
    pub uploads: Vec<Uploaded>,
    /// Who leads instead: it takes no agent in, and says so.
    pub leader: Option<String>,
    /// Answers to the next uploads; without one they succeed.
    pub refusals: VecDeque<Code>,
    /// What the next downloads of checkpoints end with, once the first file has begun; without one they succeed.
    pub download_refusals: VecDeque<Status>,
    /// Largest step whose metrics were acknowledged, by assignment.
    pub acknowledged: BTreeMap<Assignment, u64>,
    /// Data that was uploaded by submitters.
    pub trees: Vec<Tree>,
    pub files: BTreeMap<ContentHash, Vec<u8>>,
    /// Answers to the next who ask for it; without one they get it.
    pub data_refusals: VecDeque<Code>,
}

impl Shelf {
    /// Has data of one file be there; answers with its id.
    pub fn add(&mut self, name: &str, data: &[u8]) -> ContentHash {
        let sha256 = ContentHash::of(data);
        self.files.insert(sha256, data.to_vec());
        let file = TreeFile { name: name.into(), bytes: data.len() as u64, sha256 };
        let tree = Tree::new(vec![file]).unwrap();
        self.trees.push(tree.clone());
        tree.id()
    }
}

#[derive(Clone)]
struct Service {
    connections: mpsc::Sender<Connection>,
    shelf: Arc<Mutex<Shelf>>,
}

/// The coordinator.
pub struct Fake {
    pub endpoint: String,
    pub shelf: Arc<Mutex<Shelf>>,
    connections: mpsc::Receiver<Connection>,
}

impl Fake {
    pub async fn start(scope: &Scope) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (sender, connections) = mpsc::channel(1);
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let service = Service { connections: sender, shelf: shelf.clone() };
        let server = tonic::transport::Server::builder()
            .add_service(DataServiceServer::new(service.clone()))
            .add_service(AgentServiceServer::new(service));
        let stop = scope.clone();
        scope.spawn("fake coordinator", async move {
            tokio::select! {
                served = server.serve_with_incoming(TcpListenerStream::new(listener)) => served.unwrap(),
                () = stop.cancelled() => {}
            }
        });
        Self { endpoint, shelf, connections }
    }

    /// The agent's next connection, up to its `Hello`.
    pub async fn accept(&mut self) -> (Connection, v1::Hello) {
        let mut connection = soon("a connection", self.connections.recv()).await.expect("the server lives");
        match connection.next().await {
            Up::Hello(hello) => (connection, hello),
            other => panic!("Hello comes first, not {other:?}"),
        }
    }

    /// The agent's next connection, welcomed.
    pub async fn welcome(&mut self) -> Connection {
        let (connection, _) = self.accept().await;
        connection.welcome(Vec::new()).await;
        connection
    }

    /// Steps of a trial's uploads, in order.
    pub fn uploaded_steps(&self, assignment: &Assignment) -> Vec<u64> {
        let of = |u: &&Uploaded| u.header.trial_id == assignment.trial.as_str();
        self.shelf.lock().unwrap().uploads.iter().filter(of).map(|u| u.header.step).collect()
    }
}

/// One session.
pub struct Connection {
    requests: Streaming<v1::SessionRequest>,
    responses: mpsc::Sender<Result<v1::SessionResponse, Status>>,
    shelf: Arc<Mutex<Shelf>>,
}

/// What a trial said until its last word.
#[derive(Debug, Default)]
pub struct Heard {
    pub started: Option<v1::Started>,
    /// Steps of its points; each must come after those before it.
    pub steps: Vec<u64>,
    pub last: Option<Event>,
    /// What it said for its log.
    pub notes: Vec<v1::Note>,
    /// Number of the newest message.
    pub sequence: u64,
}

impl Heard {
    /// A word for how it ended.
    pub fn ending(&self) -> String {
        match self.last.as_ref().expect("it ended") {
            Event::Finished(finished) => format!("{:?}", finished.ending()).to_lowercase(),
            Event::Failed(failure) => format!("failed {:?}", failure.class()).to_lowercase(),
            Event::Released(_) => "released".into(),
            Event::Started(_) | Event::Noted(_) => "not ended".into(),
        }
    }

    /// What it said about its end.
    pub fn message(&self) -> &str {
        match self.last.as_ref().expect("it ended") {
            Event::Finished(finished) => &finished.message,
            Event::Failed(failure) => &failure.message,
            Event::Released(released) => &released.reason,
            Event::Started(_) | Event::Noted(_) => "",
        }
    }

    fn take(&mut self, message: &Up) {
        let (sequence, points, event) = match message {
            Up::Metrics(batch) => (batch.sequence, &batch.points[..], None),
            Up::Event(event) => (event.sequence, &[][..], event.event.clone()),
            _ => return,
        };
        if sequence <= self.sequence {
            return; // A repetition.
        }
        assert_eq!(sequence, self.sequence + 1, "no message is left out");
        self.sequence = sequence;
        self.steps.extend(points.iter().map(|point| point.step));
        match event {
            Some(Event::Started(started)) => self.started = Some(started),
            Some(Event::Noted(note)) => self.notes.push(note),
            other => self.last = other.or(self.last.take()),
        }
    }
}

impl Connection {
    pub async fn next(&mut self) -> Up {
        soon("a message", self.requests.message())
            .await
            .expect("the stream is sound")
            .expect("the stream is open")
            .message
            .expect("a message says something")
    }

    pub async fn send(&self, message: Down) {
        let response = v1::SessionResponse { message: Some(message) };
        self.responses.send(Ok(response)).await.expect("the agent listens");
    }

    pub async fn welcome(&self, drop: Vec<v1::Holding>) {
        self.welcome_as(drop, &Feature::OF_COORDINATORS).await;
    }

    /// As a coordinator of a version that understands this.
    pub async fn welcome_as(&self, drop: Vec<v1::Holding>, understands: &[Feature]) {
        let (heartbeat_seconds, lease_seconds) = (0.05, 5.0);
        let understands = proto::convert::understood(understands.iter().copied());
        let version = "fake".into();
        let welcome = v1::Welcome { version, heartbeat_seconds, lease_seconds, drop, understands };
        self.send(Down::Welcome(welcome)).await;
    }

    pub async fn assign(&self, assignment: &Assignment, config: &TrialConfig) {
        self.send(Down::Assign(assign(assignment, config))).await;
    }

    pub async fn stop(&self, assignment: &Assignment, reason: v1::StopReason) {
        let (trial_id, attempt) = (assignment.trial.to_string(), assignment.attempt.0);
        self.send(Down::Stop(v1::Stop { trial_id, attempt, reason: reason.into() })).await;
    }

    /// Acknowledges a message.
    pub async fn acknowledge(&self, message: &Up) {
        let (trial_id, attempt, sequence) = match message {
            Up::Metrics(batch) => (batch.trial_id.clone(), batch.attempt, batch.sequence),
            Up::Event(event) => (event.trial_id.clone(), event.attempt, event.sequence),
            _ => return,
        };
        if let Up::Metrics(batch) = message
            && let Some(last) = batch.points.last()
        {
            let key = Assignment::new(trial_id.clone(), attempt);
            self.shelf.lock().unwrap().acknowledged.insert(key, last.step);
        }
        self.send(Down::Acknowledge(v1::Acknowledge { trial_id, attempt, sequence })).await;
    }

    /// The next message about a trial, acknowledged; heartbeats and other trials are passed by.
    pub async fn hear(&mut self, assignment: &Assignment, heard: &mut Heard) -> Up {
        loop {
            let message = self.next().await;
            let about = match &message {
                Up::Metrics(batch) => Assignment::new(batch.trial_id.clone(), batch.attempt),
                Up::Event(event) => Assignment::new(event.trial_id.clone(), event.attempt),
                _ => continue,
            };
            self.acknowledge(&message).await;
            if about == *assignment {
                heard.take(&message);
                return message;
            }
        }
    }

    /// Hears a trial out to its first points.
    pub async fn hear_points(&mut self, assignment: &Assignment, heard: &mut Heard) {
        while !matches!(self.hear(assignment, heard).await, Up::Metrics(_)) {}
    }

    /// Hears a trial out to its last word.
    pub async fn hear_out(&mut self, assignment: &Assignment, heard: &mut Heard) {
        while heard.last.is_none() {
            self.hear(assignment, heard).await;
        }
    }

    /// The holdings of the next heartbeat.
    pub async fn heartbeat(&mut self) -> v1::Heartbeat {
        loop {
            let message = self.next().await;
            self.acknowledge(&message).await;
            if let Up::Heartbeat(heartbeat) = message {
                return heartbeat;
            }
        }
    }

    /// Returns once a heartbeat names exactly these assignments.
    pub async fn until_held(&mut self, assignments: &[&Assignment]) {
        let wanted: Vec<_> = assignments.iter().map(|a| (*a).clone()).collect();
        loop {
            let held = self.heartbeat().await.holdings;
            let held: Vec<_> = held.into_iter().map(|h| Assignment::new(h.trial_id, h.attempt)).collect();
            if held == wanted {
                return;
            }
        }
    }
}

pub fn assign(assignment: &Assignment, config: &TrialConfig) -> v1::Assign {
    v1::Assign {
        trial_id: assignment.trial.to_string(),
        attempt: assignment.attempt.0,
        device_id: "cpu".into(),
        config: Some(proto::convert::document(config)),
        resume_step: None,
        digests: None,
        predicted_peak_memory_bytes: 1_000,
        traceparent: String::new(),
        evaluations: None,
    }
}

#[tonic::async_trait]
impl AgentService for Service {
    type SessionStream = ReceiverStream<Result<v1::SessionResponse, Status>>;
    type DownloadCheckpointStream = ReceiverStream<Result<v1::DownloadCheckpointResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        if let Some(leader) = self.shelf.lock().unwrap().leader.clone() {
            return Err(RpcError::Standby(Ok(Some(leader))).into());
        }
        let (responses, stream) = mpsc::channel(1024);
        let connection = Connection { requests: request.into_inner(), responses, shelf: self.shelf.clone() };
        self.connections.send(connection).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn upload_checkpoint(
        &self,
        request: Request<Streaming<v1::UploadCheckpointRequest>>,
    ) -> Result<Response<v1::UploadCheckpointResponse>, Status> {
        use v1::upload_checkpoint_request::Piece;
        if let Some(code) = self.shelf.lock().unwrap().refusals.pop_front() {
            return Err(Status::new(code, "on purpose"));
        }
        let mut stream = request.into_inner();
        let Some(Piece::Header(header)) = stream.message().await?.and_then(|m| m.piece) else {
            return Err(Status::invalid_argument("no header"));
        };
        let mut bytes = Vec::new();
        for file in &header.files {
            let mut content: Vec<u8> = Vec::new();
            while (content.len() as u64) < file.bytes {
                let Some(Piece::Data(data)) = stream.message().await?.and_then(|m| m.piece) else {
                    return Err(Status::data_loss("cut off"));
                };
                assert!(data.len() <= proto::CHUNK_BYTES);
                content.extend(data);
            }
            assert_eq!(content.len() as u64, file.bytes, "no piece across two files");
            assert_eq!(Sha256::digest(&content).as_slice(), file.sha256);
            bytes.push(content);
        }
        assert!(stream.message().await?.is_none(), "nothing behind the last file");
        let mut shelf = self.shelf.lock().unwrap();
        let assignment = Assignment::new(header.trial_id.clone(), header.attempt);
        let acknowledged = shelf.acknowledged.get(&assignment).copied().unwrap_or(0);
        assert!(header.step <= acknowledged, "step {} uploaded, {acknowledged} acknowledged", header.step);
        shelf.uploads.push(Uploaded { header, bytes });
        Ok(Response::new(v1::UploadCheckpointResponse::default()))
    }

    async fn download_checkpoint(
        &self,
        request: Request<v1::DownloadCheckpointRequest>,
    ) -> Result<Response<Self::DownloadCheckpointStream>, Status> {
        use v1::download_checkpoint_response::Piece;
        let trial = request.into_inner().trial_id;
        let mut shelf = self.shelf.lock().unwrap();
        let found = shelf.uploads.iter().rev().find(|u| u.header.trial_id == trial);
        let Uploaded { header, bytes } = found.cloned().ok_or_else(|| Status::not_found(trial))?;
        let (sender, stream) = mpsc::channel(64);
        if let Some(refusal) = shelf.download_refusals.pop_front() {
            let header = v1::DownloadCheckpointResponse { piece: Some(Piece::Header(header)) };
            sender.try_send(Ok(header)).unwrap();
            sender.try_send(Err(refusal)).unwrap();
            return Ok(Response::new(ReceiverStream::new(stream)));
        }
        let data = bytes.into_iter().filter(|b| !b.is_empty()).map(|b| Piece::Data(Bytes::from(b)));
        for piece in std::iter::once(Piece::Header(header)).chain(data) {
            sender.try_send(Ok(v1::DownloadCheckpointResponse { piece: Some(piece) })).unwrap();
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

#[tonic::async_trait]
impl DataService for Service {
    type DownloadFileStream = ReceiverStream<Result<v1::DownloadFileResponse, Status>>;

    async fn get_tree(
        &self,
        request: Request<v1::GetTreeRequest>,
    ) -> Result<Response<v1::GetTreeResponse>, Status> {
        let mut shelf = self.shelf.lock().unwrap();
        if let Some(code) = shelf.data_refusals.pop_front() {
            return Err(Status::new(code, "on purpose"));
        }
        let id = request.into_inner().id;
        let tree = shelf.trees.iter().find(|tree| hash(tree.id()) == id);
        let tree = tree.ok_or_else(|| Status::not_found("no such tree"))?;
        Ok(Response::new(v1::GetTreeResponse { files: files(tree) }))
    }

    async fn download_file(
        &self,
        request: Request<v1::DownloadFileRequest>,
    ) -> Result<Response<Self::DownloadFileStream>, Status> {
        let request = request.into_inner();
        let file = to_hash("sha256", &request.sha256)?;
        let data = self.shelf.lock().unwrap().files[&file][request.offset as usize..].to_vec();
        let (sender, stream) = mpsc::channel(1);
        sender.try_send(Ok(v1::DownloadFileResponse { data: data.into() })).unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn find_missing(
        &self,
        _: Request<v1::FindMissingRequest>,
    ) -> Result<Response<v1::FindMissingResponse>, Status> {
        Err(Status::permission_denied("no agent uploads"))
    }

    async fn upload_file(
        &self,
        _: Request<Streaming<v1::UploadFileRequest>>,
    ) -> Result<Response<v1::UploadFileResponse>, Status> {
        Err(Status::permission_denied("no agent uploads"))
    }

    async fn commit_tree(
        &self,
        _: Request<v1::CommitTreeRequest>,
    ) -> Result<Response<v1::CommitTreeResponse>, Status> {
        Err(Status::permission_denied("no agent uploads"))
    }
}
