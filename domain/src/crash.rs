//! Places at which a test can end the process, or have something fail, to see that nothing is lost there. They are in every
//! build, so that tests run the program that people run.
//!
//! `LORAFLEET_CRASH_AT=name:n` aborts the process when it comes to the point `name` for the n-th time, as a kill
//! would, without any clean-up; `name:n:panic` makes that thread panic instead. `name:n:fail` has what stands at the n-th
//! [`fails`] of that name fail. Unset, a place costs one load.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The variable that arms a place.
pub const VARIABLE: &str = "LORAFLEET_CRASH_AT";

/// What happens at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Abort,
    Panic,
    Fail,
}

struct Armed {
    name: String,
    hits_left: AtomicU32,
    then: Then,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// What is armed, if it is this place's time.
fn due(name: &str, of: impl Fn(Then) -> bool) -> Option<Then> {
    let armed = ARMED.get_or_init(|| parse(&std::env::var(VARIABLE).ok()?)).as_ref()?;
    let here = armed.name == name && of(armed.then);
    (here && armed.hits_left.fetch_sub(1, Ordering::Relaxed) == 1).then_some(armed.then)
}

/// Ends the process here, if it was told to.
pub fn point(name: &str) {
    match due(name, |then| then != Then::Fail) {
        None | Some(Then::Fail) => {}
        Some(Then::Panic) => std::panic::resume_unwind(Box::new(format!("crash point {name}"))),
        Some(Then::Abort) => {
            let _ = writeln!(std::io::stderr(), "crash point {name}");
            std::process::abort();
        }
    }
}

/// Whether what stands here is to fail, as if the system had refused it.
#[must_use]
pub fn fails(name: &str) -> bool {
    due(name, |then| then == Then::Fail).is_some()
}

/// `name:n`, `name:n:panic` or `name:n:fail`; what is none of them arms nothing.
fn parse(text: &str) -> Option<Armed> {
    let mut parts = text.split(':');
    let (name, hits) = (parts.next()?, parts.next()?.parse().ok().filter(|hits| *hits > 0)?);
    let then = match parts.next() {
        None => Then::Abort,
        Some("panic") => Then::Panic,
        Some("fail") => Then::Fail,
        Some(_) => return None,
    };
    Some(Armed { name: name.into(), hits_left: AtomicU32::new(hits), then })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arms_a_point() {
        for (text, want) in [
            ("a/b:3", Some(("a/b", 3, Then::Abort))),
            ("a:1:panic", Some(("a", 1, Then::Panic))),
            ("a:2:fail", Some(("a", 2, Then::Fail))),
            ("a", None),
            ("a:0", None),
            ("a:x", None),
            ("a:1:exit", None),
        ] {
            let armed = parse(text);
            let got = armed.as_ref().map(|a| (a.name.as_str(), a.hits_left.load(Ordering::Relaxed), a.then));
            assert_eq!(got, want, "{text}");
        }
        point("nothing is armed, nothing happens");
        assert!(!fails("nothing is armed, nothing fails"));
    }
}
