//! Agents that say what is not so. They may spoil the trial that was given to them, and nothing else.

use super::agent::{FakeAgent, hello, holding};
use super::fixture::{Fixture, LONG, PATIENCE, grid};
use super::{check_refusal, check_serves, watch_for_panics};
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::session_request::Message as Say;
use proto::v1::session_response::Message as Hear;
use proto::v1::trial_event::Event;
use proto::v1::upload_checkpoint_request::Piece;
use tonic::Status;

/// A point as nobody measures one.
fn point(step: u64, seconds: i64, nanos: i32, name: &str, value: f64) -> v1::MetricPoint {
    let values = vec![v1::MetricValue { name: name.into(), value }];
    v1::MetricPoint { step, time: Some(prost_types::Timestamp { seconds, nanos }), values }
}

fn metrics(trial: &str, attempt: u32, sequence: u64, points: Vec<v1::MetricPoint>) -> Say {
    Say::Metrics(v1::MetricBatch { trial_id: trial.into(), attempt, sequence, points })
}

fn event(trial: &str, attempt: u32, sequence: u64, event: Option<Event>) -> Say {
    Say::Event(v1::TrialEvent { trial_id: trial.into(), attempt, sequence, event })
}

/// What the server says until it has answered or ended the stream.
async fn answer(agent: &mut FakeAgent) -> Result<Hear, Status> {
    loop {
        match agent.hear().await {
            Ok(Hear::Assign(_)) => {}
            other => return other,
        }
    }
}

/// An agent that speaks of what was never its own is told to drop it, or its stream ends with the field's name.
#[tokio::test]
async fn what_is_not_an_agents_own_is_stopped() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await.id;
    let mut honest = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = honest.assigned().await;
    honest.start(&assign).await;
    let trial = assign.trial_id.clone();
    let long = "t".repeat(1 << 20);
    let released = || Some(Event::Released(v1::Released { reason: "r".into() }));
    let stops = [
        metrics(&trial, 2, 1, vec![point(1, 1, 0, "loss", 1.0)]),
        // The very attempt, and of another agent.
        metrics(&trial, 1, 1, vec![point(2, 1, 0, "loss", 9.0)]),
        event(&trial, 1, 1, released()),
        metrics(&trial, 0, 1, vec![]),
        metrics(&trial, u32::MAX, u64::MAX, vec![]),
        metrics(&format!("{sweep}/2"), 0, 1, vec![]),
        metrics(&format!("{sweep}/+1"), 1, 1, vec![]),
        metrics("../../1", 1, 1, vec![]),
        metrics("", 1, 1, vec![]),
        metrics(&long, 1, 1, vec![]),
        event(&trial, 7, 1, released()),
        event(&format!("{sweep}/77"), 1, 1, released()),
        event(&format!("{sweep}/01"), 1, 1, released()),
        event("nothing", 1, 1, released()),
    ];
    for said in stops {
        let what = format!("{said:?}").chars().take(120).collect::<String>();
        let mut liar = FakeAgent::connect(&fixture, hello("liar", 1, vec![holding(&assign, 3)])).await;
        liar.say(said).await;
        let heard = answer(&mut liar).await;
        assert!(
            matches!(&heard, Ok(Hear::Stop(stop)) if stop.reason() == v1::StopReason::Fenced),
            "{what}: {heard:?}"
        );
    }
    let ends = [
        Say::Hello(hello("liar", 1, vec![])),
        event(&trial, 1, 1, None),
        event(&trial, 1, 1, Some(Event::Finished(v1::Finished::default()))),
        event(&trial, 1, 1, Some(Event::Failed(v1::Failure::default()))),
        metrics(&trial, 1, 1, vec![v1::MetricPoint::default()]),
        metrics(&trial, 1, 1, vec![point(1, 1, 0, &"n".repeat(1 << 20), 1.0)]),
    ];
    for said in ends {
        let what = format!("{said:?}").chars().take(120).collect::<String>();
        let mut liar = FakeAgent::connect(&fixture, hello("liar", 1, vec![])).await;
        liar.say(said).await;
        check_refusal(&what, &answer(&mut liar).await.unwrap_err());
    }
    // The honest agent's trial is as it was.
    honest.points(&assign, &[(1, 3.0)]).await;
    assert_eq!(fixture.curve(&trial).await, [(1, 3.0)]);
    check_serves(&fixture).await;
}

/// A `Hello` of something that is no agent ends the stream with the field's name.
#[tokio::test]
async fn an_agent_that_cannot_be_is_not_let_in() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let device = hello("a", 1, vec![]).agent.unwrap().devices.remove(0);
    let version = || proto::version::VERSION.to_string();
    let agent = |id: &str, devices: Vec<v1::Device>| v1::Agent {
        id: id.into(),
        version: version(),
        devices,
        ..v1::Agent::default()
    };
    let with = |change: fn(&mut v1::Device)| {
        let mut changed = device.clone();
        change(&mut changed);
        agent("b", vec![changed])
    };
    for wrong in [
        agent("", vec![device.clone()]),
        v1::Agent { version: "99.0.0".into(), ..agent("b", vec![device.clone()]) },
        v1::Agent { version: "\0".repeat(1 << 20), ..agent("b", vec![device.clone()]) },
        agent("a\nb", vec![device.clone()]),
        agent("a\0b", vec![device.clone()]),
        agent(&"a".repeat(1 << 20), vec![device.clone()]),
        agent("b", vec![device.clone(); 50_000]),
        with(|d| d.id = String::new()),
        with(|d| d.id = "\u{1b}[2J".into()),
        with(|d| d.max_pack_size = 0),
        with(|d| d.price_per_hour = f64::NAN),
        with(|d| d.price_per_hour = f64::INFINITY),
        with(|d| d.price_per_hour = 1e300),
        with(|d| d.price_per_hour = -1.0),
    ] {
        let what = format!("{wrong:?}").chars().take(120).collect::<String>();
        let hello = v1::Hello { agent: Some(wrong), holdings: vec![] };
        let said = v1::SessionRequest { message: Some(Say::Hello(hello)) };
        let mut client = AgentServiceClient::new(fixture.channel.clone());
        let mut stream = client.session(tokio_stream::iter([said])).await.unwrap().into_inner();
        check_refusal(&what, &stream.message().await.expect_err(&what));
    }
    let agents = fixture.fleet().list_agents(v1::ListAgentsRequest::default()).await.unwrap();
    assert!(agents.into_inner().agents.is_empty());
    check_serves(&fixture).await;
}

/// Whatever an agent says of its own trial, the server goes on, and so does the next one on the same directory; the
/// sweep can be read and reported.
#[tokio::test]
async fn numbers_that_cannot_be_spoil_one_trial_at_most() {
    watch_for_panics();
    let mut fixture = Fixture::start(LONG).await;
    let odd = [0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, -1e300];
    let ranks: Vec<_> = (1..=odd.len() as u32 + 1).collect();
    let sweep = fixture.submit(&grid(&ranks)).await.id;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for odd in odd {
        let assign = agent.assigned().await;
        let (trial, attempt) = (assign.trial_id.clone(), assign.attempt);
        agent.start(&assign).await;
        let points = vec![
            point(0, i64::MAX, i32::MAX, "eval/loss", odd),
            point(1, i64::MIN, i32::MIN, "eval/loss", odd),
            point(1, 1, -1, "loss", 1.0),
            point(7, 1, 0, "eval/loss", odd),
            point(3, 1, 0, "\0\n</script>", odd),
        ];
        // The sequence goes back and leaps; each message is acknowledged by its own number.
        for sequence in [u64::MAX, 5, 0] {
            agent.say(metrics(&trial, attempt, sequence, points.clone())).await;
            let heard = answer(&mut agent).await;
            assert!(matches!(&heard, Ok(Hear::Acknowledge(ack)) if ack.sequence == sequence), "{heard:?}");
        }
        agent.upload(&assign, u64::MAX).await.unwrap();
        let summary = v1::TrialSummary {
            steps: u64::MAX,
            loss: Some(odd),
            eval_loss: Some(odd),
            base_eval_loss: Some(odd),
            peak_memory_bytes: Some(u64::MAX),
            predicted_peak_memory_bytes: Some(0),
            trainable_parameters: u64::MAX,
            total_parameters: 0,
            adapter_bytes: u64::MAX,
            samples_per_second: Some(odd),
            tokens_per_second: Some(odd),
            device_seconds: odd,
            sample_after: Some("<script>\0".into()),
            samples: vec![v1::SampleText { step: u64::MAX, text: "<script>\0".repeat(1 << 10) }; 100],
            ..v1::TrialSummary::default()
        };
        agent.drop_holding(&assign);
        let finished = v1::Finished { ending: 1, summary: Some(summary), message: "m".repeat(1 << 20) };
        agent.say(event(&trial, attempt, 1, Some(Event::Finished(finished)))).await;
        let heard = answer(&mut agent).await;
        assert!(matches!(&heard, Ok(Hear::Acknowledge(_))), "{odd}: {heard:?}");
        assert!(fixture.trial(&trial).await.state() == v1::TrialState::Completed, "{odd}");
    }
    // A failure with a message as long as a message may be leaves a trial that can still be read.
    let assign = agent.assigned().await;
    let failure = v1::Failure { class: 1, message: "é".repeat(2_000_000) };
    agent.event(&assign, Event::Failed(failure)).await;
    agent.acknowledged().await;
    for _ in 0..2 {
        let failed = fixture.trial(&assign.trial_id).await;
        let length = failed.failure.unwrap().message.len();
        assert!((1000..100_000).contains(&length), "{length}");
        for number in ranks.iter() {
            let request = v1::GetTrialMetricsRequest { trial_id: format!("{sweep}/{number}"), first_step: 0 };
            let mut stream = fixture.trials().get_trial_metrics(request).await.unwrap().into_inner();
            while stream.message().await.unwrap().is_some() {}
        }
        let request = v1::GetReportRequest { sweep_id: sweep.clone(), format: 0 };
        let mut report = fixture.sweeps().get_report(request).await.unwrap().into_inner();
        while tokio::time::timeout(PATIENCE, report.message()).await.unwrap().unwrap().is_some() {}
        let request = v1::ListTrialsRequest { sweep_id: sweep.clone(), ..v1::ListTrialsRequest::default() };
        let trials = fixture.trials().list_trials(request).await.unwrap().into_inner().trials;
        assert_eq!(trials.len(), ranks.len());
        assert!(fixture.sweep(&sweep).await.cost_usd.is_finite());
        check_serves(&fixture).await;
        fixture.restart().await;
    }
}

/// A trial of six steps has no more points than that, and no names without end; what it has stays.
#[tokio::test]
async fn points_that_no_trial_has_are_refused() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    let (trial, attempt) = (assign.trial_id.clone(), assign.attempt);
    let refused = async |started: bool, points: Vec<v1::MetricPoint>, part: &str| {
        let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![holding(&assign, 0)])).await;
        if started {
            agent.start(&assign).await;
        }
        agent.say(metrics(&trial, attempt, 9, points)).await;
        let status = answer(&mut agent).await.unwrap_err();
        check_refusal(part, &status);
        assert!(status.message().contains(part), "{status:?}");
    };
    let named = |step, number: u64| point(step, 1, 0, &format!("m{number}"), 1.0);
    let many =
        |from, count| (from..from + count).map(move |number| named(number % 7, number)).collect::<Vec<_>>();
    // Before it said how many steps it makes, and after.
    for started in [false, true] {
        for step in [8, 1 << 40, u64::MAX] {
            refused(started, vec![point(1, 1, 0, "loss", 1.0), point(step, 1, 0, "loss", 1.0)], "6 steps")
                .await;
        }
        refused(started, many(0, 101), "101 different sets of names").await;
    }
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![holding(&assign, 0)])).await;
    let heard = (0..=7).map(|step| named(step, step)).collect();
    agent.say(metrics(&trial, attempt, 9, heard)).await;
    let acknowledged = answer(&mut agent).await;
    assert!(matches!(&acknowledged, Ok(Hear::Acknowledge(_))), "{acknowledged:?}");
    // What came before counts.
    refused(true, many(8, 93), "101 different sets of names").await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![holding(&assign, 0)])).await;
    agent.say(metrics(&trial, attempt, 9, many(8, 92))).await;
    let acknowledged = answer(&mut agent).await;
    assert!(matches!(&acknowledged, Ok(Hear::Acknowledge(_))), "{acknowledged:?}");
    let request = v1::GetTrialMetricsRequest { trial_id: trial.clone(), first_step: 0 };
    let mut stream = fixture.trials().get_trial_metrics(request).await.unwrap().into_inner();
    let mut steps = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        steps.extend(part.points.iter().map(|point| point.step));
    }
    assert_eq!(steps, (0..=7).collect::<Vec<_>>());
    check_serves(&fixture).await;
}

#[tokio::test]
async fn a_checkpoint_that_cannot_be_is_refused_before_its_bytes() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    let file = |part: i32, name: &str, bytes: u64, sha: usize| v1::CheckpointFile {
        part,
        name: name.into(),
        bytes,
        sha256: vec![7; sha],
    };
    let good = || file(1, "adapter_model.safetensors", 3, 32);
    let named = |name: &str| vec![file(1, name, 3, 32)];
    let numbered = (0..20_000).map(|i| file(1, &format!("f{i}"), 0, 32)).collect();
    let cases: Vec<(&str, u32, Vec<v1::CheckpointFile>)> = vec![
        ("../../1", 1, vec![good()]),
        ("", 1, vec![good()]),
        (&assign.trial_id, 2, vec![good()]),
        (&assign.trial_id, u32::MAX, vec![good()]),
        (&assign.trial_id, 1, vec![]),
        (&assign.trial_id, 1, named("../adapter")),
        (&assign.trial_id, 1, named("/etc/passwd")),
        (&assign.trial_id, 1, named("manifest.json")),
        (&assign.trial_id, 1, named("a\0b")),
        (&assign.trial_id, 1, named("a\nb")),
        (&assign.trial_id, 1, named("")),
        (&assign.trial_id, 1, named(&"n".repeat(1 << 20))),
        (&assign.trial_id, 1, vec![good(), good()]),
        (&assign.trial_id, 1, vec![file(0, "a", 3, 32)]),
        (&assign.trial_id, 1, vec![file(99, "a", 3, 32)]),
        (&assign.trial_id, 1, vec![file(1, "a", 3, 31)]),
        (&assign.trial_id, 1, numbered),
        // A size is a promise, which nobody makes room for.
        (&assign.trial_id, 1, vec![file(1, "a", u64::MAX, 32), file(2, "b", u64::MAX, 32)]),
    ];
    let mut client = AgentServiceClient::new(fixture.channel.clone());
    for (trial_id, attempt, files) in cases {
        let what = format!("{trial_id} {attempt} {files:?}").chars().take(120).collect::<String>();
        let header = v1::CheckpointHeader { trial_id: trial_id.into(), attempt, step: 1, files };
        let pieces = [Piece::Header(header), Piece::Data(b"abc".to_vec().into())];
        let stream = pieces.map(|piece| v1::UploadCheckpointRequest { piece: Some(piece) });
        check_refusal(&what, &client.upload_checkpoint(tokio_stream::iter(stream)).await.expect_err(&what));
    }
    for pieces in [vec![], vec![None], vec![Some(Piece::Data(b"abc".to_vec().into()))]] {
        let stream: Vec<_> = pieces.into_iter().map(|piece| v1::UploadCheckpointRequest { piece }).collect();
        check_refusal("no header", &client.upload_checkpoint(tokio_stream::iter(stream)).await.unwrap_err());
    }
    let trial = fixture.trial(&assign.trial_id).await;
    assert!(trial.adapter.is_none() && trial.resume.is_none());
    agent.upload(&assign, 1).await.unwrap();
    check_serves(&fixture).await;
}
