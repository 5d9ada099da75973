//! What a plan is made for: accelerators of the catalogue, the CPU, or a number of bytes; and what a trial takes there.

use crate::evaluations::Reading;
use crate::{Failure, machines, output};
use config::machines::Catalogue;
use domain::footprint::{Engine, Load, ModelShape};
use domain::machine::{Accelerator, Machine};
use domain::trial::TrialConfig;
use gpu_agent::devices::choose::RESERVE;
use gpu_agent::engine::pass_tokens;
use serde_json::{Value, json};

/// A device.
pub(super) struct Device {
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) engine: Engine,
    /// What is known of it, and what it costs.
    known: Option<(Accelerator, Option<Machine>)>,
}

impl Device {
    /// Of the catalogue.
    fn of(accelerator: Accelerator, catalogue: &Catalogue) -> Self {
        let (name, memory_bytes) = (accelerator.name.clone(), accelerator.memory_bytes);
        let machine = catalogue.cheapest(&name).cloned();
        Self { name, memory_bytes, engine: Engine::Gpu, known: Some((accelerator, machine)) }
    }

    /// All of the catalogue that can be rented.
    pub(super) fn rented() -> Result<Vec<Self>, Failure> {
        let catalogue = machines::catalogue()?;
        let all = config::machines::accelerators().into_iter().map(|one| Self::of(one, &catalogue));
        Ok(all.filter(|device| matches!(device.known, Some((_, Some(_))))).collect())
    }

    /// Those of the catalogue among these names.
    pub(super) fn known(names: &[String]) -> Result<Vec<Self>, Failure> {
        let catalogue = machines::catalogue()?;
        let known = names.iter().filter_map(|name| config::machines::accelerator(name).ok());
        Ok(known.map(|one| Self::of(one, &catalogue)).collect())
    }

    /// The devices of those names: accelerators of the catalogue, `CPU`, or bytes (`24GB`).
    pub(super) fn named(names: &[String]) -> Result<Vec<Self>, Failure> {
        let catalogue = machines::catalogue()?;
        let find = |name: &String| {
            if name.eq_ignore_ascii_case("cpu") {
                let memory_bytes = gpu_agent::devices::cpu().memory_bytes;
                return Ok(Self { name: "CPU".into(), memory_bytes, engine: Engine::Cpu, known: None });
            }
            let problem = match config::machines::accelerator(name) {
                Ok(accelerator) => return Ok(Self::of(accelerator, &catalogue)),
                Err(problem) => problem,
            };
            let memory_bytes = config::size::parse(name).map_err(|_| {
                Failure::invalid(format!("--device {name}: {problem}, CPU, or its memory, such as 24GB"))
            })?;
            Ok(Self { name: name.clone(), memory_bytes, engine: Engine::Gpu, known: None })
        };
        names.iter().map(find).collect()
    }

    /// Whether it is what a trial must run on, if there is such a thing.
    pub(super) fn may_run(&self, config: &TrialConfig) -> bool {
        config.accelerator.as_ref().is_none_or(|accelerator| accelerator.eq_ignore_ascii_case(&self.name))
    }

    /// Bytes that tensors may take.
    fn room(&self) -> u64 {
        let reserve = if self.engine == Engine::Gpu { RESERVE } else { 0 };
        self.memory_bytes.saturating_sub(reserve)
    }

    /// Why it does not compute with a trial's numbers; `None`: it does, or nothing is known of it.
    fn unsupported(&self, config: &TrialConfig) -> Option<String> {
        let (accelerator, _) = self.known.as_ref()?;
        config.base_model().precision.compute_capability()?;
        accelerator.compute_capability.lacks_bfloat16(&self.name)
    }

    /// Whether a trial fits with so many layers computed again.
    pub(super) fn fits(&self, shape: &ModelShape, config: &TrialConfig, recomputed: u64) -> bool {
        self.unsupported(config).is_none()
            && shape.peak_bytes(&shape.load_at_most(config, self.engine), recomputed).total() <= self.room()
    }

    /// What a trial of so many steps takes here, which is `asked` something at its end.
    pub(super) fn document(
        &self,
        shape: &ModelShape,
        config: &TrialConfig,
        load: &Load,
        steps: u64,
        asked: Option<Reading>,
    ) -> Value {
        let load = Load { engine: self.engine, ..*load };
        let unsupported = self.unsupported(config);
        let [fewest, most] = config.gradient_checkpointing.recomputed_layers(shape.num_hidden_layers);
        let fits = |layers: &u64| shape.peak_bytes(&load, *layers).total() <= self.room();
        let layers = (fewest..=most).find(fits).filter(|_| unsupported.is_none());
        let recomputed = layers.unwrap_or(most);
        let mut document = json!({
            "device": self.name,
            "memory_bytes": self.memory_bytes,
            "fits": layers.is_some(),
            "unsupported": unsupported,
            "recomputed_layers": layers,
            "peak_memory_bytes": shape.peak_bytes(&load, recomputed).total(),
        });
        if let (Some((accelerator, machine)), Some(recomputed)) = (&self.known, layers) {
            let micro_batches = config.gradient_accumulation_steps;
            let step = shape.step_seconds(&load, recomputed, micro_batches, accelerator).total();
            let answering = asked.map(|Reading { tokens, documents }| {
                let length = tokens / documents.max(1);
                shape.forward_seconds(&load, tokens, pass_tokens(config), length, accelerator).total()
            });
            let seconds = step * steps as f64 + answering.unwrap_or_default();
            document["steps"] = json!(steps);
            document["seconds_per_step"] = json!(step);
            if let Some(seconds) = answering {
                document["evaluation_seconds"] = json!(seconds);
            }
            document["seconds"] = json!(seconds);
            document["cost_usd"] = json!(machine.as_ref().map(|m| m.price_of_one() * seconds / 3600.0));
            document["price"] = json!(machine.as_ref().map(machines::record));
        }
        document
    }
}

/// What is said in a few words of a device that does not compute with a trial's numbers.
pub(super) const UNSUPPORTED: &str = "bfloat16 not supported";

/// What a document says of a device, in a few words.
pub(super) fn in_words(device: &Value) -> String {
    let name = device["device"].as_str().unwrap_or_default();
    if device["unsupported"].is_string() {
        return format!("{name} {UNSUPPORTED}");
    }
    let Some(layers) = device["recomputed_layers"].as_u64() else { return format!("{name} no") };
    let again = if layers > 0 { format!(", {layers} layers again") } else { String::new() };
    let Some(step) = device["seconds_per_step"].as_f64() else { return format!("{name} yes{again}") };
    let cost = device["cost_usd"].as_f64();
    let cost =
        cost.map_or(String::new(), |cost| format!(", {} for {}", output::dollars(cost), device["steps"]));
    format!("{name} {step:.2} s a step{cost}{again}")
}

/// Where the dollars of documents come from, a line each.
pub(super) fn prices<'a>(devices: impl Iterator<Item = &'a Value>) -> String {
    let (mut lines, mut predicts) = (Vec::new(), false);
    for device in devices {
        predicts |= device["seconds"].is_number();
        let Ok(machine) = serde_json::from_value::<Machine>(device["price"].clone()) else { continue };
        let line = machine.price_line() + "\n";
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let caveat = "seconds are predicted from makers' peaks and assumed shares of them, without loading and held-out rows; no GPU \
                  has confirmed them yet\n";
    if predicts { caveat.to_string() + &lines.concat() } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::trial::{ComputeDtype, GradientCheckpointing, PrecisionMode};

    /// A batch that fits a V100 once some layers are computed again.
    #[test]
    fn layers_are_computed_again_as_a_trial_allows() {
        let shape = ModelShape {
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
        let device =
            Device { name: "V100-16GB".into(), memory_bytes: 16 << 30, engine: Engine::Gpu, known: None };
        let layers = |gradient_checkpointing| {
            let config = TrialConfig {
                precision_mode: PrecisionMode::FourBit,
                compute_dtype: Some(ComputeDtype::Float16),
                batch_size: 8,
                gradient_checkpointing,
                ..TrialConfig::default()
            };
            let load = shape.load_at_most(&config, Engine::Gpu);
            let document = device.document(&shape, &config, &load, 1, None);
            assert_eq!(document["fits"], document["recomputed_layers"].is_u64());
            document["recomputed_layers"].as_u64()
        };
        assert!(layers(GradientCheckpointing::Auto).is_some_and(|layers| (1..32).contains(&layers)));
        assert_eq!(layers(GradientCheckpointing::On), Some(32));
        assert_eq!(layers(GradientCheckpointing::Off), None);
    }
}
