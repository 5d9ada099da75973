//! What `config/otel` and the documentation ask for exists, under the names that Prometheus sees.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use saphyr::{LoadableYamlNode, Yaml};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use telemetry::metrics::{Definition, Kind, definitions};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The names of all metrics as a scraper sees them.
fn scraped() -> BTreeSet<String> {
    let registry = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
    let provider = SdkMeterProvider::builder().with_reader(exporter).build();
    let meter = provider.meter("names");
    for definition in definitions() {
        let (name, unit) = (definition.name, definition.unit);
        match definition.kind {
            Kind::Counter => meter.f64_counter(name).with_unit(unit).build().add(1.0, &[]),
            Kind::UpDownCounter => meter.i64_up_down_counter(name).with_unit(unit).build().add(1, &[]),
            Kind::Gauge => meter.f64_gauge(name).with_unit(unit).build().record(1.0, &[]),
            Kind::Histogram => meter.f64_histogram(name).with_unit(unit).build().record(1.0, &[]),
        }
    }
    let families = registry.gather();
    let mut names = BTreeSet::new();
    for family in &families {
        names.insert(family.name().to_string());
        if family.get_field_type() == prometheus::proto::MetricType::HISTOGRAM {
            names.extend(["bucket", "sum", "count"].map(|part| format!("{}_{part}", family.name())));
        }
    }
    names
}

/// The words of a text that look like metrics of ours.
fn named(text: &str) -> BTreeSet<String> {
    let prefixes = ["lorafleet_", "rpc_server_", "rpc_client_", "process_", "hw_"];
    // What a label is called, and a crate.
    let others = ["rpc_server_address", "hw_id", "hw_name", "hw_type", "lorafleet_trial_id"];
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let metric =
        |word: &&str| prefixes.iter().any(|prefix| word.starts_with(prefix)) && !others.contains(word);
    words.filter(metric).map(String::from).collect()
}

#[test]
fn every_metric_that_is_asked_for_exists() {
    let known = scraped();
    let otel = root().join("config/otel");
    let boards =
        ["fleet", "sweep", "trial", "coordinator"].map(|board| otel.join(format!("grafana/{board}.json")));
    let files = [
        otel.join("alerts.yaml"),
        otel.join("alerts.test.yaml"),
        root().join("tests/tools/telemetry.py"),
        root().join("docs/observability.md"),
    ];
    for path in boards.iter().chain(&files) {
        let text = std::fs::read_to_string(path).unwrap();
        let asked = named(&text);
        assert!(!asked.is_empty(), "{}: no metric is found in it", path.display());
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{}: {unknown:?} are not among {known:#?}", path.display());
    }
}

/// Every query of a document, panels' and rules'.
fn queries(node: &Yaml, found: &mut Vec<String>) {
    for (key, value) in node.as_mapping().into_iter().flatten() {
        match value.as_str() {
            Some(query) if key.as_str() == Some("expr") => found.push(query.into()),
            _ => queries(value, found),
        }
    }
    node.as_sequence().into_iter().flatten().for_each(|node| queries(node, found));
}

/// The labels that a query selects or groups by.
fn labels(query: &str) -> BTreeSet<String> {
    let lists = |open: &str, close: char| -> Vec<String> {
        let rests = query.split(open).skip(1);
        rests
            .flat_map(|rest| rest.split(close).next().unwrap_or_default().split(','))
            .map(String::from)
            .collect()
    };
    let selected = lists("{", '}').into_iter().filter_map(|m| Some(m.split(['=', '!']).next()?.to_string()));
    let grouped = lists("by (", ')');
    let labels = selected.chain(grouped).map(|label| label.trim().to_string());
    labels.filter(|label| !label.is_empty()).collect()
}

/// What is asked of a metric's labels is an attribute of that metric, or a label that every series has.
#[test]
fn every_label_that_is_asked_for_exists() {
    let found = labels(r#"sum by (le, a) (rate(x{b!="1", c=~"2|3"}[5m])) or y{d="4"}"#);
    assert_eq!(found, ["a", "b", "c", "d", "le"].map(String::from).into());

    let prometheus = |name: &str| name.replace('.', "_");
    let of_all = ["le", "instance", "job"].map(String::from);
    let otel = root().join("config/otel");
    let boards = ["fleet", "sweep", "trial", "coordinator"].map(|board| format!("grafana/{board}.json"));
    for file in boards.iter().map(String::as_str).chain(["alerts.yaml"]) {
        let text = std::fs::read_to_string(otel.join(file)).unwrap();
        let mut found = Vec::new();
        Yaml::load_from_str(&text).unwrap().iter().for_each(|document| queries(document, &mut found));
        assert!(!found.is_empty(), "{file}: no query is found in it");
        for query in found {
            let mut known = BTreeSet::from(of_all.clone());
            for name in named(&query) {
                let is_of = |definition: &&&Definition| name.starts_with(&prometheus(definition.name));
                let all = definitions();
                // One metric's name may begin as another's.
                let metric = all.iter().filter(is_of).max_by_key(|definition| definition.name.len()).unwrap();
                known.extend(metric.attributes.iter().map(|attribute| prometheus(attribute)));
            }
            let unknown: Vec<_> = labels(&query).difference(&known).cloned().collect();
            assert!(unknown.is_empty(), "{file}: {query}: {unknown:?} are not among {known:?}");
        }
    }
}

/// What the collector's pipelines name is defined, with the addresses that the programs are told to send to.
#[test]
fn the_collectors_pipelines_name_what_is_there() {
    let path = root().join("config/otel/collector.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let documents = Yaml::load_from_str(&text).unwrap();
    let [file] = documents.as_slice() else { panic!("{}: one document", path.display()) };
    let keys = |node: &Yaml| -> BTreeSet<String> {
        node.as_mapping().unwrap().keys().map(|key| key.as_str().unwrap().to_string()).collect()
    };
    let pipelines = &file["service"]["pipelines"];
    assert_eq!(keys(pipelines), ["logs", "metrics", "traces"].map(String::from).into());
    for part in ["receivers", "processors", "exporters"] {
        let mut named = BTreeSet::new();
        for (_, pipeline) in pipelines.as_mapping().unwrap() {
            let list = pipeline[part].as_sequence().unwrap();
            named.extend(list.iter().map(|name| name.as_str().unwrap().to_string()));
        }
        assert_eq!(named, keys(&file[part]), "{part}: what is named, and what is defined");
    }
    let protocols = &file["receivers"]["otlp"]["protocols"];
    for (protocol, port) in [("grpc", ":4317"), ("http", ":4318")] {
        assert!(protocols[protocol]["endpoint"].as_str().unwrap().ends_with(port), "{protocol}");
    }
}

#[test]
fn every_metric_is_documented() {
    let text = std::fs::read_to_string(root().join("docs/observability.md")).unwrap();
    for definition in definitions() {
        let attributes: Vec<_> = definition.attributes.iter().map(|key| format!("`{key}`")).collect();
        let row = format!(
            "| `{}` | `{}` | {} | {} |",
            definition.name,
            definition.unit,
            if attributes.is_empty() { "–".to_string() } else { attributes.join(", ") },
            definition.meaning
        );
        assert!(text.contains(&row), "docs/observability.md lacks the row:\n{row}");
    }
}
