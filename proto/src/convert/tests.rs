use super::*;
use domain::fleet::Device;
use domain::machine::PriceSource;
use domain::trial::TrialPlacement;
use domain::{AgentId, DeviceId};
use serde_json::json;

#[test]
fn a_trial_travels_unchanged() {
    let trial = Trial {
        id: TrialId::new("quickstart-0a1b/7"),
        config: TrialConfig { learning_rate: 3.7e-4, max_steps: Some(40), ..TrialConfig::default() },
        parameters: [("learning_rate".into(), json!(3.7e-4)), ("lora_rank".into(), json!(8))].into(),
        state: TrialState::Stopped,
        attempt: Attempt(3),
        step: 20,
        total_steps: Some(40),
        agent: Some("a".into()),
        device: Some(TrialDevice {
            accelerator: "A100-40GB".into(),
            memory_bytes: 41_900_000_000,
            price_per_hour: 3.67,
            price_from: Some(Box::new(price_source())),
        }),
        adapter: Some("x/adapter".into()),
        resume: Some(("x/resume".into(), 20)),
        attempts: vec![(Attempt(1), 0), (Attempt(2), 10), (Attempt(3), 10)],
        // An earlier version assigned the first, and the last has not begun.
        placements: vec![
            TrialPlacement {
                started_at: Some(Timestamp(2)),
                ended_at: Some(Timestamp(3)),
                ..TrialPlacement::new(Attempt(2), AgentId::new("a"), DeviceId::new("cuda:1"))
            },
            TrialPlacement::new(Attempt(3), AgentId::new("b"), DeviceId::new("cpu")),
        ],
        eval_loss: Some(1.5),
        cost_usd: Some(0.0),
        summary: Some(TrialSummary {
            steps: 20,
            throughput: Throughput::Packed,
            recomputed_layers: Some(3),
            samples: [4, 8].map(|step| SampleText { step, text: format!("after {step}") }).into(),
            predicted_seconds_per_step: Some(0.25),
            simulated_seconds: Some(5.0),
            ..TrialSummary::default()
        }),
        failure: Some(Failure { class: FailureClass::OutOfMemory, message: "m".into() }),
        digests: Some(Digests {
            base_model: "b".into(),
            dataset: "d".into(),
            tokenizer: "t".into(),
            spec: "s".into(),
            documents: "e".into(),
        }),
        created_at: Timestamp(1_700_000_000_123),
        started_at: Some(Timestamp(1)),
        finished_at: None,
        trace_id: None,
        replicate_of: Some(TrialId::new("s/1")),
    };
    let wire = v1::Trial::from(trial.clone());
    assert_eq!((wire.sweep_id.as_str(), wire.number), ("quickstart-0a1b", 7));
    // But for the configuration, in which the values in force are written out.
    let shown = Trial { config: trial.config.in_force(Some(40)), ..trial };
    assert_eq!(shown.config.lora_alpha, Some(32.0));
    assert_eq!(Trial::try_from(wire).unwrap(), shown);
    let odd = |seconds| {
        let summary = v1::TrialSummary { simulated_seconds: Some(seconds), ..v1::TrialSummary::default() };
        TrialSummary::from(summary).simulated_seconds
    };
    assert_eq!([f64::NAN, f64::INFINITY, -1.0, 1e300].map(odd), [None; 4], "no cost can be made of it");
    let mut later = v1::Trial::from(shown.clone());
    later.config.as_mut().unwrap().fields.insert("of_a_later_version".into(), prost_types::Value::default());
    assert_eq!(Trial::try_from(later).unwrap(), shown);
}

#[test]
fn a_models_shape_travels_unchanged() {
    let shape = ModelShape {
        vocab_size: 1,
        hidden_size: 2,
        intermediate_size: 3,
        num_hidden_layers: 4,
        num_attention_heads: 5,
        num_key_value_heads: 6,
        head_dim: 7,
        tie_word_embeddings: false,
        query_key_value_bias: false,
        query_key_norms: false,
        sliding_window: None,
        sliding_window_layers: 0,
    };
    for shape in [
        ModelShape { tie_word_embeddings: true, ..shape },
        ModelShape { query_key_value_bias: true, ..shape },
        ModelShape { query_key_norms: true, ..shape },
        ModelShape { sliding_window: Some(4096), sliding_window_layers: 1, ..shape },
    ] {
        assert_eq!(ModelShape::try_from(v1::ModelShape::from(shape)).unwrap(), shape);
    }
    // Who knows nothing of windows says nothing of them.
    let old = v1::ModelShape { sliding_window: None, sliding_window_layers: 0, ..shape.into() };
    assert_eq!(ModelShape::try_from(old).unwrap(), shape);
    for (windows, want) in [
        ((Some(0), 1), "sliding_window: is 0, not in 1 to 16777216"),
        ((Some(u64::MAX), 1), "sliding_window: is 18446744073709551615, not in 1 to 16777216"),
        ((Some(8), 5), "sliding_window_layers: is 5, of 4 layers"),
    ] {
        let (sliding_window, sliding_window_layers) = windows;
        let wire = v1::ModelShape { sliding_window, sliding_window_layers, ..shape.into() };
        assert_eq!(ModelShape::try_from(wire).unwrap_err().to_string(), want);
    }
}

#[test]
fn documents_keep_their_values() {
    for value in [
        json!({"a": 1, "b": -3, "c": 0.25, "d": [true, null, "x"], "e": {"f": 1e-5}}),
        json!({"big": 9_007_199_254_740_992_u64}),
    ] {
        let object = value.as_object().unwrap();
        assert_eq!(&from_struct(to_struct(object)), object);
    }
}

#[test]
fn a_sweep_goes_out_with_its_counts() {
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d.jsonl",
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [2, 4]},
    });
    let spec = domain::sweep::SweepSpec::from_document(document.as_object().unwrap()).unwrap();
    let record = Sweep {
        id: domain::SweepId::new("s-0a1b"),
        spec: spec.clone(),
        state: SweepState::Running,
        request_id: "r".into(),
        namespace: "team-a".into(),
        proposed: 2,
        max_trials: Some(2),
        counts: [TrialState::Completed, TrialState::Running, TrialState::Running].into_iter().collect(),
        best: Some((TrialId::new("s-0a1b/1"), 0.5)),
        cost_usd: 0.25,
        failure: None,
        ended_early: Some("max_wall_clock of 4 s is spent".into()),
        created_at: Timestamp(1500),
        finished_at: None,
    };
    let wire = sweep(&record);
    let counts: Vec<_> = wire.counts.iter().map(|c| (c.state(), c.trials)).collect();
    assert_eq!(counts, [(v1::TrialState::Running, 2), (v1::TrialState::Completed, 1)]);
    assert_eq!((wire.best_trial_id.as_deref(), wire.best_value), (Some("s-0a1b/1"), Some(0.5)));
    assert_eq!(wire.ended_early, record.ended_early);
    assert_eq!((wire.namespace.as_str(), wire.waits_for), ("team-a", None));
    let document = from_struct(wire.spec.unwrap());
    assert_eq!(domain::sweep::SweepSpec::from_document(&document).unwrap(), spec);
}

fn price_source() -> PriceSource {
    PriceSource {
        machine: "a2-highgpu-1g".into(),
        provider: "gcp".into(),
        region: "us-central1".into(),
        accelerators: 1,
        date: "2025-03-06".into(),
        source: "a catalogue".into(),
        spot: false,
    }
}

#[test]
fn devices_are_checked() {
    let good = v1::Device { id: "cpu".into(), max_pack_size: 1, ..v1::Device::default() };
    let simulated = v1::Device { simulated_speed: 60.0, price_per_hour: 3.0, ..good.clone() };
    let priced = v1::Device {
        price_per_hour: 3.0,
        price_from: Some(v1::PriceSource { machine: "m".repeat(300), ..price_source().into() }),
        ..good.clone()
    };
    let volta = v1::Device { compute_capability: "7.0".into(), ..good.clone() };
    for device in [good.clone(), simulated.clone(), volta] {
        assert_eq!(v1::Device::from(Device::try_from(device.clone()).unwrap()), device);
    }
    let source = Device::try_from(priced).unwrap().price_from.unwrap();
    assert_eq!((source.machine.len(), source.region), (crate::limits::NAME_BYTES, "us-central1".into()));
    // An hour of its time is a minute of ours.
    assert_eq!(Device::try_from(simulated).unwrap().cost_per_hour(), 180.0);
    for (device, want) in [
        (v1::Device { id: String::new(), ..good.clone() }, "id: is missing"),
        (v1::Device { max_pack_size: 0, ..good.clone() }, "max_pack_size: must be at least 1"),
        (v1::Device { price_per_hour: -1.0, ..good.clone() }, "price_per_hour: must be 0 to 1000000"),
        (v1::Device { price_per_hour: f64::NAN, ..good.clone() }, "price_per_hour: must be 0 to 1000000"),
        (v1::Device { simulated_speed: 0.5, ..good.clone() }, "simulated_speed: must be 1 to 1000000, or 0"),
        (
            v1::Device { simulated_speed: f64::NAN, ..good.clone() },
            "simulated_speed: must be 1 to 1000000, or 0",
        ),
        (
            v1::Device { compute_capability: "8".into(), ..good.clone() },
            "compute_capability: \"8\" is no compute capability; write it as in \"8.0\"",
        ),
        (v1::Device { id: "a\nb".into(), ..good.clone() }, "id: has a control character: \"a\\nb\""),
        (v1::Device { id: "a".repeat(201), ..good }, "id: has 201 bytes, above 200"),
    ] {
        assert_eq!(Device::try_from(device).unwrap_err().to_string(), want);
    }
}

#[test]
fn what_is_missing_is_named() {
    let error = Trial::try_from(v1::Trial { state: 1, ..v1::Trial::default() }).unwrap_err();
    assert_eq!(error.to_string(), "config: is missing");
}

/// An agent may send what it likes: a record has few texts on the way, short ones, in order.
#[test]
fn texts_on_the_way_are_few_short_and_in_order() {
    let sample = |step, length| v1::SampleText { step, text: "é".repeat(length) };
    let kept = |samples| TrialSummary::from(v1::TrialSummary { samples, ..Default::default() }).samples;
    let steps = |samples| kept(samples).iter().map(|sample| sample.step).collect::<Vec<_>>();
    assert_eq!(steps(vec![sample(3, 1), sample(2, 1), sample(3, 1), sample(9, 1)]), [3, 9]);
    assert_eq!(kept((1..1000).map(|step| sample(step, 1)).collect()).len(), limits::SAMPLES);
    let long = &kept(vec![sample(1, 100_000)])[0].text;
    assert!(long.len() <= limits::SAMPLE_BYTES && long.ends_with('…'), "{}", long.len());
}
