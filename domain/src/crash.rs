//! Places at which a test can end the process, to see that nothing is lost there. They are in every build, so that
//! tests run the program that people run.
//!
//! `LORAFLEET_CRASH_AT=name:n` aborts the process when it comes to the point `name` for the n-th time, as a kill
//! would, without any clean-up; `name:n:panic` makes that thread panic instead. Unset, a point costs one load.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The variable that arms a point.
pub const VARIABLE: &str = "LORAFLEET_CRASH_AT";

struct Armed {
    name: String,
    hits_left: AtomicU32,
    panics: bool,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// Ends the process here, if it was told to.
pub fn point(name: &str) {
    let Some(armed) = ARMED.get_or_init(|| parse(&std::env::var(VARIABLE).ok()?)) else { return };
    if armed.name != name || armed.hits_left.fetch_sub(1, Ordering::Relaxed) != 1 {
        return;
    }
    if armed.panics {
        std::panic::resume_unwind(Box::new(format!("crash point {name}")));
    }
    let _ = writeln!(std::io::stderr(), "crash point {name}");
    std::process::abort();
}

/// `name:n` or `name:n:panic`; what is neither arms nothing.
fn parse(text: &str) -> Option<Armed> {
    let mut parts = text.split(':');
    let (name, hits) = (parts.next()?, parts.next()?.parse().ok().filter(|hits| *hits > 0)?);
    let panics = match parts.next() {
        None => false,
        Some("panic") => true,
        Some(_) => return None,
    };
    Some(Armed { name: name.into(), hits_left: AtomicU32::new(hits), panics })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arms_a_point() {
        for (text, want) in [
            ("a/b:3", Some(("a/b", 3, false))),
            ("a:1:panic", Some(("a", 1, true))),
            ("a", None),
            ("a:0", None),
            ("a:x", None),
            ("a:1:exit", None),
        ] {
            let armed = parse(text);
            let got =
                armed.as_ref().map(|a| (a.name.as_str(), a.hits_left.load(Ordering::Relaxed), a.panics));
            assert_eq!(got, want, "{text}");
        }
        point("nothing is armed, nothing happens");
    }
}
