//! Which sweeps run. The directory's actor serialises submissions and knows the running sweeps; its handle
//! also answers for those that are over, from the store.

use super::deletion;
use super::message::TrialEvent;
use super::sweep::{Change, Operation, Selection, Standing, SweepHandle, Tools, View};
use crate::artifacts::Stored;
use crate::error::{CoordinatorError, Result};
use crate::search::Searcher;
use crate::store::{Batch, Checkpoint, Store, SweepRecord, Tombstone, TrialRecord};
use actor::{Gone, Mailbox, Reply, Scope};
use domain::footprint::ModelShape;
use domain::metric::MetricPoint;
use domain::sweep::{StateCounts, Sweep, SweepSpec, SweepState};
use domain::{AgentId, Attempt, SweepId, TrialId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use telemetry::trace::Place;
use tokio::sync::{broadcast, mpsc, watch};

/// Commands that may wait.
const CAPACITY: usize = 64;

/// A sweep to start.
#[derive(Debug, Clone)]
pub struct Submission {
    /// Made by the submitter: the same id again is the same submission.
    pub request_id: String,
    /// The submitter's.
    pub namespace: String,
    /// The sweep.
    pub spec: Box<SweepSpec>,
    /// Shapes of base models, by the name that trials give them.
    pub base_models: BTreeMap<String, ModelShape>,
    /// Where in its trace the submitting command called.
    pub submitted_by: Option<Place>,
}

enum Command {
    Submit(Submission, Reply<Result<Sweep>>),
    Reopen(SweepId, Operation, Reply<Result<Sweep>>),
    Delete(SweepId, Reply<Result<Tombstone>>),
    /// The sweep's actor, if it is not the one of that number.
    Find(SweepId, u64, Reply<Result<(u64, SweepHandle)>>),
    /// The sweep's actor of that number ended.
    Ended(SweepId, u64),
}

/// The sweeps that run, each with the number of its actor: a sweep that is over may run again.
type Running = Arc<HashMap<SweepId, (u64, SweepHandle)>>;

/// Speaks to the directory, and through it to the sweeps.
#[derive(Clone)]
pub struct Directory {
    mailbox: Mailbox<Command>,
    running: watch::Receiver<Running>,
    store: Store,
    /// Of one that is retired: where nothing is ever told, so that whoever follows a sweep that is not over waits.
    retired: Option<broadcast::Sender<Change>>,
}

impl Directory {
    /// Takes up every unfinished sweep of the store, then starts the directory. It ends with `scope`.
    ///
    /// # Errors
    /// The records of a sweep cannot be read.
    pub async fn start(tools: Tools, scope: &Scope) -> Result<Self> {
        let (mailbox, inbox) = actor::mailbox(CAPACITY);
        let store = tools.store.clone();
        let (publish, running) = watch::channel(Running::default());
        let mut state =
            State { tools, running: publish, started: 0, mailbox: mailbox.clone(), scope: scope.clone() };
        let mut heads = store.sweep_heads().await?;
        heads.retain(|head| !head.state.is_terminal());
        tracing::info!(sweeps = heads.len(), "loading sweeps");
        for head in &heads {
            let record = match record(&store, &head.id).await {
                // The others are none the worse for it.
                Err(error @ CoordinatorError::Unreadable { .. }) => {
                    tracing::error!(sweep = %head.id, %error, "a sweep does not go on");
                    continue;
                }
                record => record?,
            };
            let trials = store.trials(&head.id).await?;
            tracing::info!(sweep = %head.id, trials = trials.len(), "going on with a sweep");
            state.run_sweep(record, trials, None).await?;
        }
        store.tombstones().await?.into_iter().for_each(|tombstone| state.remove_artifacts(tombstone, None));
        scope.spawn("directory", async move { state.run(inbox).await });
        Ok(Self { mailbox, running, store, retired: None })
    }

    /// What is left of a directory whose coordinator leads no more: it answers from a store that can be read alone.
    pub fn retired(store: Store) -> Self {
        // Nobody reads either.
        let (mailbox, _) = actor::mailbox(1);
        let (_, running) = watch::channel(Running::default());
        Self { mailbox, running, store, retired: Some(broadcast::channel(1).0) }
    }

    /// Starts a sweep; the same request id again answers with the sweep that it made.
    ///
    /// # Errors
    /// The search is impossible.
    pub async fn submit(&self, submission: Submission) -> Result<Sweep> {
        self.mailbox.ask(|reply| Command::Submit(submission, reply)).await?
    }

    /// The store, for listings.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A sweep as it stands, without its trials.
    pub async fn sweep(&self, id: &SweepId) -> Result<Sweep> {
        if let Some(sweep) = self.find(id)
            && let Ok(sweep) = sweep.sweep().await
        {
            return Ok(sweep);
        }
        Ok(record(&self.store, id).await?.sweep)
    }

    /// Some of a sweep's trials, in the order of their numbers.
    pub async fn trials(&self, id: &SweepId, selection: Selection) -> Result<Vec<TrialRecord>> {
        if let Some(sweep) = self.find(id)
            && let Ok(trials) = sweep.trials(selection.clone()).await
        {
            return Ok(trials);
        }
        if self.store.sweep_head(id).await?.is_none() {
            return Err(CoordinatorError::not_found("sweep", id));
        }
        self.store.select(id, &selection).await
    }

    /// A sweep as it stands, with its trials.
    pub async fn view(&self, id: &SweepId) -> Result<View> {
        if let Some(sweep) = self.find(id)
            && let Ok(view) = sweep.view().await
        {
            return Ok(view);
        }
        let record = record(&self.store, id).await?;
        Ok(View { sweep: record.sweep, trials: self.store.trials(id).await? })
    }

    /// A sweep as it stands, and what changes from then on; nothing does if it is over.
    pub async fn watch(&self, id: &SweepId) -> Result<(View, Option<broadcast::Receiver<Change>>)> {
        if let Some(sweep) = self.find(id)
            && let Ok((view, changes)) = sweep.watch().await
        {
            return Ok((view, Some(changes)));
        }
        let view = self.view(id).await?;
        let changes = self.retired.as_ref().filter(|_| !view.sweep.state.is_terminal());
        Ok((view, changes.map(broadcast::Sender::subscribe)))
    }

    /// Every change of a sweep from now on; `None` if it does not run.
    pub async fn subscribe(&self, id: &SweepId) -> Option<broadcast::Receiver<Change>> {
        match &self.retired {
            Some(retired) => Some(retired.subscribe()),
            None => self.find(id)?.subscribe().await.ok(),
        }
    }

    /// A trial as it stands.
    pub async fn trial(&self, id: &TrialId) -> Result<TrialRecord> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(trial) = sweep.trial(number).await
        {
            return trial;
        }
        self.store.trial(id).await?.ok_or_else(|| CoordinatorError::not_found("trial", id))
    }

    /// Whether a message about an attempt still counts.
    ///
    /// # Errors
    /// `Fenced` if it does not; `NotFound` if there is no such trial.
    pub async fn standing(&self, id: &TrialId, attempt: Attempt, by: Option<&AgentId>) -> Result<Standing> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(standing) = sweep.standing(number, attempt, by.cloned()).await
        {
            return standing;
        }
        Standing::of(&self.trial(id).await?.trial, attempt, by)
    }

    /// Durable points of an attempt.
    ///
    /// # Errors
    /// As [`Directory::standing`].
    pub async fn metrics(&self, id: &TrialId, attempt: Attempt, points: Vec<MetricPoint>) -> Result<()> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(done) = sweep.metrics(number, attempt, points).await
        {
            return done;
        }
        self.repetition(id, attempt, None).await
    }

    /// What an agent says of an attempt; durable when it returns.
    ///
    /// # Errors
    /// As [`Directory::standing`].
    pub async fn event(&self, id: &TrialId, attempt: Attempt, by: &AgentId, event: TrialEvent) -> Result<()> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(done) = sweep.event(number, attempt, by.clone(), event).await
        {
            return done;
        }
        self.repetition(id, attempt, Some(by)).await
    }

    /// An attempt's checkpoint is in the object store; the trial's record points at it when this returns.
    /// Answers with the paths that nothing points at any more.
    ///
    /// # Errors
    /// As [`Directory::standing`].
    pub async fn checkpoint(
        &self,
        id: &TrialId,
        attempt: Attempt,
        step: u64,
        stored: Stored,
    ) -> Result<Vec<String>> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(done) = sweep.checkpoint(number, attempt, step, stored).await
        {
            return done;
        }
        self.repetition(id, attempt, None).await.map(|()| Vec::new())
    }

    /// The checkpoint that an attempt was to go on from is not in the object store any more. It is not current any more when this
    /// returns: another goes on without that checkpoint.
    ///
    /// # Errors
    /// As [`Directory::standing`].
    pub async fn checkpoint_gone(&self, id: &TrialId, attempt: Attempt, gone: Checkpoint) -> Result<()> {
        let (sweep, number) = parts(id)?;
        if let Some(sweep) = self.find(&sweep)
            && let Ok(done) = sweep.checkpoint_gone(number, attempt, gone).await
        {
            return done;
        }
        self.repetition(id, attempt, None).await
    }

    /// Ends a trial for a person.
    ///
    /// # Errors
    /// It is over, or there is none of that id.
    pub async fn stop_trial(&self, id: &TrialId) -> Result<TrialRecord> {
        let (sweep, number) = parts(id)?;
        let stopped = self.ask(&sweep, |sweep| async move { sweep.stop_trial(number).await }).await;
        let Err(
            CoordinatorError::Over { kind: "sweep", .. } | CoordinatorError::NotFound { kind: "sweep", .. },
        ) = stopped
        else {
            return stopped;
        };
        // What is told is the trial's state, unless it runs again by now.
        let trial = self.trial(id).await?.trial;
        if trial.state.is_terminal() { Err(over("trial", id, true, trial.state.as_str())) } else { stopped }
    }

    /// Ends a sweep and its trials for a person. Trials that train upload their adapters first.
    ///
    /// # Errors
    /// It is over, or there is none of that id.
    pub async fn cancel(&self, id: &SweepId) -> Result<Sweep> {
        self.ask(id, |sweep| async move { sweep.cancel().await }).await
    }

    /// Does what a person asks of a sweep.
    ///
    /// # Errors
    /// It is over, or there is none of that id.
    pub async fn operate(&self, id: &SweepId, operation: Operation) -> Result<Sweep> {
        if !operation.reopens() {
            let question = |sweep: SweepHandle| {
                let operation = operation.clone();
                async move { sweep.operate(operation).await }
            };
            return self.ask(id, question).await;
        }
        if let Some(sweep) = self.find(id)
            && let Ok(done) = sweep.operate(operation.clone()).await
        {
            return done;
        }
        self.mailbox.ask(|reply| Command::Reopen(id.clone(), operation, reply)).await?
    }

    /// Deletes a sweep that is over, its trials, metrics and checkpoints; `force` ends it first. Everything is gone
    /// when it returns; whatever happens meanwhile, the next start goes on with it.
    ///
    /// # Errors
    /// It is not over, or there is none of that id.
    pub async fn delete(&self, id: &SweepId, force: bool) -> Result<Tombstone> {
        while force && let Some(mut changes) = self.subscribe(id).await {
            match self.cancel(id).await {
                Ok(_) | Err(CoordinatorError::Over { .. }) => {}
                Err(error) => return Err(error),
            }
            while let Ok(change) = changes.recv().await {
                if matches!(&change, Change::Sweep(sweep) if sweep.state.is_terminal()) {
                    break;
                }
            }
        }
        self.mailbox.ask(|reply| Command::Delete(id.clone(), reply)).await?
    }

    /// The sweep is not running: a message about one of its trials can only be a repetition.
    async fn repetition(&self, id: &TrialId, attempt: Attempt, by: Option<&AgentId>) -> Result<()> {
        match self.standing(id, attempt, by).await? {
            Standing::Over => Ok(()),
            // Nobody runs it: its agent is to let go of it, and has a message of another trial heard next.
            Standing::Current { .. } if self.store.is_unreadable(&parts(id)?.0).await? => {
                Err(CoordinatorError::Fenced { trial: id.clone(), attempt })
            }
            Standing::Current { .. } => Err(Gone.into()),
        }
    }

    /// Asks a running sweep. A sweep that is over may run again by another actor while its last one is asked.
    ///
    /// # Errors
    /// It is over, or there is none of that id; or the sweep's own.
    async fn ask<T, F>(&self, id: &SweepId, question: impl Fn(SweepHandle) -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<Result<T>, Gone>>,
    {
        let (mut asked, mut running) = (0, self.running.borrow().get(id).cloned());
        loop {
            if let Some((number, sweep)) = running {
                if let Ok(answer) = question(sweep).await {
                    return answer;
                }
                asked = number;
            }
            let found = self.mailbox.ask(|reply| Command::Find(id.clone(), asked, reply)).await?;
            running = Some(found?);
        }
    }

    fn find(&self, id: &SweepId) -> Option<SweepHandle> {
        self.running.borrow().get(id).map(|(_, sweep)| sweep.clone())
    }
}

async fn record(store: &Store, id: &SweepId) -> Result<SweepRecord> {
    store.sweep(id).await?.ok_or_else(|| CoordinatorError::not_found("sweep", id))
}

fn parts(id: &TrialId) -> Result<(SweepId, u32)> {
    id.sweep().zip(id.number()).ok_or_else(|| CoordinatorError::not_found("trial", id))
}

/// A thing that does not run although its record says so belongs to a coordinator that is ending.
fn over(kind: &'static str, id: impl ToString, terminal: bool, state: &'static str) -> CoordinatorError {
    if terminal { CoordinatorError::Over { kind, id: id.to_string(), state } } else { Gone.into() }
}

struct State {
    tools: Tools,
    running: watch::Sender<Running>,
    /// Actors started so far.
    started: u64,
    mailbox: Mailbox<Command>,
    scope: Scope,
}

impl State {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let scope = self.scope.clone();
        loop {
            let command = tokio::select! {
                () = scope.cancelled() => return,
                command = inbox.recv() => command,
            };
            // Whoever asked and is gone since does not need the answer.
            match command {
                Some(Command::Submit(submission, reply)) => {
                    let _ = reply.send(self.submit(submission).await);
                }
                Some(Command::Reopen(id, operation, reply)) => {
                    self.reopen(&id, operation, reply).await;
                }
                Some(Command::Delete(id, reply)) => self.delete(&id, reply).await,
                Some(Command::Find(id, asked, reply)) => drop(reply.send(self.another(&id, asked).await)),
                Some(Command::Ended(id, number)) => {
                    if self.running.borrow().get(&id).is_some_and(|(current, _)| *current == number) {
                        self.running.send_modify(|running| drop(Arc::make_mut(running).remove(&id)));
                    }
                }
                None => return,
            }
        }
    }

    async fn submit(&mut self, submission: Submission) -> Result<Sweep> {
        let Submission { request_id, namespace, spec, base_models, submitted_by } = submission;
        let store = self.tools.store.clone();
        if let Some(id) = store.request(&request_id).await? {
            return self.existing(&id).await;
        }
        let max_trials = Searcher::new(&spec).map_err(CoordinatorError::problems)?.size();
        let sweep = Sweep {
            id: self.new_id(&spec.name).await?,
            spec: *spec,
            state: SweepState::Running,
            request_id,
            namespace,
            proposed: 0,
            max_trials,
            counts: StateCounts::default(),
            best: None,
            cost_usd: 0.0,
            failure: None,
            ended_early: None,
            created_at: self.tools.clock.now(),
            finished_at: None,
        };
        tracing::info!(sweep = %sweep.id, ?max_trials, "a new sweep");
        let mut record = SweepRecord::new(sweep, base_models);
        record.submitted_by = submitted_by.map(|place| place.to_string());
        let mut batch = Batch::default();
        batch.submission(&record);
        store.commit(batch).await?;
        let handle = self.run_sweep(record, Vec::new(), None).await?;
        Ok(handle.sweep().await?)
    }

    async fn existing(&mut self, id: &SweepId) -> Result<Sweep> {
        if let Some(sweep) = self.find(id)
            && let Ok(sweep) = sweep.sweep().await
        {
            return Ok(sweep);
        }
        let store = self.tools.store.clone();
        let record = record(&store, id).await?;
        let sweep = record.sweep.clone();
        if !sweep.state.is_terminal() {
            // The submission was written although the disk said that it had failed.
            let trials = store.trials(id).await?;
            self.run_sweep(record, trials, None).await?;
        }
        Ok(sweep)
    }

    fn find(&self, id: &SweepId) -> Option<SweepHandle> {
        self.running.borrow().get(id).map(|(_, sweep)| sweep.clone())
    }

    /// A sweep's actor that was not asked yet. None starts meanwhile, so that a sweep without one is over.
    async fn another(&self, id: &SweepId, asked: u64) -> Result<(u64, SweepHandle)> {
        let running = self.running.borrow().get(id).filter(|(number, _)| *number != asked).cloned();
        if let Some(running) = running {
            return Ok(running);
        }
        let state = record(&self.tools.store, id).await?.sweep.state;
        Err(over("sweep", id, state.is_terminal(), state.as_str()))
    }

    /// Runs a sweep again that was over. Answers once that is durable, while the directory goes on.
    async fn reopen(&mut self, id: &SweepId, operation: Operation, reply: Reply<Result<Sweep>>) {
        // Another request may have come before this one.
        if let Some(sweep) = self.find(id)
            && let Ok(done) = sweep.operate(operation.clone()).await
        {
            return drop(reply.send(done));
        }
        match self.run_again(id, operation).await {
            Ok(sweep) => {
                let (id, store, scope) = (id.clone(), self.tools.store.clone(), self.scope.clone());
                self.scope.spawn("reopening", async move {
                    let settled = match sweep.settled().await {
                        // There was nothing left to do, and it is over again.
                        Err(Gone) if !scope.is_cancelled() => record(&store, &id).await.map(|r| r.sweep),
                        settled => settled.map_err(CoordinatorError::from),
                    };
                    drop(reply.send(settled));
                });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    async fn run_again(&mut self, id: &SweepId, operation: Operation) -> Result<SweepHandle> {
        let store = &self.tools.store;
        let (record, trials) = (record(store, id).await?, store.trials(id).await?);
        self.run_sweep(record, trials, Some(operation)).await
    }

    /// Answers once nothing is left of the sweep.
    async fn delete(&self, id: &SweepId, reply: Reply<Result<Tombstone>>) {
        match deletion::remove_records(&self.tools, id, self.find(id).is_some()).await {
            Ok(tombstone) => self.remove_artifacts(tombstone, Some(reply)),
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Removes a deleted sweep's checkpoints, while the directory goes on.
    fn remove_artifacts(&self, tombstone: Tombstone, reply: Option<Reply<Result<Tombstone>>>) {
        let (tools, scope) = (self.tools.clone(), self.scope.clone());
        self.scope.spawn("deletion", async move {
            let sweep = tombstone.sweep.clone();
            let done = tokio::select! {
                () = scope.cancelled() => return,
                done = deletion::remove_artifacts(&tools, tombstone) => done,
            };
            if let Err(error) = &done {
                tracing::error!(%sweep, %error, "cannot delete its checkpoints; the next start goes on");
            }
            if let Some(reply) = reply {
                let _ = reply.send(done);
            }
        });
    }

    /// `<name>-<4 hex digits>` that no sweep has or had.
    async fn new_id(&self, name: &str) -> Result<SweepId> {
        loop {
            let [a, b, ..] = uuid::Uuid::new_v4().into_bytes();
            let id = SweepId::new(format!("{name}-{a:02x}{b:02x}"));
            let store = &self.tools.store;
            if store.sweep_head(&id).await?.is_none() && store.tombstone(&id).await?.is_none() {
                return Ok(id);
            }
        }
    }

    async fn run_sweep(
        &mut self,
        record: SweepRecord,
        trials: Vec<TrialRecord>,
        again: Option<Operation>,
    ) -> Result<SweepHandle> {
        self.started += 1;
        let number = self.started;
        let id = record.sweep.id.clone();
        let directory = self.mailbox.clone();
        let ended = move |id| -> futures::future::BoxFuture<'static, ()> {
            Box::pin(async move {
                // A directory that is gone holds no sweep.
                let _ = directory.tell(Command::Ended(id, number)).await;
            })
        };
        let handle =
            SweepHandle::start(record, trials, again, self.tools.clone(), &self.scope, ended).await?;
        let entry = (number, handle.clone());
        self.running.send_modify(|running| drop(Arc::make_mut(running).insert(id, entry)));
        Ok(handle)
    }
}
