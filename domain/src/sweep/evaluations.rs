//! What a sweep asks of its base and of each adapter once that is trained: the section `evaluations`.

use super::in_force;
use crate::trial::TrialConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Keys of the section.
pub(super) const KEYS: &[&str] =
    &["tasks", "when", "num_fewshot", "fewshot_order", "limit", "task_data", "fewshot_data"];

/// Whose order documents are asked in, and examples drawn: that of a version of lm-evaluation-harness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum FewshotOrder {
    /// Documents as they stand; examples from `random.Random(1234)`.
    #[default]
    #[serde(rename = "v0.4")]
    V0_4,
    /// Documents shuffled by `random.Random(42)`, and examples drawn on from there, as the first Open LLM Leaderboard did.
    #[serde(rename = "v0.3")]
    V0_3,
}

impl FewshotOrder {
    /// The order of a version, if there is one of that name.
    pub fn parse(name: &str) -> Option<Self> {
        serde_json::from_value(name.into()).ok()
    }
}

/// The tasks of a sweep's evaluations, as lm-evaluation-harness defines them. A trial that has made all its steps is asked
/// them before it ends, and so is the base alone.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluations {
    /// Tasks and presets that ship, by name; and others by what their files say, as mappings.
    pub tasks: Vec<Value>,
    /// Parameters and the value in force that each must have in a trial that is asked; empty means all are.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub when: BTreeMap<String, Value>,
    /// Examples before each document, where neither preset nor task pin their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_fewshot: Option<u32>,
    /// Whose order documents are asked in, and examples drawn; v0.4's if nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fewshot_order: Option<FewshotOrder>,
    /// Only the first documents of each task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Where the documents of tasks lie, by the task's name; those of the others come from the hub.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub task_data: BTreeMap<String, String>,
    /// Where the examples of tasks lie, if not beside their documents.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fewshot_data: BTreeMap<String, String>,
}

impl Evaluations {
    /// Whether a trial of this configuration is asked.
    pub fn asks(&self, config: &TrialConfig) -> bool {
        self.when.is_empty() || {
            let values = in_force(config);
            self.when.iter().all(|(name, value)| values.get(name) == Some(value))
        }
    }

    /// What a trial of this configuration is asked, without the conditions that it meets; `None` if it does not.
    pub fn of(&self, config: &TrialConfig) -> Option<Self> {
        self.asks(config).then(|| Self { when: BTreeMap::new(), ..self.clone() })
    }

    /// What it names that lies somewhere.
    pub fn sources_mut(&mut self) -> impl Iterator<Item = &mut String> {
        self.task_data.values_mut().chain(self.fewshot_data.values_mut())
    }

    /// What it names that lies somewhere.
    pub fn sources(&self) -> impl Iterator<Item = &String> {
        self.task_data.values().chain(self.fewshot_data.values())
    }
}
