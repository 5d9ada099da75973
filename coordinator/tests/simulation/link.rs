//! The network between an agent and the coordinator.

use crate::draws::Draws;
use crate::server::Server;
use crate::world::World;
use coordinator::access::Caller;
use coordinator::actors::agent_session;
use coordinator::actors::message::{FromAgent, Outbox, ToAgent};
use futures::StreamExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// An agent's way to the coordinator.
pub struct Link {
    draws: Mutex<Draws>,
    partitioned: AtomicBool,
    reopened: Notify,
    /// Whether the agent does not let go of what it is told to drop.
    stubborn: AtomicBool,
    /// The most milliseconds that a message takes.
    slowest: AtomicU64,
    /// Cuts the present stream.
    cut: Mutex<CancellationToken>,
}

/// An agent's end of a stream.
pub struct Line {
    up: mpsc::UnboundedSender<(Instant, FromAgent)>,
    down: mpsc::UnboundedReceiver<ToAgent>,
}

impl Line {
    pub fn say(&self, message: FromAgent) {
        // A line that is cut is noticed where it is listened to.
        let _ = self.up.send((Instant::now(), message));
    }

    pub async fn hear(&mut self) -> Option<ToAgent> {
        self.down.recv().await
    }
}

impl Link {
    pub fn new(seed: u64, agent: usize) -> Self {
        Self {
            draws: Mutex::new(Draws::new(seed, &format!("link {agent}"))),
            partitioned: AtomicBool::new(false),
            reopened: Notify::new(),
            stubborn: AtomicBool::new(false),
            slowest: AtomicU64::new(0),
            cut: Mutex::default(),
        }
    }

    pub fn partition(&self, partitioned: bool) {
        self.partitioned.store(partitioned, Ordering::Relaxed);
        if !partitioned {
            self.reopened.notify_waiters();
        }
    }

    pub fn is_partitioned(&self) -> bool {
        self.partitioned.load(Ordering::Relaxed)
    }

    pub fn set_stubborn(&self, stubborn: bool) {
        self.stubborn.store(stubborn, Ordering::Relaxed);
    }

    pub fn is_stubborn(&self) -> bool {
        self.stubborn.load(Ordering::Relaxed)
    }

    pub fn slow(&self, slowest_ms: u64) {
        self.slowest.store(slowest_ms, Ordering::Relaxed);
    }

    pub fn cut(&self) {
        self.cut.lock().unwrap().cancel();
    }

    /// The time that a message takes.
    pub fn latency(&self) -> Duration {
        let slowest = self.slowest.load(Ordering::Relaxed);
        let mut draws = self.draws.lock().unwrap();
        if slowest == 0 { draws.millis(0, 3) } else { draws.millis(0, slowest) }
    }

    /// Whether an answer gets lost.
    pub fn loses(&self) -> bool {
        self.is_partitioned()
            || self.slowest.load(Ordering::Relaxed) > 0 && self.draws.lock().unwrap().chance(0.3)
    }

    /// Returns when messages come through.
    async fn open(&self) {
        while self.is_partitioned() {
            self.reopened.notified().await;
        }
    }

    /// Opens a stream. Messages keep their order.
    pub fn connect(self: &Arc<Self>, world: &World, server: &Server) -> Line {
        let (up, mut from_agent) = mpsc::unbounded_channel::<(Instant, FromAgent)>();
        let (to_agent, down) = mpsc::unbounded_channel();
        let (says, said) = mpsc::channel(16);
        let (outbox, mut told) = Outbox::new();
        let cut = CancellationToken::new();
        std::mem::replace(&mut *self.cut.lock().unwrap(), cut.clone()).cancel();
        let (desk, ends) = (server.desk.clone(), server.scope.clone());
        server.scope.spawn("stream", async move {
            agent_session::serve(desk, ReceiverStream::new(said).map(Ok), outbox, Caller::default(), ends)
                .await;
        });
        let link = self.clone();
        let upwards = async move {
            while let Some((at, message)) = from_agent.recv().await {
                sleep_until(at + link.latency()).await;
                link.open().await;
                if says.send(message).await.is_err() {
                    return;
                }
            }
        };
        let link = self.clone();
        let downwards = async move {
            // Its end, with or without an error, is seen like everything else: not before the network is there.
            while let Some(Ok(message)) = told.recv().await {
                sleep_until(Instant::now() + link.latency()).await;
                link.open().await;
                if to_agent.send(message).is_err() {
                    return;
                }
            }
            link.open().await;
        };
        let dead = server.dead.clone();
        world.scope.spawn("link", async move {
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = dead.cancelled() => {}
                () = async { tokio::join!(upwards, downwards); } => {}
            }
        });
        Line { up, down }
    }
}
