//! The agent: devices, the training engine's host, and the session with the coordinator.
