//! The frozen base: a Llama on a device, shared by all trials of a pack.

mod config;
mod weights;

pub use config::{LlamaConfig, RopeScaling};
pub use weights::{Base, Layer, Linear};
