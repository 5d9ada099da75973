//! `lorafleet machines`: prices that are listed, imported, and named where dollars are shown.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../hub/tests/common/mod.rs"]
mod local_hub;

use common::Sandbox;
use local_hub::{COMMIT, LocalHub};
use serde_json::{Value, json};

/// The day of the second import.
const DAY: &str = "2026-11-03";
const ROWS: &str = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,SpotPrice
small,T4,1.0,8,32,0.5,east,0.25
large,A100,8.0,96,680,16.0,east,
large,A100,8.0,96,680,24.0,west,8.0
plain,,,4,16,0.1,east,0.05
odd,TPU-9,1.0,4,16,0.1,east,0.05
";

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new(
        "name: priced
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
max_steps: 2
",
    );
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    for (name, text) in [
        ("model/config.json", config.to_string().as_str()),
        ("cheap/vms.csv", ROWS),
        ("bad/vms.csv", &ROWS.replace("0.5,east", "half,east")),
        ("other/vms.csv", "a,b\n1,2\n"),
        ("none/vms.csv", ROWS.lines().next().unwrap()),
    ] {
        let path = sandbox.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    sandbox
}

fn names(listed: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let one = |machine: &Value| (text(&machine["provider"]), text(&machine["machine"]));
    listed.as_array().unwrap().iter().map(one).collect()
}

#[test]
fn prices_are_imported_listed_and_named() {
    let sandbox = sandbox();
    let shipped = sandbox.json(&["machines", "list"]);
    assert!(names(&shipped).iter().any(|(_, machine)| machine == "a2-highgpu-1g"), "{shipped:#}");
    let said = sandbox.json(&["machines", "import", "cheap/vms.csv", "--date", "2026-11-02"]);
    for (key, want) in [
        ("provider", json!("cheap")),
        ("machines", json!(3)),
        ("rows", json!(5)),
        ("without_accelerator", json!(1)),
        ("unknown_accelerator", json!(1)),
        ("without_price", json!(0)),
        ("date", json!("2026-11-02")),
        ("source", json!("cheap/vms.csv")),
    ] {
        assert_eq!(said[key], want, "{key}");
    }
    let all = sandbox.json(&["machines", "list"]);
    assert_eq!(all.as_array().unwrap().len(), 3 + shipped.as_array().unwrap().len());
    // The cheapest A100 is a part of a machine with eight.
    let cheapest = ["machines", "list", "--accelerator", "a100-40gb", "--sort", "price", "--limit", "2"];
    let cheapest = sandbox.json(&cheapest);
    assert_eq!(names(&cheapest), [("cheap".into(), "large".into()), ("cheap".into(), "large".into())]);
    assert_eq!((&cheapest[0]["price"], &cheapest[0]["price_per_hour"]), (&json!(2.0), &json!(16.0)));
    assert_eq!(
        (&cheapest[0]["spot_price_per_hour"], &cheapest[1]["spot_price_per_hour"]),
        (&Value::Null, &json!(8.0))
    );
    let plan = ["plan", "--model", "model/config.json", "--device", "A100-40GB"];
    let planned = sandbox.json(&plan);
    let price = &planned[0]["devices"][0]["price"];
    assert_eq!((&price["machine"], &price["region"]), (&json!("large"), &json!("east")));
    let table = sandbox.lorafleet(&plan);
    let line = "A100-40GB: $16.00 an hour for large (cheap, east), a part in 8, 2026-11-02, SkyPilot's catalogue, cheap/vms.csv";
    assert!(String::from_utf8_lossy(&table.stdout).contains(line), "{table:?}");
    // A second import takes the place of the first.
    std::fs::write(sandbox.path().join("cheap/vms.csv"), ROWS.replace(",0.5,east", ",360000,east")).unwrap();
    sandbox.json(&["machines", "import", "cheap/vms.csv", "--date", DAY]);
    assert_eq!(sandbox.json(&["machines", "list"]).as_array().unwrap().len(), all.as_array().unwrap().len());
    let run =
        sandbox.lorafleet(&["run", "sweep.yaml", "--simulate=T4-16GB", "--simulate-speed=100000", "-o=json"]);
    let (result, told) = (&run.stdout, String::from_utf8_lossy(&run.stderr));
    assert!(told.contains("T4-16GB: $360000.00 an hour for small (cheap, east), 2"), "{told}");
    // A hundred dollars a second.
    let result: Value = serde_json::from_slice(result).unwrap();
    let (cost, seconds) =
        (&result["trials"][0]["cost_usd"], &result["trials"][0]["summary"]["device_seconds"]);
    let device = &result["trials"][0]["device"];
    for (key, want) in [
        ("machine", json!("small")),
        ("provider", json!("cheap")),
        ("region", json!("east")),
        ("accelerators", json!(1)),
        ("source", json!("SkyPilot's catalogue, cheap/vms.csv")),
        ("spot", json!(false)),
    ] {
        assert_eq!(device["price_from"][key], want, "{key}: {device:#}");
    }
    let id = result["sweep"]["id"].as_str().unwrap();
    assert_eq!(&sandbox.json(&["trials", "get", &format!("{id}/1")])["device"], device);
    let named = format!(
        "T4-16GB $360000.00 an hour, that of small (cheap, east), {DAY}, SkyPilot's catalogue, cheap/vms.csv."
    );
    let page = std::fs::read_to_string(sandbox.path().join(result["report"].as_str().unwrap())).unwrap();
    assert!(page.replace("&#39;", "'").replace("&#x27;", "'").contains(&named), "{named}");
    sandbox.json(&["export", id, "--format", "csv", "--to", "out"]);
    let csv = std::fs::read_to_string(sandbox.path().join("out/trials.csv")).unwrap();
    assert!(csv.contains(&format!(",small,cheap,east,{DAY},")), "{csv}");
    let (cost, seconds) = (cost.as_f64().unwrap(), seconds.as_f64().unwrap());
    assert!((cost / (100.0 * seconds) - 1.0).abs() < 1e-9, "{cost} for {seconds} s");
}

#[test]
fn what_cannot_be_imported_changes_nothing() {
    let sandbox = sandbox();
    sandbox.json(&["machines", "import", "cheap/vms.csv"]);
    let before = sandbox.json(&["machines", "list"]);
    for (arguments, fragments) in [
        (&["bad/vms.csv"][..], &["bad/vms.csv", "line 2: Price: \"half\""][..]),
        (&["other/vms.csv"], &["no column InstanceType"]),
        (&["none/vms.csv"], &["none of its 0 rows", "nothing changed"]),
        (&["nothing/vms.csv"], &["nothing/vms.csv"]),
        (&["sweep.yaml"], &["--provider"]),
        (&["cheap/vms.csv", "--date=today"], &["--date", "2026-11-28"]),
    ] {
        let output = sandbox.lorafleet(&[&["machines", "import"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{arguments:?}: {message}");
    }
    assert_eq!(sandbox.json(&["machines", "list"]), before);
    let own = sandbox.path().join("config/lorafleet/machines.yaml");
    std::fs::write(own, "- {machine: x}\n").unwrap();
    for arguments in [
        &["machines", "list"][..],
        &["plan", "--model=model/config.json"],
        &["run", "sweep.yaml", "--simulate=T4-16GB"],
    ] {
        let output = sandbox.lorafleet(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains("machines.yaml") && message.contains("line 1"), "{arguments:?}: {message}");
    }
}

#[test]
fn an_address_is_read() {
    let (sandbox, hub) = (sandbox(), LocalHub::start());
    // A name that begins so is redirected to another server.
    for (file, rows) in [("lambda/vms.csv", ROWS), ("model/vms.csv", ROWS), ("bad/vms.csv", "\u{feff}x")] {
        hub.put("datasets/a/b", file, rows);
    }
    let address = |file: &str| format!("{}/datasets/a/b/resolve/{COMMIT}/{file}", hub.endpoint());
    for provider in ["lambda", "model"] {
        let address = address(&format!("{provider}/vms.csv"));
        let said = sandbox.json(&["machines", "import", &address]);
        assert_eq!((&said["provider"], &said["source"]), (&json!(provider), &json!(address)));
    }
    let closed = "http://127.0.0.1:1/x/vms.csv".to_string();
    for (address, code) in [(address("bad/vms.csv"), 2), (address("missing/vms.csv"), 2), (closed, 3)] {
        let output = sandbox.lorafleet(&["machines", "import", &address]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(&address), "{message}");
    }
}
