//! Runs of a sweep's best trials with other seeds: what a document may ask, and which seeds they have.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{check, spec};
use domain::sweep::{Replicates, SweepSpec};
use serde_json::json;

#[test]
fn runs_of_the_best_with_other_seeds() {
    let asked = |runs, finalists| Some(Replicates { runs, finalists });
    for (changes, want) in [
        (json!({}), None),
        (json!({ "replicates": 1 }), None),
        (json!({ "replicates": 1, "finalists": 2 }), None),
        (json!({ "replicates": null, "finalists": null }), None),
        (json!({ "replicates": 3 }), asked(3, 3)),
        (json!({ "replicates": 2, "finalists": 1 }), asked(2, 1)),
        (json!({ "replicates": 100, "finalists": 100 }), asked(100, 100)),
        (json!({ "replicates": 3, "keep_adapters": 3 }), asked(3, 3)),
        (json!({ "replicates": 1, "keep_adapters": 1 }), None),
        // A constant is no search.
        (json!({ "replicates": 2, "parameters": { "lora_rank": [8, 16], "seed": 7 } }), asked(2, 3)),
    ] {
        let spec = spec(changes.clone());
        assert_eq!(spec.replicates, want, "{changes}");
        assert_eq!(SweepSpec::from_document(&spec.to_document()).unwrap(), spec, "{changes}");
    }
    for (changes, problem) in [
        (
            json!({ "replicates": 0 }),
            "replicates: must be a whole number from 1, not 0; give one of at most 100",
        ),
        (
            json!({ "replicates": "three", "finalists": 2 }),
            "replicates: must be a whole number from 1, not \"three\"; give one of at most 100",
        ),
        (
            json!({ "replicates": 2, "finalists": 101 }),
            "finalists: must be a whole number from 1, not 101; give one of at most 100",
        ),
        (
            json!({ "finalists": 2 }),
            "finalists: says how many trials are run again, and none is; add replicates: 3, or remove it",
        ),
        (
            json!({ "replicates": 2, "parameters": { "seed": [1, 2] } }),
            "replicates: are runs of the best trials with other seeds, and the search chooses by seed; give seed one \
             value, or remove replicates",
        ),
        (
            json!({ "replicates": 3, "keep_adapters": 2 }),
            "keep_adapters: is 2, and the best of 3 finalists may be any of them; set keep_adapters to at least finalists",
        ),
    ] {
        check(changes, &[problem]);
    }
}

/// Reference: the streams of `domain::rng`, drawn in Python.
#[test]
fn seeds_of_further_runs() {
    for (first, run, want) in
        [(0, 2, 8_754_438_904_263_943), (0, 3, 1_741_140_584_894_632), (42, 2, 2_791_174_315_431_681)]
    {
        assert_eq!(Replicates::seed(first, run), want, "run {run} of {first}");
    }
    for (asked, trials, want) in [((3, 3), 16, 6), ((3, 3), 2, 4), ((2, 1), 9, 1), ((2, 3), 0, 0)] {
        let (runs, finalists) = asked;
        assert_eq!(Replicates { runs, finalists }.on_top_of(trials), want, "{asked:?} of {trials}");
    }
}
