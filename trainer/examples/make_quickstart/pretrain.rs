//! Full-parameter pretraining of the base on candle's autograd. The trainer crate itself trains adapters
//! alone; here every step is a plain differentiable op, because candle's fused softmax and RMSNorm have no
//! backward.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use std::collections::BTreeMap;
use trainer::model::ModelConfig;
use trainer::rng;

/// Sequences of a step, their tokens, and the number of steps.
pub const BATCH: usize = 12;
pub const LENGTH: usize = 80;
const PEAK: f64 = 4e-3;
const WARMUP: usize = 100;

pub struct Model {
    config: ModelConfig,
    pub weights: BTreeMap<String, Var>,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Model {
    /// Normal weights of the usual widths; the layers that write to the residual stream start smaller.
    pub fn new(config: ModelConfig, seed: u64) -> Result<Self> {
        let device = Device::Cpu;
        let c = &config;
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let deep = 1.0 / (2.0 * c.num_hidden_layers as f64).sqrt();
        let mut weights = BTreeMap::new();
        let mut add = |name: String, shape: &[usize], scale: f64| -> Result<()> {
            let key = rng::key(seed, &name);
            let count = shape.iter().product::<usize>() as u64;
            let values: Vec<f32> = match shape.len() {
                1 => vec![1.0; count as usize],
                _ => (0..count).map(|i| (normal(key, i) * scale) as f32).collect(),
            };
            weights.insert(name, Var::from_tensor(&Tensor::from_vec(values, shape, &device)?)?);
            Ok(())
        };
        let (hidden, inter) = (c.hidden_size, c.intermediate_size);
        let narrow = 1.0 / (hidden as f64).sqrt();
        add("model.embed_tokens.weight".into(), &[c.vocab_size, hidden], 0.05)?;
        add("model.norm.weight".into(), &[hidden], 1.0)?;
        for i in 0..c.num_hidden_layers {
            for (name, shape, scale) in [
                ("input_layernorm", &[hidden][..], 1.0),
                ("post_attention_layernorm", &[hidden], 1.0),
                ("self_attn.q_proj", &[q, hidden], narrow),
                ("self_attn.k_proj", &[kv, hidden], narrow),
                ("self_attn.v_proj", &[kv, hidden], narrow),
                ("self_attn.o_proj", &[hidden, q], narrow * deep),
                ("mlp.gate_proj", &[inter, hidden], narrow),
                ("mlp.up_proj", &[inter, hidden], narrow),
                ("mlp.down_proj", &[hidden, inter], deep / (inter as f64).sqrt()),
            ] {
                add(format!("model.layers.{i}.{name}.weight"), shape, scale)?;
            }
        }
        let half = c.head_dim / 2;
        let positions: Vec<f32> = (0..LENGTH).map(|p| p as f32).collect();
        let angles = Tensor::from_vec(positions, (LENGTH, 1), &device)?.matmul(&Tensor::from_vec(
            c.inverse_frequencies(),
            (1, half),
            &device,
        )?)?;
        let mask: Vec<f32> =
            (0..LENGTH * LENGTH).map(|i| if i % LENGTH > i / LENGTH { -1e9 } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, 1, LENGTH, LENGTH), &device)?;
        Ok(Self { config, weights, cos: angles.cos()?, sin: angles.sin()?, mask })
    }

    /// Mean negative log-likelihood of the next token; `ids` holds `[sequences, LENGTH + 1]` tokens.
    pub fn loss(&self, ids: &[u32]) -> Result<Tensor> {
        let sequences = ids.len() / (LENGTH + 1);
        let ids = Tensor::from_slice(ids, (sequences, LENGTH + 1), &Device::Cpu)?;
        let inputs = ids.narrow(1, 0, LENGTH)?.flatten_all()?;
        let targets = ids.narrow(1, 1, LENGTH)?.flatten_all()?;
        let mut x = self.weight("model.embed_tokens")?.index_select(&inputs, 0)?;
        for i in 0..self.config.num_hidden_layers {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let h = self.norm(&x, &at("input_layernorm"))?;
            x = x.add(&self.attention(&h, sequences, &at("self_attn"))?)?;
            let h = self.norm(&x, &at("post_attention_layernorm"))?;
            let gate = self.linear(&h, &at("mlp.gate_proj"))?.silu()?;
            let up = self.linear(&h, &at("mlp.up_proj"))?;
            x = x.add(&self.linear(&gate.mul(&up)?, &at("mlp.down_proj"))?)?;
        }
        let logits = self.norm(&x, "model.norm")?.matmul(&self.weight("model.embed_tokens")?.t()?)?;
        candle_nn::loss::cross_entropy(&logits, &targets)
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        let weight = self.weights.get(&format!("{name}.weight"));
        weight.map(Var::as_tensor).ok_or_else(|| candle_core::Error::Msg(format!("no weight {name}")))
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.matmul(&self.weight(name)?.t()?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + self.config.rms_norm_eps)?;
        x.broadcast_div(&mean.sqrt()?)?.broadcast_mul(self.weight(name)?)
    }

    fn attention(&self, x: &Tensor, sequences: usize, at: &str) -> Result<Tensor> {
        let (heads, kv_heads, dim) =
            (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim);
        let split = |name: &str, heads: usize| {
            let y = self.linear(x, &format!("{at}.{name}"))?;
            y.reshape((sequences, LENGTH, heads, dim))?.transpose(1, 2)?.contiguous()
        };
        let group = heads / kv_heads;
        let repeat = |y: Tensor| {
            let y = y.unsqueeze(2)?.broadcast_as((sequences, kv_heads, group, LENGTH, dim))?;
            y.contiguous()?.reshape((sequences, heads, LENGTH, dim))
        };
        let q = self.rotate(&split("q_proj", heads)?)?;
        let k = repeat(self.rotate(&split("k_proj", kv_heads)?)?)?;
        let v = repeat(split("v_proj", kv_heads)?)?;
        let scores = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?.broadcast_add(&self.mask)?;
        let y = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        let y = y.transpose(1, 2)?.contiguous()?.reshape((sequences * LENGTH, heads * dim))?;
        self.linear(&y, &format!("{at}.o_proj"))
    }

    /// Rotary embedding in Hugging Face's layout: a head's first half against its second.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let half = self.config.head_dim / 2;
        let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let first = a.broadcast_mul(&self.cos)?.sub(&b.broadcast_mul(&self.sin)?)?;
        let second = b.broadcast_mul(&self.cos)?.add(&a.broadcast_mul(&self.sin)?)?;
        Tensor::cat(&[first, second], 3)
    }

    /// Trains all weights on `windows(n)`, the `n`-th batch of token ids, with AdamW and a cosine schedule.
    pub fn train(&self, steps: usize, mut windows: impl FnMut(usize) -> Result<Vec<u32>>) -> Result<()> {
        let params = ParamsAdamW { lr: 0.0, weight_decay: 0.01, beta2: 0.99, ..ParamsAdamW::default() };
        let mut optimizer = AdamW::new(self.weights.values().cloned().collect(), params)?;
        for step in 0..steps {
            optimizer.set_learning_rate(rate(step, steps));
            let loss = self.loss(&windows(step)?)?;
            optimizer.backward_step(&loss)?;
            if step % 100 == 0 || step + 1 == steps {
                println!("step {step:5}  loss {:.4}", loss.to_scalar::<f32>()?);
            }
        }
        Ok(())
    }

    /// The weights in float16, by name.
    pub fn halves(&self) -> Result<BTreeMap<String, Tensor>> {
        self.weights.iter().map(|(name, w)| Ok((name.clone(), w.as_tensor().to_dtype(DType::F16)?))).collect()
    }
}

/// Warm-up, then half a cosine down to a hundredth of the peak.
fn rate(step: usize, steps: usize) -> f64 {
    if step < WARMUP {
        return PEAK * (step + 1) as f64 / WARMUP as f64;
    }
    let done = (step - WARMUP) as f64 / (steps - WARMUP).max(1) as f64;
    PEAK * (0.01 + 0.99 * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()))
}

/// The stream's `i`-th normal number (Box and Muller).
fn normal(key: u64, i: u64) -> f64 {
    let (u, v) = (1.0 - rng::uniform(key, 2 * i), rng::uniform(key, 2 * i + 1));
    (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
}
