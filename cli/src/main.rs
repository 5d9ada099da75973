//! The lorafleet command line.
fn main() {}
