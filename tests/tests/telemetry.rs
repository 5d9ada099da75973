//! What programs tell a collector: on every way out, and when it does not listen. This program is also those programs:
//! [`role`] is what they run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod otlp;

use domain::{Clock, SystemClock};
use otlp::{Collector, PATIENCE, TENANT, attribute, text};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use telemetry::{Instrument, Options, Settings};
use tests::certificates::Authority;

const ROLE: &str = "LORAFLEET_TEST_ROLE";
/// A secret that programs are told of and asked to log.
const SECRET: &str = "hf_planted-0123456789";
/// Spans that the program `many` tells of: more than a queue holds.
const MANY: usize = 20_000;

/// The role that is a part of another program, as the process of an engine.
const PART: &str = "is a part";

const OPTIONS: Options = Options { service: "tested", version: "0", level: "info", scraped: true };

/// What the programs run; nothing when the tests are run.
#[test]
fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == PART {
        let _ = telemetry::program::run_quietly(&OPTIONS, || {
            telemetry::metrics::LEASE_RENEWALS.add(3.0, &[]);
            let attempt = telemetry::trace::TrialTrace::of("a", 1).attempt(1);
            let _ = telemetry::trace::Span { name: "something", ..Default::default() }.tell(attempt);
            telemetry::trace::at_place(Some(attempt), || tracing::info!("logged with {SECRET}"));
            Ok(())
        });
        return;
    }
    let work = async {
        let span = telemetry::trace::below(None, "something");
        async {
            telemetry::metrics::LEASE_RENEWALS.add(3.0, &[]);
            telemetry::trace::failed(&telemetry::trace::below(None, "something that fails"), SECRET);
            tracing::info!(token = SECRET, "logged with {SECRET}");
        }
        .instrument(span)
        .await;
        match role.as_str() {
            "returns" => Ok(()),
            "fails" => Err(telemetry::End::failed("on purpose")),
            "panics" => {
                // A thread that does not end must not keep it from its end.
                drop(tokio::task::spawn_blocking(std::thread::park));
                panic!("on purpose, with {SECRET}")
            }
            "waits" => {
                let mut interrupts = actor::Interrupts::new().unwrap();
                println!("ready");
                interrupts.next().await;
                Ok(())
            }
            _ => {
                for _ in 0..MANY {
                    drop(telemetry::trace::below(None, "one of many"));
                }
                println!("told all, dropped {}", dropped_by(&telemetry::http::text()));
                Ok(())
            }
        }
    };
    let _ = telemetry::program::run(&OPTIONS, work);
}

/// Spans that a full queue dropped, as `/metrics` has it.
fn dropped_by(text: &str) -> usize {
    let full = |line: &&str| {
        line.starts_with("otel_sdk_processor_span_processed") && line.contains("error_type=\"queue_full\"")
    };
    text.lines().find(full).and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0)
}

fn start(role: &str, variables: &[(&str, String)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role", "--nocapture"]).env(ROLE, role).env("HF_TOKEN", SECRET);
    spawn(&mut command, variables)
}

/// Starts a program that is told these variables alone of telemetry.
fn spawn(command: &mut Command, variables: &[(&str, String)]) -> Child {
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command.env_remove(telemetry::LOG).envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn output(child: Child) -> Output {
    child.wait_with_output().unwrap()
}

/// The variables that have a program send everything to a collector, and nothing before its end.
fn late(collector: &Collector) -> Vec<(&'static str, String)> {
    let mut variables = collector.variables();
    let often = ["OTEL_BSP_SCHEDULE_DELAY", "OTEL_BLRP_SCHEDULE_DELAY", "OTEL_METRIC_EXPORT_INTERVAL"];
    variables.extend(often.map(|name| (name, "3600000".to_string())));
    variables
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_out_loses_nothing() {
    for role in ["returns", "fails", "panics", "waits"] {
        let collector = Collector::start().await;
        let mut child = start(role, &late(&collector));
        // Kept to the end, so that the program can go on writing.
        let mut lines = None;
        if role == "waits" {
            let stdout = lines.insert(BufReader::new(child.stdout.take().unwrap()).lines());
            assert!(stdout.any(|line| line.unwrap().contains("ready")));
            assert!(collector.received().spans.is_empty());
            tests::signal(child.id(), "TERM");
        }
        let output = tokio::task::spawn_blocking(move || output(child)).await.unwrap();
        let received = collector.received();
        let spans: Vec<_> =
            received.spans.iter().map(|(of, span)| (of.as_str(), span.name.as_str())).collect();
        assert_eq!(spans, [("tested", "something that fails"), ("tested", "something")], "{role}");
        assert_eq!(received.spans[0].1.status.as_ref().unwrap().message, "[redacted]", "{role}");
        let span = &received.spans[1].1;

        // The log, here and on standard error: with the trace's id and without the secret.
        let logged = received.logs.iter().find(|(_, log)| text(log).starts_with("logged"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        let (_, log) = logged.unwrap_or_else(|| panic!("{role}: {:#?} {stderr}", received.logs));
        assert_eq!(text(log), "logged with [redacted]", "{role}");
        assert_eq!(attribute(&log.attributes, "token").as_deref(), Some("[redacted]"), "{role}");
        assert_eq!((&log.trace_id, &log.span_id), (&span.trace_id, &span.span_id), "{role}");
        assert!(!log.event_name.is_empty(), "{role}: {log:?}");
        assert!(!stderr.contains(SECRET), "{stderr}");
        let lines = stderr.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let line = lines.into_iter().find(|line| line["message"] == "logged with [redacted]").expect(role);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(line["trace_id"], hex(&span.trace_id), "{role}");
        let ended = received.logs.iter().any(|(_, log)| text(log).contains("on purpose"));
        assert_eq!(ended, ["fails", "panics"].contains(&role), "{role}");

        let renewals = received.metrics.iter().find(|(_, metric)| metric.name == "lorafleet.lease.renewals");
        assert_eq!(renewals.expect(role).1.unit, "{lease}");
    }
}

/// A verb that works alone has nothing to put in order, and no runtime that could hear of a signal: it ends at once, as one
/// that was interrupted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verb_that_a_signal_ends_loses_nothing_that_is_measured() {
    let collector = Collector::start().await;
    let mut command = Command::new(tests::program::path("lorafleet"));
    // More steps than anybody waits for, of few rows.
    command.args(["bench", "train", "--batch", "1", "--steps", "20000"]);
    let mut child = spawn(&mut command, &late(&collector));
    // Its name is there once it has a handler for the signal.
    let listens = |id| {
        let threads = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
        let mut names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
        names.any(|name| name == "interrupt\n")
    };
    let clock = SystemClock::new();
    while child.try_wait().unwrap().is_none() && !listens(child.id()) && clock.monotonic() < PATIENCE {
        std::thread::yield_now();
    }
    let before = collector.received().metrics.len();
    // Whatever is found, it is not left to go on.
    tests::signal(child.id(), "TERM");
    let output = tokio::task::spawn_blocking(move || output(child)).await.unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(before, 0, "it is the flush that sends them");
    let received = collector.received();
    assert!(received.metrics.iter().any(|(of, _)| of == "lorafleet"), "{received:#?}");
}

/// What the process of an engine logs is exported, at its place in a trial's trace; all else of it its agent tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_program_exports_its_log_alone() {
    let collector = Collector::start().await;
    let child = start(PART, &collector.variables());
    let output = tokio::task::spawn_blocking(move || output(child)).await.unwrap();
    let received = collector.received();
    assert!(received.spans.is_empty() && received.metrics.is_empty(), "{received:#?}");
    let logged = received.logs.iter().find(|(_, log)| text(log) == "logged with [redacted]");
    let (of, log) = logged.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(of, "tested");
    let attempt = telemetry::trace::TrialTrace::of("a", 1).attempt(1).to_string();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(attempt.contains(&format!("{}-{}", hex(&log.trace_id), hex(&log.span_id))), "{attempt} {log:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_reads_nothing_costs_no_time_and_what_is_lost_is_counted() {
    // It takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    for protocol in ["grpc", "http/protobuf"] {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.clone()),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.to_string()),
            ("OTEL_BSP_SCHEDULE_DELAY", "1".to_string()),
        ];
        let child = start("tells many", &variables);
        #[allow(clippy::disallowed_methods, reason = "a real process takes real time")]
        let started = Instant::now();
        let mut child = child;
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("told") {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "{protocol}: it ended before it had told");
        }
        let told = started.elapsed();
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        child.wait().unwrap();
        let ended = started.elapsed();
        // Many times as long as it takes, and shorter than a collector's time to answer.
        assert!(told < Duration::from_secs(5), "{protocol}: {told:?}");
        // All but what waits, and a batch or two on their way.
        let lost: usize = line.trim().rsplit_once(' ').unwrap().1.parse().unwrap();
        assert!((MANY - 2048 - 2 * 512..MANY).contains(&lost), "{protocol}: {lost}");
        let most = telemetry::FLUSH_LIMIT + Duration::from_secs(4);
        assert!(ended - told < most, "{protocol}: flushing took {:?}", ended - told);
    }
}

/// gRPC and HTTP, in plain and over TLS, with the headers that a collector asks for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_to_a_collector() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let pair = authority.issue("collector");
    for (protocol, has_tls, calls) in [
        ("grpc", false, "opentelemetry.proto.collector"),
        ("grpc", true, "opentelemetry.proto.collector"),
        ("http/protobuf", false, "/v1/"),
        ("http/protobuf", true, "/v1/"),
    ] {
        let way = format!("{protocol}, TLS: {has_tls}");
        let collector = match has_tls {
            true => Collector::with_certificate(&pair).await,
            false => Collector::start().await,
        };
        let mut variables = collector.variables();
        variables.push(("OTEL_EXPORTER_OTLP_PROTOCOL", protocol.into()));
        variables.push(("OTEL_EXPORTER_OTLP_HEADERS", format!("{TENANT}=loras")));
        if has_tls {
            variables.push(("OTEL_EXPORTER_OTLP_CERTIFICATE", authority.ca.display().to_string()));
        }
        let child = start("returns", &variables);
        let output = tokio::task::spawn_blocking(move || output(child)).await.unwrap();
        let received = collector.received();
        let why = || format!("{way}: {received:#?} {}", String::from_utf8_lossy(&output.stderr));
        assert!(received.spans.iter().any(|(_, span)| span.name == "something"), "{}", why());
        assert!(received.metrics.iter().any(|(_, m)| m.name == "lorafleet.lease.renewals"), "{}", why());
        assert!(received.logs.iter().any(|(_, log)| text(log) == "logged with [redacted]"), "{}", why());
        let expected = |(path, tenant): (&String, &Option<String>)| {
            path.contains(calls) && tenant.as_deref() == Some("loras")
        };
        assert!(received.calls.len() == 3 && received.calls.iter().all(expected), "{}", why());
    }
}

/// What is not to be sent, and who sends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_variables_say_is_done() {
    // (variables; whether spans, metrics and logs are sent)
    for (said, want) in [
        (vec![("OTEL_SDK_DISABLED", "true")], [false; 3]),
        (vec![("OTEL_TRACES_SAMPLER", "always_off")], [false, true, true]),
        (
            vec![("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0")],
            [false, true, true],
        ),
        (vec![("OTEL_METRICS_EXPORTER", "none")], [true, false, true]),
        (vec![("OTEL_LOGS_EXPORTER", "none")], [true, true, false]),
        (
            vec![
                ("OTEL_SERVICE_NAME", "tested"),
                ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab,service.instance.id=gpu7"),
            ],
            [true; 3],
        ),
    ] {
        let collector = Collector::start().await;
        let mut variables = collector.variables();
        variables.extend(said.iter().map(|(name, value)| (*name, value.to_string())));
        let child = start("returns", &variables);
        tokio::task::spawn_blocking(move || output(child)).await.unwrap();
        let received = collector.received();
        let sent = [!received.spans.is_empty(), !received.metrics.is_empty(), !received.logs.is_empty()];
        assert_eq!(sent, want, "{said:?}");
        let Some(resource) = received.resources.get("tested") else {
            assert_eq!(want, [false; 3], "{said:?}: {:?}", received.resources);
            continue;
        };
        let of = |key: &str| attribute(resource, key);
        let own =
            ["service.version", "service.instance.id", "host.name", "process.pid", "telemetry.sdk.version"];
        assert!(
            own.iter().all(|key| of(key).is_some_and(|value| !value.is_empty())),
            "{said:?}: {resource:?}"
        );
        if said.iter().any(|(name, _)| *name == "OTEL_RESOURCE_ATTRIBUTES") {
            let named = ["deployment.environment.name", "service.instance.id"].map(of);
            assert_eq!(named, ["lab", "gpu7"].map(|value| Some(value.to_string())));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_full_queue_drops_is_counted() {
    let collector = Collector::start().await;
    let mut variables = collector.variables();
    variables.push(("OTEL_BSP_MAX_QUEUE_SIZE", "16".into()));
    variables.push(("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16".into()));
    let child = start("tells many", &variables);
    tokio::task::spawn_blocking(move || output(child)).await.unwrap();
    let received = collector.received();
    let arrived = received.spans.iter().filter(|(_, span)| span.name == "one of many").count();
    let metrics = received.metrics.iter().filter(|(_, m)| m.name == "otel.sdk.processor.span.processed");
    let dropped = metrics.filter_map(|(_, metric)| dropped(metric)).fold(0.0, f64::max);
    assert!(arrived < MANY, "nothing was dropped");
    assert_eq!(arrived + dropped as usize, MANY);
}

/// What a metric counts of a full queue.
fn dropped(metric: &opentelemetry_proto::tonic::metrics::v1::Metric) -> Option<f64> {
    use opentelemetry_proto::tonic::metrics::v1::{metric::Data, number_data_point::Value};
    let Some(Data::Sum(sum)) = &metric.data else { return None };
    let full = |attributes: &[_]| attribute(attributes, "error.type").as_deref() == Some("queue_full");
    let point = sum.data_points.iter().find(|point| full(&point.attributes))?;
    match point.value? {
        Value::AsInt(number) => Some(number as f64),
        Value::AsDouble(number) => Some(number),
    }
}

#[test]
fn prometheus_takes_the_rules() {
    for (what, file) in [("check", "alerts.yaml"), ("test", "alerts.test.yaml")] {
        let file = tests::root().join("config/otel").join(file);
        match Command::new("promtool").args([what, "rules"]).arg(&file).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => tests::skipped(&format!(
                "Prometheus' alert rules: promtool is not there (Debian: apt-get install prometheus): {error}"
            )),
        }
    }
}

/// An agent that exports no traces passes on where its calls belong, so that the coordinator's spans of them stay in the trace.
#[tokio::test]
async fn a_place_is_passed_on_where_no_traces_are_exported() {
    let place = telemetry::trace::TrialTrace::of("a", 1).attempt(1);
    let current = telemetry::trace::Place::current;
    let work = async { Ok::<_, String>(current()) };
    assert_eq!(telemetry::trace::within(place, "something", work).await, Ok(Some(place)));
    assert_eq!(current(), None);
}

#[test]
fn nothing_runs_unless_it_is_asked_for() {
    let settings = Settings::read(|_| None).unwrap();
    assert!(settings.traces.is_none() && settings.metrics.is_none() && settings.logs.is_none());
    // Telling costs nothing and does not fail.
    telemetry::trace::Span { name: "x", ..Default::default() }
        .tell(telemetry::trace::TrialTrace::of("a", 1).whole());
    assert_eq!(telemetry::http::text(), "");
}
