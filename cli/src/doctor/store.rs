//! Where a coordinator is to keep metrics and checkpoints.

use super::network::{LIMIT, within};
use super::{Finding, machine};
use coordinator::place::{Place, PlaceError};

/// A directory's disk, or whether a store does what is asked of it: writes, does not replace, reads, lists, deletes.
pub(super) async fn artifacts(named: &str) -> Vec<Finding> {
    match Place::parse(named) {
        Ok(Place::Directory(dir)) => machine::disk(&dir),
        // A store that does not answer is tried again by its client, each of the five times.
        Ok(Place::Objects(objects)) => {
            let found =
                within(5 * LIMIT, objects.probe()).await.map(|probed| probed.map_err(|e| e.to_string()));
            vec![of_store(named, found.and_then(|probed| probed))]
        }
        Err(error @ PlaceError::Feature(_)) => vec![Finding::warning(
            CHECK,
            error.to_string(),
            "a coordinator looks itself when it starts; to look from here, build with --features object-stores",
        )],
        Err(error) => {
            vec![Finding::bad(CHECK, error.to_string(), "mend --artifacts, or the variables that it names")]
        }
    }
}

const CHECK: &str = "store";

fn of_store(named: &str, probed: Result<(), String>) -> Finding {
    match probed {
        Ok(()) => Finding::good(CHECK, format!("{named} takes objects, and gives them back")),
        // What it says names the store and what to do.
        Err(why) => Finding::bad(
            CHECK,
            why,
            "mend it before a coordinator starts: it would refuse to (docs/fleet.md)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[tokio::test]
    async fn places_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let free = format!("free for {}", dir.path().display());
        let of = |named: String| async move { artifacts(&named).await };
        for named in [dir.path().display().to_string(), format!("file://{}", dir.path().display())] {
            let findings = of(named).await;
            assert!(findings[0].found.contains(&free), "{findings:?}");
        }
        let findings = of("az://x".into()).await;
        assert!(
            findings[0].verdict == Verdict::Bad && findings[0].found.contains("is no place"),
            "{findings:?}"
        );
    }

    #[test]
    fn what_a_store_says_is_passed_on() {
        assert_eq!(of_store("s3://b", Ok(())).verdict, Verdict::Good);
        let bad = of_store("s3://b", Err("`s3://b`: writing failed".into()));
        assert!(bad.verdict == Verdict::Bad && bad.found.contains("writing failed"), "{bad:?}");
    }
}
