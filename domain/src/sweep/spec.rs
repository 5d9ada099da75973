//! What a sweep file asks for.

use super::Evaluations;
use crate::rng;
use crate::trial::{TrialConfig, serialize_differing};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Whether a smaller or a larger value of the sweep's metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Smaller is better.
    #[default]
    Minimize,
    /// Larger is better.
    Maximize,
}

impl Goal {
    /// Whether `a` is better than `b`. NaN is worse than anything.
    pub fn better(self, a: f64, b: f64) -> bool {
        if a.is_nan() || b.is_nan() {
            return !a.is_nan();
        }
        match self {
            Goal::Minimize => a < b,
            Goal::Maximize => a > b,
        }
    }
}

/// How the next trial is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Every combination once.
    Grid,
    /// Independent draws.
    #[default]
    Random,
    /// The first value of every parameter, then one parameter at a time varied from it.
    OneFactorAtATime,
    /// Random draws with asynchronous successive halving (Li et al. 2020, the stopping variant).
    Asha,
}

/// How trials are chosen, ended and compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchSpec {
    /// How the next trial is chosen.
    pub algorithm: Algorithm,
    /// Trials in all. Required by `random` and `asha`; others end when their space does.
    pub max_trials: Option<u32>,
    /// The metric by which trials are compared.
    pub metric: String,
    /// Which way is better.
    pub goal: Goal,
    /// Seed of the draws; the same seed proposes the same trials.
    pub seed: u64,
    /// ASHA: steps of the first rung; rungs follow at `min_steps · reduction_factor^k`.
    pub min_steps: Option<u32>,
    /// ASHA: one in this many goes on at each rung.
    pub reduction_factor: u32,
    /// Trials that may run at a time; as many as the devices hold unless given.
    pub max_concurrent_trials: Option<u32>,
}

impl Default for SearchSpec {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            max_trials: None,
            metric: crate::metric::EVAL_LOSS.into(),
            goal: Goal::default(),
            seed: 0,
            min_steps: None,
            reduction_factor: 3,
            max_concurrent_trials: None,
        }
    }
}

/// What values a parameter may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Distribution {
    /// One value.
    Constant(Value),
    /// One of these.
    Choices(Vec<Value>),
    /// A number between two, both included; a multiple of `step` above `low` if given.
    Uniform {
        /// Smallest value.
        low: f64,
        /// Largest value.
        high: f64,
        /// Distance of neighbouring values.
        step: Option<f64>,
    },
    /// A number whose logarithm is uniform; `low` > 0. Rounded to multiples of `step` above `low` if given.
    LogUniform {
        /// Smallest value.
        low: f64,
        /// Largest value.
        high: f64,
        /// Distance of neighbouring values.
        step: Option<f64>,
    },
    /// A whole number between two, both included.
    Integer {
        /// Smallest value.
        low: i64,
        /// Largest value.
        high: i64,
        /// Distance of neighbouring values.
        step: Option<i64>,
    },
    /// Depends on the values of parameters that stand before it.
    When {
        /// Parameters and the value that each must have.
        conditions: BTreeMap<String, Value>,
        /// What it takes if all conditions hold.
        then: Box<Distribution>,
        /// What it takes if not; its default if absent.
        otherwise: Option<Box<Distribution>>,
    },
}

/// A condition on a trial's parameters, such as `lora_alpha <= 2 * lora_rank`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Constraint(pub String);

/// What a sweep may spend.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// US dollars.
    pub max_cost_usd: Option<f64>,
    /// Seconds from submission.
    pub max_wall_clock_seconds: Option<f64>,
}

/// Where trials may run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Accelerator names (`A100-40GB`, `CPU`, …); empty means any.
    pub accelerators: Vec<String>,
    /// Trials that may be on a device together with one of this sweep's, that one and other sweeps' among them; 1: each has
    /// its device for itself. As many as the device takes unless given; from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pack_size: Option<u32>,
}

/// How often the best trials are run, each time with another seed, so that none is the best by luck alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replicates {
    /// Runs of each finalist in all, the one that made it a finalist among them; from 2.
    pub runs: u32,
    /// Trials that are run again at most: the best of those that made all their steps.
    pub finalists: u32,
}

impl Replicates {
    /// Finalists unless their number is given.
    pub const DEFAULT_FINALISTS: u32 = 3;
    /// Runs, and finalists, at most.
    pub const MOST: u64 = 100;

    /// Runs that come on top of a search of so many trials, if so many of them are fit to be finalists.
    pub fn on_top_of(self, trials: u32) -> u32 {
        self.finalists.min(trials) * (self.runs - 1)
    }

    /// The seed of a finalist's `run`-th run, from 2 on: 53 bits, a function of the seed of its first run and of `run`
    /// alone. Finalists of one seed have the same seeds in their further runs too, so that these can be compared in pairs.
    pub fn seed(first: u64, run: u32) -> u64 {
        // As many bits as JSON's numbers keep.
        rng::bits(rng::key(first, "replicate"), u64::from(run)) >> 11
    }
}

/// What a sweep file asks for, checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepSpec {
    /// The sweep's name.
    pub name: String,
    /// How trials are chosen, ended and compared.
    pub search: SearchSpec,
    /// Searched parameters, in the file's order.
    pub parameters: Vec<(String, Distribution)>,
    /// What all trials share: every parameter that is given at the top level, defaults for the rest.
    #[serde(serialize_with = "serialize_differing")]
    pub base: TrialConfig,
    /// Conditions that every trial must meet.
    pub constraints: Vec<Constraint>,
    /// What it may spend.
    pub budget: Budget,
    /// Where trials may run.
    pub resources: Resources,
    /// How many adapters are kept of trials that are over: those of the best. All of them unless given; from 1.
    #[serde(default)]
    pub keep_adapters: Option<u32>,
    /// What its base and its adapters are asked.
    #[serde(default)]
    pub evaluations: Option<Evaluations>,
    /// How often its best trials are run; once unless given.
    #[serde(default)]
    pub replicates: Option<Replicates>,
}
