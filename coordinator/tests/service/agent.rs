//! A fake agent: it speaks the real protocol over a real connection, and trains nothing.

use super::fixture::{Fixture, PATIENCE};
use actor::Scope;
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::session_request::Message as Say;
use proto::v1::session_response::Message as Hear;
use proto::v1::trial_event::Event;
use security::Line;
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

pub struct FakeAgent {
    client: AgentServiceClient<Line>,
    say: mpsc::Sender<v1::SessionRequest>,
    hear: Streaming<v1::SessionResponse>,
    holdings: Arc<Mutex<Vec<v1::Holding>>>,
    heartbeats: Scope,
    sequence: u64,
    pub welcome: v1::Welcome,
}

impl Drop for FakeAgent {
    fn drop(&mut self) {
        self.heartbeats.cancel();
    }
}

/// An agent with one device on which `pack` trials may train together, at 3.60 dollars an hour.
pub fn hello(id: &str, pack: u32, holdings: Vec<v1::Holding>) -> v1::Hello {
    let device = v1::Device {
        id: "cpu".into(),
        accelerator: "CPU".into(),
        memory_bytes: 1 << 30,
        max_pack_size: pack,
        price_per_hour: 3.6,
        price_from: None,
        resident_base: String::new(),
        simulated_speed: 0.0,
        compute_capability: String::new(),
    };
    let version = proto::version::VERSION.into();
    let understands = proto::convert::understood(domain::fleet::Feature::OF_AGENTS);
    let agent =
        v1::Agent { id: id.into(), version, devices: vec![device], understands, ..v1::Agent::default() };
    v1::Hello { agent: Some(agent), holdings }
}

pub fn holding(assign: &v1::Assign, step: u64) -> v1::Holding {
    v1::Holding { trial_id: assign.trial_id.clone(), attempt: assign.attempt, step, held_seconds: None }
}

impl FakeAgent {
    pub async fn connect(fixture: &Fixture, hello: v1::Hello) -> Self {
        Self::connect_over(fixture.channel.clone(), hello).await
    }

    pub async fn connect_over(line: Line, hello: v1::Hello) -> Self {
        let mut client = AgentServiceClient::new(line);
        let (say, outgoing) = mpsc::channel(64);
        let holdings = Arc::new(Mutex::new(hello.holdings.clone()));
        say.send(v1::SessionRequest { message: Some(Say::Hello(hello)) }).await.unwrap();
        let mut hear = client.session(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        let Some(Hear::Welcome(welcome)) = hear.message().await.unwrap().unwrap().message else {
            panic!("no welcome");
        };
        let heartbeats = Scope::new();
        let (scope, beat, held) = (heartbeats.clone(), say.clone(), holdings.clone());
        let every = Duration::from_secs_f64(welcome.heartbeat_seconds);
        heartbeats.spawn("heartbeats", async move {
            let mut tick = tokio::time::interval(every);
            loop {
                tokio::select! {
                    () = scope.cancelled() => return,
                    _ = tick.tick() => {}
                }
                let holdings = held.lock().unwrap().clone();
                let heartbeat = v1::Heartbeat { holdings, ..v1::Heartbeat::default() };
                let message = v1::SessionRequest { message: Some(Say::Heartbeat(heartbeat)) };
                if beat.send(message).await.is_err() {
                    return;
                }
            }
        });
        Self { client, say, hear, holdings, heartbeats, sequence: 0, welcome }
    }

    pub async fn say(&self, message: Say) {
        self.say.send(v1::SessionRequest { message: Some(message) }).await.unwrap();
    }

    pub async fn hear(&mut self) -> Result<Hear, Status> {
        let message = tokio::time::timeout(PATIENCE, self.hear.message()).await.expect("nothing in time");
        message?.and_then(|m| m.message).ok_or_else(|| Status::cancelled("the stream ended"))
    }

    /// The next assignment, held from now on.
    pub async fn assigned(&mut self) -> v1::Assign {
        loop {
            if let Hear::Assign(assign) = self.hear().await.unwrap() {
                self.holdings.lock().unwrap().push(holding(&assign, 0));
                return assign;
            }
        }
    }

    /// The next stop.
    pub async fn stopped(&mut self) -> v1::Stop {
        loop {
            if let Hear::Stop(stop) = self.hear().await.unwrap() {
                return stop;
            }
        }
    }

    /// Lets go of each trial that it is told to stop, without a word, until its stream ends.
    pub async fn obey(mut self) {
        while let Ok(Some(message)) = self.hear.message().await {
            if let Some(Hear::Stop(stop)) = message.message {
                self.holdings.lock().unwrap().retain(|held| held.trial_id != stop.trial_id);
            }
        }
    }

    /// Waits for the acknowledgement of what was said last. Answers with a stop that came before it.
    pub async fn acknowledged(&mut self) -> Option<v1::Stop> {
        let mut stopped = None;
        loop {
            match self.hear().await.unwrap() {
                Hear::Acknowledge(ack) if ack.sequence == self.sequence => return stopped,
                Hear::Stop(stop) => stopped = Some(stop),
                Hear::Assign(assign) => panic!("an assignment that the test does not await: {assign:?}"),
                _ => {}
            }
        }
    }

    pub async fn event(&mut self, assign: &v1::Assign, event: Event) {
        self.sequence += 1;
        let (trial_id, attempt, sequence) = (assign.trial_id.clone(), assign.attempt, self.sequence);
        self.say(Say::Event(v1::TrialEvent { trial_id, attempt, sequence, event: Some(event) })).await;
    }

    pub async fn start(&mut self, assign: &v1::Assign) {
        let digest = |text: &str| format!("sha256:{text}");
        let digests = v1::Digests {
            base_model: digest("b"),
            dataset: digest("d"),
            tokenizer: digest("t"),
            spec: digest("s"),
            documents: String::new(),
        };
        let start_step = assign.resume_step.unwrap_or(0);
        let started = v1::Started { total_steps: 6, start_step, digests: Some(digests) };
        self.event(assign, Event::Started(started)).await;
        self.acknowledged().await;
    }

    /// Sends points and waits until they are durable. Answers with a stop that came before.
    pub async fn points(&mut self, assign: &v1::Assign, points: &[(u64, f64)]) -> Option<v1::Stop> {
        let losses: Vec<_> = points.iter().map(|(step, loss)| (*step, [("eval/loss", *loss)])).collect();
        let points: Vec<_> = losses.iter().map(|(step, values)| (*step, &values[..])).collect();
        self.values(assign, &points).await
    }

    /// [`FakeAgent::points`] of any metrics.
    pub async fn values(
        &mut self,
        assign: &v1::Assign,
        points: &[(u64, &[(&str, f64)])],
    ) -> Option<v1::Stop> {
        self.sequence += 1;
        let value = |&(name, value): &(&str, f64)| v1::MetricValue { name: name.into(), value };
        let point = |(step, values): &(u64, &[(&str, f64)])| v1::MetricPoint {
            step: *step,
            time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            values: values.iter().map(value).collect(),
        };
        self.say(Say::Metrics(v1::MetricBatch {
            trial_id: assign.trial_id.clone(),
            attempt: assign.attempt,
            sequence: self.sequence,
            points: points.iter().map(point).collect(),
        }))
        .await;
        self.acknowledged().await
    }

    /// Reports the end of a trial, which is held no more.
    pub async fn finish(&mut self, assign: &v1::Assign, ending: v1::Ending, eval_loss: Option<f64>) {
        self.drop_holding(assign);
        let summary = v1::TrialSummary { steps: 6, eval_loss, ..v1::TrialSummary::default() };
        let finished =
            v1::Finished { ending: ending.into(), summary: Some(summary), message: "loss is NaN".into() };
        self.event(assign, Event::Finished(finished)).await;
    }

    pub fn drop_holding(&self, assign: &v1::Assign) {
        self.holdings.lock().unwrap().retain(|h| h.trial_id != assign.trial_id);
    }

    /// Trains a trial from its start to its end, with a checkpoint, at a loss that `loss` gives for each step.
    pub async fn train(&mut self, assign: &v1::Assign, loss: f64) {
        self.start(assign).await;
        let points: Vec<_> = (1..=6).map(|step| (step, loss + 1.0 / step as f64)).collect();
        self.points(assign, &points).await;
        self.upload(assign, 6).await.unwrap();
        self.finish(assign, v1::Ending::Completed, Some(loss)).await;
    }

    /// The bytes of the two files of a checkpoint.
    pub fn files(assign: &v1::Assign, step: u64) -> [(v1::CheckpointPart, &'static str, Vec<u8>); 2] {
        let text = |part: &str| format!("{part} of {} at {step}", assign.trial_id).into_bytes();
        [
            (v1::CheckpointPart::Adapter, "adapter_model.safetensors", text("adapter")),
            (v1::CheckpointPart::Resume, "state.safetensors", text("resume").repeat(100_000)),
        ]
    }

    pub async fn upload(&mut self, assign: &v1::Assign, step: u64) -> Result<(), Status> {
        self.client.upload_checkpoint(tokio_stream::iter(Self::pieces(assign, step))).await?;
        Ok(())
    }

    /// Begins the upload of a checkpoint whose pieces are sent one by one.
    pub fn begin_upload(
        &self,
        pieces: mpsc::Receiver<v1::UploadCheckpointRequest>,
    ) -> impl Future<Output = Result<(), Status>> + use<> {
        let mut client = self.client.clone();
        async move { client.upload_checkpoint(ReceiverStream::new(pieces)).await.map(drop) }
    }

    /// The messages of a checkpoint's upload.
    pub fn pieces(assign: &v1::Assign, step: u64) -> Vec<v1::UploadCheckpointRequest> {
        let files = Self::files(assign, step);
        let described = files.iter().map(|(part, name, data)| v1::CheckpointFile {
            part: (*part).into(),
            name: (*name).into(),
            bytes: data.len() as u64,
            sha256: Sha256::digest(data).to_vec(),
        });
        let header = v1::CheckpointHeader {
            trial_id: assign.trial_id.clone(),
            attempt: assign.attempt,
            step,
            files: described.collect(),
        };
        use v1::upload_checkpoint_request::Piece;
        let mut pieces = vec![Piece::Header(header)];
        for (_, _, data) in files {
            pieces.extend(data.chunks(1 << 20).map(|chunk| Piece::Data(chunk.to_vec().into())));
        }
        pieces.into_iter().map(|piece| v1::UploadCheckpointRequest { piece: Some(piece) }).collect()
    }

    /// The step and all bytes of the trial's newest checkpoint.
    pub async fn download(&mut self, assign: &v1::Assign) -> Result<(u64, Vec<u8>), Status> {
        use v1::download_checkpoint_response::Piece;
        let request =
            v1::DownloadCheckpointRequest { trial_id: assign.trial_id.clone(), attempt: assign.attempt };
        let mut stream = self.client.download_checkpoint(request).await?.into_inner();
        let Some(Piece::Header(header)) = stream.message().await?.unwrap().piece else { panic!("no header") };
        let mut bytes = Vec::new();
        while let Some(Piece::Data(data)) = stream.message().await?.and_then(|m| m.piece) {
            assert!(data.len() <= proto::CHUNK_BYTES);
            bytes.extend_from_slice(&data);
        }
        Ok((header.step, bytes))
    }
}
