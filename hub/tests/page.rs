//! Texts by their addresses, from a server on this machine.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{COMMIT, LocalHub};
use hub::HubError;

#[test]
fn a_text_or_why_there_is_none() {
    let hub = LocalHub::start();
    // A name that begins with `model` is redirected to another server.
    for (file, bytes) in [("plain.csv", &b"a,\xc3\xa9\n"[..]), ("model.csv", b"b"), ("odd.csv", b"\xff")] {
        hub.put("datasets/a/b", file, bytes);
    }
    let address = |file: &str| format!("{}/datasets/a/b/resolve/{COMMIT}/{file}", hub.endpoint());
    assert_eq!(hub::page(&address("plain.csv")).unwrap(), "a,é\n");
    assert_eq!(hub::page(&address("model.csv")).unwrap(), "b");
    assert!(hub.seen().iter().all(|seen| seen.token.is_none()));

    let check = |address: &str, unavailable: bool, fragment: &str| {
        let error = hub::page(address).unwrap_err();
        assert_eq!(matches!(error, HubError::Unavailable { .. }), unavailable, "{error}");
        let message = error.to_string();
        assert!(message.starts_with(address) && message.contains(fragment), "{message}");
    };
    check(&address("odd.csv"), false, "no UTF-8");
    check(&address("missing.csv"), false, "404");
    check("http://127.0.0.1:1/x.csv", true, "cannot be reached");
    hub.state().refuse = Some((503, ""));
    check(&address("plain.csv"), true, "503");
    hub.state().refuse = None;
    hub.state().break_after = Some(("plain.csv".into(), 2, 1));
    check(&address("plain.csv"), true, "cannot be reached");
}
