//! A trial's full configuration: every parameter with the value in force, under the names of the
//! Vertex/PEFT/Hugging Face world. It serialises to one flat JSON object whose keys are the sweep file's.

use crate::machine::ComputeCapability;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

/// What a trial trains for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Task {
    /// Instruction tuning with LoRA on a causal language model.
    #[default]
    #[serde(rename = "instruct-lora")]
    InstructLora,
}

/// The numbers in which the frozen base is held and multiplied. Adapters, moments and the optimizer step
/// are float32 in every mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionMode {
    /// 32-bit floating point.
    #[default]
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half precision with a loss scaler.
    Float16,
    /// NF4 base weights (QLoRA).
    #[serde(rename = "4bit")]
    FourBit,
}

/// The numbers of what 4-bit bases leave unquantised: embedding and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// 32-bit floating point.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half precision.
    Float16,
}

/// How a frozen base is held: what two trials must agree on to share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Precision {
    /// The numbers of its matrices.
    pub mode: PrecisionMode,
    /// With 4 bits, those of embedding and head; else `None`.
    pub compute_dtype: Option<ComputeDtype>,
    /// With 4 bits, whether magnitudes are quantised too; else false.
    pub double_quant: bool,
}

impl Precision {
    /// The least compute capability of a GPU that trains on such a base; `None`: any that is trained on at all.
    pub fn compute_capability(self) -> Option<ComputeCapability> {
        let bfloat16 = match self.mode {
            PrecisionMode::Bfloat16 => true,
            PrecisionMode::FourBit => self.compute_dtype == Some(ComputeDtype::Bfloat16),
            PrecisionMode::Float32 | PrecisionMode::Float16 => false,
        };
        bfloat16.then_some(ComputeCapability::BFLOAT16)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            PrecisionMode::Float32 => write!(f, "float32"),
            PrecisionMode::Bfloat16 => write!(f, "bfloat16"),
            PrecisionMode::Float16 => write!(f, "float16"),
            PrecisionMode::FourBit => {
                let rest = match self.compute_dtype.unwrap_or(ComputeDtype::Float32) {
                    ComputeDtype::Float32 => "float32",
                    ComputeDtype::Bfloat16 => "bfloat16",
                    ComputeDtype::Float16 => "float16",
                };
                write!(f, "4bit {rest}{}", if self.double_quant { " double_quant" } else { "" })
            }
        }
    }
}

/// A frozen base: a model, and how it is held.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct BaseModel {
    /// `pretrained_model_id`.
    pub model: String,
    /// How its weights are held.
    pub precision: Precision,
}

/// The model, and in brackets its numbers unless they are float32. Two bases are the same if this is.
impl fmt::Display for BaseModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.precision.mode {
            PrecisionMode::Float32 => write!(f, "{}", self.model),
            _ => write!(f, "{} [{}]", self.model, self.precision),
        }
    }
}

/// Which layers keep their input alone and are computed again in the backward pass (transformers'
/// `gradient_checkpointing`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GradientCheckpointing {
    /// As many as it takes to fit the device's free memory: none, if all fits.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

impl GradientCheckpointing {
    /// The fewest of a model's `layers` that it may have computed again, and the most.
    pub fn recomputed_layers(self, layers: u64) -> [u64; 2] {
        match self {
            Self::Auto => [0, layers],
            Self::On => [layers; 2],
            Self::Off => [0; 2],
        }
    }
}

/// `true`, `false` or `"auto"`.
impl Serialize for GradientCheckpointing {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::On => serializer.serialize_bool(true),
            Self::Off => serializer.serialize_bool(false),
        }
    }
}

impl<'de> Deserialize<'de> for GradientCheckpointing {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Value {
            Flag(bool),
            Text(String),
        }
        match Value::deserialize(deserializer)? {
            Value::Flag(true) => Ok(Self::On),
            Value::Flag(false) => Ok(Self::Off),
            Value::Text(text) if text == "auto" => Ok(Self::Auto),
            Value::Text(text) => {
                Err(serde::de::Error::custom(format!("{text:?} is not true, false or auto")))
            }
        }
    }
}

/// The learning rate's course over the steps, as transformers' `get_scheduler` defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// The peak from the first step on; warm-up is ignored, as transformers does.
    Constant,
    /// Linear warm-up, then the peak.
    ConstantWithWarmup,
    /// Linear warm-up, then linearly to zero.
    #[default]
    Linear,
    /// Linear warm-up, then half a cosine to zero.
    Cosine,
}

/// Which linear layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Module names (the last part of the path, or a path suffix), as PEFT matches a list.
    Names(Vec<String>),
    /// `all-linear` (every linear layer but the output head), or a regular expression that must match the
    /// whole module path, as PEFT matches a string.
    Pattern(String),
}

impl TargetModules {
    /// PEFT's word for every linear layer but the output head.
    pub const ALL_LINEAR: &str = "all-linear";
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Pattern(Self::ALL_LINEAR.into())
    }
}

/// How an adapter's matrices begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum InitLoraWeights {
    /// A uniform in ±1/√in_features (Kaiming with a = √5), B zero.
    #[default]
    Default,
    /// A normal with a standard deviation of 1/rank, B zero.
    Gaussian,
    /// The weight's largest singular values and their vectors, in both; what is left of the weight is frozen
    /// (PiSSA, Meng, Wang and Zhang 2024, <https://arxiv.org/abs/2404.02948>).
    Pissa,
    /// The same by so many subspace iterations (of [`Self::ITERATIONS`]) from random vectors instead of the whole
    /// decomposition.
    PissaNiter(u32),
}

impl InitLoraWeights {
    const PISSA_NITER: &str = "pissa_niter_";

    /// Without an iteration the vectors are near random ones. Each multiplies by the whole weight twice, and what it adds
    /// falls off as a power of its number, so that more than this many only hold a device.
    pub const ITERATIONS: RangeInclusive<u32> = 1..=1000;

    /// Whether the matrices begin as a part of the weight.
    pub fn is_pissa(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_))
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::Gaussian => write!(f, "gaussian"),
            Self::Pissa => write!(f, "pissa"),
            Self::PissaNiter(iterations) => write!(f, "{}{iterations}", Self::PISSA_NITER),
        }
    }
}

/// PEFT's words, `default` in place of its `true`.
impl Serialize for InitLoraWeights {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let iterations = || {
            let number = text.strip_prefix(Self::PISSA_NITER)?;
            let iterations = number.parse().ok().filter(|n| Self::ITERATIONS.contains(n))?;
            // One way to write each: no sign, no zeros in front.
            (iterations.to_string() == number).then_some(iterations)
        };
        match text.as_str() {
            "default" => Ok(Self::Default),
            "gaussian" => Ok(Self::Gaussian),
            "pissa" => Ok(Self::Pissa),
            _ => iterations().map(Self::PissaNiter).ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "{text:?} is not default, gaussian, pissa or pissa_niter_N (N from 1 to 1000)"
                ))
            }),
        }
    }
}

/// When a mixture of data sets ends, in Hugging Face's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoppingStrategy {
    /// When one of them has no more rows.
    #[default]
    FirstExhausted,
    /// When each has had its last row; those that have no more begin anew.
    AllExhausted,
}

/// How rows are held out when no evaluation file is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EvalSplit {
    /// Rows drawn by `seed`.
    #[default]
    Random,
    /// The file's last rows.
    Last,
}

macro_rules! trial_config {
    ($( $(#[doc = $doc:literal])* $name:ident : $type:ty = $default:expr ; )*) => {
        /// One fine-tuning run, every parameter with the value in force.
        ///
        /// Serialised, it is a flat object whose keys are the parameter names of sweep files and of
        /// `lorafleet train`'s flags; a missing key takes the default, an unknown one is an error.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct TrialConfig {
            $( $(#[doc = $doc])* pub $name: $type, )*
        }

        impl Default for TrialConfig {
            fn default() -> Self {
                Self { $( $name: $default, )* }
            }
        }

        /// Serialises a configuration without the parameters that have their defaults. A version that does not know one of
        /// ours reads it all the same, as long as that is left at its default; so no default ever changes.
        ///
        /// # Errors
        /// Those of the serializer.
        pub fn serialize_differing<S: Serializer>(
            config: &TrialConfig,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            static DEFAULTS: LazyLock<TrialConfig> = LazyLock::new(TrialConfig::default);
            let mut map = serializer.serialize_map(None)?;
            $( if config.$name != DEFAULTS.$name {
                map.serialize_entry(stringify!($name), &config.$name)?;
            } )*
            map.end()
        }

        /// Every parameter's name, in the order of [`TrialConfig`]'s fields.
        pub const PARAMETER_NAMES: &[&str] = &[ $( stringify!($name), )* ];

        /// What each parameter means, in the same order.
        pub const PARAMETER_MEANINGS: &[&str] = &[ $( concat!($( $doc, )*), )* ];
    };
}

trial_config! {
    /// What the trial trains for.
    task: Task = Task::default();
    /// The frozen base: a local directory in Hugging Face's layout, or a model of its hub.
    pretrained_model_id: String = String::new();
    /// The training rows: a `.jsonl`, `.json` or `.parquet` file, a directory of them, or a data set of the hub.
    dataset_name: String = String::new();
    /// More data sets, named likewise, whose rows are mixed with those of `dataset_name`.
    interleave_datasets: Option<Vec<String>> = None;
    /// How often the next row is one of `dataset_name` and of each of `interleave_datasets`, brought to a sum of 1; without
    /// it they take turns.
    interleave_probabilities: Option<Vec<f64>> = None;
    /// Whether a mixture ends when one data set has no more rows, or when all have had their last.
    stopping_strategy: StoppingStrategy = StoppingStrategy::default();
    /// The column that holds a row's text. Rows of messages, prompts or tokens need none.
    instruct_column_in_dataset: String = "text".into();
    /// Evaluation rows, named likewise; without it, rows are held out of `dataset_name`.
    eval_dataset_name: Option<String> = None;
    /// Rows to hold out: a share of the rows if below 1, else their number; 0 holds none out.
    eval_size: f64 = 0.1;
    /// Which rows are held out.
    eval_split: EvalSplit = EvalSplit::default();
    /// Train only on the assistant's turns (`### Assistant:` up to the next `### Human:`).
    assistant_only_loss: bool = false;
    /// Append the EOS token to each row.
    add_eos: bool = true;
    /// Count rows that cannot be read instead of ending with an error.
    skip_bad_rows: bool = false;
    /// Draw a new row order each epoch from `seed`; false keeps the file's order.
    shuffle: bool = true;
    /// The frozen base's numbers.
    precision_mode: PrecisionMode = PrecisionMode::default();
    /// With `4bit`, the numbers of embedding and head: float32 on a CPU unless given.
    compute_dtype: Option<ComputeDtype> = None;
    /// With `4bit`, quantise the blocks' magnitudes too.
    double_quant: bool = true;
    /// Keep only each layer's input and compute the rest again in the backward pass: slower, less memory. `auto`
    /// does so for as many layers as it takes to fit the device.
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing::Auto;
    /// The adapter's rank `r`.
    lora_rank: u32 = 16;
    /// The adapter's `lora_alpha`; its output is scaled by `lora_alpha / lora_rank`. Default: 2 × rank.
    lora_alpha: Option<f64> = None;
    /// Probability of dropping an element of an adapter's input while training.
    lora_dropout: f64 = 0.0;
    /// Which linear layers get an adapter.
    target_modules: TargetModules = TargetModules::default();
    /// Which of them get none after all.
    exclude_modules: Option<TargetModules> = None;
    /// The decoder layers, by number from 0, that get adapters; all unless given.
    layers_to_transform: Option<Vec<u32>> = None;
    /// Modules that are trained whole beside the adapter, each that ends in one of these names: `lm_head`,
    /// `embed_tokens`, `norm` (every norm), a linear layer. They get no adapter.
    modules_to_save: Option<Vec<String>> = None;
    /// Other ranks, by the end of a layer's path or a regular expression for it.
    rank_pattern: BTreeMap<String, u32> = BTreeMap::new();
    /// Other values of `lora_alpha`, likewise.
    alpha_pattern: BTreeMap<String, f64> = BTreeMap::new();
    /// Scale by `lora_alpha / √lora_rank` instead (rsLoRA).
    use_rslora: bool = false;
    /// Train each output's magnitude apart from its direction (DoRA).
    use_dora: bool = false;
    /// How the matrices begin.
    init_lora_weights: InitLoraWeights = InitLoraWeights::default();
    /// A PEFT adapter directory to start from instead of a fresh initialisation.
    init_adapter: Option<String> = None;
    /// Rows of a micro-batch.
    batch_size: u32 = 2;
    /// Micro-batches of an optimizer step.
    gradient_accumulation_steps: u32 = 1;
    /// Tokens to which a row is cut.
    max_sequence_length: u32 = 512;
    /// AdamW's peak learning rate.
    learning_rate: f64 = 2e-4;
    /// What B's learning rate is, as a multiple of A's (LoRA+).
    loraplus_lr_ratio: Option<f64> = None;
    /// The learning rate's course.
    lr_scheduler_type: LrSchedulerType = LrSchedulerType::default();
    /// Steps of linear warm-up; overrides `warmup_ratio` if above 0.
    warmup_steps: u32 = 0;
    /// Warm-up as a share of all steps, rounded up.
    warmup_ratio: f64 = 0.0;
    /// AdamW's decoupled weight decay.
    weight_decay: f64 = 0.0;
    /// AdamW's first moment decay.
    adam_beta1: f64 = 0.9;
    /// AdamW's second moment decay.
    adam_beta2: f64 = 0.999;
    /// AdamW's denominator offset.
    adam_epsilon: f64 = 1e-8;
    /// Global L2 norm to which gradients are clipped; 0 clips nothing.
    max_grad_norm: f64 = 1.0;
    /// Optimizer steps; takes precedence over `num_train_epochs`.
    max_steps: Option<u32> = None;
    /// Passes over the training rows, if `max_steps` is not given. Without both, 500 steps.
    num_train_epochs: Option<f64> = None;
    /// Seed of initialisation, row order, held-out split and dropout.
    seed: u64 = 42;
    /// Steps between metric points.
    logging_steps: u32 = 1;
    /// Steps between evaluations; 0 evaluates at the end only.
    eval_steps: u32 = 0;
    /// Steps between checkpoints; 0 saves at the end only.
    save_steps: u32 = 0;
    /// The accelerator that the trial must run on; any that `resources.accelerators` allows unless given.
    accelerator: Option<String> = None;
}

impl TrialConfig {
    /// The parameter that says where a trial runs and nothing of what it trains.
    pub const ACCELERATOR: &str = "accelerator";

    /// Steps when neither `max_steps` nor `num_train_epochs` is given.
    pub const DEFAULT_MAX_STEPS: u32 = 500;

    /// `lora_alpha` in force: 2 × rank unless given.
    pub fn lora_alpha_in_force(&self) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * f64::from(self.lora_rank))
    }

    /// What its device is told of it: all but where it was to run, which placement has seen to. An agent of a version that
    /// does not know that parameter trains it all the same.
    pub fn for_device(&self) -> Self {
        Self { accelerator: None, ..self.clone() }
    }

    /// Every model, adapter and set of rows that it names.
    pub fn sources_mut(&mut self) -> impl Iterator<Item = &mut String> {
        let one = [&mut self.pretrained_model_id, &mut self.dataset_name].into_iter();
        let optional = [&mut self.eval_dataset_name, &mut self.init_adapter].into_iter().flatten();
        one.chain(optional).chain(self.interleave_datasets.iter_mut().flatten())
    }

    /// The frozen base that it trains on.
    pub fn base_model(&self) -> BaseModel {
        let mode = self.precision_mode;
        let quantized = mode == PrecisionMode::FourBit;
        let precision = Precision {
            mode,
            compute_dtype: quantized.then(|| self.compute_dtype.unwrap_or(ComputeDtype::Float32)),
            double_quant: quantized && self.double_quant,
        };
        BaseModel { model: self.pretrained_model_id.clone(), precision }
    }

    /// Optimizer steps of the whole run on `training_rows` rows.
    ///
    /// An epoch has ⌈⌈rows ÷ batch⌉ ÷ accumulation⌉ steps (its last batch, and its last accumulation, may
    /// be smaller), as in transformers' Trainer.
    pub fn total_steps(&self, training_rows: u64) -> u64 {
        if let Some(steps) = self.max_steps {
            return u64::from(steps);
        }
        let Some(epochs) = self.num_train_epochs else {
            return u64::from(Self::DEFAULT_MAX_STEPS);
        };
        let batches = training_rows.div_ceil(u64::from(self.batch_size.max(1)));
        let steps_per_epoch = batches.div_ceil(u64::from(self.gradient_accumulation_steps.max(1)));
        (epochs * steps_per_epoch as f64).ceil() as u64
    }

    /// The parameters that do not have their defaults, as [`serialize_differing`] has them.
    pub fn differing(&self) -> Map<String, Value> {
        match serialize_differing(self, serde_json::value::Serializer) {
            Ok(Value::Object(differing)) => differing,
            // A flat struct of strings and numbers serialises without fail.
            Ok(_) | Err(_) => Map::new(),
        }
    }

    /// The configuration with the values in force where it leaves them open: `lora_alpha`, `max_steps` unless
    /// it depends on the rows, and, for a run of `total_steps`, `max_steps` and `warmup_steps`. It trains alike,
    /// but is another document: a digest is of what was asked for.
    pub fn in_force(&self, total_steps: Option<u64>) -> Self {
        let mut config = self.clone();
        config.lora_alpha = Some(self.lora_alpha_in_force());
        if self.max_steps.is_none() && self.num_train_epochs.is_none() {
            config.max_steps = Some(Self::DEFAULT_MAX_STEPS);
        }
        if let Some(total) = total_steps {
            let steps = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
            config.max_steps = Some(steps(total));
            config.warmup_steps = steps(self.warmup_steps_in_force(total));
        }
        config
    }

    /// Warm-up steps in force for a run of `total_steps`.
    pub fn warmup_steps_in_force(&self, total_steps: u64) -> u64 {
        if self.warmup_steps > 0 {
            u64::from(self.warmup_steps)
        } else {
            (self.warmup_ratio * total_steps as f64).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_object_with_the_sweep_files_keys() {
        let json = serde_json::to_value(TrialConfig::default()).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, PARAMETER_NAMES);
        let flat =
            |(key, value): (&String, &serde_json::Value)| key.ends_with("_pattern") || !value.is_object();
        assert!(json.as_object().unwrap().iter().all(flat));
        let back: TrialConfig = serde_json::from_value(json).unwrap();
        assert_eq!(back, TrialConfig::default());
    }

    /// Records and what agents are told leave defaults out: one that changed would change trials that are under way.
    #[test]
    fn what_differs_is_all_that_is_told() {
        assert_eq!(TrialConfig::default().differing(), Map::new());
        let config = TrialConfig {
            pretrained_model_id: "m".into(),
            max_steps: Some(7),
            lora_rank: 4,
            ..TrialConfig::default()
        };
        let told = serde_json::json!({ "pretrained_model_id": "m", "lora_rank": 4, "max_steps": 7 });
        assert_eq!(Value::Object(config.differing()), told);
        assert_eq!(serde_json::from_value::<TrialConfig>(told).unwrap(), config);
        let defaults = r#"{
            "task": "instruct-lora", "pretrained_model_id": "", "dataset_name": "", "interleave_datasets": null,
            "interleave_probabilities": null, "stopping_strategy": "first_exhausted",
            "instruct_column_in_dataset": "text", "eval_dataset_name": null, "eval_size": 0.1, "eval_split": "random",
            "assistant_only_loss": false, "add_eos": true, "skip_bad_rows": false, "shuffle": true,
            "precision_mode": "float32", "compute_dtype": null, "double_quant": true,
            "gradient_checkpointing": "auto", "lora_rank": 16, "lora_alpha": null, "lora_dropout": 0.0,
            "target_modules": "all-linear", "exclude_modules": null, "layers_to_transform": null,
            "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": false,
            "use_dora": false, "init_lora_weights": "default", "init_adapter": null, "batch_size": 2,
            "gradient_accumulation_steps": 1, "max_sequence_length": 512, "learning_rate": 2e-4,
            "loraplus_lr_ratio": null, "lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0,
            "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
            "max_grad_norm": 1.0, "max_steps": null, "num_train_epochs": null, "seed": 42, "logging_steps": 1,
            "eval_steps": 0, "save_steps": 0, "accelerator": null
        }"#;
        let defaults: Value = serde_json::from_str(defaults).unwrap();
        assert_eq!(
            serde_json::to_value(TrialConfig::default()).unwrap(),
            defaults,
            "a new parameter is added here; the default of an old one never changes"
        );
    }

    /// Where it runs is placement's business: an agent of a version before that parameter knows the rest.
    #[test]
    fn a_device_is_not_told_where_it_is() {
        let config =
            TrialConfig { accelerator: Some("T4-16GB".into()), lora_rank: 4, ..TrialConfig::default() };
        assert_eq!(config.differing().len(), 2);
        assert_eq!(Value::Object(config.for_device().differing()), serde_json::json!({ "lora_rank": 4 }));
    }

    #[test]
    fn values_in_force() {
        let open = TrialConfig { lora_rank: 4, warmup_ratio: 0.1, ..TrialConfig::default() };
        let epochs = TrialConfig { num_train_epochs: Some(2.0), ..open.clone() };
        let given =
            TrialConfig { lora_alpha: Some(3.0), max_steps: Some(7), warmup_steps: 2, ..open.clone() };
        // (asked for, steps if known) -> (lora_alpha, max_steps, warmup_steps)
        for (config, total, want) in [
            (&open, None, (8.0, Some(500), 0)),
            (&open, Some(500), (8.0, Some(500), 50)),
            (&epochs, None, (8.0, None, 0)),
            (&epochs, Some(113), (8.0, Some(113), 12)),
            (&given, None, (3.0, Some(7), 2)),
            (&given, Some(7), (3.0, Some(7), 2)),
        ] {
            let got = config.in_force(total);
            assert_eq!((got.lora_alpha.unwrap(), got.max_steps, got.warmup_steps), want, "{config:?}");
            let rows = total.unwrap_or_default();
            if total.is_some() {
                assert_eq!(got.in_force(total), got, "again changes nothing");
                assert_eq!(got.total_steps(rows), rows);
                assert_eq!(got.warmup_steps_in_force(rows), config.warmup_steps_in_force(rows));
            }
        }
    }

    #[test]
    fn steps_of_a_run() {
        // (rows, batch, accumulation, epochs, max_steps) -> steps
        for (rows, batch, accumulation, epochs, max_steps, want) in [
            (450, 4, 1, Some(1.0), None, 113),
            (450, 4, 2, Some(1.0), None, 57),
            (450, 4, 1, Some(1.5), None, 170),
            (450, 4, 1, Some(1.0), Some(7), 7),
            (450, 4, 1, None, None, 500),
        ] {
            let config = TrialConfig {
                batch_size: batch,
                gradient_accumulation_steps: accumulation,
                num_train_epochs: epochs,
                max_steps,
                ..TrialConfig::default()
            };
            assert_eq!(config.total_steps(rows), want, "{rows} rows, batch {batch}");
        }
    }
}
