//! How long a step takes on an accelerator, before anything runs: operations by the rate of its cores, bytes by that of its
//! memory, and what it costs to launch kernels. The shares of the peaks that are reached are assumptions until figures of
//! `docs/benchmarks/` stand beside them; what is made of them is called predicted wherever it is shown.

use super::{Load, ModelShape, average_keys, table_bytes};
use crate::machine::Accelerator;
use crate::trial::PrecisionMode;

/// The share of its cores' peak that matrix products reach. Assumed.
pub const COMPUTE_SHARE: f64 = 0.45;
/// The share of its memory's peak that is reached. Assumed.
pub const BANDWIDTH_SHARE: f64 = 0.7;
/// Seconds between two kernels, where they are too short to hide them. Assumed.
pub const LAUNCH_SECONDS: f64 = 5e-6;
/// Kernels of a decoder layer's forward and backward pass. Assumed.
const KERNELS_PER_LAYER: f64 = 100.0;
/// How often a layer's activations travel to memory and back in a step, beside matrix products. Assumed.
const ACTIVATION_TRIPS: f64 = 6.0;
/// How often logits do, in float32: product, maximum, exponentials, gradient. Assumed.
const LOGIT_TRIPS: f64 = 4.0;
/// Float32 numbers that an update reads and writes for each trainable parameter: AdamW's parameter, gradient and two moments
/// in, all but the gradient out, and the gradient once more for its norm.
const UPDATE_TRIPS: f64 = 8.0;

/// What a step costs, in seconds by what it waits for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSeconds {
    /// Matrix products.
    pub compute: f64,
    /// Memory: weights, 4-bit weights' unpacking, activations, logits, the update.
    pub memory: f64,
    /// Launches.
    pub launches: f64,
}

impl StepSeconds {
    /// All of them: nothing is taken to overlap.
    pub fn total(&self) -> f64 {
        self.compute + self.memory + self.launches
    }
}

impl ModelShape {
    /// An optimizer step's time on so many micro-batches of `load.tokens` tokens, where `recomputed` of the layers are
    /// computed again.
    pub fn step_seconds(
        &self,
        load: &Load,
        recomputed: u64,
        micro_batches: u32,
        accelerator: &Accelerator,
    ) -> StepSeconds {
        let element = table_bytes(load.precision);
        let layers = self.num_hidden_layers.max(1) as f64;
        let again = recomputed.min(self.num_hidden_layers) as f64 / layers;
        let micro_batches = f64::from(micro_batches);
        let tokens = micro_batches * load.tokens as f64;

        let linear = self.linear_parameters() as f64;
        let flops = self.flops_per_token(load, load.longest);
        let rate = if element == 4 { accelerator.tflops_32bit } else { accelerator.tflops_16bit };
        let compute = tokens * (flops + again * 2.0 * linear) / (COMPUTE_SHARE * rate * 1e12);

        // Each pass over the layers reads their weights; of 4 bits, it writes and reads them unpacked as well.
        let passes = micro_batches * (2.0 + again);
        let activations = ACTIVATION_TRIPS * tokens * self.activation_bytes(load) * (1.0 + again / 2.0);
        let logits = LOGIT_TRIPS * 4.0 * tokens * self.vocab_size as f64;
        let update = UPDATE_TRIPS * 4.0 * load.trainable_parameters as f64;
        let bytes = passes * self.read_bytes(load) + activations + logits + update;

        StepSeconds {
            compute,
            memory: bytes / (BANDWIDTH_SHARE * accelerator.bandwidth),
            launches: micro_batches * layers * KERNELS_PER_LAYER * (1.0 + again / 2.0) * LAUNCH_SECONDS,
        }
    }

    /// The time of so many `tokens` forward alone, in passes of `pass` tokens at most, of texts of `length` tokens on average:
    /// what answering questions takes. As a step's, but with its forward half (and a third of what is trained), without the
    /// head, which few tokens need.
    pub fn forward_seconds(
        &self,
        load: &Load,
        tokens: u64,
        pass: u64,
        length: u64,
        accelerator: &Accelerator,
    ) -> StepSeconds {
        let layers = self.num_hidden_layers as f64;
        let passes = tokens.div_ceil(pass.max(1)) as f64;
        let tokens = tokens as f64;
        let width = (self.num_attention_heads * self.head_dim) as f64;
        let multiplied = self.linear_parameters() + load.trainable_parameters;
        let flops = 2.0 * multiplied as f64 + 4.0 * layers * average_keys(length, length) * width;
        let rate = match table_bytes(load.precision) {
            4 => accelerator.tflops_32bit,
            _ => accelerator.tflops_16bit,
        };
        let activations = ACTIVATION_TRIPS / 2.0 * tokens * self.activation_bytes(load);
        StepSeconds {
            compute: tokens * flops / (COMPUTE_SHARE * rate * 1e12),
            memory: (passes * self.read_bytes(load) + activations)
                / (BANDWIDTH_SHARE * accelerator.bandwidth),
            launches: passes * layers * KERNELS_PER_LAYER / 2.0 * LAUNCH_SECONDS,
        }
    }

    /// Bytes that a pass over the layers reads of their weights, in 4 bits with those that it writes and reads unpacked.
    fn read_bytes(&self, load: &Load) -> f64 {
        let unpacked = match load.precision.mode {
            PrecisionMode::FourBit => 2 * table_bytes(load.precision),
            _ => 0,
        };
        self.base_bytes(load.precision) as f64 + unpacked as f64 * self.linear_parameters() as f64
    }

    /// Bytes of a token's activations in all layers.
    fn activation_bytes(&self, load: &Load) -> f64 {
        let width = 2 * self.hidden_size
            + 2 * self.num_attention_heads * self.head_dim
            + 2 * self.num_key_value_heads * self.head_dim
            + 2 * self.intermediate_size;
        table_bytes(load.precision) as f64 * width as f64 * self.num_hidden_layers.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::footprint::Engine;
    use crate::machine::ComputeCapability;
    use crate::trial::{ComputeDtype, TrialConfig};

    const A100: &str = "A100-40GB";

    fn accelerator(name: &str) -> Accelerator {
        let (tflops_16bit, tflops_32bit, bandwidth) = match name {
            A100 => (312.0, 19.5, 1555e9),
            _ => (989.0, 67.0, 4800e9),
        };
        let (name, source) = (name.to_string(), String::new());
        let compute_capability = ComputeCapability::BFLOAT16;
        Accelerator {
            name,
            memory_bytes: 0,
            compute_capability,
            tflops_16bit,
            tflops_32bit,
            bandwidth,
            source,
        }
    }

    const OPEN_LLAMA_7B: ModelShape = super::super::tests::OPEN_LLAMA_7B;

    fn seconds(mode: PrecisionMode, recomputed: u64, accumulation: u32, name: &str) -> StepSeconds {
        let compute_dtype = Some(ComputeDtype::Float16);
        let config = TrialConfig { precision_mode: mode, compute_dtype, ..TrialConfig::default() };
        let load = OPEN_LLAMA_7B.load_at_most(&config, Engine::Gpu);
        OPEN_LLAMA_7B.step_seconds(&load, recomputed, accumulation, &accelerator(name))
    }

    /// The order of things, whatever the shares are: QLoRA is slower than LoRA, float32 much slower, more again slower, a
    /// newer card faster, and two micro-batches take less than twice one.
    #[test]
    fn what_is_slower() {
        use PrecisionMode::{Float16, Float32, FourBit};
        let lora = seconds(Float16, 0, 1, A100).total();
        let qlora = seconds(FourBit, 0, 1, A100).total();
        // The published report has 5 and 3 rows a second, both with one and the same batch.
        assert!((1.1..2.0).contains(&(qlora / lora)), "{qlora} {lora}");
        assert!(seconds(Float32, 0, 1, A100).total() > 5.0 * lora);
        let again = seconds(Float16, 32, 1, A100);
        assert!((1.2..1.6).contains(&(again.total() / lora)), "{again:?}");
        assert!(seconds(Float16, 0, 1, "H200-141GB").total() < lora / 2.0);
        let two = seconds(Float16, 0, 2, A100).total();
        assert!(two < 2.0 * lora && two > 1.8 * lora, "{two} {lora}");
    }

    /// The same tokens forward alone take about half of a step's time, in smaller passes more, and longer texts more.
    #[test]
    fn asking_takes_less_than_training() {
        let config = TrialConfig { precision_mode: PrecisionMode::Float16, ..TrialConfig::default() };
        let load = OPEN_LLAMA_7B.load_at_most(&config, Engine::Gpu);
        let a100 = accelerator(A100);
        let forward =
            |tokens, pass, length| OPEN_LLAMA_7B.forward_seconds(&load, tokens, pass, length, &a100).total();
        let step = OPEN_LLAMA_7B.step_seconds(&load, 0, 1, &a100).total();
        let asked = forward(1024, 1024, 512);
        assert!((0.4..0.55).contains(&(asked / step)), "{asked} {step}");
        // Passes of a length take as long as each other.
        assert!((forward(10_240, 1024, 512) / (10.0 * asked) - 1.0).abs() < 1e-9);
        assert!(forward(10_240, 128, 512) > forward(10_240, 1024, 512));
        assert!(forward(1024, 1024, 2048) > asked && forward(0, 1024, 512) == 0.0);
    }

    /// The floor of the design, 26.7 GFLOP a token, at the assumed share.
    #[test]
    fn operations_are_most_of_it() {
        let step = seconds(PrecisionMode::Float16, 0, 1, A100);
        let floor = 1024.0 * 26.7e9 / (0.45 * 312e12);
        assert!((step.compute / floor - 1.0).abs() < 0.1, "{step:?} {floor}");
        assert!(step.compute > 0.5 * step.total(), "{step:?}");
    }
}
