//! Agents that say where they are, and who leads.
//!
//! A member's key hangs on a lease: it says that the machine lives and can be found, nothing about its trials, whose
//! leases are the coordinator's.

use super::EtcdOptions;
use super::client::{Etcd, Operation};
use super::lease::Lease;
use crate::{Leadership, Member, Result};
use actor::Scope;
use etcd_client::{Client, GetOptions, PutOptions, SortOrder, SortTarget};
use futures::future::{BoxFuture, FutureExt};
use std::time::Duration;

/// The pause between two tries to register.
const PAUSE: Duration = Duration::from_secs(1);

/// Who is there.
#[derive(Debug, Clone)]
pub struct Members {
    etcd: Etcd,
    ttl: Duration,
}

impl Members {
    /// Connects to an etcd that is there.
    ///
    /// # Errors
    /// No address can be used, or etcd does not answer.
    pub async fn connect(options: &EtcdOptions) -> Result<Self> {
        Ok(Self::of(Etcd::connect(options).await?, options.ttl))
    }

    /// The same, whether or not etcd is there: whoever asks is told.
    ///
    /// # Errors
    /// The certificates cannot be read.
    pub fn open(options: &EtcdOptions) -> Result<Self> {
        Ok(Self::of(Etcd::new(options)?, options.ttl))
    }

    pub(super) fn of(etcd: Etcd, ttl: Duration) -> Self {
        Self { etcd, ttl }
    }

    /// Enters a member and keeps its entry alive, through whatever etcd does, until `scope` is cancelled, whose
    /// `finish` waits until the entry is removed. Returns before the entry is there.
    pub fn register(&self, member: Member, scope: &Scope) {
        let (members, stop) = (self.clone(), scope.clone());
        scope.spawn("membership", async move {
            while !stop.is_cancelled() {
                match members.enter(&member, &stop).await {
                    Ok(lease) => drop(lease.over().await),
                    Err(error) => tracing::warn!(%error, "not registered; trying again"),
                }
                tokio::select! {
                    () = tokio::time::sleep(PAUSE) => {}
                    () = stop.cancelled() => {}
                }
            }
        });
    }

    async fn enter(&self, member: &Member, scope: &Scope) -> Result<Lease> {
        let lease = Lease::grant(&self.etcd, self.ttl, scope).await?;
        // Tried twice it is the same entry on the same lease.
        let put = |mut client: Client| {
            let options = Some(PutOptions::new().with_lease(lease.id()));
            let (key, value) = (self.etcd.member(&member.id), member.value.clone());
            async move { client.put(key, value, options).await }
        };
        if let Err(error) = self.etcd.call(Operation::REGISTER, put).await {
            lease.end().await;
            return Err(error);
        }
        tracing::info!(id = member.id, "registered in etcd");
        Ok(lease)
    }
}

impl Leadership for Members {
    /// What the leader gave as its name when it became that.
    fn leader(&self) -> BoxFuture<'_, Result<Option<String>>> {
        async {
            // As etcd's election has it: the oldest of those who wait in it.
            let oldest = GetOptions::new().with_prefix().with_limit(1);
            let oldest = oldest.with_sort(SortTarget::Create, SortOrder::Ascend);
            let found = self.etcd.get(format!("{}/", self.etcd.election()), oldest).await?;
            Ok(found.into_iter().next().map(|(_, value, _)| String::from_utf8_lossy(&value).into_owned()))
        }
        .boxed()
    }
    fn members(&self) -> BoxFuture<'_, Result<Vec<Member>>> {
        async {
            let prefix = self.etcd.member("");
            let found = self.etcd.get(prefix.clone(), GetOptions::new().with_prefix()).await?;
            let member = |(key, value, _): (Vec<u8>, Vec<u8>, i64)| {
                let id = String::from_utf8_lossy(key.get(prefix.len()..).unwrap_or_default()).into_owned();
                Member { id, value }
            };
            Ok(found.into_iter().map(member).collect())
        }
        .boxed()
    }
}
