//! What a trial takes, from its model's shape alone, before anything runs: parameters, adapter size, memory,
//! floating-point operations. Bytes are bytes, GB is 10⁹ of them; a multiply-add is two operations.

use crate::trial::{ComputeDtype, Precision, PrecisionMode, TargetModules, TrialConfig};
use serde::{Deserialize, Serialize};

mod modules;
pub mod speed;
mod start;

pub use modules::{Module, Saved};
pub use start::start_bytes;

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
    /// both gradients), those that PiSSA began with twice, the gradient by the weight of what is trained whole
    /// (2 × parameters), and causal attention over `length` tokens: (length + 1) / 2 keys on average, fewer in layers with
    /// a window, two products forward, five backward. Magnitudes have an adapted layer's frozen product made again in the
    /// backward; with dropout it is made of the dropped input too, each way. What layers that are computed again take is
    /// left out, and so is what does not grow with the tokens: the norms of magnitudes, PiSSA's start.
    pub fn flops_per_token(&self, load: &Load, length: u64) -> f64 {
        let saved = load.saved;
        let again = match (load.magnitudes > 0, load.has_dropout) {
            (false, _) => 0.0,
            (true, false) => 2.0,
            (true, true) => 6.0,
        };
        let frozen = 4.0 * (self.linear_parameters() + self.vocab_size * self.hidden_size) as f64;
        let frozen = frozen + again * load.adapted as f64;
        let low_rank = 6.0 * load.trainable_parameters.saturating_sub(saved.parameters) as f64;
        let low_rank = low_rank + 4.0 * load.initial_parameters as f64;
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
/// (`trainer::pack`). Tests there hold them against what the CPU's passes count and what the allocator hands out, on the
/// CPU and with a GPU's operations emulated there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeakBytes {
    /// The frozen base.
    pub weights: u64,
    /// The adapter, its gradients, its two moments, and the adapter that a divergence falls back to:
    /// 4 × (1 + 1 + 2 + 1) bytes a parameter; and the matrices that PiSSA began with, 4 bytes each. Where checkpoints are
    /// written while it trains on, an earlier adapter and its moments besides, 12 bytes a parameter, which are there for as
    /// long as one is being written. On a GPU that is a copy in the computer's memory, which does not count; the
    /// gradients count only where the peak is at the backward's end, when all of them are there, or where an earlier
    /// micro-batch left them, and a copy in the activations' numbers comes on top.
    pub adapter: u64,
    /// What every layer keeps for its backward: per token the input, the middle, queries, keys, values,
    /// attention's output, gate and up; of a layer that is computed again, the input alone.
    pub activations: u64,
    /// The larger of two moments: a block of logits with the states around it, or a layer's backward, with all
    /// that the layer would have kept if it is computed again. Where the run's start or its update takes more than a
    /// pass, what that works on.
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

    fn larger(self, other: Self) -> Self {
        if other.total() > self.total() { other } else { self }
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

/// Queries that a GPU's attention takes at a time: it holds their products with all keys that they see.
pub const ATTENTION_BLOCK: u64 = 512;

/// What a trial's peak depends on beside its model's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// How the base is held.
    pub precision: Precision,
    /// Where it trains.
    pub engine: Engine,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Frozen parameters of the adapter: PiSSA's initial matrices.
    pub initial_parameters: u64,
    /// Elements of the weights that have adapters.
    pub adapted: u64,
    /// Of the trainable parameters, those of modules that are trained whole.
    pub saved: Saved,
    /// Whether adapters see their inputs with dropout.
    pub has_dropout: bool,
    /// Outputs that have magnitudes (DoRA).
    pub magnitudes: u64,
    /// Whether a micro-batch finds the gradients of one before it.
    pub accumulates: bool,
    /// Whether checkpoints are written while it trains on.
    pub checkpoints: bool,
    /// The most that the start of an adapted layer takes ([`start_bytes`]).
    pub start: u64,
    /// Tokens of the largest micro-batch.
    pub tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
}

impl Load {
    /// The adapter's own bytes.
    pub fn adapter_bytes(&self) -> u64 {
        4 * (self.trainable_parameters + self.initial_parameters)
    }

    /// Of each output with magnitudes the row's norm, its square without the adapter, and two factors.
    fn norm_bytes(&self) -> u64 {
        4 * 4 * self.magnitudes
    }

    /// Before the first step, when layers' adapters begin, one after the other where the peak has no room for more;
    /// `pass` is a later moment.
    fn at_start(&self, pass: PeakBytes) -> PeakBytes {
        PeakBytes { adapter: self.adapter_bytes(), activations: 0, working: self.start, ..pass }
    }
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
        beside += if load.has_dropout && load.magnitudes > 0 { inter } else { 0 };
        let backward = element * tokens * (again + beside + attention.max(hidden + 2 * inter));
        // The embedding's gradient is there when all else of the pass is gone, if none is from before.
        let late = load.saved.has_embedding && !load.accumulates;
        let last = if late { 4 * self.vocab_size * hidden } else { 0 };
        let each = if load.checkpoints { 20 + 12 } else { 20 };
        let adapter = each * load.trainable_parameters + 4 * load.initial_parameters + load.norm_bytes();
        let pass = PeakBytes {
            weights: self.base_bytes(load.precision),
            adapter: adapter.saturating_sub(last),
            activations: element * tokens * (kept * layer + recomputed * hidden),
            working: loss.max(backward),
        };
        // With nothing of the pass left, AdamW makes a matrix and its moments anew.
        let update = PeakBytes { adapter, activations: 0, working: 12 * load.saved.largest, ..pass };
        [update, load.at_start(pass)].into_iter().fold(pass, PeakBytes::larger)
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
        loss += if load.saved.has_head { 4 * block * self.vocab_size } else { 0 };
        let matrix = match load.precision.mode {
            PrecisionMode::FourBit => {
                element * self.linears().iter().map(|l| l.in_features * l.out_features).max().unwrap_or(0)
            }
            _ => 0,
        };
        // Of a layer's backward, its feed-forward part, and its attention part, when gate, up, middle and attention's
        // output are gone.
        // A linear layer that is trained has its gradient by transposed ones in float32; what is gone by then makes up for half.
        let mut beside = if load.saved.has_linears { 4 * inter } else { 0 };
        // With magnitudes, in float32: outputs once more, the gradient by them, and their product. At another moment the
        // input that is dropped.
        let dropped = if load.has_dropout { element * inter } else { 0 };
        beside += if load.magnitudes > 0 { 3 * 4 * inter } else { dropped };
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
        let adapter = (16 + copy) * parameters + (4 + copy) * initial + load.norm_bytes();
        let at_start = PeakBytes {
            weights,
            adapter: adapter + if load.accumulates { 4 * parameters } else { head_gradient },
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
        // Then, with nothing of the pass left, AdamW makes the weights anew; moments change where they lie.
        let update = PeakBytes {
            adapter: 20 * parameters + 4 * initial,
            activations: 0,
            working: 4 * parameters,
            ..at_start
        };
        [at_end, update, load.at_start(at_start)].into_iter().fold(at_start, PeakBytes::larger)
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
        let precision = config.base_model().precision;
        let head = head && !self.tie_word_embeddings;
        let head = head.then_some([self.vocab_size, self.hidden_size]);
        let weights = self.linears().map(|l| [l.out_features, l.in_features]).into_iter().chain(head);
        let start = weights
            .map(|shape| start_bytes(engine, precision, shape, u64::from(rank), config.init_lora_weights));
        Load {
            precision,
            engine,
            trainable_parameters: matrices + magnitudes + saved.parameters,
            adapted: self.linear_parameters() + head.map_or(0, |[rows, columns]| rows * columns),
            saved,
            has_dropout: config.lora_dropout > 0.0,
            magnitudes,
            accumulates: config.gradient_accumulation_steps > 1,
            checkpoints: config.save_steps > 0,
            start: start.max().unwrap_or(0),
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
mod tests;
