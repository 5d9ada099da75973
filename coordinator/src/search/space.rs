//! The space of configurations: parameters in their order, conditions, constraints.

use domain::sweep::{
    Distribution, Expression, Problem, SweepSpec, check_parameter, in_force, values_of, with_values,
};
use domain::trial::TrialConfig;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Values of the parameters that apply, by name.
pub(super) type Assignment = BTreeMap<String, Value>;

/// The digest of a configuration in force: equal for points that train alike. Every trial's is held while its sweep
/// runs, so it is short.
pub(super) type Identity = [u8; 16];

#[derive(Debug)]
pub(super) struct Space {
    base: TrialConfig,
    defaults: Map<String, Value>,
    pub(super) parameters: Vec<(String, Distribution)>,
    constraints: Vec<Expression>,
}

/// One point of the space.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    assignment: Assignment,
    pub(super) config: TrialConfig,
    pub(super) identity: Identity,
    /// Whether it meets all constraints.
    pub(super) allowed: bool,
}

impl Space {
    pub(super) fn new(spec: &SweepSpec) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut constraints = Vec::new();
        for (i, constraint) in spec.constraints.iter().enumerate() {
            match Expression::parse(&constraint.0) {
                Ok(expression) => constraints.push(expression),
                Err(e) => problems.push(Problem::new(format!("constraints[{i}]"), e.to_string(), "mend it")),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let defaults = values_of(&spec.base);
        Ok(Self { base: spec.base.clone(), defaults, parameters: spec.parameters.clone(), constraints })
    }

    /// What parameter `distribution` may be, given the values of those before it; `None`: its default.
    pub(super) fn resolve<'a>(
        &self,
        distribution: &'a Distribution,
        before: &Assignment,
    ) -> Option<&'a Distribution> {
        distribution.resolve(&|name, value| {
            before.get(name).or_else(|| self.defaults.get(name)).is_some_and(|actual| actual == value)
        })
    }

    /// Gives `name` a value in its normal form, in which conditions compare it.
    pub(super) fn assign(assignment: &mut Assignment, name: &str, value: Value) {
        let normal = check_parameter(name, &value).unwrap_or(value);
        assignment.insert(name.into(), normal);
    }

    pub(super) fn candidate(&self, assignment: Assignment) -> Candidate {
        let some = assignment.iter().map(|(name, value)| (name.as_str(), value));
        let config = with_values(&self.base, self.defaults.clone(), some);
        let allowed = self.constraints.is_empty() || {
            let values = in_force(&config);
            self.constraints.iter().all(|constraint| constraint.holds(&values))
        };
        let identity = identity(&config);
        Candidate { assignment, config, identity, allowed }
    }

    /// The values that the search chose: all but constants.
    pub(super) fn chosen(&self, candidate: &Candidate) -> BTreeMap<String, Value> {
        let constant = |name: &str| {
            self.parameters.iter().any(|(n, d)| n == name && matches!(d, Distribution::Constant(_)))
        };
        let chosen = candidate.assignment.iter().filter(|(name, _)| !constant(name));
        chosen.map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

fn identity(config: &TrialConfig) -> Identity {
    // A flat struct of strings and numbers serialises without fail.
    let digest = Sha256::digest(serde_json::to_vec(&config.in_force(None)).unwrap_or_default());
    std::array::from_fn(|i| digest[i])
}
