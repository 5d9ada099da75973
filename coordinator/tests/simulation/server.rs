//! A coordinator's process, and what starts it again when it ends.

use crate::checks;
use crate::stores::{Objects, Process, Segments};
use crate::world::World;
use actor::Scope;
use bytes::Bytes;
use coordinator::actors::agent_session::Desk;
use coordinator::actors::dispatcher::Terms;
use coordinator::actors::sweep::Standing;
use coordinator::artifacts::{ArtifactError, Artifacts, FileSpec, Part};
use coordinator::history::History;
use coordinator::store::Store;
use coordinator::{CoordinatorError, Kept, go_on};
use domain::{Attempt, TrialId};
use registry::RegistryError;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

pub const TERMS: Terms = Terms { heartbeat: Duration::from_secs(5), lease: Duration::from_secs(30) };

/// The pause before a coordinator that could not start is started again.
const AGAIN: Duration = Duration::from_secs(1);

/// A coordinator that serves.
pub struct Server {
    pub number: u32,
    pub desk: Desk,
    pub artifacts: Artifacts,
    pub dead: CancellationToken,
    pub scope: Scope,
}

/// What happens to a coordinator.
#[derive(Debug)]
pub enum Order {
    /// It is killed, and started again after a while.
    Kill(Duration),
    /// Another takes the lead; this one lives on until it notices, so long at most.
    TakeOver(Duration),
}

/// Starts a coordinator whenever there is none.
pub async fn supervise(world: Arc<World>, mut orders: mpsc::UnboundedReceiver<Order>) {
    let mut number = 0;
    let mut led = None;
    loop {
        let (process, store) = match led.take() {
            Some(led) => led,
            None => lead(&world, &mut number).await,
        };
        let scope = Scope::new();
        let (world, dead) = (&world, process.dead.clone());
        let kill = |scope: &Scope| {
            dead.cancel();
            scope.cancel();
            world.leader.send_replace(None);
            checks::look(world);
        };
        let order = tokio::select! {
            biased;
            order = orders.recv() => order,
            server = open(world, number, process, store, scope.clone()) => match server {
                Ok(server) => {
                    world.say("coordinator", format_args!("{number} serves"));
                    world.leader.send_replace(Some(Arc::new(server)));
                    tokio::select! {
                        biased;
                        order = orders.recv() => order,
                        () = scope.cancelled() => {
                            world.find("the coordinator ended by itself");
                            Some(Order::Kill(AGAIN))
                        }
                    }
                }
                Err(error) => {
                    world.say("coordinator", format_args!("{number} cannot start: {error}"));
                    if !error.is_storage() {
                        world.find(format_args!("the coordinator cannot start: {error}"));
                    }
                    Some(Order::Kill(AGAIN))
                }
            }
        };
        match order {
            None => return kill(&scope),
            Some(Order::Kill(down)) => {
                world.say("coordinator", format_args!("{number} is killed for {down:?}"));
                kill(&scope);
                tokio::select! {
                    () = sleep(down) => {}
                    () = world.healed.cancelled() => {}
                }
            }
            Some(Order::TakeOver(limit)) => {
                led = Some(lead(world, &mut number).await);
                tokio::select! {
                    biased;
                    () = scope.cancelled() => world.say("coordinator", "the one before has noticed"),
                    () = sleep(limit) => {}
                    () = world.healed.cancelled() => {}
                }
                kill(&scope);
            }
        }
    }
}

async fn lead(world: &Arc<World>, number: &mut u32) -> (Process, Store) {
    *number += 1;
    world.say("coordinator", format_args!("{number} leads"));
    let process = Process::new(world, *number);
    let store = Store::lead(Arc::new(process.clone()), "simulated").await.unwrap();
    (process, store)
}

async fn open(
    world: &Arc<World>,
    number: u32,
    process: Process,
    store: Store,
    scope: Scope,
) -> Result<Server, CoordinatorError> {
    let dead = process.dead.clone();
    let history = History::open_here(&world.history, Box::new(Segments(process.clone())), &HashSet::new())?;
    // As leaders do that share a store: one that was replaced may write and delete for a while.
    let artifacts = Artifacts::on(Arc::new(Objects::new(process))).in_term(store.term(), scope.clone());
    let kept = Kept { store, history, artifacts: artifacts.clone() };
    let desk = go_on(kept, world.clock.clone(), TERMS, &scope).await?;
    Ok(Server { number, desk, artifacts, dead, scope })
}

/// Why a checkpoint did not come through, as an agent sees it.
#[derive(Debug)]
pub enum Refused {
    /// The assignment is not current.
    Fenced,
    /// Another time, perhaps.
    Later,
    /// Never.
    Never(String),
}

impl From<CoordinatorError> for Refused {
    fn from(error: CoordinatorError) -> Self {
        match error {
            CoordinatorError::Fenced { .. } | CoordinatorError::NotFound { .. } => Self::Fenced,
            CoordinatorError::Gone(_) | CoordinatorError::Registry(RegistryError::Fenced { .. }) => {
                Self::Later
            }
            error if error.is_storage() => Self::Later,
            error => Self::Never(error.to_string()),
        }
    }
}

impl From<ArtifactError> for Refused {
    fn from(error: ArtifactError) -> Self {
        CoordinatorError::from(error).into()
    }
}

/// What `AgentService` does with a checkpoint that comes.
pub async fn receive(
    server: &Server,
    trial: &TrialId,
    attempt: Attempt,
    step: u64,
    content: &Value,
) -> Result<(), Refused> {
    let directory = &server.desk.directory;
    current(server, trial, attempt).await?;
    let bytes = Bytes::from(content.to_string());
    let file = |part, name: &str| FileSpec {
        part,
        name: name.into(),
        bytes: bytes.len() as u64,
        sha256: Sha256::digest(&bytes).into(),
    };
    let files = vec![file(Part::Adapter, "adapter.json"), file(Part::Resume, "resume.json")];
    let mut upload = server.artifacts.begin(trial, attempt, step, files)?;
    upload.write([bytes.clone(), bytes].concat().into()).await?;
    let stored = upload.finish().await?;
    let unused = directory.checkpoint(trial, attempt, step, stored).await?;
    server.artifacts.discard(trial, unused).await;
    Ok(())
}

/// What `AgentService` does for an agent that asks for a checkpoint: its step and its resume state.
pub async fn send(server: &Server, trial: &TrialId, attempt: Attempt) -> Result<(u64, Value), Refused> {
    use futures::TryStreamExt;
    current(server, trial, attempt).await?;
    let record = server.desk.directory.trial(trial).await?;
    let never = || Refused::Never("there is no checkpoint".into());
    let checkpoint = record.checkpoint.ok_or_else(never)?;
    server.artifacts.files(&checkpoint.adapter).await?;
    let pieces: Vec<Bytes> =
        server.artifacts.read(&checkpoint.resume, "resume.json").await?.try_collect().await?;
    let content =
        serde_json::from_slice(&pieces.concat()).map_err(|error| Refused::Never(error.to_string()))?;
    Ok((checkpoint.step, content))
}

async fn current(server: &Server, trial: &TrialId, attempt: Attempt) -> Result<(), Refused> {
    match server.desk.directory.standing(trial, attempt, None).await? {
        Standing::Current { .. } => Ok(()),
        Standing::Over => Err(Refused::Fenced),
    }
}
