//! Which trials may be compared: slices, in which chosen parameters vary and all others are held, and pairs, that differ
//! in one parameter alone.

use super::numbers;
use domain::trial::{Shortage, Throughput, Trial, TrialConfig, TrialState};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The name under which a trial's accelerator stands beside its parameters.
pub(super) const ACCELERATOR: &str = TrialConfig::ACCELERATOR;
/// The parameter that has a line of its own in every figure.
pub(super) const PRECISION: &str = "precision_mode";

/// What tells from quantisation's savings those that cost time.
pub(super) const AGAIN: &str = "gradient_checkpointing";

/// Parameters that move neither the bytes nor the seconds of a step.
const INDIFFERENT: &[&str] = &[
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "logging_steps",
];

/// Parameters that move nothing that a trial learns: trials that differ in these alone are the same result again.
const SAME_RESULT: &[&str] = &[ACCELERATOR, AGAIN, "logging_steps", "save_steps"];

/// Parameters that decide how long a run is.
const LENGTH: &[&str] = &["max_steps", "num_train_epochs"];

/// Parameters that decide how large an adapter is, beside its rank.
const SIZE_OF_ADAPTER: &[&str] = &[
    "pretrained_model_id",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "use_dora",
    "init_lora_weights",
];

/// What a number depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dependence {
    /// On what moves a step's bytes and seconds.
    Step,
    /// On that, and on how many steps there are.
    Run,
    /// On what moves an adapter's size.
    Adapter,
}

impl Dependence {
    fn on(self, parameter: &str) -> bool {
        match self {
            Self::Step => !INDIFFERENT.contains(&parameter) && !LENGTH.contains(&parameter),
            Self::Run => !INDIFFERENT.contains(&parameter),
            Self::Adapter => SIZE_OF_ADAPTER.contains(&parameter),
        }
    }
}

/// A trial with its parameters as they were asked for, and the accelerator that it ran on among them.
#[derive(Debug)]
pub(super) struct Fact<'a> {
    pub(super) trial: &'a Trial,
    parameters: Map<String, Value>,
}

impl<'a> Fact<'a> {
    fn of(trial: &'a Trial) -> Self {
        let mut parameters = fields(&trial.config);
        // The one that it ran on, which is the one that it had to; that by the name that its device has for it.
        if let Some(device) = &trial.device {
            parameters.insert(ACCELERATOR.into(), json!(device.accelerator));
        }
        Self { trial, parameters }
    }

    /// A parameter's value.
    pub(super) fn get(&self, name: &str) -> &Value {
        self.parameters.get(name).unwrap_or(&Value::Null)
    }

    /// Whether it was alone on its device while it was measured; also if it was not measured because it did not fit.
    pub(super) fn is_solo(&self) -> bool {
        let summary = self.trial.summary.as_ref();
        summary.is_none_or(|s| s.throughput == Throughput::Solo && s.pack_peak_memory_bytes.is_none())
    }

    /// Whether its device, empty, could not hold it. One that ran out of memory beside others is none of those.
    pub(super) fn does_not_fit(&self) -> bool {
        self.shortage().is_some()
    }

    /// What it lacked, if that is why it failed.
    pub(super) fn shortage(&self) -> Option<Shortage> {
        Shortage::of(self.trial.failure.as_ref()?)
    }

    pub(super) fn peak_memory(&self) -> Option<f64> {
        self.trial.summary.as_ref()?.peak_memory_bytes.map(|bytes| bytes as f64)
    }

    pub(super) fn speed(&self) -> Option<f64> {
        self.trial.summary.as_ref()?.samples_per_second.filter(|speed| speed.is_finite() && *speed > 0.0)
    }

    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        self.trial.summary.as_ref()?.tokens_per_second.filter(|speed| speed.is_finite() && *speed > 0.0)
    }

    /// Dollars of a run that came to its end.
    pub(super) fn cost(&self) -> Option<f64> {
        let completed = self.trial.state == TrialState::Completed;
        self.trial.cost_usd.filter(|cost| completed && *cost > 0.0)
    }

    /// What tells apart trials that learn something else, but for `parameter`.
    pub(super) fn result_key(&self, parameter: &str) -> String {
        let moves = |name: &&String| *name != parameter && !SAME_RESULT.contains(&name.as_str());
        key(self, self.parameters.keys().filter(moves).map(String::as_str))
    }

    /// Seconds of a step.
    pub(super) fn step_seconds(&self) -> Option<f64> {
        let rows = self.get("batch_size").as_f64()? * self.get("gradient_accumulation_steps").as_f64()?;
        Some(rows / self.speed()?)
    }

    pub(super) fn recomputed_layers(&self) -> Option<u64> {
        self.trial.summary.as_ref()?.recomputed_layers
    }
}

pub(super) fn fields(config: &TrialConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// The trials of a sweep, and the parameters in which any two of them differ.
pub(super) struct Facts<'a> {
    pub(super) facts: Vec<Fact<'a>>,
    varying: BTreeSet<String>,
}

/// A parameter and its value.
pub(super) type Fixed = (String, Value);

/// Trials that agree in all but the parameters that were let vary.
pub(super) struct Slice<'a, 'f> {
    /// What is held, of what differs within the sweep.
    pub(super) fixed: Vec<Fixed>,
    pub(super) facts: Vec<&'f Fact<'a>>,
}

impl<'a> Facts<'a> {
    pub(super) fn of(trials: impl IntoIterator<Item = &'a Trial>) -> Self {
        let facts: Vec<_> = trials.into_iter().map(Fact::of).collect();
        let mut varying = BTreeSet::new();
        if let Some((first, rest)) = facts.split_first() {
            for (name, value) in &first.parameters {
                if rest.iter().any(|fact| fact.get(name) != value) {
                    varying.insert(name.clone());
                }
            }
        }
        Self { facts, varying }
    }

    /// The values of a parameter, numbers by size.
    pub(super) fn values(&self, name: &str) -> Vec<&Value> {
        sorted(self.facts.iter().map(|fact| fact.get(name)))
    }

    /// Whether there are trials with one value of a parameter and trials with another.
    pub(super) fn has_several(&self, name: &str) -> bool {
        self.values(name).len() > 1
    }

    /// Whether trials differ in a parameter, be it that it is known of some alone.
    pub(super) fn varies(&self, name: &str) -> bool {
        self.varying.contains(name)
    }

    /// The trials that agree in everything that `dependence` names but in `free`: of those with several values of
    /// `free[0]` the slice that has the most combinations of `free` that were measured, then the most in all, then the
    /// most trials, then the values that most of the sweep's trials have.
    pub(super) fn slice<'f>(
        &'f self,
        free: &[&str],
        dependence: Dependence,
        counts: impl Fn(&Fact) -> bool,
    ) -> Option<Slice<'a, 'f>> {
        let held: Vec<_> = self
            .varying
            .iter()
            .filter(|name| !free.contains(&name.as_str()) && dependence.on(name))
            .collect();
        let mut groups: BTreeMap<String, Vec<&Fact>> = BTreeMap::new();
        for fact in self.facts.iter().filter(|fact| counts(fact)) {
            groups.entry(key(fact, held.iter().map(|name| name.as_str()))).or_default().push(fact);
        }
        let combinations = |facts: &[&Fact], free: &[&str]| {
            let keys: BTreeSet<_> = facts.iter().map(|fact| key(fact, free.iter().copied())).collect();
            keys.len()
        };
        let several = |facts: &&Vec<&Fact>| combinations(facts, &free[..1]) > 1;
        let mut shared: BTreeMap<(&str, String), usize> = BTreeMap::new();
        for (fact, name) in self.facts.iter().flat_map(|fact| held.iter().map(move |name| (fact, name))) {
            *shared.entry((name.as_str(), fact.get(name).to_string())).or_default() += 1;
        }
        let size = |facts: &[&Fact]| {
            let measured: Vec<_> = facts.iter().copied().filter(|fact| !fact.does_not_fit()).collect();
            let usual =
                |name: &&String| shared.get(&(name.as_str(), facts[0].get(name).to_string())).copied();
            let usual: usize = held.iter().filter_map(usual).sum();
            (combinations(&measured, free), combinations(facts, free), facts.len(), usual)
        };
        // Of equals the first.
        let sized = groups.values().filter(several).map(|facts| (size(facts), facts));
        let (_, best) = sized.reduce(|best, other| if other.0 > best.0 { other } else { best })?;
        let first = best.first()?;
        let fixed = held.iter().map(|name| ((*name).clone(), first.get(name).clone())).collect();
        Some(Slice { fixed, facts: best.clone() })
    }

    /// The trials among which some differ in `parameter` alone.
    pub(super) fn contrasts<'f>(&'f self, parameter: &str) -> Contrasts<'a, 'f> {
        let held: Vec<_> =
            self.varying.iter().map(String::as_str).filter(|name| *name != parameter).collect();
        let mut groups: BTreeMap<String, Vec<&Fact>> = BTreeMap::new();
        for fact in &self.facts {
            groups.entry(key(fact, held.iter().copied())).or_default().push(fact);
        }
        let differ =
            |facts: &Vec<&Fact>| facts.iter().any(|fact| fact.get(parameter) != facts[0].get(parameter));
        Contrasts { parameter: parameter.into(), groups: groups.into_values().filter(differ).collect() }
    }
}

/// Groups of trials that agree in all but one parameter.
pub(super) struct Contrasts<'a, 'f> {
    parameter: String,
    groups: Vec<Vec<&'f Fact<'a>>>,
}

impl<'a, 'f> Contrasts<'a, 'f> {
    /// The values of the parameter, numbers by size.
    pub(super) fn values(&self) -> Vec<&'f Value> {
        sorted(self.groups.iter().flatten().map(|fact| fact.get(&self.parameter)))
    }

    /// Pairs of trials that differ in the parameter alone, where it is `a` in one and `b` in the other. Each trial is in
    /// one pair at most.
    pub(super) fn pairs(&self, a: &Value, b: &Value) -> Vec<(&'f Fact<'a>, &'f Fact<'a>)> {
        let with = |facts: &[&'f Fact<'a>], value: &Value| -> Vec<_> {
            facts.iter().copied().filter(|fact| fact.get(&self.parameter) == value).collect()
        };
        self.groups.iter().flat_map(|facts| with(facts, a).into_iter().zip(with(facts, b))).collect()
    }
}

/// What tells trials apart by some of their parameters.
fn key<'n>(fact: &Fact, names: impl Iterator<Item = &'n str>) -> String {
    names.map(|name| fact.get(name).to_string()).collect::<Vec<_>>().join("\n")
}

/// Values once each, numbers by size and before texts.
pub(super) fn sorted<'v>(values: impl Iterator<Item = &'v Value>) -> Vec<&'v Value> {
    let mut values: Vec<_> = values.filter(|value| !value.is_null()).collect();
    values.sort_by(|a, b| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a, b) if a.is_some() != b.is_some() => b.is_some().cmp(&a.is_some()),
        _ => a.to_string().cmp(&b.to_string()),
    });
    values.dedup();
    values
}

/// `batch_size 2, max_sequence_length 512`.
pub(super) fn named(fixed: &[Fixed]) -> String {
    let pair = |(name, value): &Fixed| format!("{name} {}", numbers::value(value));
    fixed.iter().map(pair).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::made;
    use super::*;
    use proptest::prelude::*;

    /// Trials of these precisions (4 bits or not), batch sizes, ranks and learning rates.
    fn trials(rows: &[(bool, u32, u32, u32)]) -> Vec<Trial> {
        let trial = |(number, (four_bit, batch_size, lora_rank, rate)): (u32, &(bool, u32, u32, u32))| {
            let mut trial = made::trial(number);
            trial.config.batch_size = *batch_size;
            trial.config.lora_rank = *lora_rank;
            trial.config.learning_rate = f64::from(*rate) * 1e-4;
            if *four_bit {
                trial.config.precision_mode = domain::trial::PrecisionMode::FourBit;
            }
            trial
        };
        (1..).zip(rows).map(trial).collect()
    }

    fn numbers_of(facts: &[&Fact]) -> Vec<u32> {
        facts.iter().filter_map(|fact| fact.trial.id.number()).collect()
    }

    #[test]
    fn the_slice_with_the_most_combinations() {
        let trials = trials(&[
            (false, 1, 8, 1),
            (false, 2, 8, 2),
            (false, 1, 16, 1),
            (false, 2, 16, 1),
            (true, 2, 16, 3),
            (true, 4, 32, 3),
        ]);
        let facts = Facts::of(&trials);
        let slice = facts.slice(&["batch_size", PRECISION], Dependence::Step, |_| true).unwrap();
        assert_eq!(numbers_of(&slice.facts), [3, 4, 5]);
        assert_eq!(named(&slice.fixed), "lora_rank 16");
        // An adapter's size does not depend on batch and precision.
        let adapters = facts.slice(&["lora_rank"], Dependence::Adapter, |_| true).unwrap();
        assert_eq!(adapters.facts.len(), 6);
        assert!(
            facts.slice(&["max_sequence_length"], Dependence::Step, |_| true).is_none(),
            "it does not vary"
        );
    }

    /// Of slices as large, the one that shows something, and of those what the sweep mostly is.
    #[test]
    fn what_was_measured_goes_before_what_does_not_fit() {
        let trials = [
            made::unfit(1, made::four_bit(4, 16, 1024), 45.0),
            made::unfit(2, made::four_bit(8, 16, 1024), 80.0),
            made::measured(3, made::four_bit(4, 16, 256), 6.0, 1.0),
            made::measured(4, made::four_bit(8, 16, 256), 7.0, 1.0),
            made::measured(5, made::four_bit(4, 16, 128), 5.0, 1.0),
            made::measured(6, made::four_bit(8, 16, 128), 6.0, 1.0),
            made::measured(7, made::four_bit(4, 64, 256), 8.0, 1.0),
        ];
        let facts = Facts::of(&trials);
        let slice = facts.slice(&["batch_size", PRECISION], Dependence::Step, |_| true).unwrap();
        assert_eq!(named(&slice.fixed), "lora_rank 16, max_sequence_length 256");
    }

    /// What a sweep chose and what a device calls itself are one parameter, also of a trial that has had no device yet.
    #[test]
    fn an_accelerator_that_was_chosen_is_the_one_that_it_ran_on() {
        let on = |number: u32, batch: u32, chosen: &str, given: Option<&str>| {
            let mut trial = made::measured(number, made::four_bit(batch, 16, 512), 7.0, 3.0);
            trial.config.accelerator = Some(chosen.into());
            trial.device = given.map(|name| made::device(name, 16.0, 1.0));
            trial
        };
        let trials = [
            on(1, 2, "a100-40gb", Some("A100-40GB")),
            on(2, 2, "V100-16GB", Some("V100-16GB")),
            on(3, 4, "A100-40GB", Some("A100-40GB")),
            on(4, 4, "V100-16GB", None),
        ];
        let facts = Facts::of(&trials);
        let (a100, v100) = (json!("A100-40GB"), json!("V100-16GB"));
        assert_eq!(facts.values(ACCELERATOR), [&a100, &v100]);
        let pairs = facts.contrasts(ACCELERATOR).pairs(&a100, &v100);
        let numbers: Vec<_> = pairs.iter().map(|(a, b)| (a.trial.id.number(), b.trial.id.number())).collect();
        assert_eq!(numbers, [(Some(1), Some(2)), (Some(3), Some(4))]);
    }

    #[test]
    fn every_parameter_that_is_told_apart_is_one() {
        for name in [INDIFFERENT, SAME_RESULT, LENGTH, SIZE_OF_ADAPTER].concat() {
            assert!(domain::trial::PARAMETER_NAMES.contains(&name), "{name}");
        }
    }

    #[test]
    fn numbers_come_by_size_and_before_texts() {
        let values = [json!("b"), json!(16), json!(4), json!("a"), json!(16), json!(null), json!(4.5)];
        let got: Vec<_> = sorted(values.iter()).into_iter().map(numbers::value).collect();
        assert_eq!(got, ["4", "4.5", "16", "a", "b"]);
    }

    proptest! {
        #[test]
        fn pairs_differ_in_one_parameter_alone(
            rows in proptest::collection::vec((any::<bool>(), 1u32..4, 1u32..3, 1u32..3), 0..24)
        ) {
            let trials = trials(&rows);
            let facts = Facts::of(&trials);
            let (a, b) = (json!("float32"), json!("4bit"));
            let pairs = facts.contrasts(PRECISION).pairs(&a, &b);
            let mut seen = BTreeSet::new();
            for (left, right) in &pairs {
                prop_assert_eq!((left.get(PRECISION), right.get(PRECISION)), (&a, &b));
                for (name, value) in &left.parameters {
                    prop_assert!(name == PRECISION || right.get(name) == value);
                }
                prop_assert!(seen.insert(left.trial.id.clone()) && seen.insert(right.trial.id.clone()));
            }
            // As many as there are: of each kind the fewer of the two sides.
            let mut sides: BTreeMap<_, [usize; 2]> = BTreeMap::new();
            for (four_bit, batch, rank, rate) in &rows {
                sides.entry((batch, rank, rate)).or_default()[usize::from(*four_bit)] += 1;
            }
            prop_assert_eq!(pairs.len(), sides.values().map(|[a, b]| *a.min(b)).sum::<usize>());
        }

        #[test]
        fn a_slice_holds_what_it_says(
            rows in proptest::collection::vec((any::<bool>(), 1u32..4, 1u32..3, 1u32..3), 0..24)
        ) {
            let trials = trials(&rows);
            let facts = Facts::of(&trials);
            if let Some(slice) = facts.slice(&["batch_size", PRECISION], Dependence::Step, |_| true) {
                for fact in &slice.facts {
                    for (name, value) in &slice.fixed {
                        prop_assert_eq!(fact.get(name), value);
                    }
                }
                prop_assert!(sorted(slice.facts.iter().map(|fact| fact.get("batch_size"))).len() > 1);
                // What moves a step is held whether it is named or not.
                for (name, value) in &slice.facts[0].parameters {
                    let free = ["batch_size", PRECISION].contains(&name.as_str());
                    let same = slice.facts.iter().all(|fact| fact.get(name) == value);
                    prop_assert!(free || same || !Dependence::Step.on(name), "{name}");
                }
                // No other slice has more places.
                let mut groups: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
                for fact in &facts.facts {
                    let place = (fact.get("batch_size").to_string(), fact.get(PRECISION).to_string());
                    groups.entry(fact.get("lora_rank").to_string()).or_default().insert(place);
                }
                let several = |places: &&BTreeSet<(String, String)>| {
                    places.iter().map(|(batch, _)| batch).collect::<BTreeSet<_>>().len() > 1
                };
                let most = groups.values().filter(several).map(BTreeSet::len).max();
                let own = groups[&slice.facts[0].get("lora_rank").to_string()].len();
                prop_assert_eq!(most, Some(own));
            }
        }
    }
}
