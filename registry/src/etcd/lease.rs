//! A lease that is kept alive until it is ended, expires, or could not be renewed for its whole term.

use super::client::{Etcd, Operation, PATIENCE};
use crate::{RegistryError, Result};
use actor::Scope;
use etcd_client::{Client, Error};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The pause before a broken stream of renewals is opened again.
const PAUSE: Duration = Duration::from_millis(200);

/// gRPC's number of the status that a lease is not there, or not any more.
const NOT_FOUND: i32 = 5;

/// A granted lease. Clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    id: i64,
    /// Cancelled, nothing renews it any more.
    kept: Scope,
    /// Once it is over: when it was last known to be alive.
    over: watch::Receiver<Option<Instant>>,
}

impl Lease {
    /// Asks for a lease and keeps it alive until [`Lease::end`], or until `scope` is cancelled, which ends it too and
    /// waits for that when it is finished.
    pub(super) async fn grant(etcd: &Etcd, ttl: Duration, scope: &Scope) -> Result<Self> {
        // A node that was asked and did not answer may grant one too: nothing hangs on it, and its term ends it.
        let asked = Instant::now();
        let seconds = ttl.as_secs().max(2);
        let granted = etcd
            .call(Operation::GRANT_LEASE, |mut client| async move {
                client.lease_grant(seconds as i64, None).await
            })
            .await?;
        let id = granted.id();
        if id == 0 {
            return Err(RegistryError::Storage("etcd granted no lease".into()));
        }
        let (ended, over) = watch::channel(None);
        let (etcd, ttl, kept) = (etcd.clone(), Duration::from_secs(seconds), scope.child());
        let stop = kept.clone();
        scope.spawn("lease", async move {
            let alive = tokio::select! {
                until = keep(&etcd, id, asked + ttl, ttl) => {
                    tracing::warn!(lease = id, "a lease in etcd has ended");
                    // Whatever the clock was when it was found out: a process may have stood still since.
                    until.checked_sub(ttl).unwrap_or(asked)
                }
                () = stop.cancelled() => {
                    // Nothing renews it any more: if this fails, its term ends it, with the keys that hang on it.
                    if let Err(error) = etcd.call(Operation::REVOKE_LEASE, |client| revoke(client, id)).await {
                        tracing::warn!(%error, "the lease ends by itself");
                    }
                    Instant::now()
                }
            };
            ended.send_replace(Some(alive));
        });
        Ok(Self { id, kept, over })
    }

    /// Its number.
    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// Returns once it is over, with the moment at which etcd was last asked to renew it and did.
    pub(super) async fn over(&self) -> Instant {
        // An error says that the task is gone, and with it whatever kept the lease alive.
        let alive = self.over.clone().wait_for(Option::is_some).await.ok().and_then(|alive| *alive);
        alive.unwrap_or_else(Instant::now)
    }

    /// Ends it, and with it the keys that hang on it.
    pub(super) async fn end(&self) {
        self.kept.cancel();
        self.over().await;
    }
}

/// Ends a lease; one that has ended, perhaps by an earlier try, is as good.
async fn revoke(mut client: Client, id: i64) -> std::result::Result<(), Error> {
    match client.lease_revoke(id).await {
        Err(Error::GRpcStatus(status)) if i32::from(status.code()) == NOT_FOUND => Ok(()),
        other => other.map(drop),
    }
}

/// Renews until the lease is over, at another node if one does not answer while there is time. The term is counted from when
/// a renewal was sent, so that it ends here no later than in etcd. Answers with the end of the last term that etcd granted.
async fn keep(etcd: &Etcd, id: i64, mut until: Instant, ttl: Duration) -> Instant {
    const RENEW: Operation = Operation::RENEW_LEASE;
    let patience = if etcd.has_one_node() { ttl } else { PATIENCE.min(ttl / 4) };
    while let Ok(node) = etcd.node() {
        let open = async { node.client().await?.lease_keep_alive(id).await };
        match tokio::time::timeout_at(until.min(Instant::now() + patience), open).await {
            Ok(Ok((mut keeper, mut answers))) => loop {
                let sent = Instant::now();
                let answer = async {
                    keeper.keep_alive().await?;
                    answers.message().await
                };
                match tokio::time::timeout_at(until.min(sent + patience), answer).await {
                    Ok(Ok(Some(answer))) if answer.ttl() > 0 => until = sent + ttl,
                    Ok(Ok(Some(_))) => return until,
                    Ok(Ok(None)) => break,
                    Ok(Err(error)) => {
                        etcd.refused(&node, RENEW, &error);
                        break;
                    }
                    Err(_) => {
                        etcd.unanswered(&node, RENEW);
                        break;
                    }
                }
                tokio::time::sleep(ttl / 3).await;
            },
            Ok(Err(error)) => {
                etcd.refused(&node, RENEW, &error);
            }
            Err(_) => etcd.unanswered(&node, RENEW),
        }
        if Instant::now() >= until {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    until
}
