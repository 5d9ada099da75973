//! A lease that is kept alive until it is ended, expires, or could not be renewed for its whole term.

use super::client::{Etcd, Operation};
use crate::{RegistryError, Result};
use actor::Scope;
use etcd_client::Client;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The pause before a broken stream of renewals is opened again.
const PAUSE: Duration = Duration::from_millis(200);

/// A granted lease. Clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    id: i64,
    /// Cancelled, nothing renews it any more.
    kept: Scope,
    over: watch::Receiver<bool>,
}

impl Lease {
    /// Asks for a lease and keeps it alive until [`Lease::end`], or until `scope` is cancelled, which ends it too and
    /// waits for that when it is finished.
    pub(super) async fn grant(etcd: &Etcd, ttl: Duration, scope: &Scope) -> Result<Self> {
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
        let (ended, over) = watch::channel(false);
        let (etcd, ttl, kept) = (etcd.clone(), Duration::from_secs(seconds), scope.child());
        let stop = kept.clone();
        scope.spawn("lease", async move {
            tokio::select! {
                () = keep(etcd.client(), id, asked + ttl, ttl) => {
                    tracing::warn!(lease = id, "a lease in etcd has ended");
                }
                () = stop.cancelled() => {
                    // Nothing renews it any more: if this fails, its term ends it, with the keys that hang on it.
                    if let Err(error) = etcd.call(Operation::REVOKE_LEASE, |mut client| async move { client.lease_revoke(id).await }).await {
                        tracing::warn!(%error, "the lease ends by itself");
                    }
                }
            }
            ended.send_replace(true);
        });
        Ok(Self { id, kept, over })
    }

    /// Its number.
    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// Returns once it is over.
    pub(super) async fn over(&self) {
        // An error says that the task is gone, and with it whatever kept the lease alive.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    /// Ends it, and with it the keys that hang on it.
    pub(super) async fn end(&self) {
        self.kept.cancel();
        self.over().await;
    }
}

/// Renews until the lease is over. The term is counted from when a renewal was sent, so that it ends here no later than
/// in etcd.
async fn keep(mut client: Client, id: i64, mut until: Instant, ttl: Duration) {
    loop {
        let renewals = tokio::time::timeout_at(until, client.lease_keep_alive(id)).await;
        match &renewals {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => Operation::RENEW_LEASE.failed(error),
            Err(_) => Operation::RENEW_LEASE.unanswered(),
        }
        if let Ok(Ok((mut keeper, mut answers))) = renewals {
            loop {
                let sent = Instant::now();
                let answer = async {
                    keeper.keep_alive().await?;
                    answers.message().await
                };
                match tokio::time::timeout_at(until, answer).await {
                    Ok(Ok(Some(answer))) if answer.ttl() > 0 => until = sent + ttl,
                    Ok(Ok(Some(_))) => return,
                    Err(_) => return Operation::RENEW_LEASE.unanswered(),
                    Ok(Ok(None)) => break,
                    Ok(Err(error)) => {
                        Operation::RENEW_LEASE.failed(&error);
                        break;
                    }
                }
                tokio::time::sleep(ttl / 3).await;
            }
        }
        if Instant::now() >= until {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
