//! How much one client may ask: calls at a time, streams included, and calls a second. A client is a token's name, or
//! an address where there is no token that is known; of agents it is both.

use domain::Clock;
use proto::status::RpcError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Clients that are remembered; above that those are forgotten who ask nothing now.
const REMEMBERED: usize = 10_000;

/// How much a client may ask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Calls at a time.
    pub at_once: usize,
    /// Calls a second, in the long run.
    pub per_second: f64,
}

impl Terms {
    /// Calls that may come in one go after a silence: those of some seconds.
    fn burst(&self) -> f64 {
        self.per_second * 5.0
    }
}

/// What clients ask now.
#[derive(Clone)]
pub struct Limits {
    terms: Option<Terms>,
    clock: Arc<dyn Clock>,
    clients: Arc<Mutex<HashMap<String, Client>>>,
}

struct Client {
    calls: usize,
    /// Calls that it may make at once.
    credit: f64,
    /// When that was.
    at: Duration,
}

/// A call under way; it ends when this is dropped.
pub struct Call {
    limits: Limits,
    client: String,
}

impl Limits {
    /// On these terms; `None`: without limits.
    pub fn new(terms: Option<Terms>, clock: Arc<dyn Clock>) -> Self {
        Self { terms, clock, clients: Arc::default() }
    }

    /// Begins a client's call.
    ///
    /// # Errors
    /// It asks too much.
    pub fn begin(&self, client: &str) -> Result<Option<Call>, RpcError> {
        let Some(terms) = self.terms else { return Ok(None) };
        let now = self.clock.monotonic();
        let mut clients = self.clients();
        if clients.len() >= REMEMBERED && !clients.contains_key(client) {
            clients.retain(|_, client| client.calls > 0 || client.refilled(&terms, now) < terms.burst());
        }
        let entry =
            clients.entry(client.into()).or_insert(Client { calls: 0, credit: terms.burst(), at: now });
        entry.credit = entry.refilled(&terms, now);
        entry.at = now;
        let exhausted = |why: String, retry| Err(RpcError::Exhausted { client: client.into(), why, retry });
        if entry.calls >= terms.at_once {
            let why = format!(
                "{client} has {} calls open, which is the most; end some, or ask who runs the server for --max-calls",
                entry.calls
            );
            return exhausted(why, Duration::from_secs(1));
        }
        if entry.credit < 1.0 {
            let why = format!(
                "{client} makes more than {} calls a second; wait, or ask who runs the server for \
                 --max-calls-per-second",
                terms.per_second
            );
            return exhausted(why, Duration::from_secs_f64((1.0 - entry.credit) / terms.per_second));
        }
        entry.credit -= 1.0;
        entry.calls += 1;
        Ok(Some(Call { limits: self.clone(), client: client.into() }))
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<String, Client>> {
        // Nothing that can panic is done while it is held.
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    fn refilled(&self, terms: &Terms, now: Duration) -> f64 {
        (self.credit + (now.saturating_sub(self.at)).as_secs_f64() * terms.per_second).min(terms.burst())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(client) = self.limits.clients().get_mut(&self.client) {
            client.calls = client.calls.saturating_sub(1);
        }
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limits").field("terms", &self.terms).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Timestamp;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock that stands until it is set.
    #[derive(Default)]
    struct Still(AtomicU64);

    impl Clock for Still {
        fn now(&self) -> Timestamp {
            Timestamp(0)
        }

        fn monotonic(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn a_client_that_asks_too_much_waits_and_no_other_one() {
        let clock = Arc::new(Still::default());
        let limits = Limits::new(Some(Terms { at_once: 3, per_second: 2.0 }), clock.clone());
        let refused = |client: &str| match limits.begin(client) {
            Err(RpcError::Exhausted { why, retry, .. }) => (why, retry),
            _ => panic!("it was let in"),
        };
        // Three at a time.
        let open: Vec<_> = (0..3).map(|_| limits.begin("a").unwrap()).collect();
        assert!(refused("a").0.contains("--max-calls"));
        assert!(limits.begin("b").is_ok());
        drop(open);
        // Ten in one go, of which three are made, then two a second.
        for _ in 0..7 {
            drop(limits.begin("a").unwrap());
        }
        let (why, retry) = refused("a");
        assert!(
            why.contains("--max-calls-per-second") && retry == Duration::from_millis(500),
            "{why} {retry:?}"
        );
        clock.0.store(500, Ordering::Relaxed);
        drop(limits.begin("a").unwrap());
        refused("a");
        assert!(limits.begin("b").is_ok());
        // Not more than that in one go after any silence.
        clock.0.store(3_600_000, Ordering::Relaxed);
        for _ in 0..10 {
            drop(limits.begin("a").unwrap());
        }
        refused("a");
        assert!(Limits::new(None, clock).begin("a").is_ok_and(|call| call.is_none()));
    }

    #[test]
    fn who_asks_nothing_any_more_is_forgotten() {
        let clock = Arc::new(Still::default());
        let limits = Limits::new(Some(Terms { at_once: 3, per_second: 100.0 }), clock.clone());
        let open = limits.begin("open").unwrap();
        for client in 0..REMEMBERED {
            drop(limits.begin(&client.to_string()).unwrap());
        }
        clock.0.store(60_000, Ordering::Relaxed);
        drop(limits.begin("new").unwrap());
        let known: Vec<_> = limits.clients().keys().cloned().collect();
        assert_eq!(known.len(), 2, "who has a call open, and who came last");
        drop(open);
    }
}
