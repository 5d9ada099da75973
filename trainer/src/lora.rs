//! LoRA adapters: the trainable matrices, their initialisation, and the low-rank product with its backward.

use crate::error::Result;
use crate::model::Base;
use crate::{memory, ops, rng};
use candle_core::{DType, Tensor};
use domain::trial::InitLoraWeights;

/// A linear layer that can take an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Its path in the model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

/// A linear layer that gets an adapter, and which.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The layer.
    pub module: ModuleSpec,
    /// The adapter's rank.
    pub rank: usize,
    /// What its output is multiplied by.
    pub scaling: f64,
    /// Whether it has magnitudes.
    pub use_dora: bool,
}

impl Target {
    /// The parameters that it trains.
    pub fn parameters(&self) -> u64 {
        let ModuleSpec { in_features, out_features, .. } = self.module;
        let magnitudes = if self.use_dora { out_features } else { 0 };
        (self.rank * (in_features + out_features) + magnitudes) as u64
    }

    /// Adapters of one rank, scaled by `lora_alpha / rank`, on all of some layers.
    pub fn all(modules: &[ModuleSpec], rank: usize, lora_alpha: f64) -> Vec<Self> {
        let scaling = lora_alpha / rank as f64;
        modules.iter().map(|m| Self { module: m.clone(), rank, scaling, use_dora: false }).collect()
    }
}

/// The adapter of one linear layer: `y += scaling · B · (A · dropout(x))`, and with magnitudes (DoRA, Liu et al. 2024)
/// each output then times `m / ‖its row of W + scaling · B · A‖`. All tensors are float32.
#[derive(Debug, Clone)]
pub struct LoraMatrix {
    /// The layer's path.
    pub path: String,
    /// What its output is multiplied by.
    pub scaling: f64,
    /// `[rank, in_features]`.
    pub a: Tensor,
    /// `[out_features, rank]`.
    pub b: Tensor,
    /// `[out_features]`
    pub magnitude: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `a`.
    pub grad_a: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `b`.
    pub grad_b: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `magnitude`.
    pub grad_magnitude: Option<Tensor>,
}

/// A parameter that is trained: its name, its value, its accumulated gradient.
pub type Trained<'a> = (&'static str, &'a mut Tensor, &'a mut Option<Tensor>);

impl LoraMatrix {
    /// The names of its parameters, as PEFT has them.
    pub const PARAMETERS: [&'static str; 3] = ["lora_A", "lora_B", "lora_magnitude_vector"];

    /// An adapter without gradients.
    pub fn new(target: &Target, a: Tensor, b: Tensor, magnitude: Option<Tensor>) -> Self {
        Self {
            path: target.module.path.clone(),
            scaling: target.scaling,
            a,
            b,
            magnitude,
            grad_a: None,
            grad_b: None,
            grad_magnitude: None,
        }
    }

    /// Its parameters by name, in the order of [`LoraMatrix::PARAMETERS`].
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        Self::PARAMETERS.into_iter().zip([&self.a, &self.b].into_iter().chain(&self.magnitude))
    }

    /// The same with their gradients, to be changed.
    pub fn trained(&mut self) -> impl Iterator<Item = Trained<'_>> {
        let values = [&mut self.a, &mut self.b].into_iter().chain(&mut self.magnitude);
        let gradients = [&mut self.grad_a, &mut self.grad_b, &mut self.grad_magnitude];
        Self::PARAMETERS
            .into_iter()
            .zip(values)
            .zip(gradients)
            .map(|((name, value), grad)| (name, value, grad))
    }

    /// Its gradients so far.
    pub fn gradients(&self) -> impl Iterator<Item = &Tensor> {
        [&self.grad_a, &self.grad_b, &self.grad_magnitude].into_iter().flatten()
    }
}

/// One trial's adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its matrices in model order.
    pub modules: Vec<LoraMatrix>,
    /// Probability of dropping an input element while training.
    pub dropout: f64,
    /// Seed of the dropout masks.
    pub seed: u64,
}

/// Where a dropout mask stands in a run: the micro-batch's running number. With the adapter's seed and the
/// module it names the mask, so that a replayed step sees the same one.
pub type DropoutCounter = u64;

/// Where the mask of some rows of a module's input stands: the micro-batch, and the first of these rows among
/// all that the trial has in it. Rows that come in blocks get the mask that they would get at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskPlace {
    pub(crate) counter: DropoutCounter,
    pub(crate) first_row: usize,
}

impl Adapter {
    /// A fresh adapter as PEFT initialises it: B zero, A uniform in ±1/√in_features (Kaiming with a = √5) or normal
    /// with a standard deviation of 1/rank, magnitudes those of the base's rows. The values depend on the seed and
    /// each module's path alone.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn new(
        base: &Base,
        targets: &[Target],
        init: InitLoraWeights,
        dropout: f64,
        seed: u64,
    ) -> Result<Self> {
        let matrix = |target: &Target| {
            let (module, rank, device) = (&target.module, target.rank, base.device());
            let bound = 1.0 / (module.in_features as f64).sqrt();
            let key = rng::key(seed, &module.path);
            let value = |i: u64| match init {
                InitLoraWeights::Default => (2.0 * rng::uniform(key, i) - 1.0) * bound,
                InitLoraWeights::Gaussian => rng::normal(key, i) / rank as f64,
            };
            let a = (0..(rank * module.in_features) as u64).map(|i| value(i) as f32).collect();
            let magnitude = match base.linear(&module.path) {
                Some(linear) if target.use_dora => Some(linear.row_squares()?.sqrt()?),
                _ => None,
            };
            let a = Tensor::from_vec::<_, f32>(a, (rank, module.in_features), device)?;
            let b = Tensor::zeros((module.out_features, rank), DType::F32, device)?;
            Ok(LoraMatrix::new(target, a, b, magnitude))
        };
        let modules = targets.iter().map(matrix).collect::<Result<_>>()?;
        Ok(Self { modules, dropout, seed })
    }

    /// The number of trainable parameters.
    pub fn parameters(&self) -> u64 {
        self.modules.iter().flat_map(LoraMatrix::parameters).map(|(_, value)| value.elem_count() as u64).sum()
    }

    /// Forgets the accumulated gradients.
    pub fn zero_grad(&mut self) {
        self.modules.iter_mut().flat_map(LoraMatrix::trained).for_each(|(_, _, gradient)| *gradient = None);
    }

    /// The index of a layer's matrix.
    pub fn position(&self, path: &str) -> Option<usize> {
        self.modules.iter().position(|m| m.path == path)
    }

    /// The mask of rows of a module's input; `None` without dropout.
    fn mask(&self, module: usize, place: Option<MaskPlace>) -> Option<Mask> {
        let place = place.filter(|_| self.dropout > 0.0)?;
        let module = &self.modules[module];
        let seed = self.seed ^ place.counter.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let width = module.a.dims()[1];
        Some(Mask {
            key: rng::key(seed, &module.path),
            first: (place.first_row * width) as u64,
            probability: self.dropout,
        })
    }

    /// Adds the low-rank product of a module to its trial's rows: `x` `[tokens, in]`, to rows `start..` of `y`
    /// `[_, out]`. `place` is `None` outside training (no dropout).
    pub(crate) fn forward(
        &self,
        module: usize,
        working: &Working,
        x: &Tensor,
        y: Tensor,
        start: usize,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let h = match self.mask(module, place) {
            Some(mask) => ops::project(&mask.apply(x)?, &working.a)?,
            None => ops::project(x, &working.a)?,
        };
        ops::add_product_transposed(y, start, &h, &working.b, self.modules[module].scaling)
    }

    /// Adds the module's gradients, for `x` `[tokens, in]` and the gradient `dy` `[tokens, out]` by what
    /// [`Adapter::forward`] added to. Returns dh `[tokens, rank]`, for [`Adapter::add_input_gradient`].
    ///
    /// With h = A·x and dh = Bᵀ·dy: dB += s·dy ⊗ h, dA += s·dh ⊗ x.
    pub(crate) fn backward(
        &mut self,
        module: usize,
        working: &Working,
        x: &Tensor,
        dy: &Tensor,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let masked = self.mask(module, place).map(|mask| mask.apply(x)).transpose()?;
        let x = masked.as_ref().unwrap_or(x);
        let lora = &mut self.modules[module];
        let scaling = lora.scaling;
        let h = ops::project(x, &working.a)?;
        accumulate(&mut lora.grad_b, ops::outer_transposed(&h, dy, scaling)?)?;
        let dh = ops::project_transposed(dy, &working.b)?;
        accumulate(&mut lora.grad_a, ops::outer(&dh, x, scaling)?)?;
        Ok(dh)
    }

    /// Adds the gradient by the module's input to rows `start..` of `dx`: s·Aᵀ·dh, masked as the input was.
    pub(crate) fn add_input_gradient(
        &self,
        module: usize,
        working: &Working,
        dh: &Tensor,
        dx: Tensor,
        start: usize,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let (a, scaling) = (&working.a, self.modules[module].scaling);
        let Some(mask) = self.mask(module, place) else {
            return ops::add_product(dx, start, dh, a, scaling);
        };
        let zeros = Tensor::zeros((dh.dims2()?.0, a.dims2()?.1), dx.dtype(), dx.device())?;
        let part = ops::add_product(zeros, 0, dh, a, scaling)?;
        ops::add_rows(dx, start, &mask.apply(&part)?)
    }

    /// Bytes of its matrices and as much again for their gradients.
    pub fn bytes(&self) -> u64 {
        2 * self
            .modules
            .iter()
            .flat_map(LoraMatrix::parameters)
            .map(|(_, value)| memory::bytes(value))
            .sum::<u64>()
    }
}

/// A module's matrices as a pass uses them.
pub(crate) struct Working {
    /// `[rank, in_features]`, in the pass's numbers.
    a: Tensor,
    /// `[out_features, rank]`, in the pass's numbers.
    b: Tensor,
    /// What its magnitudes make of outputs, if it has any.
    pub(crate) columns: Option<Columns>,
}

/// What magnitudes make of a layer's outputs in a pass.
pub(crate) struct Columns {
    /// `[out_features]`: what each output is multiplied by, m / norm.
    pub(crate) factor: Tensor,
    /// `[out_features]`: ‖row of W + scaling · B · A‖, which the gradient takes for a constant.
    norm: Tensor,
}

impl Adapter {
    /// The modules' matrices as a pass on `base` uses them: in float32 themselves, else copies.
    pub(crate) fn working(&self, base: &Base) -> Result<Vec<Working>> {
        let matrices: Vec<&Tensor> = self.modules.iter().flat_map(|m| [&m.a, &m.b]).collect();
        let mut copies = ops::cast(&matrices, base.compute_dtype())?.into_iter();
        let mut working = Vec::with_capacity(self.modules.len());
        while let (Some(a), Some(b)) = (copies.next(), copies.next()) {
            let columns = self.columns(base, working.len())?;
            working.push(Working { a, b, columns });
        }
        Ok(working)
    }

    /// What a module's magnitudes make of its outputs; `None` without any. The norms come from
    /// ‖w + s·bA‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b, so that no matrix of the base's size is made.
    fn columns(&self, base: &Base, module: usize) -> Result<Option<Columns>> {
        let lora = &self.modules[module];
        let (Some(magnitude), Some(linear)) = (&lora.magnitude, base.linear(&lora.path)) else {
            return Ok(None);
        };
        let (a, b, s) = (&lora.a, &lora.b, lora.scaling);
        let across = ops::linear(a, &linear.weight, DType::F32)?;
        let across = (b.t()?.mul(&across)?.sum(0)? * (2.0 * s))?;
        let within = (b.matmul(&a.matmul(&a.t()?)?)?.mul(b)?.sum(1)? * (s * s))?;
        let norm = ((linear.row_squares()? + across)? + within)?.maximum(0f32)?.sqrt()?;
        Ok(Some(Columns { factor: magnitude.div(&norm)?, norm }))
    }

    /// Adds the gradient by a module's magnitudes: `z` `[tokens, out]` are its outputs before them, `dy` the gradient
    /// by those after.
    pub(crate) fn magnitude_backward(
        &mut self,
        module: usize,
        columns: &Columns,
        z: &Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        let gradient = dy.to_dtype(DType::F32)?.mul(&z.to_dtype(DType::F32)?)?.sum(0)?.div(&columns.norm)?;
        accumulate(&mut self.modules[module].grad_magnitude, gradient)
    }
}

/// A dropout mask: each element 0 with a probability, else 1/(1−p).
struct Mask {
    key: u64,
    /// The running number of the first element.
    first: u64,
    probability: f64,
}

impl Mask {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        ops::dropout(x, self.key, self.first, self.probability)
    }
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        // The new gradient is changed in place and the old sum left alone: a snapshot may hold it.
        Some(sum) => ops::add(gradient, &sum)?,
        None => gradient,
    });
    Ok(())
}
