//! Fenced durable state: one trait, SQLite and an in-memory model.
