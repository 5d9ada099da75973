//! The coordinator: search, placement, sweeps, history, artifacts and gRPC services.
