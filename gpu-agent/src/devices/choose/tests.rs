use super::*;

fn gpu(name: &str, uuid: &str, gib: u64) -> Gpu {
    let (name, uuid) = (name.to_string(), uuid.to_string());
    Gpu { name, uuid, memory_bytes: gib << 30, compute: (8, 0), speed: 1, ..Gpu::default() }
}

/// A slow T4, a fast A100, and a second A100 in two slices, as they sit on the bus.
fn facts() -> Facts {
    let slice = |uuid: &str| Slice {
        name: "NVIDIA A100-SXM4-40GB MIG 3g.20gb".into(),
        uuid: uuid.into(),
        memory_bytes: 20 << 30,
    };
    let sliced = Some(vec![slice("MIG-aa"), slice("MIG-bb")]);
    let gpus = vec![
        gpu("Tesla T4", "GPU-10", 15),
        Gpu { speed: 5, ..gpu("NVIDIA A100-SXM4-40GB", "GPU-11", 40) },
        Gpu { speed: 5, slices: sliced, ..gpu("NVIDIA A100-SXM4-40GB", "GPU-22", 40) },
    ];
    Facts { driver: "580.65".into(), cuda: (13, 0), gpus, silent: Vec::new() }
}

fn settings() -> Settings {
    Settings { built_with: Some((13, 0)), ..Settings::default() }
}

/// The UUIDs of what is trained on, in order.
fn uuids(found: &Found) -> Vec<&str> {
    let uuid = |device: &'_ DeviceOptions| match &device.host {
        EngineHost::Process { device, variables } if device == "cuda:0" => variables[0].1.clone(),
        other => panic!("{other:?}"),
    };
    let known = ["GPU-10", "GPU-11", "GPU-22", "MIG-aa", "MIG-bb"];
    found.devices.iter().map(|d| *known.iter().find(|known| **known == uuid(d)).unwrap()).collect()
}

#[test]
fn what_cuda_visible_devices_leaves() {
    let all = ["GPU-11", "MIG-aa", "MIG-bb", "GPU-10"];
    let by_bus = ["GPU-10", "GPU-11", "MIG-aa", "MIG-bb"];
    // (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER, what is left, what is said)
    let rows: &[(Option<&str>, &str, &[&str], &str)] = &[
        (None, "", &all, ""),
        (None, "FASTEST_FIRST", &all, ""),
        (None, "PCI_BUS_ID", &by_bus, ""),
        (Some(""), "", &[], ""),
        (Some("-1"), "", &[], ""),
        (Some("0"), "", &["GPU-11"], ""),
        (Some("0"), "PCI_BUS_ID", &["GPU-10"], ""),
        (Some("2, 0"), "", &["GPU-10", "GPU-11"], ""),
        (Some("1"), "", &["MIG-aa", "MIG-bb"], ""),
        (Some("2x,1gpu"), "PCI_BUS_ID", &["MIG-aa", "MIG-bb", "GPU-11"], ""),
        (Some("GPU-10"), "", &["GPU-10"], ""),
        (Some("MIG-bb,GPU-11"), "", &["MIG-bb", "GPU-11"], ""),
        (Some("GPU-2"), "", &["MIG-aa", "MIG-bb"], ""),
        // Two begin so, none does, none is there: what comes before it is left.
        (Some("2,GPU-1,0"), "", &["GPU-10"], "\"GPU-1\""),
        (Some("MIG-"), "", &[], "\"MIG-\""),
        (Some("0,GPU-99,1"), "", &["GPU-11"], "\"GPU-99\""),
        (Some("0,7,1"), "", &["GPU-11"], "\"7\""),
        (Some("0,-1,1"), "", &["GPU-11"], ""),
        (Some("none"), "", &[], "\"none\""),
        (Some("0,,1"), "", &["GPU-11"], "\"\""),
        // Twice: nothing is left.
        (Some("0,0"), "", &[], "\"0\""),
        (Some("1,MIG-aa"), "", &[], "\"MIG-aa\""),
    ];
    for (visible, order, left, said) in rows {
        let visible = visible.map(String::from);
        let order = Some(order.to_string()).filter(|order| !order.is_empty());
        let found = choose(&Ok(facts()), &Settings { visible: visible.clone(), order, ..settings() });
        assert_eq!(uuids(&found), *left, "{visible:?}: {found:?}");
        let ids: Vec<_> = found.devices.iter().map(|device| device.id.to_string()).collect();
        assert_eq!(ids, (0..left.len()).map(|n| format!("cuda:{n}")).collect::<Vec<_>>());
        assert_eq!(found.notes.len(), usize::from(!said.is_empty()), "{visible:?}: {found:?}");
        assert!(found.notes.iter().all(|note| note.contains(said)), "{visible:?}: {found:?}");
    }
}

/// It is what the program's kernels have, which on a later GPU are those of the one that they were compiled for.
#[test]
fn what_trials_compute_with() {
    for (compute, built_for, has) in
        [((7, 0), (7, 0), "7.0"), ((7, 5), (7, 0), "7.0"), ((9, 0), (8, 0), "8.0"), ((9, 0), (9, 0), "9.0")]
    {
        let mut facts = facts();
        facts.gpus.iter_mut().for_each(|gpu| gpu.compute = compute);
        let found = choose(&Ok(facts), &Settings { built_for: Some(built_for), ..settings() });
        assert_eq!(found.devices.len(), 4, "{found:?}");
        for device in found.devices {
            assert_eq!(device.compute_capability.map(String::from).as_deref(), Some(has), "{compute:?}");
        }
    }
}

#[test]
fn what_a_device_is() {
    let found = choose(&Ok(facts()), &settings());
    let seen: Vec<_> =
        found.devices.iter().map(|device| (device.accelerator.as_str(), device.memory_bytes)).collect();
    let less = |gib: u64| (gib << 30) - 1_000_000_000;
    assert_eq!(
        seen,
        [
            ("A100-40GB", less(40)),
            ("A100 MIG 3g.20gb", less(20)),
            ("A100 MIG 3g.20gb", less(20)),
            ("T4-16GB", less(15))
        ]
    );
    assert!(found.devices.iter().all(|device| device.max_pack_size > 0));
}

#[test]
fn what_is_not_trained_on() {
    let one = |change: fn(&mut Facts)| {
        let mut facts = Facts { gpus: vec![gpu("NVIDIA H200", "GPU-10", 140)], ..facts() };
        change(&mut facts);
        Ok(facts)
    };
    let (with, without) = (Some((13, 1)), None);
    // (what the driver says, built with, how many are left, what is said, each in a line)
    type Row<'a> = (Result<Facts, Absent>, Option<(u32, u32)>, usize, &'a [&'a str]);
    let rows: &[Row] = &[
        (one(|f| f.cuda = (13, 1)), with, 1, &[]),
        (one(|f| f.cuda = (14, 0)), with, 1, &[]),
        (
            one(|f| f.cuda = (13, 0)),
            with,
            1,
            &["580.65 has CUDA 13.0, and this program was built with CUDA 13.1"],
        ),
        (one(|f| f.cuda = (12, 9)), with, 0, &["update the driver"]),
        (one(|f| f.cuda = (1, 0)), Some((0, 0)), 1, &[]),
        (one(|f| f.gpus.clear()), with, 0, &[]),
        (
            one(|f| (f.cuda, f.gpus[0].compute) = ((13, 1), (6, 1))),
            with,
            0,
            &["cuda:0 (NVIDIA H200) has compute capability 6.1, which is too old: 7.0 is needed"],
        ),
        (one(|f| (f.cuda, f.gpus[0].compute) = ((13, 1), (7, 0))), with, 1, &[]),
        (
            one(|f| (f.cuda, f.gpus[0].uncorrected_errors) = ((13, 1), 3)),
            with,
            1,
            &["cuda:0 (NVIDIA H200) has had 3 memory errors"],
        ),
        (
            one(|f| (f.cuda, f.silent) = ((13, 1), vec!["GPU 1 of this machine: lost".into()])),
            with,
            1,
            &["GPU 1 of this machine: lost"],
        ),
        (Err(Absent::Missing), with, 0, &["no NVIDIA driver was found"]),
        (Err(Absent::Broken("version mismatch".into())), with, 0, &["does not work: version mismatch"]),
        (Err(Absent::Missing), without, 0, &[]),
        (Err(Absent::Broken("version mismatch".into())), without, 0, &[]),
        (
            one(|_| ()),
            without,
            0,
            &["this machine has an NVIDIA H200, but this program was built without CUDA; build it with \
               --features cuda (docs/gpu.md) to train on it"],
        ),
        (one(|f| f.gpus[0].compute = (6, 1)), without, 0, &[]),
        (one(|f| f.silent = vec!["lost".into()]), without, 0, &["built without CUDA"]),
    ];
    for (read, built_with, left, said) in rows {
        let found = choose(read, &Settings { built_with: *built_with, ..Settings::default() });
        assert_eq!(found.devices.len(), *left, "{read:?}: {found:?}");
        assert_eq!(found.notes.len(), said.len(), "{read:?}: {found:?}");
        for (note, said) in found.notes.iter().zip(*said) {
            assert!(note.contains(said) && !note.contains('\n'), "{note}");
        }
    }
}

#[test]
fn a_gpu_that_the_kernels_were_not_compiled_for_is_refused() {
    // (compiled for, the GPU's compute capability, what is said)
    for (built_for, compute, said) in [
        (None, (8, 0), ""),
        (Some((8, 0)), (8, 0), ""),
        (Some((8, 0)), (9, 0), ""),
        (Some((7, 0)), (12, 0), ""),
        (Some((9, 0)), (9, 0), ""),
        (
            Some((9, 0)),
            (8, 0),
            "cuda:0 (NVIDIA A100) has compute capability 8.0, and this program was built for 9.0; build it with \
             CUDA_COMPUTE_CAP=80 (docs/gpu.md) to train on it",
        ),
        (Some((8, 6)), (8, 0), "built for 8.6; build it with CUDA_COMPUTE_CAP=80"),
        // What is compiled for 9.0 runs on nothing later either.
        (Some((9, 0)), (10, 0), "built for 9.0; build it with CUDA_COMPUTE_CAP=100"),
        (Some((9, 0)), (6, 1), "which is too old"),
    ] {
        let gpus = vec![Gpu { compute, ..gpu("NVIDIA A100", "GPU-10", 40) }];
        let found = choose(&Ok(Facts { gpus, ..facts() }), &Settings { built_for, ..settings() });
        let what = format!("{built_for:?} on {compute:?}: {found:?}");
        assert_eq!(found.devices.len(), usize::from(said.is_empty()), "{what}");
        assert_eq!(found.notes.len(), usize::from(!said.is_empty()), "{what}");
        assert!(found.notes.iter().all(|note| note.contains(said)), "{what}");
    }
}

/// An old card keeps its number: CUDA counts it.
#[test]
fn a_refused_card_keeps_its_number() {
    let mut facts = facts();
    facts.gpus[1].compute = (6, 0);
    let found = choose(&Ok(facts), &settings());
    assert_eq!(found.devices[0].id.as_str(), "cuda:1");
    assert_eq!(uuids(&found)[0], "MIG-aa");
}
