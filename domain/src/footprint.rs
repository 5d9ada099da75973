//! What a trial takes, from its model's shape alone, before anything runs: parameters, adapter size, memory,
//! floating-point operations. Bytes are bytes, GB is 10⁹ of them; a multiply-add is two operations.

use crate::trial::{ComputeDtype, Precision, PrecisionMode, TargetModules, TrialConfig};
use serde::{Deserialize, Serialize};

mod modules;
pub mod speed;

pub use modules::{Module, Saved};

/// The shape of a model of the Llama family, as its `config.json` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Rows of the embedding.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the feed-forward layer.
    pub intermediate_size: u64,
    /// Decoder layers.
    pub num_hidden_layers: u64,
    /// Query heads.
    pub num_attention_heads: u64,
    /// Key and value heads.
    pub num_key_value_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether queries, keys and values have a bias, as Qwen2's do.
    #[serde(default)]
    pub query_key_value_bias: bool,
    /// Whether each query head and each key head has an RMSNorm, as Qwen3's do.
    #[serde(default)]
    pub query_key_norms: bool,
    /// In layers that have a window, how many keys a query sees at most, its own among them.
    #[serde(default)]
    pub sliding_window: Option<u64>,
    /// How many layers have it.
    #[serde(default)]
    pub sliding_window_layers: u64,
}

/// A linear layer of every decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// The last part of its path, `q_proj`, ….
    pub name: &'static str,
    /// Width of its input.
    pub in_features: u64,
    /// Width of its output.
    pub out_features: u64,
}

impl ModelShape {
    /// The linear layers of a decoder layer, in model order. The output head is not among them.
    pub fn linears(&self) -> [Linear; 7] {
        let (hidden, inter) = (self.hidden_size, self.intermediate_size);
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        [
            ("q_proj", hidden, query),
            ("k_proj", hidden, key_value),
            ("v_proj", hidden, key_value),
            ("o_proj", query, hidden),
            ("gate_proj", hidden, inter),
            ("up_proj", hidden, inter),
            ("down_proj", inter, hidden),
        ]
        .map(|(name, in_features, out_features)| Linear { name, in_features, out_features })
    }

    /// Parameters of all decoder layers' linear layers.
    pub fn linear_parameters(&self) -> u64 {
        let layer: u64 = self.linears().iter().map(|l| l.in_features * l.out_features).sum();
        layer * self.num_hidden_layers
    }

    /// Parameters that are no matrix: norms, biases.
    fn vector_parameters(&self) -> u64 {
        let biases = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim;
        let biases = if self.query_key_value_bias { biases } else { 0 };
        let head_norms = if self.query_key_norms { 2 * self.head_dim } else { 0 };
        self.num_hidden_layers * (2 * self.hidden_size + biases + head_norms) + self.hidden_size
    }

    /// Parameters of the base; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        self.linear_parameters() + tables * self.vocab_size * self.hidden_size + self.vector_parameters()
    }

    /// The output head's name.
    pub const HEAD: &str = "lm_head";

    /// Parameters of an adapter of `rank` on the linear layers that `is_target` picks by name, among them an
    /// untied head, [`ModelShape::HEAD`].
    pub fn trainable_parameters(&self, rank: u64, is_target: impl Fn(&str) -> bool) -> u64 {
        let layer: u64 = self
            .linears()
            .iter()
            .filter(|l| is_target(l.name))
            .map(|l| rank * (l.in_features + l.out_features))
            .sum();
        let head = !self.tie_word_embeddings && is_target(Self::HEAD);
        let head = if head { rank * (self.hidden_size + self.vocab_size) } else { 0 };
        layer * self.num_hidden_layers + head
    }

    /// Operations of one token's training pass: forward and the gradient by the input of every frozen
    /// product (2 × 2 × parameters), the head once each way, the low-rank products three times (forward and
    /// both gradients), the gradient by the weight of what is trained whole (2 × parameters), and causal attention
    /// over `length` tokens: (length + 1) / 2 keys on average, fewer in layers with a window, two products forward,
    /// five backward.
    pub fn flops_per_token(&self, trainable_parameters: u64, saved: Saved, length: u64) -> f64 {
        let frozen = 4.0 * (self.linear_parameters() + self.vocab_size * self.hidden_size) as f64;
        let low_rank = 6.0 * trainable_parameters.saturating_sub(saved.parameters) as f64;
        let whole = 2.0 * saved.multiplied as f64;
        let windowed = self.windowed_layers() as f64;
        let full = self.num_hidden_layers as f64 - windowed;
        let window = self.sliding_window.unwrap_or(length).min(length);
        let keys = full * average_keys(length, length) + windowed * average_keys(length, window);
        let width = (self.num_attention_heads * self.head_dim) as f64;
        frozen + low_rank + whole + 7.0 * 2.0 * keys * width
    }

    /// Layers that have a window.
    fn windowed_layers(&self) -> u64 {
        self.sliding_window.map_or(0, |_| self.sliding_window_layers.min(self.num_hidden_layers))
    }
}

/// How many keys each of `length` queries sees on average, one after the other, each at most `window` of them: the
/// first `window` queries see one more each, the others `window`.
fn average_keys(length: u64, window: u64) -> f64 {
    let (length, window) = (length.max(1) as f64, window as f64);
    (window * (window + 1.0) / 2.0 + (length - window) * window) / length
}

/// Rows of the block of logits that the engine makes at a time: as many as make 8 Mi elements, and if that is more than
/// a matrix product's tile of 128 rows a whole number of tiles.
pub fn logits_block(vocab_size: u64) -> u64 {
    const TILE: u64 = 128;
    let rows = ((8 << 20) / vocab_size.max(1)).max(1);
    if rows < TILE { rows } else { rows - rows % TILE }
}

/// Bytes of a matrix of `elements` in NF4: two elements a byte, and for each 64 of them a magnitude, in float32 or
/// with double quantisation in 8 bits, which then need a float32 for each 256 and one for all.
pub fn nf4_bytes(elements: u64, double_quant: bool) -> u64 {
    let blocks = elements.div_ceil(64);
    let magnitudes = if double_quant { blocks + 4 * blocks.div_ceil(256) + 4 } else { 4 * blocks };
    elements.div_ceil(2) + magnitudes
}

/// Most bytes of tensors that a solo trial holds, by what holds them. The terms follow the engine's passes
/// (`trainer::pack`), and tests there hold them against what the CPU's passes count and a GPU's allocator says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeakBytes {
    /// The frozen base.
    pub weights: u64,
    /// The adapter, its gradients, its two moments, and the adapter that a divergence falls back to:
    /// 4 × (1 + 1 + 2 + 1) bytes a parameter; and the matrices that PiSSA began with, 4 bytes each. On a GPU the gradients count only where the peak is at the
    /// backward's end, when all of them are there, and a copy in the activations' numbers comes on top.
    pub adapter: u64,
    /// What every layer keeps for its backward: per token the input, the middle, queries, keys, values,
    /// attention's output, gate and up; of a layer that is computed again, the input alone.
    pub activations: u64,
    /// The larger of two moments: a block of logits with the states around it, or a layer's backward, with all
    /// that the layer would have kept if it is computed again.
    pub working: u64,
}

impl PeakBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights + self.own()
    }

    /// What a trial holds for itself: all but the base, which the trials of a pack share.
    pub fn own(&self) -> u64 {
        self.adapter + self.activations + self.working
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// A CPU: activations in float32 whatever the base is held in.
    #[default]
    Cpu,
    /// A GPU: activations in the numbers of the base's embedding.
    Gpu,
}

impl Engine {
    /// Bytes of an element of an activation.
    fn activation_bytes(self, precision: Precision) -> u64 {
        if self == Self::Cpu { 4 } else { table_bytes(precision) }
    }
}

/// Bytes of an element of the embedding and the head.
fn table_bytes(precision: Precision) -> u64 {
    match precision.mode {
        PrecisionMode::Float32 => 4,
        PrecisionMode::FourBit => match precision.compute_dtype {
            None | Some(ComputeDtype::Float32) => 4,
            Some(_) => 2,
        },
        _ => 2,
    }
}

/// Parameters that AdamW takes together on a GPU.
pub const ADAMW_TOGETHER: u64 = 32;

/// Queries that a GPU's attention takes at a time: it holds their products with all keys that they see.
pub const ATTENTION_BLOCK: u64 = 512;

/// What a trial's peak depends on beside its model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// How the base is held.
    pub precision: Precision,
    /// Where it trains.
    pub engine: Engine,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Frozen parameters of the adapter: PiSSA's initial matrices.
    pub initial_parameters: u64,
    /// Of the trainable parameters, those of modules that are trained whole.
    pub saved: Saved,
    /// Whether adapters see their inputs with dropout.
    pub has_dropout: bool,
    /// Whether adapters have magnitudes (DoRA).
    pub has_magnitudes: bool,
    /// Tokens of the largest micro-batch.
    pub tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
}

impl ModelShape {
    /// Bytes of the frozen base: its linear layers in the precision's numbers, embedding and head in those or, with
    /// 4 bits, in `compute_dtype`'s, norms and biases in float32.
    pub fn base_bytes(&self, precision: Precision) -> u64 {
        let table = table_bytes(precision);
        let linears = match precision.mode {
            PrecisionMode::FourBit => {
                let bytes = |l: &Linear| nf4_bytes(l.in_features * l.out_features, precision.double_quant);
                self.linears().iter().map(bytes).sum::<u64>() * self.num_hidden_layers
            }
            _ => self.linear_parameters() * table,
        };
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        linears + table * tables * self.vocab_size * self.hidden_size + 4 * self.vector_parameters()
    }

    /// The peak of a solo trial, where `recomputed` of the layers are computed again.
    pub fn peak_bytes(&self, load: &Load, recomputed: u64) -> PeakBytes {
        let (hidden, inter, tokens) = (self.hidden_size, self.intermediate_size, load.tokens);
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        let layer = 2 * hidden + 2 * query + 2 * key_value + 2 * inter;
        let recomputed = recomputed.min(self.num_hidden_layers);
        let kept = self.num_hidden_layers - recomputed;
        let block = logits_block(self.vocab_size).min(tokens);
        let element = load.engine.activation_bytes(load.precision);
        if load.engine == Engine::Gpu {
            return self.peak_bytes_on_gpu(load, recomputed, kept, element);
        }
        // Logits are float32 everywhere.
        // A head that is trained has its gradient by the logits' transpose.
        let logits = if load.saved.has_head { 2 } else { 1 } * block * self.vocab_size;
        let loss = element * (tokens * hidden + 2 * block * hidden) + 4 * logits;
        // The layers that keep all come last, so that they are gone when the first is computed again.
        let again = if kept == 0 { layer - hidden } else { 0 };
        // Of a layer's backward, its feed-forward part, and its attention part, when gate, up, middle and attention's
        // output are gone: the gradients by queries, keys and values, head by head and joined, and what head norms give.
        let normed = if self.query_key_norms { query + key_value } else { 0 };
        let attention = (2 * (query + 2 * key_value) + normed).saturating_sub(2 * inter);
        // So has a linear layer. Dropout makes the input's gradient apart and masks it; with magnitudes there are two.
        let mut beside = if load.saved.has_linears { inter } else { 0 };
        beside += if load.has_dropout { 2 * inter } else { 0 };
        beside += if load.has_dropout && load.has_magnitudes { inter } else { 0 };
        let backward = element * tokens * (again + beside + attention.max(hidden + 2 * inter));
        // The embedding's gradient is there when all else of the pass is gone.
        let last = if load.saved.has_embedding { 4 * self.vocab_size * hidden } else { 0 };
        let adapter = 20 * load.trainable_parameters + 4 * load.initial_parameters;
        let pass = PeakBytes {
            weights: self.base_bytes(load.precision),
            adapter: adapter.saturating_sub(last),
            activations: element * tokens * (kept * layer + recomputed * hidden),
            working: loss.max(backward),
        };
        // With nothing of the pass left, AdamW makes a matrix and its moments anew.
        let update = PeakBytes { adapter, activations: 0, working: 12 * load.saved.largest, ..pass };
        if update.total() > pass.total() { update } else { pass }
    }

    /// [`ModelShape::peak_bytes`] on a GPU, whose elements of activations take `element` bytes.
    fn peak_bytes_on_gpu(&self, load: &Load, recomputed: u64, kept: u64, element: u64) -> PeakBytes {
        let (hidden, inter, tokens) = (self.hidden_size, self.intermediate_size, load.tokens);
        let (heads, dim) = (self.num_attention_heads, self.head_dim);
        let (query, key_value) = (heads * dim, self.num_key_value_heads * dim);
        let layer = 2 * hidden + 2 * query + 2 * key_value + 2 * inter;
        // A copy in other numbers, where they are others.
        let copy = if element == 4 { 0 } else { element };
        let block = logits_block(self.vocab_size).min(tokens);
        let mut loss =
            element * (2 * tokens * hidden + 3 * block * hidden) + (4 + copy) * block * self.vocab_size;
        // A head that is trained has its gradient in float32 and by the logits' transpose from here on.
        let head_gradient = if load.saved.has_head { 4 * self.vocab_size * hidden } else { 0 };
        loss += if load.saved.has_head { (4 + copy) * block * self.vocab_size } else { 0 };
        let matrix = match load.precision.mode {
            PrecisionMode::FourBit => {
                element * self.linears().iter().map(|l| l.in_features * l.out_features).max().unwrap_or(0)
            }
            _ => 0,
        };
        // Of a layer's backward, its feed-forward part, and its attention part, when gate, up, middle and attention's
        // output are gone.
        let mut beside = if load.saved.has_linears { 2 * 4 * inter } else { 0 };
        // In float32: outputs once more, the gradient by them, and their product.
        beside += if load.has_magnitudes { 3 * 4 * inter } else { 0 };
        let feed_forward = element * tokens * (2 * inter + 3 * hidden) + matrix + tokens * beside;
        // Where every layer has a window, a block's queries see no more keys than theirs together.
        let block_queries = load.longest.min(ATTENTION_BLOCK);
        let keys_seen = match self.sliding_window {
            Some(window) if self.windowed_layers() == self.num_hidden_layers => {
                load.longest.min(block_queries + window.saturating_sub(1))
            }
            _ => load.longest,
        };
        let scores = (4 + element) * heads * block_queries * keys_seen;
        let shared = heads > self.num_key_value_heads || load.longest > ATTENTION_BLOCK;
        let keys = if shared { 2 * 4 * key_value } else { 2 * element * key_value };
        // Queries and keys after their norms are made again beside those before them.
        let normed = if self.query_key_norms { query + key_value } else { 0 };
        let attention = tokens * (element * (hidden + 2 * query + normed) + keys) + scores;
        let attention = attention.saturating_sub(element * tokens * (2 * inter + query + hidden));
        let backward = feed_forward.max(attention);
        // The layers that keep all come last, so that they are gone when the first is computed again.
        let again = element * tokens * (layer - hidden);
        let held = element * tokens * (kept * layer + recomputed * hidden);
        let first = if kept == 0 { again + backward } else { backward };
        let (weights, parameters) = (self.base_bytes(load.precision), load.trainable_parameters);
        let initial = load.initial_parameters;
        let adapter = (16 + copy) * parameters + (4 + copy) * initial;
        let at_start = PeakBytes {
            weights,
            adapter: adapter + head_gradient,
            activations: held,
            working: loss.max(first),
        };
        // At its end the backward holds one layer and all gradients.
        let at_end = PeakBytes {
            adapter: adapter + 4 * parameters,
            activations: element * tokens * layer,
            working: backward,
            ..at_start
        };
        // Then, with nothing of the pass left, AdamW makes a group's weights and moments anew.
        let tensors = 2 * self.linears().len() as u64 * self.num_hidden_layers;
        let low_rank = parameters - load.saved.parameters.min(parameters);
        let anew = 12 * (low_rank * ADAMW_TOGETHER.min(tensors) / tensors.max(1) + load.saved.parameters);
        let update =
            PeakBytes { adapter: 20 * parameters + 4 * initial, activations: 0, working: anew, ..at_start };
        [at_end, update].into_iter().fold(at_start, |a, b| if b.total() > a.total() { b } else { a })
    }

    /// How many layers must be computed again for the peak to stay within `budget` bytes: the fewest. `None` if it
    /// does not with all of them.
    pub fn recomputed_layers(&self, load: &Load, budget: u64) -> Option<u64> {
        (0..=self.num_hidden_layers).find(|layers| self.peak_bytes(load, *layers).total() <= budget)
    }

    /// What a trial takes whose data nobody has read yet, at most: every row as long as `max_sequence_length`, an
    /// adapter on every linear layer, and on an untied head unless the targets are `all-linear`, which leaves it
    /// out.
    pub fn load_at_most(&self, config: &TrialConfig, engine: Engine) -> Load {
        let head = config.target_modules != TargetModules::default();
        let is_target = |name: &str| head || name != Self::HEAD;
        let ranks = config.rank_pattern.values().chain([&config.lora_rank]);
        let rank = ranks.max().copied().unwrap_or_default();
        // DoRA's magnitudes, one for each output.
        let outputs: u64 =
            self.linears().iter().map(|l| l.out_features).sum::<u64>() * self.num_hidden_layers;
        let magnitudes = if config.use_dora { outputs + self.vocab_size } else { 0 };
        let matrices = self.trainable_parameters(u64::from(rank), is_target);
        let saved = self.saved(config.modules_to_save.as_deref());
        Load {
            precision: config.base_model().precision,
            engine,
            trainable_parameters: matrices + magnitudes + saved.parameters,
            saved,
            has_dropout: config.lora_dropout > 0.0,
            has_magnitudes: config.use_dora,
            initial_parameters: if config.init_lora_weights.is_pissa() { matrices } else { 0 },
            tokens: u64::from(config.batch_size) * u64::from(config.max_sequence_length),
            longest: u64::from(config.max_sequence_length),
        }
    }

    /// The most and the least that such a trial takes on a CPU: with the fewest layers computed again that its
    /// `gradient_checkpointing` allows, and with the most.
    pub fn peak_bytes_at_most(&self, config: &TrialConfig) -> [PeakBytes; 2] {
        let load = self.load_at_most(config, Engine::Cpu);
        let layers = config.gradient_checkpointing.recomputed_layers(self.num_hidden_layers);
        layers.map(|layers| self.peak_bytes(&load, layers))
    }
}

/// Bytes of `adapter_model.safetensors` in float32: the values, with PiSSA the initial ones too, and a header of some
/// 115 bytes a tensor.
pub fn adapter_bytes(parameters: u64, tensors: u64) -> u64 {
    4 * parameters + 115 * tensors + 8
}

/// Trainable parameters as a share of base and adapter together.
pub fn trainable_share(trainable_parameters: u64, base_parameters: u64) -> f64 {
    trainable_parameters as f64 / (base_parameters + trainable_parameters) as f64
}

/// Tokens of an optimizer step at most: rows of all its micro-batches, each cut to the longest length.
pub fn tokens_per_step(config: &TrialConfig) -> u64 {
    u64::from(config.batch_size)
        * u64::from(config.gradient_accumulation_steps)
        * u64::from(config.max_sequence_length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain LoRA without dropout, on so many tokens in all and in the longest row.
    fn lora(
        engine: Engine,
        precision: Precision,
        trainable_parameters: u64,
        [tokens, longest]: [u64; 2],
    ) -> Load {
        Load {
            precision,
            engine,
            trainable_parameters,
            initial_parameters: 0,
            saved: Saved::default(),
            has_dropout: false,
            has_magnitudes: false,
            tokens,
            longest,
        }
    }

    pub(super) const OPEN_LLAMA_7B: ModelShape = ModelShape {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        tie_word_embeddings: false,
        query_key_value_bias: false,
        query_key_norms: false,
        sliding_window: None,
        sliding_window_layers: 0,
    };

    /// The published benchmark's table of fine-tuned parameters.
    #[test]
    fn the_published_table() {
        assert_eq!(OPEN_LLAMA_7B.parameters(), 6_738_415_616);
        let all: u64 = OPEN_LLAMA_7B.modules().iter().map(|module| module.matrix + module.vector).sum();
        assert_eq!(all, OPEN_LLAMA_7B.parameters());
        // (rank, trainable, total in 10⁹, share in per cent, adapter in MiB)
        for (rank, trainable, total, share, mib) in [
            (8, 19_988_480, 6.76, 0.3, 76.4),
            (16, 39_976_960, 6.78, 0.6, 152.65),
            (32, 79_953_920, 6.82, 1.2, 305.15),
            (64, 159_907_840, 6.90, 2.3, 610.15),
        ] {
            let got = OPEN_LLAMA_7B.trainable_parameters(rank, |name| name != ModelShape::HEAD);
            assert_eq!(got, trainable);
            let all = (OPEN_LLAMA_7B.parameters() + got) as f64 / 1e9;
            assert!((all - total).abs() < 0.005, "{all}");
            let percent = 100.0 * trainable_share(got, OPEN_LLAMA_7B.parameters());
            assert!((percent - share).abs() < 0.05, "{percent}");
            let file = adapter_bytes(got, 2 * 7 * 32) as f64 / 1_048_576.0;
            assert!((file - mib).abs() < 0.2, "{file}");
        }
    }

    /// The design's floor: 26.7 GFLOP a token forward and dX at 7B.
    #[test]
    fn operations_of_a_token() {
        let giga = OPEN_LLAMA_7B.flops_per_token(39_976_960, Saved::default(), 512) / 1e9;
        assert!((26.0..28.5).contains(&giga), "{giga}");
    }

    /// A window of as many keys as there are changes nothing; a smaller one counts the keys that are seen.
    #[test]
    fn operations_within_a_window() {
        let shape = OPEN_LLAMA_7B;
        let windowed = |window, layers| ModelShape {
            sliding_window: Some(window),
            sliding_window_layers: layers,
            ..shape
        };
        // The keys that the queries of a row see, counted one by one.
        let keys = |length: u64, window: u64| (1..=length).map(|query| query.min(window)).sum::<u64>() as f64;
        let attention = |shape: ModelShape, length: u64| {
            let none = ModelShape { num_attention_heads: 0, num_key_value_heads: 0, ..shape };
            let frozen = shape.linear_parameters() - none.linear_parameters();
            shape.flops_per_token(0, Saved::default(), length)
                - none.flops_per_token(0, Saved::default(), length)
                - 4.0 * frozen as f64
        };
        for (length, window, layers) in
            [(512, 4096, 32), (512, 512, 32), (8192, 4096, 32), (100, 7, 3), (64, 1, 32)]
        {
            let seen = layers as f64 * keys(length, window) + (32 - layers) as f64 * keys(length, length);
            let want = 14.0 * 4096.0 * seen / length as f64;
            let got = attention(windowed(window, layers), length);
            assert!(
                (got - want).abs() < 1e-9 * shape.flops_per_token(0, Saved::default(), length),
                "{length} {window} {layers}"
            );
        }
        assert_eq!(
            windowed(512, 32).flops_per_token(9, Saved::default(), 512),
            shape.flops_per_token(9, Saved::default(), 512)
        );
        assert_eq!(
            windowed(7, 0).flops_per_token(9, Saved::default(), 512),
            shape.flops_per_token(9, Saved::default(), 512)
        );
    }

    /// On a GPU a block's scores are those of the keys that its queries see, if no layer sees more.
    #[test]
    fn scores_within_a_window() {
        let precision = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
        let shape = |sliding_window, sliding_window_layers| ModelShape {
            intermediate_size: 64,
            sliding_window,
            sliding_window_layers,
            ..OPEN_LLAMA_7B
        };
        let peak = |shape: ModelShape| {
            let (trainable_parameters, tokens) = (1000, 8192);
            let load = lora(Engine::Gpu, precision, trainable_parameters, [tokens, tokens]);
            shape.peak_bytes(&load, 0).total()
        };
        let full = peak(shape(None, 0));
        assert_eq!(peak(shape(Some(1024), 31)), full, "one layer sees all keys");
        assert_eq!(peak(shape(Some(8192), 32)), full);
        // 512 queries of 32 heads see 512 + 1023 keys, in float32 and in 16 bits.
        assert_eq!(full - peak(shape(Some(1024), 32)), 6 * 32 * 512 * (8192 - 1535));
    }

    /// The design's floors at 7B: 13.48 GB in float16, 3.87 in NF4 with embedding and head in 16 bits, 4.127 bits
    /// a quantised parameter.
    #[test]
    fn bytes_of_the_base() {
        let compute_dtype = Some(ComputeDtype::Float16);
        for (mode, double_quant, gigabytes) in [
            (PrecisionMode::Float32, false, 26.95),
            (PrecisionMode::Float16, false, 13.48),
            (PrecisionMode::FourBit, true, 3.87),
            (PrecisionMode::FourBit, false, 4.17),
        ] {
            let bytes =
                OPEN_LLAMA_7B.base_bytes(Precision { mode, compute_dtype, double_quant }) as f64 / 1e9;
            assert!((bytes - gigabytes).abs() < 0.01, "{mode:?}: {bytes}");
        }
        let bits = nf4_bytes(4096 * 11_008, true) as f64 * 8.0 / (4096.0 * 11_008.0);
        assert!((bits - 4.127).abs() < 0.0005, "{bits}");
    }

    /// What OpenLLaMA 7B is to take on a GPU with rank 16 on all linear layers: the published benchmark's rows and beyond.
    #[test]
    fn goals_on_a_gpu() {
        let sixteen = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
        let compute_dtype = Some(ComputeDtype::Bfloat16);
        let four = Precision { mode: PrecisionMode::FourBit, compute_dtype, double_quant: true };
        // (precision, rows, length, all layers again, gigabytes at most)
        for (precision, rows, longest, again, most) in [
            (sixteen, 2, 512, false, 21.0),
            (sixteen, 2, 512, true, 16.0),
            (sixteen, 1, 512, true, 15.0),
            (sixteen, 2, 1024, false, 38.0),
            (sixteen, 1, 4096, false, 38.0),
            (four, 2, 512, true, 5.3),
            (four, 2, 2048, true, 8.0),
            (four, 64, 512, true, 38.0),
        ] {
            let trainable_parameters = 39_976_960;
            let tokens = rows * longest;
            let load = lora(Engine::Gpu, precision, trainable_parameters, [tokens, longest]);
            let peak = OPEN_LLAMA_7B.peak_bytes(&load, if again { 32 } else { 0 });
            let gigabytes = peak.total() as f64 / 1e9;
            println!("{precision} {rows} x {longest}, layers again: {again}: {gigabytes:.2} GB, {peak:?}");
            assert!(gigabytes <= most, "{precision} {rows} x {longest}: {gigabytes} GB");
        }
    }

    #[test]
    fn as_few_layers_are_computed_again_as_fit() {
        let engine = Engine::Cpu;
        let load = lora(engine, Precision::default(), 1000, [1024, 512]);
        let shape = OPEN_LLAMA_7B;
        let peak = |layers| shape.peak_bytes(&load, layers).total();
        for layers in 0..=32 {
            // The last layer is the first that the backward pass asks for: to compute it again saves nothing.
            assert_eq!(shape.recomputed_layers(&load, peak(layers)), Some(layers.min(31)));
            assert!(layers == 0 || layers == 32 || peak(layers) < peak(layers - 1), "{layers} saves bytes");
        }
        assert_eq!(shape.recomputed_layers(&load, peak(32) - 1), None);
        assert_eq!(shape.recomputed_layers(&load, u64::MAX), Some(0));
    }

    #[test]
    fn targets_are_counted_by_name() {
        let attention = OPEN_LLAMA_7B.trainable_parameters(8, |name| matches!(name, "q_proj" | "v_proj"));
        assert_eq!(attention, 2 * 8 * (4096 + 4096) * 32);
        let head = |shape: ModelShape| shape.trainable_parameters(8, |name| name == ModelShape::HEAD);
        assert_eq!(head(OPEN_LLAMA_7B), 8 * (4096 + 32_000));
        assert_eq!(head(ModelShape { tie_word_embeddings: true, ..OPEN_LLAMA_7B }), 0);
        let adapter = |target_modules| {
            let config = TrialConfig { lora_rank: 8, target_modules, ..TrialConfig::default() };
            OPEN_LLAMA_7B.peak_bytes_at_most(&config)[0].adapter
        };
        let (all, named) = (TargetModules::default(), TargetModules::Names(vec!["lm_head".into()]));
        assert_eq!(adapter(all), 20 * 19_988_480);
        assert_eq!(adapter(named), 20 * (19_988_480 + head(OPEN_LLAMA_7B)));
    }
}
