//! Frozen weights: read from a checkpoint, never given a gradient, never copied.

use super::{ModelConfig, Quantization, incoming};
use crate::checkpoint::{Checkpoint, Quantized};
use crate::device;
use crate::error::{Result, TrainError};
use crate::lora::ModuleSpec;
use crate::ops;
use crate::saved::{Kind, SavedSpec};
use crate::weight::{Numbers, Weight};
use candle_core::{DType, Device, Tensor};
use domain::trial::Precision;
use std::path::Path;
use std::sync::OnceLock;

/// A linear layer: `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Its path in the model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[out_features, in_features]`.
    pub weight: Weight,
    /// `[out_features]`, in float32; most layers have none.
    pub bias: Option<Tensor>,
    row_squares: OnceLock<Tensor>,
}

impl Linear {
    /// A layer of that path and weight, without a bias.
    pub fn new(path: String, weight: Weight) -> Self {
        Self { path, weight, bias: None, row_squares: OnceLock::new() }
    }

    /// The sum of the squares of each row of the weight, `[out_features]`, computed once.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn row_squares(&self) -> Result<&Tensor> {
        if let Some(squares) = self.row_squares.get() {
            return Ok(squares);
        }
        let squares = ops::row_squares(&self.weight)?;
        Ok(self.row_squares.get_or_init(|| squares))
    }

    fn spec(&self) -> ModuleSpec {
        let [out_features, in_features] = self.weight.dims();
        ModuleSpec { path: self.path.clone(), in_features, out_features }
    }
}

/// One decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// RMSNorm weight before attention, `[hidden]`.
    pub input_norm: Tensor,
    /// RMSNorm weight before the feed-forward layer, `[hidden]`.
    pub post_attention_norm: Tensor,
    /// RMSNorm weights of each query head and of each key head, `[head_dim]`, if the model has them.
    pub head_norms: Option<[Tensor; 2]>,
    /// How many keys a query sees at most, its own among them; `None` for all before it.
    pub window: Option<usize>,
    /// q, k, v, o, gate, up, down.
    pub linears: [Linear; 7],
}

impl Layer {
    /// One of its norms, in the order of [`NORM_PATHS`].
    fn norm(&self, which: usize) -> Option<&Tensor> {
        let [q, k] = self.head_norms();
        [q, k, Some(&self.input_norm), Some(&self.post_attention_norm)].into_iter().nth(which).flatten()
    }

    /// The norms of query heads and of key heads, if the model has them.
    pub fn head_norms(&self) -> [Option<&Tensor>; 2] {
        self.head_norms.as_ref().map_or([None, None], |[q, k]| [Some(q), Some(k)])
    }
}

/// The paths of a layer's linear modules, in the order of [`Layer::linears`].
const LINEAR_PATHS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The paths of a layer's norms.
const NORM_PATHS: [&str; 4] =
    ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"];

/// The numbers of a layer's norms among all ([`Base::modules`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct NormNumbers {
    /// Of each query head and of each key head.
    pub(crate) heads: [usize; 2],
    /// Before attention.
    pub(crate) input: usize,
    /// Before the feed-forward layer.
    pub(crate) post_attention: usize,
}

impl NormNumbers {
    pub(crate) fn of(layer: usize) -> Self {
        let first = layer * NORM_PATHS.len();
        Self { heads: [first, first + 1], input: first + 2, post_attention: first + 3 }
    }
}

/// So many of them, the first, have a bias where queries, keys and values do.
const BIASED: usize = 3;

/// The output head's path.
const HEAD_PATH: &str = "lm_head";

/// How far the loading of a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadProgress {
    /// After each tensor.
    Read {
        /// Bytes of the files that are read.
        bytes: u64,
        /// Of so many.
        of: u64,
    },
    /// A matrix that was read begins to be quantised. For a GPU it is quantised as it is read, and this is told after its last
    /// piece.
    Quantising,
    /// It is quantised. A GPU may still be at it: nothing waits for its kernels.
    Quantised {
        /// What it takes now.
        bytes: u64,
    },
}

/// A frozen Llama, or one of its kin, on a device.
#[derive(Debug)]
pub struct Base {
    /// Its shape.
    pub config: ModelConfig,
    /// How its weights are held.
    pub precision: Precision,
    /// `[vocab, hidden]`, in the precision's numbers.
    pub embedding: Tensor,
    /// Its layers.
    pub layers: Vec<Layer>,
    /// The last RMSNorm's weight, `[hidden]`.
    pub norm: Tensor,
    /// The output head, `[vocab, hidden]`; the embedding itself if tied.
    pub head: Linear,
    /// Rotary frequencies of one head, `[head_dim / 2]`.
    pub inverse_frequencies: Vec<f32>,
}

impl Base {
    /// Loads a model directory in Hugging Face's layout: `config.json`, and the weights as [`Checkpoint::open`]
    /// finds them. Tensor by tensor, each is brought into the precision's numbers while the next is read; for a GPU, piece by
    /// piece.
    ///
    /// # Errors
    /// A file is missing or cut off, or a tensor is missing or has another shape than the configuration says.
    pub fn load(dir: &Path, precision: Precision, device: &Device) -> Result<Self> {
        Self::load_watched(dir, precision, device, &mut |_| ())
    }

    /// [`Base::load`]; `watch` is told how far it is.
    ///
    /// # Errors
    /// Those of [`Base::load`].
    pub fn load_watched(
        dir: &Path,
        precision: Precision,
        device: &Device,
        watch: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        device::check(device, precision)?;
        let (config, tensors) = open(dir)?;
        let bytes = |name: &str| tensors.bytes(name).unwrap_or_default();
        let total = tensors.names().map(bytes).sum();
        let (mut read, quantization) = (0, config.quantization);
        // Those that nobody has quantised, in the order in which they are asked for.
        let mut wanted = Vec::new();
        Self::assemble(config.clone(), precision, |name, shape, held| {
            if !tensors.is_quantized(name) {
                wanted.push((name.to_string(), held));
            }
            held.outline(shape)
        })?;
        incoming::each(&tensors, &wanted, device, |next| {
            Self::assemble(config, precision, |name, shape, held| {
                let found = check_tensor(dir, &tensors, quantization, name, shape, held)?;
                read += found.as_ref().map_or_else(|| bytes(name), Quantized::bytes);
                let weight = match (found, held) {
                    (None, _) => next(name, held, watch)?,
                    (Some(matrix), Numbers::Nf4 { .. }) => Weight::Nf4(matrix.read(device)?),
                    (Some(matrix), _) => held.hold(&matrix.read(device)?.dequantize()?)?,
                };
                watch(LoadProgress::Read { bytes: read, of: total });
                Ok(weight)
            })
        })
    }

    /// The model directory's shapes, checked as [`Base::load`] checks them, without reading a weight: every
    /// tensor is a view of one zero.
    ///
    /// # Errors
    /// Those of [`Base::load`].
    pub fn outline(dir: &Path, precision: Precision) -> Result<Self> {
        let (config, tensors) = open(dir)?;
        let quantization = config.quantization;
        Self::assemble(config, precision, |name, shape, held| {
            check_tensor(dir, &tensors, quantization, name, shape, held)?;
            held.outline(shape)
        })
    }

    /// A model of random weights, N(0, 0.02), for benchmarks and tests.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn random(config: ModelConfig, precision: Precision, device: &Device) -> Result<Self> {
        device::check(device, precision)?;
        Self::assemble(config, precision, |name, shape, held| {
            held.hold(&if name.ends_with("norm.weight") {
                Tensor::ones(shape, DType::F32, device)?
            } else {
                Tensor::randn(0f32, 0.02, shape, device)?
            })
        })
    }

    fn assemble(
        config: ModelConfig,
        precision: Precision,
        mut read: impl FnMut(&str, &[usize], Numbers) -> Result<Weight>,
    ) -> Result<Self> {
        let c = &config;
        let (table, linear) = (Numbers::of_tables(precision), Numbers::of_linears(precision));
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let shapes = [
            [q, hidden],
            [kv, hidden],
            [kv, hidden],
            [hidden, q],
            [inter, hidden],
            [inter, hidden],
            [hidden, inter],
        ];
        let embedding = read("model.embed_tokens.weight", &[c.vocab_size, hidden], table)?.dense()?;
        let mut layers = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            let mut linears = Vec::with_capacity(7);
            for (place, (path, shape)) in LINEAR_PATHS.iter().zip(&shapes).enumerate() {
                let path = format!("model.layers.{i}.{path}");
                let weight = read(&format!("{path}.weight"), shape, linear)?;
                let mut layer = Linear::new(path, weight);
                if place < BIASED && c.query_key_value_bias {
                    let name = format!("{}.bias", layer.path);
                    layer.bias = Some(read(&name, &shape[..1], Numbers::Float32)?.dense()?);
                }
                linears.push(layer);
            }
            let linears: [Linear; 7] = match linears.try_into() {
                Ok(linears) => linears,
                Err(_) => unreachable!("seven paths make seven linears"),
            };
            let mut norm = |name: &str, width: usize| {
                read(&format!("model.layers.{i}.{name}.weight"), &[width], Numbers::Float32)?.dense()
            };
            let head_norms = match c.query_key_norms {
                true => Some([norm("self_attn.q_norm", c.head_dim)?, norm("self_attn.k_norm", c.head_dim)?]),
                false => None,
            };
            layers.push(Layer {
                input_norm: norm("input_layernorm", hidden)?,
                post_attention_norm: norm("post_attention_layernorm", hidden)?,
                head_norms,
                window: c.sliding_windows.get(i).copied().flatten(),
                linears,
            });
        }
        let norm = read("model.norm.weight", &[hidden], Numbers::Float32)?.dense()?;
        let head = match c.tie_word_embeddings {
            true => Weight::Dense(embedding.clone()),
            false => read("lm_head.weight", &[c.vocab_size, hidden], table)?,
        };
        let head = Linear::new(HEAD_PATH.into(), head);
        let inverse_frequencies = config.inverse_frequencies();
        Ok(Self { config, precision, embedding, layers, norm, head, inverse_frequencies })
    }

    /// Its tensors as they are held, by the names that files have for them; a tied head is the embedding.
    pub(crate) fn tensors(&self) -> Vec<(String, Weight)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), self.embedding.clone().into())];
        for (i, layer) in self.layers.iter().enumerate() {
            for linear in &layer.linears {
                tensors.push((format!("{}.weight", linear.path), linear.weight.clone()));
                let bias = linear.bias.clone();
                tensors.extend(bias.map(|bias| (format!("{}.bias", linear.path), bias.into())));
            }
            for (which, name) in NORM_PATHS.into_iter().enumerate() {
                let norm = layer.norm(which).cloned();
                tensors.extend(norm.map(|norm| (format!("model.layers.{i}.{name}.weight"), norm.into())));
            }
        }
        tensors.push(("model.norm.weight".into(), self.norm.clone().into()));
        if !self.config.tie_word_embeddings {
            tensors.push((format!("{HEAD_PATH}.weight"), self.head.weight.clone()));
        }
        tensors
    }

    /// Every module that holds weights, in model order.
    pub fn modules(&self) -> Vec<SavedSpec> {
        let module = |path: String, kind, shape: &[usize], has_bias| SavedSpec {
            path,
            kind,
            shape: shape.to_vec(),
            has_bias,
        };
        let table = [self.config.vocab_size, self.config.hidden_size];
        let mut modules = vec![module("model.embed_tokens".into(), Kind::Embedding, &table, false)];
        let linear = |number: usize, linear: &Linear| {
            module(linear.path.clone(), Kind::Linear(number), &linear.weight.dims(), linear.bias.is_some())
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let first = i * layer.linears.len();
            modules.extend(layer.linears.iter().enumerate().map(|(j, l)| linear(first + j, l)));
            for (which, name) in NORM_PATHS.into_iter().enumerate() {
                if let Some(weight) = layer.norm(which) {
                    let path = format!("model.layers.{i}.{name}");
                    let number = i * NORM_PATHS.len() + which;
                    modules.push(module(path, Kind::Norm(number), weight.dims(), false));
                }
            }
        }
        modules.push(module("model.norm".into(), Kind::Norm(self.last_norm()), self.norm.dims(), false));
        let head = self.layers.iter().map(|layer| layer.linears.len()).sum();
        modules.push(linear(head, &self.head));
        modules
    }

    /// The number of the last norm among all: each layer has four, whether it holds weights for them or not.
    pub(crate) fn last_norm(&self) -> usize {
        self.layers.len() * NORM_PATHS.len()
    }

    /// A module's weight and bias in float32.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub(crate) fn values(&self, kind: Kind) -> Result<(Tensor, Option<Tensor>)> {
        Ok(match kind {
            Kind::Embedding => (self.embedding.to_dtype(DType::F32)?, None),
            Kind::Norm(number) => {
                let layer = self.layers.get(number / NORM_PATHS.len());
                let norm = layer.and_then(|layer| layer.norm(number % NORM_PATHS.len()));
                (norm.unwrap_or(&self.norm).clone(), None)
            }
            Kind::Linear(number) => {
                let linear = self.layers.iter().flat_map(|layer| &layer.linears).nth(number);
                let linear = linear.unwrap_or(&self.head);
                (linear.weight.to_float32()?, linear.bias.clone())
            }
        })
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The numbers of activations and of the gradients by them: on the CPU float32, on a GPU those of the embedding.
    pub fn compute_dtype(&self) -> DType {
        if ops::on_gpu(self.device()) { self.embedding.dtype() } else { DType::F32 }
    }

    /// The linear layers of all decoder layers, in model order: what `all-linear` means.
    pub fn linear_modules(&self) -> Vec<ModuleSpec> {
        self.layers.iter().flat_map(|layer| layer.linears.iter().map(Linear::spec)).collect()
    }

    /// The linear layer of a path, the head among them.
    pub fn linear(&self, path: &str) -> Option<&Linear> {
        let linears = self.layers.iter().flat_map(|layer| &layer.linears);
        linears.chain([&self.head]).find(|linear| linear.path == path)
    }

    /// The output head. Where it is tied it is the embedding too and takes no adapter.
    pub fn head_module(&self) -> ModuleSpec {
        self.head.spec()
    }

    /// Parameters of the base; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let (weights, tensors) = self.parts();
        let matrices: usize = weights.map(Weight::elem_count).sum();
        (matrices + tensors.map(Tensor::elem_count).sum::<usize>()) as u64
    }

    /// Bytes of its weights.
    pub fn bytes(&self) -> u64 {
        let (weights, tensors) = self.parts();
        weights.map(Weight::bytes).sum::<u64>() + tensors.map(crate::memory::bytes).sum::<u64>()
    }

    /// Its matrices and its other tensors, each once.
    fn parts(&self) -> (impl Iterator<Item = &Weight>, impl Iterator<Item = &Tensor>) {
        let linears = self.layers.iter().flat_map(|l| l.linears.iter().map(|l| &l.weight));
        let head = (!self.config.tie_word_embeddings).then_some(&self.head.weight);
        let vectors = self.layers.iter().flat_map(|l| {
            let biases = l.linears.iter().filter_map(|linear| linear.bias.as_ref());
            biases.chain(l.head_norms.iter().flatten()).chain([&l.input_norm, &l.post_attention_norm])
        });
        (linears.chain(head), vectors.chain([&self.embedding, &self.norm]))
    }
}

/// A model directory's configuration and its weights.
fn open(dir: &Path) -> Result<(ModelConfig, Checkpoint)> {
    Ok((ModelConfig::load(dir)?, Checkpoint::open(dir)?))
}

/// Finds a tensor of numbers with the shape that the configuration asks for, to be held in `held`; it is `Some` if it was
/// quantised before.
fn check_tensor<'a>(
    dir: &Path,
    checkpoint: &'a Checkpoint,
    quantization: Option<Quantization>,
    name: &'a str,
    shape: &[usize],
    held: Numbers,
) -> Result<Option<Quantized<'a>>> {
    let Some(quantization) = quantization else {
        if checkpoint.is_quantized(name) {
            let problem = format!("{name} is quantised, but config.json has no quantization_config");
            let remedy = "restore config.json from who quantised the model";
            return Err(TrainError::model(dir, problem, remedy));
        }
        check_dense(dir, checkpoint, name, shape)?;
        return Ok(None);
    };
    let found = checkpoint.quantized(name, shape)?;
    let Some(matrix) = &found else {
        if matches!(held, Numbers::Nf4 { .. }) {
            let problem = format!("is 4bit, but {name} is the one that {} leaves unquantised", dir.display());
            let remedy = "set it to bfloat16, float16 or float32, in which the model is dequantised, or use the model \
                          that it was made of";
            return Err(TrainError::parameter("precision_mode", problem, remedy));
        }
        check_dense(dir, checkpoint, name, shape)?;
        return Ok(None);
    };
    let double = matrix.double_quant();
    if double != quantization.double_quant {
        let problem = format!(
            "bnb_4bit_use_double_quant is {}, but {name} is {} it",
            quantization.double_quant,
            if double { "quantised with" } else { "quantised without" }
        );
        let remedy = "config.json and the weights belong to different models";
        return Err(TrainError::model(&dir.join("config.json"), problem, remedy));
    }
    match held {
        Numbers::Nf4 { double_quant } if double_quant != double => {
            let problem = format!(
                "is {double_quant}, but {} was quantised with bnb_4bit_use_double_quant {double}",
                dir.display()
            );
            Err(TrainError::parameter("double_quant", problem, format!("set it to {double}")))
        }
        _ => Ok(found),
    }
}

fn check_dense(dir: &Path, checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<()> {
    let dtype = checkpoint.dtype(name)?;
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        return Err(TrainError::model(
            dir,
            format!("{name} is of type {dtype:?}, which is no weight's"),
            "use a checkpoint of the model in float32, float16 or bfloat16",
        ));
    }
    let found = checkpoint.shape(name)?;
    if found != shape {
        return Err(TrainError::model(
            dir,
            format!("{name} has shape {found:?}, but config.json says {shape:?}"),
            "config.json and the weights belong to different models",
        ));
    }
    Ok(())
}
