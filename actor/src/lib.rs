//! The small actor kit on tokio. An actor is a handle, a command enum and a run loop in one file; this crate
//! holds what all of them share:
//!
//! | item | is |
//! |---|---|
//! | [`Scope`] | a node of the shutdown tree: the one way to spawn a task, and to stop and await what it spawned |
//! | [`Interrupts`] | Ctrl-C and SIGTERM |
//! | [`mailbox`] | a bounded channel of commands; [`Mailbox::ask`] sends one that carries its reply |
//!
//! A task is named, belongs to a scope, and ends when its scope is cancelled; a task that panics is logged
//! and cancels the root of its tree, since what it owned is then in no known state.

mod interrupts;

pub use interrupts::Interrupts;

use std::future::Future;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A node of the shutdown tree.
#[derive(Debug, Clone)]
pub struct Scope {
    root: CancellationToken,
    token: CancellationToken,
    tasks: TaskTracker,
}

impl Default for Scope {
    fn default() -> Self {
        Self::new()
    }
}

impl Scope {
    /// The root of a new tree.
    pub fn new() -> Self {
        let token = CancellationToken::new();
        Self { root: token.clone(), token, tasks: TaskTracker::new() }
    }

    /// A node below this one: cancelled with it, or alone. Its tasks are awaited with its own
    /// [`Scope::finish`].
    pub fn child(&self) -> Self {
        Self { root: self.root.clone(), token: self.token.child_token(), tasks: TaskTracker::new() }
    }

    /// Runs a task. It must return when [`Scope::cancelled`] does. If it panics, the whole tree is cancelled.
    #[allow(clippy::disallowed_methods, reason = "this is the one spawn")]
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let root = self.root.clone();
        let inner = tokio::spawn(task);
        self.tasks.spawn(async move {
            if let Err(error) = inner.await
                && error.is_panic()
            {
                tracing::error!(task = name, %error, "a task panicked; shutting down");
                root.cancel();
            }
        });
    }

    /// Tells this node and all below it to end.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Whether it was told to end.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Returns when it is told to end.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Cancels, then waits for this node's own tasks, at most `limit`. Returns whether all ended in time.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.cancel();
        self.tasks.close();
        tokio::time::timeout(limit, self.tasks.wait()).await.is_ok()
    }
}

/// The actor behind a mailbox is gone: its scope was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("shutting down")]
pub struct Gone;

/// Where an actor's commands are sent. Clones go to the same actor.
#[derive(Debug)]
pub struct Mailbox<C>(mpsc::Sender<C>);

impl<C> Clone for Mailbox<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// The command's way back to whoever asked.
pub type Reply<T> = oneshot::Sender<T>;

/// A mailbox of at most `capacity` waiting commands, and the end that the actor reads.
pub fn mailbox<C>(capacity: usize) -> (Mailbox<C>, mpsc::Receiver<C>) {
    let (sender, receiver) = mpsc::channel(capacity);
    (Mailbox(sender), receiver)
}

impl<C> Mailbox<C> {
    /// Sends a command, waiting for room.
    ///
    /// # Errors
    /// The actor is gone.
    pub async fn tell(&self, command: C) -> Result<(), Gone> {
        self.0.send(command).await.map_err(|_| Gone)
    }

    /// Sends a command made around a [`Reply`], and waits for the answer.
    ///
    /// # Errors
    /// The actor is gone, or dropped the reply.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> C) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.tell(command(reply)).await?;
        answer.await.map_err(|_| Gone)
    }

    /// Sends from a thread outside the runtime, waiting for room.
    ///
    /// # Errors
    /// The actor is gone.
    pub fn blocking_tell(&self, command: C) -> Result<(), Gone> {
        self.0.blocking_send(command).map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_parent_cancels_its_children_and_not_the_reverse() {
        let root = Scope::new();
        let (a, b) = (root.child(), root.child());
        a.cancel();
        assert!(a.is_cancelled() && !b.is_cancelled() && !root.is_cancelled());
        root.cancel();
        assert!(b.is_cancelled());
    }

    #[tokio::test]
    async fn finish_waits_for_tasks() {
        let scope = Scope::new();
        let (done, mut saw) = mpsc::channel(1);
        let inner = scope.clone();
        scope.spawn("test", async move {
            inner.cancelled().await;
            let _ = done.send(()).await;
        });
        assert!(scope.finish(Duration::from_secs(5)).await);
        assert!(saw.try_recv().is_ok());
    }

    #[tokio::test]
    async fn a_panic_cancels_the_tree() {
        let root = Scope::new();
        let child = root.child();
        child.spawn("test", async { panic!("on purpose") });
        root.cancelled().await;
    }

    #[tokio::test]
    async fn asking_one_who_is_gone_is_an_error() {
        let (mailbox, inbox) = mailbox::<Reply<u32>>(1);
        drop(inbox);
        assert_eq!(mailbox.ask(|reply| reply).await, Err(Gone));
    }
}
