//! LoRA adapters: the trainable matrices, their initialisation, and the low-rank product with its backward.

use crate::error::Result;
use crate::model::Base;
use crate::saved::{SavedModule, Trainable};
use crate::{memory, ops, pissa, rng};
use candle_core::{DType, Tensor};
use domain::footprint::{self, Engine};
use domain::trial::{InitLoraWeights, Precision};
use rayon::prelude::*;

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
    /// How its matrices begin.
    pub init: InitLoraWeights,
}

impl Target {
    /// The parameters that it trains.
    pub fn parameters(&self) -> u64 {
        let ModuleSpec { in_features, out_features, .. } = self.module;
        let magnitudes = if self.use_dora { out_features } else { 0 };
        (self.rank * (in_features + out_features) + magnitudes) as u64
    }

    /// The parameters that it holds beside them: PiSSA's initial matrices.
    pub fn initial_parameters(&self) -> u64 {
        let ModuleSpec { in_features, out_features, .. } = self.module;
        if self.init.is_pissa() { (self.rank * (in_features + out_features)) as u64 } else { 0 }
    }

    /// What its start takes while it lasts.
    pub fn start_bytes(&self, engine: Engine, precision: Precision) -> u64 {
        let shape = [self.module.out_features as u64, self.module.in_features as u64];
        footprint::start_bytes(engine, precision, shape, self.rank as u64, self.init)
    }

    /// Adapters of one rank, scaled by `lora_alpha / rank`, on all of some layers.
    pub fn all(modules: &[ModuleSpec], rank: usize, lora_alpha: f64) -> Vec<Self> {
        let scaling = lora_alpha / rank as f64;
        let init = InitLoraWeights::Default;
        modules.iter().map(|m| Self { module: m.clone(), rank, scaling, use_dora: false, init }).collect()
    }
}

/// The adapter of one linear layer: `y += scaling · B · (A · dropout(x))`, and with magnitudes (DoRA, Liu et al. 2024)
/// each output then times `m / ‖its row of W + scaling · B · A‖`. With PiSSA, W is less `scaling · B₀ · A₀`, the product
/// that it began with. All tensors are float32.
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
    /// `a` and `b` as they began, where that is a part of the weight: A₀ and B₀ of PiSSA, which are never changed.
    pub initial: Option<[Tensor; 2]>,
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
    pub fn new(
        target: &Target,
        a: Tensor,
        b: Tensor,
        magnitude: Option<Tensor>,
        initial: Option<[Tensor; 2]>,
    ) -> Self {
        Self {
            path: target.module.path.clone(),
            scaling: target.scaling,
            a,
            b,
            magnitude,
            initial,
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

    /// A and B of the adapter that has the same output on the whole weight: with PiSSA `[A; A₀]` and `[B, −B₀]`, of
    /// twice the rank, as PEFT converts it; else themselves.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn on_whole_weight(&self) -> Result<[Tensor; 2]> {
        Ok([self.a_on_whole_weight()?, self.b_on_whole_weight()?])
    }

    /// The first of [`LoraMatrix::on_whole_weight`].
    pub(crate) fn a_on_whole_weight(&self) -> Result<Tensor> {
        let Some([a, _]) = &self.initial else { return Ok(self.a.clone()) };
        Ok(Tensor::cat(&[&self.a, a], 0)?)
    }

    /// The second of [`LoraMatrix::on_whole_weight`].
    pub(crate) fn b_on_whole_weight(&self) -> Result<Tensor> {
        let Some([_, b]) = &self.initial else { return Ok(self.b.clone()) };
        Ok(Tensor::cat(&[&self.b, &b.neg()?], 1)?)
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
    /// The modules that are trained whole beside them, in model order.
    pub saved: Vec<SavedModule>,
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
    /// with a standard deviation of 1/rank, or both from the weight ([`crate::pissa`]); magnitudes those of the base's
    /// rows. The values depend on the seed, each module's path and its weight alone.
    ///
    /// # Errors
    /// The device runs out of memory, or a weight that is to be decomposed is not finite.
    pub fn new(base: &Base, trainable: &Trainable, dropout: f64, seed: u64) -> Result<Self> {
        Self::within(base, trainable, dropout, seed, 0)
    }

    /// [`Adapter::new`], of which as many layers begin at once as stay within `bytes` of the CPU's memory, and at least
    /// one.
    ///
    /// # Errors
    /// Those of [`Adapter::new`].
    pub fn within(base: &Base, trainable: &Trainable, dropout: f64, seed: u64, bytes: u64) -> Result<Self> {
        let begin = |target: &Target| begin(base, target, seed);
        // Each decomposition has one thread; without one there is nothing to share out.
        let each = trainable.start_bytes(Engine::Cpu, base.precision);
        let at_once = bytes.checked_div(each).unwrap_or(1).clamp(1, crate::threads() as u64) as usize;
        let mut modules = Vec::with_capacity(trainable.targets.len());
        for together in trainable.targets.chunks(at_once) {
            match together {
                [target] => modules.push(begin(target)?),
                _ => modules.extend(together.par_iter().map(begin).collect::<Result<Vec<_>>>()?),
            }
        }
        let saved = trainable.saved.iter().map(|spec| SavedModule::of(base, spec)).collect::<Result<_>>()?;
        Ok(Self { modules, saved, dropout, seed })
    }

    /// All that it trains, by path and name.
    pub fn named(&self) -> impl Iterator<Item = (&str, &'static str, &Tensor)> {
        let matrices = self.modules.iter().flat_map(|m| m.parameters().map(|(n, v)| (m.path.as_str(), n, v)));
        let saved = self.saved.iter().flat_map(|m| m.parameters().map(|(n, v)| (m.path.as_str(), n, v)));
        matrices.chain(saved)
    }

    /// The same with gradients, to be changed.
    pub fn trained(&mut self) -> impl Iterator<Item = Trained<'_>> {
        let saved = self.saved.iter_mut().flat_map(SavedModule::trained);
        self.modules.iter_mut().flat_map(LoraMatrix::trained).chain(saved)
    }

    /// Its gradients so far.
    pub fn gradients(&self) -> impl Iterator<Item = &Tensor> {
        let saved = self.saved.iter().flat_map(SavedModule::gradients);
        self.modules.iter().flat_map(LoraMatrix::gradients).chain(saved)
    }

    /// The number of trainable parameters.
    pub fn parameters(&self) -> u64 {
        self.named().map(|(_, _, value)| value.elem_count() as u64).sum()
    }

    /// The number of parameters that it holds beside them: PiSSA's initial matrices.
    pub fn initial_parameters(&self) -> u64 {
        self.initial().map(|value| value.elem_count() as u64).sum()
    }

    fn initial(&self) -> impl Iterator<Item = &Tensor> {
        self.modules.iter().flat_map(|module| module.initial.iter().flatten())
    }

    /// Forgets the accumulated gradients.
    pub fn zero_grad(&mut self) {
        self.trained().for_each(|(_, _, gradient)| *gradient = None);
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

    /// What the trained product of a module sees of its input, if that is not the input itself: the input with dropout.
    pub(crate) fn dropped(
        &self,
        module: usize,
        x: &Tensor,
        place: Option<MaskPlace>,
    ) -> Result<Option<Tensor>> {
        self.mask(module, place).map(|mask| mask.apply(x)).transpose()
    }

    /// Adds the gradients by the module's matrices, for what its trained product saw, `x` `[tokens, in]`, and the
    /// gradient `dy` `[tokens, out]` by what that gave; `d_initial` is the gradient by what the other gave. Returns dh
    /// `[tokens, rank]` of each product, for [`Adapter::add_input_gradient`].
    ///
    /// With h = A·x and dh = Bᵀ·dy: dB += s·dy ⊗ h, dA += s·dh ⊗ x.
    pub(crate) fn backward(
        &mut self,
        module: usize,
        working: &Working,
        x: &Tensor,
        dy: &Tensor,
        d_initial: &Tensor,
    ) -> Result<Vec<Tensor>> {
        let lora = &mut self.modules[module];
        let mut gradients = Vec::with_capacity(working.products.len());
        for Product { a, b, scaling, is_trained } in &working.products {
            if !is_trained {
                gradients.push(ops::project_transposed(d_initial, b)?);
                continue;
            }
            let h = ops::project(x, a)?;
            accumulate(&mut lora.grad_b, ops::outer_transposed(&h, dy, *scaling)?)?;
            let dh = ops::project_transposed(dy, b)?;
            accumulate(&mut lora.grad_a, ops::outer(&dh, x, *scaling)?)?;
            gradients.push(dh);
        }
        Ok(gradients)
    }

    /// The gradient by a module's dropped input: `dx`, masked as that was.
    pub(crate) fn dropped_backward(
        &self,
        module: usize,
        dx: Tensor,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        self.mask(module, place).map_or(Ok(dx.clone()), |mask| mask.apply(&dx))
    }

    /// Adds the gradient by the module's input to rows `start..` of `dx`: s·Aᵀ·dh of each product, masked as its input
    /// was.
    pub(crate) fn add_input_gradient(
        &self,
        module: usize,
        working: &Working,
        dh: &[Tensor],
        mut dx: Tensor,
        start: usize,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        for (Product { a, scaling, is_trained, .. }, dh) in working.products.iter().zip(dh) {
            let mask = self.mask(module, place).filter(|_| *is_trained);
            dx = match mask {
                Some(mask) => {
                    let zeros = Tensor::zeros((dh.dims2()?.0, a.dims2()?.1), dx.dtype(), dx.device())?;
                    let part = ops::add_product(zeros, 0, dh, a, *scaling)?;
                    ops::add_rows(dx, start, &mask.apply(&part)?)?
                }
                None => ops::add_product(dx, start, dh, a, *scaling)?,
            };
        }
        Ok(dx)
    }

    /// Bytes of what it trains.
    pub fn trained_bytes(&self) -> u64 {
        self.named().map(|(_, _, value)| memory::bytes(value)).sum()
    }

    /// Bytes of all that it is made of.
    pub fn bytes(&self) -> u64 {
        self.trained_bytes() + self.initial().map(memory::bytes).sum::<u64>()
    }
}

/// A module's matrices as a pass uses them.
pub(crate) struct Working {
    /// What its output gets: the product that is trained, and with PiSSA minus the one that it began as.
    products: Vec<Product>,
    /// What its magnitudes make of outputs, if it has any.
    pub(crate) columns: Option<Columns>,
}

impl Working {
    /// Adds its trained product, or its initial one if there is any, to rows `start..` of `y` `[_, out]`: that of `x`
    /// `[tokens, in]`.
    pub(crate) fn add(&self, trained: bool, x: &Tensor, mut y: Tensor, start: usize) -> Result<Tensor> {
        for product in self.products.iter().filter(|product| product.is_trained == trained) {
            let h = ops::project(x, &product.a)?;
            y = ops::add_product_transposed(y, start, &h, &product.b, product.scaling)?;
        }
        Ok(y)
    }

    /// Adds the gradient by the input of its initial product, if there is any, to `dx`.
    pub(crate) fn add_initial_backward(&self, dy: &Tensor, mut dx: Tensor) -> Result<Tensor> {
        for product in self.products.iter().filter(|product| !product.is_trained) {
            let dh = ops::project_transposed(dy, &product.b)?;
            dx = ops::add_product(dx, 0, &dh, &product.a, product.scaling)?;
        }
        Ok(dx)
    }
}

/// A low-rank product, in the pass's numbers.
struct Product {
    /// `[rank, in_features]`
    a: Tensor,
    /// `[out_features, rank]`
    b: Tensor,
    scaling: f64,
    is_trained: bool,
}

/// What magnitudes make of a layer's outputs in a pass: `W·x` becomes `factor · (W·x + s·B·A·x)`. With dropout, which
/// PEFT has the whole of DoRA's part see, x̃ for x in `W·x + surplus · W·x̃ + factor · s·B·A·x̃`.
pub(crate) struct Columns {
    /// `[out_features]`: what each output is multiplied by, m / norm.
    pub(crate) factor: Tensor,
    /// `[out_features]`: m / norm − 1.
    pub(crate) surplus: Tensor,
    /// `[out_features]`: ‖row of W + scaling · B · A‖, which the gradient takes for a constant.
    norm: Tensor,
}

impl Adapter {
    /// The modules' matrices as a pass on `base` uses them: in float32 themselves, else copies.
    pub(crate) fn working(&self, base: &Base) -> Result<Vec<Working>> {
        let matrices: Vec<&Tensor> = self
            .modules
            .iter()
            .flat_map(|m| [&m.a, &m.b].into_iter().chain(m.initial.iter().flatten()))
            .collect();
        let mut copies = ops::cast(&matrices, base.compute_dtype())?.into_iter();
        let mut working = Vec::with_capacity(self.modules.len());
        for (number, module) in self.modules.iter().enumerate() {
            let mut products = Vec::with_capacity(2);
            let scalings = [(module.scaling, true), (-module.scaling, false)];
            for (scaling, is_trained) in scalings.into_iter().take(1 + usize::from(module.initial.is_some()))
            {
                if let (Some(a), Some(b)) = (copies.next(), copies.next()) {
                    products.push(Product { a, b, scaling, is_trained });
                }
            }
            working.push(Working { products, columns: self.columns(base, number)? });
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
        let ([a, b], s) = (lora.on_whole_weight()?, lora.scaling);
        let across = ops::linear(&a, &linear.weight, DType::F32)?;
        let across = (b.t()?.mul(&across)?.sum(0)? * (2.0 * s))?;
        let within = (b.matmul(&a.matmul(&a.t()?)?)?.mul(&b)?.sum(1)? * (s * s))?;
        let norm = ((linear.row_squares()? + across)? + within)?.maximum(0f32)?.sqrt()?;
        let factor = magnitude.div(&norm)?;
        let surplus = (&factor - 1.0)?;
        Ok(Some(Columns { factor, surplus, norm }))
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

/// A layer's fresh matrices.
fn begin(base: &Base, target: &Target, seed: u64) -> Result<LoraMatrix> {
    let (module, rank, device) = (&target.module, target.rank, base.device());
    let key = rng::key(seed, &module.path);
    let linear = base.linear(&module.path);
    let magnitude = match linear {
        Some(linear) if target.use_dora => Some(linear.row_squares()?.sqrt()?),
        _ => None,
    };
    let drawn = |value: &dyn Fn(u64) -> f64| -> Result<[Tensor; 2]> {
        let a = (0..(rank * module.in_features) as u64).map(|i| value(i) as f32).collect();
        let a = Tensor::from_vec::<_, f32>(a, (rank, module.in_features), device)?;
        Ok([a, Tensor::zeros((module.out_features, rank), DType::F32, device)?])
    };
    let bound = 1.0 / (module.in_features as f64).sqrt();
    let iterations = match target.init {
        InitLoraWeights::PissaNiter(iterations) => Some(iterations),
        _ => None,
    };
    let [a, b] = match (target.init, linear) {
        (InitLoraWeights::Pissa | InitLoraWeights::PissaNiter(_), Some(linear)) => {
            pissa::principal(&linear.weight, target, iterations, key)?
        }
        (InitLoraWeights::Gaussian, _) => drawn(&|i| rng::normal(key, i) / rank as f64)?,
        _ => drawn(&|i| (2.0 * rng::uniform(key, i) - 1.0) * bound)?,
    };
    let initial = target.init.is_pissa().then(|| [a.clone(), b.clone()]);
    Ok(LoraMatrix::new(target, a, b, magnitude, initial))
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

/// Adds a gradient to those so far.
pub(crate) fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        // The new gradient is changed in place and the old sum left alone: a snapshot may hold it.
        Some(sum) => ops::add(gradient, &sum)?,
        None => gradient,
    });
    Ok(())
}
