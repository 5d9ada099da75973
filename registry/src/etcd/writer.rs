//! The group commit: one task takes every commit that waits and writes them in one transaction.
//!
//! etcd takes 128 operations and 1.5 MB a transaction. A value that is too large is written in parts first, and then its
//! key, which names them. A batch that is too large is written as such a value, the journal; from then on it is
//! decided, and is applied in several transactions, by the next leader if this one is gone.
//!
//! A transaction is tried at another node if one does not answer, and that one may carry it out whenever it goes on. So each
//! has a name, which it writes to the key of the turn, where it compares the name of the one before. Of its tries one counts;
//! one that comes after a later transaction finds the turn gone on and has no effect.

use super::Term;
use super::client::{self, Etcd, INLINE, Operation, PART, PARTED};
use crate::{Fence, RegistryError, Result, Write};
use actor::{Reply, Scope};
use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, GetOptions, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse,
    TxnResponse,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{RwLock, mpsc, watch};

/// Operations of a transaction; etcd takes 128. A write of ours is up to three.
const OPERATIONS: usize = 120;
/// Bytes of a transaction; etcd takes 1.5 MB.
const BYTES: usize = 1 << 20;
/// Commits that are looked at together.
const TOGETHER: usize = 256;

/// A batch to write.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) fence: Fence,
    pub(super) batch: Vec<Write>,
    pub(super) reply: Reply<Result<()>>,
}

/// What a batch leaves at each key; `None` removes it.
type Changes = BTreeMap<String, Option<Vec<u8>>>;

/// The one who writes.
pub(super) struct Writer {
    etcd: Etcd,
    term: watch::Receiver<Option<Arc<Term>>>,
    whole: Arc<RwLock<()>>,
    /// The leadership for which `parted` was read.
    known: Fence,
    /// Keys whose value lies in parts, and the parts' id.
    parted: BTreeMap<String, String>,
    /// Ids given in this leadership.
    ids: u64,
    /// The name of the last transaction; `None` if there was none yet.
    turn: Option<Vec<u8>>,
}

impl Writer {
    pub(super) fn new(etcd: Etcd, term: watch::Receiver<Option<Arc<Term>>>, whole: Arc<RwLock<()>>) -> Self {
        Self { etcd, term, whole, known: Fence(0), parted: BTreeMap::new(), ids: 0, turn: None }
    }

    /// Works until the scope is cancelled, and waits then for no answer of etcd: whoever may still want to write is told that it
    /// is over.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Commit>, scope: Scope) {
        let work = async {
            let mut waiting = Vec::new();
            while inbox.recv_many(&mut waiting, TOGETHER).await > 0 {
                self.take(std::mem::take(&mut waiting)).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = scope.cancelled() => {}
        }
    }

    /// Writes commits in their order, as many a transaction as fit.
    async fn take(&mut self, commits: Vec<Commit>) {
        let term = self.term.borrow().clone();
        let (mut together, mut replies) = (Changes::new(), Vec::new());
        for Commit { fence, batch, reply } in commits {
            let Some(term) = term.as_ref().filter(|term| term.fence == fence) else {
                let _ = reply.send(Err(self.fenced(fence).await));
                continue;
            };
            let changes: Changes = batch.into_iter().map(Write::into_change).collect();
            if !fits(together.iter().chain(&changes)) {
                self.answer(term, std::mem::take(&mut together), std::mem::take(&mut replies)).await;
            }
            together.extend(changes);
            replies.push(reply);
        }
        if let Some(term) = term.filter(|_| !replies.is_empty()) {
            self.answer(&term, together, replies).await;
        }
    }

    async fn answer(&mut self, term: &Term, changes: Changes, replies: Vec<Reply<Result<()>>>) {
        if replies.is_empty() {
            return;
        }
        let done = self.write(term, changes).await;
        if done.is_err() {
            // What etcd has done of it is not known: it is read again.
            self.known = Fence(0);
        }
        for reply in replies {
            // Nobody may be listening any more.
            let _ = reply.send(done.clone());
        }
    }

    async fn write(&mut self, term: &Term, changes: Changes) -> Result<()> {
        if self.known != term.fence {
            self.begin(term).await?;
        }
        if fits(changes.iter()) {
            return self.apply(term, changes).await;
        }
        let (etcd, whole) = (self.etcd.clone(), Arc::clone(&self.whole));
        let (id, journal) = (self.new_id(term), encode(&changes));
        self.write_parts(term, &id, &journal).await?;
        let mark = [&[PARTED], id.as_bytes()].concat();
        self.transaction(term, vec![TxnOp::put(etcd.journal(), mark, None)]).await?;
        let _whole = whole.write().await;
        self.apply_journal(term, changes, &id).await
    }

    /// Applies a batch that is decided, and forgets its journal.
    async fn apply_journal(&mut self, term: &Term, changes: Changes, id: &str) -> Result<()> {
        let mut piece = Changes::new();
        for (key, value) in changes {
            let one = Changes::from([(key, value)]);
            if !fits(piece.iter().chain(&one)) {
                self.apply(term, std::mem::take(&mut piece)).await?;
            }
            piece.extend(one);
        }
        self.apply(term, piece).await?;
        let parts = DeleteOptions::new().with_prefix();
        let forget =
            vec![TxnOp::delete(self.etcd.journal(), None), TxnOp::delete(self.etcd.parts(id), Some(parts))];
        self.transaction(term, forget).await
    }

    /// Applies changes that fit, or one that does not, in one transaction; parts come before.
    async fn apply(&mut self, term: &Term, changes: Changes) -> Result<()> {
        let mut operations = Vec::new();
        let mut parted = Vec::new();
        for (key, value) in changes {
            if let Some(old) = self.parted.get(&key) {
                operations
                    .push(TxnOp::delete(self.etcd.parts(old), Some(DeleteOptions::new().with_prefix())));
                operations.push(TxnOp::delete(self.etcd.owner(old), None));
                parted.push((key.clone(), None));
            }
            let at = self.etcd.state(&key);
            match value {
                None => operations.push(TxnOp::delete(at, None)),
                Some(value) if value.len() <= PART => {
                    operations.push(TxnOp::put(at, [&[INLINE], value.as_slice()].concat(), None));
                }
                Some(value) => {
                    let id = self.new_id(term);
                    self.write_parts(term, &id, &value).await?;
                    operations.push(TxnOp::put(at, [&[PARTED], id.as_bytes()].concat(), None));
                    operations.push(TxnOp::put(self.etcd.owner(&id), key.as_bytes(), None));
                    parted.push((key, Some(id)));
                }
            }
        }
        self.transaction(term, operations).await?;
        for (key, id) in parted {
            match id {
                Some(id) => self.parted.insert(key, id),
                None => self.parted.remove(&key),
            };
        }
        Ok(())
    }

    fn new_id(&mut self, term: &Term) -> String {
        self.ids += 1;
        format!("{}-{}", term.fence.0, self.ids)
    }

    async fn write_parts(&mut self, term: &Term, id: &str, value: &[u8]) -> Result<()> {
        let prefix = self.etcd.parts(id);
        let mut operations = Vec::new();
        for (number, part) in value.chunks(PART).enumerate() {
            operations.push(TxnOp::put(format!("{prefix}{number:08}"), part, None));
            if operations.len() * PART >= BYTES {
                self.transaction(term, std::mem::take(&mut operations)).await?;
            }
        }
        if operations.is_empty() { Ok(()) } else { self.transaction(term, operations).await }
    }

    /// Writes under the term's fence.
    async fn transaction(&mut self, term: &Term, operations: Vec<TxnOp>) -> Result<()> {
        if operations.is_empty() {
            return self.look(term).await;
        }
        match self.take_turn(term, operations).await? {
            true => Ok(()),
            false => Err(RegistryError::Storage(
                "etcd: nothing was written, as an earlier write that had failed came late".into(),
            )),
        }
    }

    /// Sees that the term is the current one. It writes nothing, and may be asked as often as one likes.
    async fn look(&self, term: &Term) -> Result<()> {
        // Without an operation etcd takes it for a serializable read, which a member that lags answers from what it knows.
        let look = TxnOp::get(term.key.clone(), None);
        let txn = Txn::new().when(vec![self.leads(term)]).and_then(vec![look]);
        let answer = self.etcd.call(Operation::WRITE, |client| tried(client, txn.clone())).await?;
        self.etcd.saw(answer.header());
        if answer.succeeded() { Ok(()) } else { Err(self.fenced(term.fence).await) }
    }

    /// Writes in this transaction's turn. False if it is not its turn, as an earlier one of this term, of which nobody knew
    /// whether it had its effect, had it now.
    async fn take_turn(&mut self, term: &Term, mut operations: Vec<TxnOp>) -> Result<bool> {
        let (name, turn) = (self.new_id(term).into_bytes(), self.etcd.turn());
        operations.push(TxnOp::put(turn.clone(), name.clone(), None));
        let is_next = match &self.turn {
            Some(last) => Compare::value(turn.clone(), CompareOp::Equal, last.clone()),
            None => Compare::create_revision(turn.clone(), CompareOp::Equal, 0),
        };
        let txn = Txn::new()
            .when(vec![self.leads(term), is_next])
            .and_then(operations)
            .or_else(vec![TxnOp::get(turn, None)]);
        let answer = self.etcd.call(Operation::WRITE, |client| tried(client, txn.clone())).await?;
        self.etcd.saw(answer.header());
        let found = answer.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(found) => found.kvs().first().map(|kv| kv.value().to_vec()),
            _ => None,
        });
        // Another try of it had its effect before this one.
        if answer.succeeded() || found.as_ref() == Some(&name) {
            self.turn = Some(name);
            return Ok(true);
        }
        match self.fenced(term.fence).await {
            RegistryError::Fenced { held, current } if held == current => Ok(false),
            error => Err(error),
        }
    }

    /// What holds as long as the term does.
    fn leads(&self, term: &Term) -> Compare {
        Compare::create_revision(term.key.clone(), CompareOp::Equal, term.fence.0 as i64)
    }

    /// The refusal of a fence that is not the current leader's.
    async fn fenced(&self, held: Fence) -> RegistryError {
        let oldest =
            GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend).with_limit(1);
        let found = |mut client: Client| {
            let (key, oldest) = (format!("{}/", self.etcd.election()), oldest.clone());
            async move { client.get(key, Some(oldest)).await }
        };
        match self.etcd.call(Operation::ASK_WHO_LEADS, found).await {
            Ok(answer) => {
                let current = answer.kvs().first().map_or(0, |kv| kv.create_revision().unsigned_abs());
                RegistryError::Fenced { held: held.0, current }
            }
            Err(error) => error,
        }
    }

    /// Takes over from the leader before, or after a write of which nobody knows whether it had its effect: applies what was
    /// decided, and forgets parts that no key names.
    async fn begin(&mut self, term: &Term) -> Result<()> {
        // No earlier transaction has an effect from here on. One comes in between at most as often as one failed.
        loop {
            let found = self.etcd.get(self.etcd.turn(), GetOptions::new()).await?.pop();
            self.turn = found.map(|(_, name, _)| name);
            if self.take_turn(term, Vec::new()).await? {
                break;
            }
        }
        self.parted.clear();
        let owners = self.all(self.etcd.owner(""), GetOptions::new()).await?;
        let start = self.etcd.owner("").len();
        for (key, owner) in owners {
            let id = String::from_utf8_lossy(key.get(start..).unwrap_or_default()).into_owned();
            self.parted.insert(String::from_utf8_lossy(&owner).into_owned(), id);
        }
        let journal = self.etcd.get(self.etcd.journal(), GetOptions::new()).await?.pop();
        if let Some((_, mark, revision)) = journal {
            let id = String::from_utf8_lossy(mark.get(1..).unwrap_or_default()).into_owned();
            let changes = decode(&self.etcd.whole_value(&mark, revision).await?);
            let changes =
                changes.ok_or_else(|| RegistryError::Storage("etcd: the journal is damaged".into()))?;
            tracing::info!(writes = changes.len(), "applying what the last leader had decided");
            let whole = Arc::clone(&self.whole);
            let _whole = whole.write().await;
            self.apply_journal(term, changes, &id).await?;
        }
        let parts = self.all(self.etcd.all_parts(), GetOptions::new().with_keys_only()).await?;
        let start = self.etcd.all_parts().len();
        let id = |key: &[u8]| {
            let rest = String::from_utf8_lossy(key.get(start..).unwrap_or_default()).into_owned();
            rest.split('/').next().unwrap_or_default().to_string()
        };
        let mut stray: Vec<_> = parts.iter().map(|(key, _)| id(key)).collect();
        stray.dedup();
        stray.retain(|id| !self.parted.values().any(|known| known == id));
        for id in stray {
            let parts = DeleteOptions::new().with_prefix();
            self.transaction(term, vec![TxnOp::delete(self.etcd.parts(&id), Some(parts))]).await?;
        }
        self.known = term.fence;
        Ok(())
    }

    /// Every key that begins with `prefix`, in pages.
    async fn all(&self, prefix: String, options: GetOptions) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let end = client::after_all_of(prefix.clone());
        let (mut next, mut all) = (prefix.into_bytes(), Vec::new());
        loop {
            let page = options.clone().with_range(end.clone()).with_limit(super::PAGE as i64);
            let page = self.etcd.get(next, page).await?;
            let full = page.len() == super::PAGE;
            all.extend(page.into_iter().map(|(key, value, _)| (key, value)));
            match all.last() {
                Some((last, _)) if full => next = client::successor(last),
                _ => return Ok(all),
            }
        }
    }
}

async fn tried(mut client: Client, txn: Txn) -> std::result::Result<TxnResponse, etcd_client::Error> {
    client.txn(txn).await
}

impl Write {
    fn into_change(self) -> (String, Option<Vec<u8>>) {
        match self {
            Self::Put(key, value) => (key, Some(value)),
            Self::Delete(key) => (key, None),
        }
    }
}

/// Whether one transaction takes these changes, each with the removal of old parts.
fn fits<'a>(changes: impl Iterator<Item = (&'a String, &'a Option<Vec<u8>>)>) -> bool {
    let (mut operations, mut bytes) = (0, 0);
    for (key, value) in changes {
        operations += 3;
        // A value in parts is written before; the transaction has its id.
        bytes += key.len() + value.as_ref().map_or(0, Vec::len).min(PART) + 64;
    }
    operations <= OPERATIONS && bytes <= BYTES
}

/// A batch as bytes: each change as the key's length and the key, then 0, or 1 with the value's length and the value.
fn encode(changes: &Changes) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |part: &[u8]| {
        bytes.extend((part.len() as u64).to_le_bytes());
        bytes.extend(part);
    };
    for (key, value) in changes {
        put(key.as_bytes());
        match value {
            Some(value) => {
                put(&[1]);
                put(value);
            }
            None => put(&[0]),
        }
    }
    bytes
}

/// The batch that [`encode`] made these bytes of; `None` if they are not whole.
fn decode(mut bytes: &[u8]) -> Option<Changes> {
    let mut take = || -> Option<Option<Vec<u8>>> {
        if bytes.is_empty() {
            return Some(None);
        }
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        bytes = rest;
        Some(Some(part.to_vec()))
    };
    let mut changes = Changes::new();
    while let Some(key) = take()? {
        let value = match take()??.as_slice() {
            [0] => None,
            [1] => Some(take()??),
            _ => return None,
        };
        changes.insert(String::from_utf8(key).ok()?, value);
    }
    Some(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Registry;
    use crate::etcd::{EtcdOptions, EtcdRegistry};

    #[test]
    fn a_batch_as_bytes_and_back() {
        let some = Some(vec![0, 1, 255]);
        let changes = Changes::from([("".into(), some), ("a".into(), None), ("b\0".into(), Some(vec![]))]);
        let bytes = encode(&changes);
        assert_eq!(decode(&bytes), Some(changes));
        for end in 1..bytes.len() {
            assert!(decode(&bytes[..end]).is_none_or(|cut| cut.len() < 3), "{end} bytes");
        }
        assert_eq!(decode(&[]), Some(Changes::new()));
    }

    #[tokio::test]
    async fn of_the_tries_of_a_transaction_one_counts_and_none_that_comes_late() {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = ::tests::etcd::Etcd::start(dir.path()) else { return };
        let scope = Scope::new();
        let options = EtcdOptions::new(vec![server.endpoint.clone()]);
        let registry = EtcdRegistry::connect(&options, &scope).await.unwrap();
        let fence = registry.lead("test").await.unwrap();
        let term = registry.term.borrow().clone().unwrap();
        let value = async || String::from_utf8(registry.get("a").await.unwrap().unwrap()).unwrap();

        // It writes beside the registry's own, with names of its own.
        let mut writer = Writer::new(registry.etcd.clone(), registry.term.subscribe(), Arc::default());
        writer.ids = 1000;
        writer.begin(&term).await.unwrap();
        let put = |value: &str| {
            vec![TxnOp::put(registry.etcd.state("a"), [&[INLINE], value.as_bytes()].concat(), None)]
        };
        let (turn, ids) = (writer.turn.clone(), writer.ids);
        assert!(writer.take_turn(&term, put("first")).await.unwrap());
        (writer.turn, writer.ids) = (turn.clone(), ids);
        assert!(writer.take_turn(&term, put("again")).await.unwrap(), "an earlier try of it had its effect");
        assert_eq!(value().await, "first");
        assert!(writer.take_turn(&term, put("second")).await.unwrap());
        (writer.turn, writer.ids) = (turn, ids);
        assert!(!writer.take_turn(&term, put("late")).await.unwrap());
        assert_eq!(value().await, "second");

        // To the registry's own these came as what it had given up would: it says so once, and goes on after them.
        let third = || vec![Write::Put("a".into(), b"third".to_vec())];
        let refusal = registry.commit(fence, third()).await.unwrap_err();
        assert!(refusal.to_string().contains("came late"), "{refusal}");
        assert_eq!(value().await, "second");
        registry.commit(fence, third()).await.unwrap();
        assert_eq!(value().await, "third");
        scope.cancel();
    }
}
