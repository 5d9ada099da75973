//! Typed configuration of coordinator and agent, and the files people start from.
