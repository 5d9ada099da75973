//! A run's numbers at its end.

use super::{Loaded, Progress, Run};
use crate::adapter_file;
use crate::error::Result;
use domain::footprint::{Load, PeakBytes};
use domain::machine::Accelerator;
use domain::trial::{GradientCheckpointing, Throughput, TrialSummary};

impl Run {
    /// The numbers so far: speeds are those of all training time, evaluation left out; `device_seconds` is
    /// training and evaluation (who loaded the base adds that). Texts are continued greedily.
    ///
    /// # Errors
    /// The device runs out of memory, or the tokenizer cannot read its own ids.
    pub fn summary(&mut self, loaded: &Loaded) -> Result<TrialSummary> {
        let (samples, tokens) = self.progress.speed_since(&Progress::default());
        let adapter = &self.state.adapter;
        let trainable = adapter.parameters();
        let predicted = self.predicted_peak_bytes(loaded);
        let (before, after) = self.samples(loaded)?;
        Ok(TrialSummary {
            steps: self.state.step,
            loss: self.progress.loss,
            eval_loss: self.progress.eval_loss,
            base_eval_loss: self.progress.base_eval_loss,
            peak_memory_bytes: Some(self.progress.peak_memory_bytes).filter(|bytes| *bytes > 0),
            pack_peak_memory_bytes: self.progress.packed.then_some(self.progress.pack_peak_memory_bytes),
            peak_rss_bytes: peak_rss_bytes(),
            predicted_peak_memory_bytes: Some(predicted.total()),
            trainable_parameters: trainable,
            total_parameters: loaded.base.parameters() + trainable,
            adapter_bytes: adapter_file::size(adapter)?,
            samples_per_second: samples,
            tokens_per_second: tokens,
            throughput: if self.progress.packed { Throughput::Packed } else { Throughput::Solo },
            device_seconds: self.progress.training_seconds + self.progress.evaluation_seconds,
            recomputed_layers: Some(self.recomputed_layers as u64),
            truncated_rows: self.data.truncated_rows,
            skipped_rows: self.data.skipped_rows,
            sample_prompt: self.data.sample_prompt_text.clone().filter(|_| before.is_some()),
            sample_before: before,
            sample_after: after,
            samples: self.samples_before_its_end(),
            // Whoever trains it asks nothing.
            ..TrialSummary::default()
        })
    }

    /// What the footprint model says that the run holds at its peak, alone on its device.
    pub fn predicted_peak_bytes(&self, loaded: &Loaded) -> PeakBytes {
        loaded.base.config.shape().peak_bytes(&self.load, self.recomputed_layers as u64)
    }

    /// What the speed model says that a step on its largest micro-batches takes on an accelerator, in seconds.
    pub fn predicted_seconds_per_step(&self, loaded: &Loaded, accelerator: &Accelerator) -> f64 {
        let (recomputed, micro_batches) =
            (self.recomputed_layers as u64, self.config.gradient_accumulation_steps);
        let shape = loaded.base.config.shape();
        shape.step_seconds(&self.load, recomputed, micro_batches, accelerator).total()
    }

    /// Where `gradient_checkpointing` is `auto`, chooses the fewest layers to compute again with which the run,
    /// alone with its base, stays within `memory_bytes`; all of them if it never does. Returns what it then holds
    /// at its peak.
    pub fn fit(&mut self, loaded: &Loaded, memory_bytes: u64) -> PeakBytes {
        if self.config.gradient_checkpointing == GradientCheckpointing::Auto {
            let shape = loaded.base.config.shape();
            let fewest = shape.recomputed_layers(&self.load, memory_bytes);
            self.recomputed_layers = fewest.unwrap_or(shape.num_hidden_layers) as usize;
        }
        self.predicted_peak_bytes(loaded)
    }

    /// Computes all layers again from here on, where `gradient_checkpointing` is `auto`. False if it does already, or
    /// may not.
    pub fn spare_memory(&mut self, loaded: &Loaded) -> bool {
        let all = loaded.base.layers.len();
        let may = self.config.gradient_checkpointing == GradientCheckpointing::Auto;
        if may && self.recomputed_layers < all {
            self.recomputed_layers = all;
            return true;
        }
        false
    }

    /// Layers that are computed again in the backward pass.
    pub fn recomputed_layers(&self) -> usize {
        self.recomputed_layers
    }

    /// What its footprint depends on.
    pub fn load(&self) -> &Load {
        &self.load
    }
}

/// The process's highest resident set size, where the system tells (Linux).
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
