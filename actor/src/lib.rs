//! The small actor kit on tokio: mailbox handles, supervision, shutdown.
