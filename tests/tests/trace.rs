//! The trace of a trial, told by the programs as people start them: the command that submits, the coordinator, two agents.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod otlp;

use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::trace::v1::Span;
use otlp::{Collector, Received, attribute, text};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tests::http::{free_address, get};
use tests::program::{self, Program};

/// Starts a program that tells the collector.
fn start(name: &str, arguments: &[&str], collector: &Collector) -> Program {
    Program::start_with(name, arguments, |command| {
        let levels = "warn,gpu_agent::actors::device=info,coordinator::actors::sweep=info";
        command.envs(collector.variables()).env("LORAFLEET_LOG", levels);
    })
}

/// Runs a command that tells the collector; its exit code, and what it says on standard output and standard error.
fn run(arguments: &[&str], collector: &Collector) -> (Option<i32>, String, String) {
    let variables = collector.variables();
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    program::output("lorafleet", arguments, &variables)
}

fn sweep_file(dir: &Path) -> PathBuf {
    let quickstart = tests::root().join("config/quickstart");
    let document = serde_json::json!({
        "name": "one",
        "pretrained_model_id": quickstart.join("base"),
        "dataset_name": quickstart.join("instruct.jsonl"),
        "eval_size": 2, "batch_size": 1, "max_sequence_length": 32, "max_steps": 400, "save_steps": 20,
        "eval_steps": 40, "logging_steps": 1, "precision_mode": "4bit",
        "search": { "algorithm": "grid" },
        "parameters": { "lora_rank": [2] },
    });
    let path = dir.join("sweep.yaml");
    std::fs::write(&path, document.to_string()).unwrap();
    path
}

/// The spans of a trace by their names, in the order of their beginnings.
fn spans(received: &Received, trace: &[u8]) -> BTreeMap<String, Vec<(String, Span)>> {
    let mut named: BTreeMap<String, Vec<(String, Span)>> = BTreeMap::new();
    for (of, span) in received.spans.iter().filter(|(_, span)| span.trace_id == trace) {
        named.entry(span.name.clone()).or_default().push((of.clone(), span.clone()));
    }
    named.values_mut().for_each(|spans| spans.sort_by_key(|(_, span)| span.start_time_unix_nano));
    named
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_holds_a_trial_with_both_its_attempts() {
    let collector = Collector::start().await;
    let dir = tempfile::tempdir().unwrap();
    let data = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let http = free_address();
    let coordinator_at = |listen: &str| {
        let arguments = ["--listen", listen, "--data-dir", &data("coordinator"), "--http", &http];
        start("coordinator", &arguments, &collector)
    };
    let mut coordinator = coordinator_at("127.0.0.1:0");
    let endpoint = coordinator.says("listening on ");
    let agent = |name: &str| {
        let arguments = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", &data(name)];
        start("gpu-agent", &arguments, &collector)
    };
    let first = agent("first");
    let file = sweep_file(dir.path());
    let arguments = ["submit", file.to_str().unwrap(), "--endpoint", &endpoint];
    let (code, submitted, errors) = run(&arguments, &collector);
    assert_eq!(code, Some(0), "{errors}");
    let sweep = submitted.trim();

    // An agent that leaves gives the trial back, and a coordinator that ends goes on with it.
    collector
        .until("a checkpoint", |received| {
            received.spans.iter().find(|(_, span)| span.name == "checkpoint.upload").map(drop)
        })
        .await;
    assert_eq!(get(&http, "/healthz"), (200, "lives\n".into()));
    assert_eq!(get(&http, "/readyz"), (200, "ready\n".into()));
    let (status, shown) = get(&http, "/metrics");
    assert_eq!(status, 200);
    assert!(shown.contains("lorafleet_trials{state=\"running\"} 1"), "{shown}");
    assert!(shown.contains("# TYPE rpc_server_call_duration_seconds histogram"), "{shown}");
    assert!(first.terminate() && coordinator.terminate());
    let _coordinator = coordinator_at(endpoint.strip_prefix("http://").unwrap());
    let second = agent("second");
    let trial = collector
        .until("the trial's end", |received| {
            received.spans.iter().find(|(_, span)| span.name == "trial").map(|(_, span)| span.clone())
        })
        .await;
    assert!(second.terminate());

    let arguments = ["trials", "get", &format!("{sweep}/1"), "-o", "json", "--endpoint", &endpoint];
    let (_, shown, _) = run(&arguments, &collector);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let hex: String = trial.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((&shown["trace_id"], &shown["state"]), (&hex.into(), &"completed".into()));

    // A command that fails says why in its span.
    let arguments = ["get", "no-such-sweep", "--endpoint", &endpoint];
    let (code, _, errors) = run(&arguments, &collector);
    assert_ne!(code, Some(0), "{errors}");
    let failed = collector
        .until("the failed command", |received| {
            received.spans.iter().find(|(_, span)| span.name == "lorafleet get").map(|(_, span)| span.clone())
        })
        .await;
    let status = failed.status.unwrap();
    assert!(!status.message.is_empty() && errors.contains(&status.message), "{status:?} {errors}");

    let received = collector.received();
    let named = spans(&received, &trial.trace_id);
    let of =
        |name: &str| named.get(name).unwrap_or_else(|| panic!("no span {name}: {:?}", named.keys())).clone();
    let services = |name: &str| of(name).iter().map(|(of, _)| of.clone()).collect::<BTreeSet<_>>();
    let ids = |name: &str| of(name).iter().map(|(_, span)| span.span_id.clone()).collect::<Vec<_>>();

    // The whole trial is linked to the command that submitted its sweep.
    assert_eq!(of("trial").len(), 1);
    assert!(trial.parent_span_id.is_empty());
    let submit = received.spans.iter().find(|(_, span)| span.name == "lorafleet submit").unwrap();
    assert_eq!(submit.0, "lorafleet");
    assert_eq!(trial.links.len(), 1);
    assert_eq!(trial.links[0].trace_id, submit.1.trace_id);
    let calls = received.spans.iter().filter(|(_, span)| span.trace_id == submit.1.trace_id);
    let sides: BTreeSet<_> = calls
        .filter(|(_, span)| span.name == "lorafleet.v1.SweepService/SubmitSweep")
        .map(|(of, _)| of.as_str())
        .collect();
    assert_eq!(sides, ["lorafleet", "lorafleet-coordinator"].into());

    // Queue and attempts below the trial, all else below an attempt, each told by who did it.
    let attempts = ids("attempt");
    assert_eq!((of("queue").len(), attempts.len()), (2, 2));
    for name in ["queue", "attempt"] {
        assert!(of(name).iter().all(|(_, span)| span.parent_span_id == trial.span_id), "{name}");
        assert_eq!(services(name), ["lorafleet-coordinator".to_string()].into(), "{name}");
    }
    let outcomes: Vec<_> = of("attempt")
        .iter()
        .map(|(_, span)| attribute(&span.attributes, "lorafleet.trial.outcome").unwrap())
        .collect();
    assert_eq!(outcomes, ["queued", "completed"]);
    for (name, service, times) in [
        ("place", "lorafleet-coordinator", 2),
        ("load", "lorafleet-agent", 2),
        ("prepare", "lorafleet-agent", 2),
        ("train", "lorafleet-agent", 2),
        ("checkpoint.download", "lorafleet-agent", 1),
        // Of the base, and 10 times in 400 steps.
        ("evaluate", "lorafleet-agent", 11),
    ] {
        assert_eq!((of(name).len(), services(name)), (times, [service.to_string()].into()), "{name}");
        let known = of(name).iter().all(|(_, span)| attempts.contains(&span.parent_span_id));
        assert!(known, "{name} is below an attempt");
    }
    // Neither agent had the base in 4 bits: each quantises it as it loads it.
    let loads = ids("load");
    assert_eq!((of("quantise").len(), services("quantise")), (2, ["lorafleet-agent".to_string()].into()));
    for (_, quantise) in of("quantise") {
        assert!(loads.contains(&quantise.parent_span_id), "quantise is below a load");
        let of = |key: &str| attribute(&quantise.attributes, &format!("lorafleet.base.{key}")).unwrap();
        let number = |key: &str| of(key).parse::<f64>().unwrap();
        // Of 3 layers 7 matrices each.
        assert!(number("matrices") == 21.0 && number("bytes") > 0.0, "{quantise:?}");
        // A part of its span, whose ends are cut to the millisecond.
        let took = (quantise.end_time_unix_nano - quantise.start_time_unix_nano) as f64 / 1e9;
        let busy = number("quantising_seconds");
        assert!(0.0 < busy && busy < took + 0.002, "{busy} of {took} s: {quantise:?}");
    }
    for (_, load) in of("load") {
        assert_eq!(attribute(&load.attributes, "lorafleet.base.cached").as_deref(), Some("false"));
        let mut parts = named["quantise"].iter().filter(|(_, part)| part.parent_span_id == load.span_id);
        let (_, part) = parts.next().unwrap();
        let within = load.start_time_unix_nano <= part.start_time_unix_nano
            && part.end_time_unix_nano <= load.end_time_unix_nano;
        assert!(within && parts.next().is_none(), "{load:?} {part:?}");
    }
    let uploads = ids("checkpoint.upload");
    assert!(uploads.len() >= 2);
    let below =
        |name: &str| of(name).iter().map(|(_, span)| span.parent_span_id.clone()).collect::<BTreeSet<_>>();
    assert!(below("checkpoint.upload").iter().all(|parent| attempts.contains(parent)));
    let call = "lorafleet.v1.AgentService/UploadCheckpoint";
    assert_eq!(services(call), ["lorafleet-agent".to_string(), "lorafleet-coordinator".into()].into());
    let (of_agent, of_coordinator): (Vec<_>, Vec<_>) =
        of(call).into_iter().partition(|(of, _)| of == "lorafleet-agent");
    assert!(of_agent.iter().all(|(_, span)| uploads.contains(&span.parent_span_id)));
    let callers: BTreeSet<_> = of_agent.iter().map(|(_, span)| span.span_id.clone()).collect();
    assert!(of_coordinator.iter().all(|(_, span)| callers.contains(&span.parent_span_id)));

    // Everything lies within the trial, and the steps that were reported are events, not more than fit.
    for (name, spans) in &named {
        for (_, span) in spans.iter().filter(|_| !name.contains('/') && !name.starts_with("checkpoint")) {
            let within = trial.start_time_unix_nano <= span.start_time_unix_nano
                && span.end_time_unix_nano <= trial.end_time_unix_nano + 1_000_000_000;
            assert!(within, "{name}");
        }
    }
    for (_, train) in of("train") {
        assert!((1..=64).contains(&train.events.len()), "{}", train.events.len());
        assert_eq!(train.events[0].name, "step");
        let losses = train.events.iter().filter(|e| attribute(&e.attributes, "lorafleet.loss").is_some());
        assert!(losses.count() + 1 >= train.events.len(), "all but the base's have a loss");
    }

    // What is logged of an attempt is in its trace, below it.
    for (service, line) in [("lorafleet-coordinator", "assigning"), ("lorafleet-agent", "assigned")] {
        let is_it = |of: &String, log: &LogRecord| of == service && text(log) == line;
        let logs: Vec<_> = received.logs.iter().filter(|(of, log)| is_it(of, log)).collect();
        assert_eq!(logs.len(), 2, "{line}");
        let known = |log: &LogRecord| log.trace_id == trial.trace_id && attempts.contains(&log.span_id);
        assert!(logs.iter().all(|(_, log)| known(log)), "{line}: {logs:#?}");
    }

    // Its log goes to the collector as well: what is printed of it, each line once, in its trace.
    let arguments = ["trials", "logs", &format!("{sweep}/1"), "-o", "json", "--endpoint", &endpoint];
    let (_, printed, _) = run(&arguments, &collector);
    let mut printed: Vec<serde_json::Value> = serde_json::from_str(&printed).unwrap();
    // It is printed to the second.
    printed.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("time")));
    let of_trials = |received: &Received| {
        let told = received.logs.iter().filter(|(_, log)| log.event_name == "lorafleet.trial.log");
        told.cloned().collect::<Vec<_>>()
    };
    let told = collector
        .until("the trial's log", |received| {
            let told = of_trials(received);
            (told.len() >= printed.len()).then_some(told)
        })
        .await;
    let lines = told.iter().map(|(_, log)| {
        let of = |key: &str| attribute(&log.attributes, &format!("lorafleet.{key}")).unwrap();
        let number = |key: &str| of(key).parse::<u64>().unwrap();
        serde_json::json!({
            "event": of("trial.event"),
            "attempt": number("trial.attempt"),
            "step": number("trial.step"),
            "message": text(log),
        })
    });
    assert_eq!(lines.collect::<Vec<_>>(), printed);
    assert!(
        told.is_sorted_by_key(|(_, log)| log.time_unix_nano)
            && told[0].1.time_unix_nano >= trial.start_time_unix_nano
    );
    for (service, log) in &told {
        let of = |key: &str| attribute(&log.attributes, key).unwrap();
        assert_eq!(service, "lorafleet-coordinator");
        assert_eq!(
            (of("lorafleet.trial.id"), of("lorafleet.sweep.id")),
            (format!("{sweep}/1"), sweep.into())
        );
        let place = if of("lorafleet.trial.attempt") == "0" {
            [trial.span_id.clone()].into()
        } else {
            attempts.clone()
        };
        assert!(log.trace_id == trial.trace_id && place.contains(&log.span_id), "{log:?}");
        assert_eq!((log.severity_text.as_str(), log.severity_number), ("INFO", 9), "{log:?}");
    }

    // Metrics, by name and unit.
    for (service, name, unit) in [
        ("lorafleet-coordinator", "lorafleet.trial.queue.duration", "s"),
        ("lorafleet-coordinator", "lorafleet.store.transaction.duration", "s"),
        ("lorafleet-coordinator", "lorafleet.trials", "{trial}"),
        ("lorafleet-coordinator", "rpc.server.call.duration", "s"),
        ("lorafleet-coordinator", "process.memory.usage", "By"),
        ("lorafleet-coordinator", "lorafleet.tokio.tasks", "{task}"),
        ("lorafleet-agent", "lorafleet.step.duration", "s"),
        ("lorafleet-agent", "lorafleet.trial.throughput.tokens", "{token}/s"),
        ("lorafleet-agent", "lorafleet.checkpoint.size", "By"),
        ("lorafleet-agent", "lorafleet.spool.acknowledgement.lag", "s"),
    ] {
        let found = received.metrics.iter().find(|(of, metric)| of == service && metric.name == name);
        assert_eq!(found.unwrap_or_else(|| panic!("{service} tells no {name}")).1.unit, unit, "{name}");
    }
}
