//! Bytes that are no messages, to every call that the server describes.

use super::agent::{FakeAgent, hello, holding};
use super::fixture::{Fixture, LONG, PATIENCE, grid, shape};
use super::{check_refusal, check_serves, watch_for_panics};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use prost::Message;
use proto::v1::session_request::Message as Say;
use proto::{convert, v1};
use security::Line;
use std::time::Duration;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

/// Bytes may ask for a sweep's deletion by force, which is answered once its trials have ended: as their agent lets go of
/// them, when this lease ends. Shorter than [`PATIENCE`].
const LEASE: Duration = Duration::from_secs(15);

/// A codec whose messages are bytes.
#[derive(Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        use ::bytes::BufMut;
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        use ::bytes::Buf;
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}

/// The paths of all calls that reflection tells of.
pub fn methods() -> Vec<String> {
    let described = prost_types::FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut methods = Vec::new();
    for file in described.file {
        for service in &file.service {
            let name = |method: &prost_types::MethodDescriptorProto| {
                format!("/{}.{}/{}", file.package(), service.name(), method.name())
            };
            methods.extend(service.method.iter().map(name));
        }
    }
    methods
}

/// Sends messages to a call and reads its answers; of a call that follows something, the first.
pub async fn send(channel: &Line, method: &str, messages: Vec<Vec<u8>>) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = PathAndQuery::try_from(method).unwrap();
    let follows = method.ends_with("/WatchSweep") || method.ends_with("/GetTrialLog");
    let answer = async {
        let stream = tokio_stream::iter(messages);
        let mut answers = client.streaming(Request::new(stream), path, Raw).await?.into_inner();
        while answers.message().await?.is_some() && !follows {}
        Ok(())
    };
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| panic!("{method} does not answer"))
}

/// Messages that mean something, from which the nearly right ones are made.
fn seeds(sweep: &str, assign: &v1::Assign) -> Vec<Vec<u8>> {
    let spec = Some(convert::to_struct(grid(&[2, 4]).as_object().unwrap()));
    let trial_id = assign.trial_id.clone();
    let event = |event| {
        let trial_id = assign.trial_id.clone();
        Some(Say::Event(v1::TrialEvent {
            trial_id,
            attempt: assign.attempt,
            sequence: 1,
            event: Some(event),
        }))
    };
    let point = v1::MetricPoint {
        step: 1,
        time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        values: vec![v1::MetricValue { name: "eval/loss".into(), value: 1.0 }],
    };
    let metrics = v1::MetricBatch {
        trial_id: trial_id.clone(),
        attempt: assign.attempt,
        sequence: 1,
        points: vec![point],
    };
    let finished =
        v1::Finished { ending: 1, summary: Some(v1::TrialSummary::default()), message: "m".into() };
    let started = v1::Started { total_steps: 6, start_step: 0, digests: None };
    let said = [
        Some(Say::Hello(hello("raw", 2, vec![holding(assign, 1)]))),
        Some(Say::Heartbeat(v1::Heartbeat {
            holdings: vec![holding(assign, 1)],
            ..v1::Heartbeat::default()
        })),
        Some(Say::Metrics(metrics)),
        event(v1::trial_event::Event::Started(started)),
        event(v1::trial_event::Event::Finished(finished)),
        event(v1::trial_event::Event::Released(v1::Released { reason: "r".into() })),
        event(v1::trial_event::Event::Noted(v1::Note { number: 1, severity: 2, message: "n".into() })),
    ];
    let file = v1::CheckpointFile {
        part: 1,
        name: "adapter_model.safetensors".into(),
        bytes: 9,
        sha256: vec![0; 32],
    };
    let header = v1::CheckpointHeader {
        trial_id: trial_id.clone(),
        attempt: assign.attempt,
        step: 1,
        files: vec![file],
    };
    let piece = Some(v1::upload_checkpoint_request::Piece::Header(header));
    let mut seeds: Vec<_> = said.map(|message| v1::SessionRequest { message }.encode_to_vec()).into();
    seeds.extend([
        v1::SubmitSweepRequest {
            request_id: "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001".into(),
            spec: spec.clone(),
            base_models: [("/models/a".to_string(), shape())].into(),
        }
        .encode_to_vec(),
        v1::ExtendSweepRequest {
            sweep_id: sweep.into(),
            request_id: "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a002".into(),
            spec,
        }
        .encode_to_vec(),
        v1::ListTrialsRequest {
            sweep_id: sweep.into(),
            page_size: 1,
            page_token: "0".into(),
            states: vec![1],
            without_config: false,
        }
        .encode_to_vec(),
        v1::ListSweepsRequest { page_size: 1, page_token: "00".into(), states: vec![1] }.encode_to_vec(),
        v1::GetTrialLogRequest { trial_id: trial_id.clone(), follow: true }.encode_to_vec(),
        v1::GetTrialRequest { trial_id }.encode_to_vec(),
        v1::DrainAgentRequest { agent_id: "a".into(), undo: false }.encode_to_vec(),
        v1::UploadCheckpointRequest { piece }.encode_to_vec(),
    ]);
    seeds
}

#[derive(Debug, Clone)]
enum Change {
    Set(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Repeat(Index),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            _ if bytes.is_empty() => {}
            Self::Set(at, value) => *at.get_mut(bytes) = *value,
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Repeat(at) => {
                let tail = bytes[at.index(bytes.len())..].to_vec();
                bytes.extend(tail);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Frame {
    Random(Vec<u8>),
    Nearly(Index, Vec<Change>),
}

fn frame() -> impl Strategy<Value = Frame> {
    let change = prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Change::Set(at, value)),
        1 => any::<Index>().prop_map(Change::Cut),
        1 => (any::<Index>(), vec(any::<u8>(), 1..20)).prop_map(|(at, more)| Change::Insert(at, more)),
        1 => any::<Index>().prop_map(Change::Repeat),
    ];
    prop_oneof![
        1 => vec(any::<u8>(), 0..200).prop_map(Frame::Random),
        4 => (any::<Index>(), vec(change, 0..4)).prop_map(|(seed, changes)| Frame::Nearly(seed, changes)),
    ]
}

#[test]
fn any_bytes_get_an_answer_from_every_call() {
    watch_for_panics();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (fixture, _agent, seeds) = runtime.block_on(async {
        let fixture = Fixture::start(LEASE).await;
        let sweep = fixture.submit(&grid(&[2, 4])).await;
        let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
        let assign = agent.assigned().await;
        let seeds = seeds(&sweep.id, &assign);
        let obeys = actor::Scope::new();
        obeys.spawn("agent", agent.obey());
        (fixture, obeys, seeds)
    });
    let methods = methods();
    assert!(methods.len() >= 20, "{methods:?}");
    let full = std::env::var_os("LORAFLEET_FULL").is_some();
    let cases = if full { 20_000 } else { 1_000 };
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let case = (any::<Index>(), vec(frame(), 0..4));
    let done = runner.run(&case, |(method, frames)| {
        let method = &methods[method.index(methods.len())];
        let bytes = frames.iter().map(|frame| match frame {
            Frame::Random(bytes) => bytes.clone(),
            Frame::Nearly(seed, changes) => {
                let mut bytes = seed.get(&seeds).clone();
                changes.iter().for_each(|change| change.apply(&mut bytes));
                bytes
            }
        });
        let answer = runtime.block_on(send(&fixture.channel, method, bytes.collect()));
        let code = answer.as_ref().err().map(Status::code);
        // A handler that panics shows as a broken stream.
        let broken = [Code::Unknown, Code::Unavailable, Code::Cancelled, Code::DeadlineExceeded];
        prop_assert!(code.is_none_or(|code| !broken.contains(&code)), "{}: {:?}", method, answer);
        Ok(())
    });
    done.unwrap();
    runtime.block_on(check_serves(&fixture));
}

/// A message beyond the limit is refused before it is held, and nesting without end is no recursion without end.
#[tokio::test]
async fn a_message_that_is_too_large_or_too_deep_is_refused() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let mut deep = prost_types::Value { kind: Some(prost_types::value::Kind::BoolValue(true)) };
    for _ in 0..80 {
        let values = vec![deep];
        deep = prost_types::Value {
            kind: Some(prost_types::value::Kind::ListValue(prost_types::ListValue { values })),
        };
    }
    let spec = Some(prost_types::Struct { fields: [("name".to_string(), deep)].into() });
    let deep = v1::SubmitSweepRequest { spec, ..v1::SubmitSweepRequest::default() }.encode_to_vec();
    let large = v1::GetSweepRequest { sweep_id: "x".repeat(5 << 20) }.encode_to_vec();
    for (message, is_large) in [(deep, false), (large, true)] {
        for method in methods() {
            // A call that takes nothing skips what it does not know.
            let answer = send(&fixture.channel, &method, vec![message.clone()]).await;
            // A session ends without a word where its connection's bytes are no messages.
            if (is_large || method.ends_with("/SubmitSweep")) && !method.ends_with("/Session") {
                let status = answer.unwrap_err();
                assert_eq!(status.code(), Code::InvalidArgument, "{method}: {status:?}");
                check_refusal(&method, &status);
            }
        }
        let none = send(&fixture.channel, "/lorafleet.v1.SweepService/None", vec![]).await.unwrap_err();
        assert_eq!(none.code(), Code::Unimplemented);
        assert!(none.get_error_details().error_info().is_some(), "{none:?}");
        check_serves(&fixture).await;
    }
}
