//! Fetches what the coordinator says that trials will need, one after the other. What cannot be fetched is fetched by
//! the trial that needs it.

use crate::cache::{Ahead, Cache};
use crate::transfer::Transfers;
use actor::Scope;
use domain::data::Reference;
use std::collections::BTreeSet;
use tokio::sync::watch;

/// Starts it. It takes what is to be fetched, what is needed first first; the newest list counts.
pub fn start(cache: Cache, transfers: Transfers, scope: &Scope) -> watch::Sender<Vec<Reference>> {
    let (sender, wanted) = watch::channel(Vec::new());
    let ends = scope.clone();
    scope.spawn("fetch ahead", async move {
        tokio::select! {
            () = ends.cancelled() => {}
            () = run(&cache, &transfers, wanted) => {}
        }
    });
    sender
}

async fn run(cache: &Cache, transfers: &Transfers, mut wanted: watch::Receiver<Vec<Reference>>) {
    while wanted.changed().await.is_ok() {
        let references = wanted.borrow_and_update().clone();
        let trees: BTreeSet<_> = references.iter().map(|reference| reference.tree).collect();
        for reference in &references {
            while !wanted.has_changed().unwrap_or(true) {
                cache.until_quiet().await;
                match cache.fetch_ahead(transfers, reference, &trees).await {
                    Ok(Ahead::GaveWay) => {}
                    Ok(Ahead::Here) => break,
                    Err(error) => {
                        tracing::info!(data = %reference, %error, "not fetched ahead");
                        break;
                    }
                }
            }
        }
    }
}
