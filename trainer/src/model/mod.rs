//! The frozen base: a Llama or one of its kin on a device, shared by all trials of a pack.

mod config;
mod family;
pub(crate) mod incoming;
mod quantization;
mod weights;

pub use config::{ModelConfig, RopeScaling};
pub use quantization::Quantization;
pub(crate) use weights::NormNumbers;
pub use weights::{Base, Layer, Linear, LoadProgress};
