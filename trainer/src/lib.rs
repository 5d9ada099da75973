//! The LoRA training engine on candle: a frozen Llama, or one of its kin, shared by the trials of a pack, and the hand-written
//! vector-Jacobian product that trains their adapters.
//!
//! | module | holds |
//! |---|---|
//! | [`checkpoint`] | a model directory's weights on disk: safetensors and torch's archives |
//! | [`model`] | the frozen base: configuration and weights |
//! | [`ops`] | the operations of a step, each with its backward |
//! | [`lora`] | adapters: initialisation, dropout, low-rank products |
//! | [`pissa`] | a weight's largest singular values as an adapter's beginning |
//! | [`saved`] | modules that are trained whole beside an adapter |
//! | [`pack`] | a step of a pack, evaluation, generation |
//! | [`optim`], [`schedule`], [`scaler`] | AdamW with clipping; the learning rate's course; float16's loss scaler |
//! | [`tokenizer`] | text to token ids and back |
//! | [`data`] | data files to rows, the held-out split, the order of batches |
//! | [`run`] | a fine-tuning run: from files to metrics and checkpoints |
//! | [`preflight`] | what can be checked before anything is trained |
//! | [`adapter_file`], [`files`] | adapters in PEFT's format; whole files and digests |
//! | [`merge`], [`quantize`] | base and adapter as one model; a model in 4 bits |
//! | [`kept`] | a base in 4 bits in files, as it was held |
//! | [`new_model`] | a model's directory, whole or not at all |
//! | [`quant`], [`weight`] | NF4; a frozen matrix in the numbers that it is held in |
//! | [`locate`] | where on this machine a configuration's names lie |
//! | [`device`], [`memory`] | the device by its name; how many bytes of tensors a pass holds |
//! | [`rng`] | counter-based random numbers (`domain::rng`) |
//!
//! There is no autograd graph: no tensor is a `Var`, so that a frozen weight can have no gradient, and what a
//! backward needs is a struct that one can read.

pub mod adapter_file;
pub mod checkpoint;
pub mod data;
pub mod device;
pub mod error;
pub mod files;
pub mod kept;
pub mod locate;
pub mod lora;
pub mod memory;
pub mod merge;
pub mod model;
pub mod new_model;
pub mod ops;
pub mod optim;
pub mod pack;
pub mod pissa;
pub mod preflight;
pub mod profile;
pub mod quant;
pub mod quantize;
pub mod run;
pub mod saved;
pub mod scaler;
pub mod schedule;
pub mod tokenizer;
pub mod weight;

pub use candle_core::{Device, Tensor};
pub use domain::rng;
pub use error::{Result, TrainError};

/// Threads that the trainer computes with on the CPU: the cores, or what `RAYON_NUM_THREADS` says.
pub fn threads() -> usize {
    candle_core::utils::get_num_threads()
}

/// Runs `f` on one of those threads where `device` is the CPU. A thread that is none of them sleeps while each single
/// operation is computed, and is woken after it: hundreds of times a step.
pub(crate) fn on_threads<T: Send>(device: &Device, f: impl FnOnce() -> T + Send) -> T {
    if device.is_cpu() && !ops::on_gpu(device) { rayon::scope(|_| f()) } else { f() }
}
