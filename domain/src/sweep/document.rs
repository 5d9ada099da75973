//! A sweep document, a sweep file as JSON, to a checked [`SweepSpec`] and back.
//!
//! `parameters` is a mapping, or a list of mappings with one key each: the order of parameters matters (a
//! grid varies the last one fastest, a `when` looks back), and a protobuf document keeps no order of keys.
//! [`SweepSpec::to_document`] writes the list.

use super::parameter::{LARGEST_WHOLE, check_parameter, remedy, rule_of};
use super::problem::{describe, is_within, join, unknown_key};
use super::{
    Algorithm, Budget, Constraint, Distribution, Evaluations, FewshotOrder, Goal, Problem, Replicates,
    Resources, SearchSpec, SweepSpec,
};
use super::{check, distribution, evaluations};
use crate::metric;
use crate::trial::{PARAMETER_NAMES, TrialConfig};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Keys at the document's root beside the parameters' names.
const SECTIONS: &[&str] = &[
    "name",
    "search",
    "parameters",
    "constraints",
    "budget",
    "resources",
    "keep_adapters",
    EVALUATIONS,
    REPLICATES,
    FINALISTS,
];
/// The section of what models are asked.
const EVALUATIONS: &str = "evaluations";
/// Runs of each of the best trials.
const REPLICATES: &str = "replicates";
/// How many trials are run again.
const FINALISTS: &str = "finalists";
pub(super) const SEARCH: &[&str] = &[
    "algorithm",
    "max_trials",
    "metric",
    "goal",
    "seed",
    "min_steps",
    "reduction_factor",
    "max_concurrent_trials",
];
const BUDGET: &[&str] = &["max_cost_usd", "max_wall_clock"];
const RESOURCES: &[&str] = &["accelerators", MAX_PACK_SIZE];
/// Trials that may share a device.
const MAX_PACK_SIZE: &str = "max_pack_size";
const ALGORITHMS: &[(&str, Algorithm)] = &[
    ("grid", Algorithm::Grid),
    ("random", Algorithm::Random),
    ("one_factor_at_a_time", Algorithm::OneFactorAtATime),
    ("asha", Algorithm::Asha),
];
const GOALS: &[(&str, Goal)] = &[("minimize", Goal::Minimize), ("maximize", Goal::Maximize)];

impl SweepSpec {
    /// Reads and checks a sweep document (a sweep file as JSON). All problems are found, not the first alone.
    ///
    /// # Errors
    /// The problems: first those of single keys in the document's order, then those between keys.
    pub fn from_document(document: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let mut reader = Reader { problems: Vec::new() };
        reader.unknown_keys("", document, &[SECTIONS, PARAMETER_NAMES].concat());
        let mut spec = SweepSpec {
            name: reader.name(document),
            search: reader.search(document),
            parameters: reader.parameters(document),
            base: reader.base(document),
            constraints: reader.constraints(document),
            budget: reader.budget(document),
            resources: reader.resources(document),
            keep_adapters: reader.count(document, "", "keep_adapters", 1),
            evaluations: reader.evaluations(document),
            replicates: reader.replicates(document),
        };
        let mut problems = reader.problems;
        // A part that is wrong in itself is not wrong again for what it lacks.
        let told: Vec<_> = problems.iter().map(|p| p.path.clone()).collect();
        let between = check::between_parts(&mut spec, &told);
        let is_told = |path: &str| told.iter().any(|told| is_within(told, path));
        let is_told = |p: &Problem| is_told(&p.path) || is_told(&join("parameters", &p.path));
        problems.extend(between.into_iter().filter(|p| !is_told(p)));
        if problems.is_empty() { Ok(spec) } else { Err(problems) }
    }

    /// The document with every default in force, from which [`SweepSpec::from_document`] reads the same spec.
    /// A searched parameter's default is not in it: it stands under `parameters`.
    pub fn to_document(&self) -> Map<String, Value> {
        let mut document = Map::new();
        document.insert("name".into(), json!(self.name));
        document.insert("search".into(), without_nulls(json!(self.search)));
        let entry = |(name, distribution): &(String, Distribution)| {
            Value::Object(Map::from_iter([(name.clone(), distribution::write(distribution))]))
        };
        document.insert("parameters".into(), self.parameters.iter().map(entry).collect());
        document.insert("constraints".into(), json!(self.constraints));
        let budget = json!({
            "max_cost_usd": self.budget.max_cost_usd,
            "max_wall_clock": self.budget.max_wall_clock_seconds,
        });
        document.insert("budget".into(), without_nulls(budget));
        document.insert("resources".into(), json!(self.resources));
        document.extend(self.keep_adapters.map(|most| ("keep_adapters".into(), json!(most))));
        document.extend(self.evaluations.as_ref().map(|asked| (EVALUATIONS.into(), json!(asked))));
        if let Some(Replicates { runs, finalists }) = self.replicates {
            document.insert(REPLICATES.into(), json!(runs));
            document.insert(FINALISTS.into(), json!(finalists));
        }
        if let Value::Object(base) = without_nulls(json!(self.base)) {
            let searched = |name: &str| self.parameters.iter().any(|(n, _)| n == name);
            document.extend(base.into_iter().filter(|(name, _)| !searched(name)));
        }
        document
    }
}

fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(object) = &mut value {
        object.retain(|_, v| !v.is_null());
    }
    value
}

/// Reads the parts of a document and notes what is wrong with them.
struct Reader {
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, path: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem::new(path, problem, remedy));
    }

    fn unknown_keys(&mut self, path: &str, object: &Map<String, Value>, known: &[&str]) {
        for key in object.keys().filter(|key| !known.contains(&key.as_str())) {
            self.problems.push(unknown_key(join(path, key), key, known));
        }
    }

    fn name(&mut self, document: &Map<String, Value>) -> String {
        let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        match document.get("name") {
            Some(Value::String(name))
                if name.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && name.chars().all(fit)
                    && name.len() <= 80 =>
            {
                return name.clone();
            }
            None => self.problem("name", "missing", "give the sweep a name, such as name: my-sweep"),
            Some(other) => {
                let problem = format!("must be a name that a folder can have, not {}", describe(other));
                let remedy =
                    "use at most 80 letters, digits, `-`, `_` and `.`, and begin with a letter or digit";
                self.problem("name", problem, remedy);
            }
        }
        String::new()
    }

    /// The mapping at `key`, its keys checked; empty if it is not there.
    fn section(&mut self, document: &Map<String, Value>, key: &str, known: &[&str]) -> Map<String, Value> {
        match document.get(key) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(object)) => {
                self.unknown_keys(key, object, known);
                object.clone()
            }
            Some(other) => {
                let problem = format!("must be a mapping, not {}", describe(other));
                self.problem(key, problem, format!("its keys are {}", known.join(", ")));
                Map::new()
            }
        }
    }

    fn search(&mut self, document: &Map<String, Value>) -> SearchSpec {
        let search = self.section(document, "search", SEARCH);
        let default = SearchSpec::default();
        let count = |reader: &mut Self, key: &str, from: u64| reader.count(&search, "search", key, from);
        let metric = self.metric(&search).unwrap_or(default.metric);
        SearchSpec {
            algorithm: self.one_of(&search, "search", "algorithm", ALGORITHMS).unwrap_or_default(),
            max_trials: count(self, "max_trials", 1),
            goal: self.one_of(&search, "search", "goal", GOALS).unwrap_or_else(|| metric::goal(&metric)),
            metric,
            seed: self.whole(&search, "search", "seed", 0, LARGEST_WHOLE).unwrap_or(default.seed),
            min_steps: count(self, "min_steps", 1),
            reduction_factor: count(self, "reduction_factor", 2).unwrap_or(default.reduction_factor),
            max_concurrent_trials: count(self, "max_concurrent_trials", 1),
        }
    }

    fn metric(&mut self, search: &Map<String, Value>) -> Option<String> {
        match search.get("metric")? {
            Value::String(name) if metric::REPORTED.contains(&name.as_str()) => Some(name.clone()),
            Value::String(name) if metric::task_and_metric(name).is_some() => Some(name.clone()),
            other => {
                let word = other.as_str().unwrap_or_default();
                let remedy = super::problem::did_you_mean(word, metric::REPORTED);
                let problem = format!("{} is no metric that a trial reports as it trains", describe(other));
                self.problem("search.metric", problem, remedy);
                None
            }
        }
    }

    fn one_of<T: Copy>(
        &mut self,
        object: &Map<String, Value>,
        section: &str,
        key: &str,
        known: &[(&str, T)],
    ) -> Option<T> {
        let value = object.get(key)?;
        let found = known.iter().find(|(name, _)| value.as_str() == Some(name));
        if found.is_none() {
            let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
            let problem = format!("must be one of {}, not {}", names.join(", "), describe(value));
            let remedy = super::problem::did_you_mean(value.as_str().unwrap_or_default(), &names);
            self.problem(join(section, key), problem, remedy);
        }
        found.map(|(_, value)| *value)
    }

    /// The whole number at `key`, if it is there and from `from` to `to`.
    fn whole(
        &mut self,
        object: &Map<String, Value>,
        section: &str,
        key: &str,
        from: u64,
        to: u64,
    ) -> Option<u64> {
        let value = object.get(key).filter(|v| !v.is_null())?;
        let whole = value.as_f64().filter(|x| x.fract() == 0.0 && *x >= from as f64 && *x <= to as f64);
        if whole.is_none() {
            let problem = format!("must be a whole number from {from}, not {}", describe(value));
            self.problem(join(section, key), problem, format!("give one of at most {to}"));
        }
        whole.map(|x| x as u64)
    }

    /// [`Reader::whole`] of what is counted.
    fn count(&mut self, object: &Map<String, Value>, section: &str, key: &str, from: u64) -> Option<u32> {
        let whole = self.whole(object, section, key, from, u64::from(u32::MAX));
        whole.and_then(|n| u32::try_from(n).ok())
    }

    fn parameters(&mut self, document: &Map<String, Value>) -> Vec<(String, Distribution)> {
        let Some(entries) = self.parameter_entries(document) else {
            let remedy = "write parameters: { lora_rank: [8, 16] }";
            self.problem("parameters", "must be a mapping of parameters to their values", remedy);
            return Vec::new();
        };
        let mut parameters: Vec<(String, Distribution)> = Vec::new();
        for (name, value) in entries {
            let path = join("parameters", name);
            if rule_of(name).is_none() {
                self.problems.push(unknown_key(path, name, PARAMETER_NAMES));
                continue;
            }
            if document.contains_key(name) {
                self.problem(&path, format!("{name} is given at the top level too"), "remove one of the two");
            }
            if parameters.iter().any(|(n, _)| n == name) {
                self.problem(&path, format!("{name} is there twice"), "remove one of the two");
                continue;
            }
            if let Some(distribution) = distribution::read(&mut self.problems, &path, name, value) {
                parameters.push((name.clone(), distribution));
            }
        }
        parameters
    }

    /// The parameters' names and values in order; `None` if it is neither a mapping nor a list of such.
    fn parameter_entries<'a>(
        &self,
        document: &'a Map<String, Value>,
    ) -> Option<Vec<(&'a String, &'a Value)>> {
        match document.get("parameters") {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Object(object)) => Some(object.iter().collect()),
            Some(Value::Array(items)) => {
                let mappings: Option<Vec<_>> = items.iter().map(Value::as_object).collect();
                Some(mappings?.into_iter().flatten().collect())
            }
            Some(_) => None,
        }
    }

    fn base(&mut self, document: &Map<String, Value>) -> TrialConfig {
        let mut object = Map::new();
        for (name, value) in document.iter().filter(|(name, _)| PARAMETER_NAMES.contains(&name.as_str())) {
            match check_parameter(name, value) {
                Ok(value) => drop(object.insert(name.clone(), value)),
                Err(problem) if value.is_array() || value.is_object() => {
                    self.problem(name, problem, format!("to search over {name}, put it under parameters"));
                }
                Err(problem) => self.problem(name, problem, remedy(name)),
            }
        }
        // Every value has passed its check alone, and no check looks at two.
        serde_json::from_value(Value::Object(object)).unwrap_or_default()
    }

    fn constraints(&mut self, document: &Map<String, Value>) -> Vec<Constraint> {
        let texts = match document.get("constraints") {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Array(items)) => items.iter().map(Value::as_str).collect::<Option<Vec<_>>>(),
            Some(_) => None,
        };
        let Some(texts) = texts else {
            let remedy = "write constraints: [\"lora_rank * batch_size <= 128\"]";
            self.problem("constraints", "must be a list of texts", remedy);
            return Vec::new();
        };
        for (i, text) in texts.iter().enumerate() {
            if let Err(error) = super::Expression::parse(text) {
                let remedy = "write a condition such as lora_rank * batch_size <= 128";
                self.problem(format!("constraints[{i}]"), error.to_string(), remedy);
            }
        }
        texts.into_iter().map(|text| Constraint(text.into())).collect()
    }

    fn evaluations(&mut self, document: &Map<String, Value>) -> Option<Evaluations> {
        document.get(EVALUATIONS).filter(|section| !section.is_null())?;
        let section = self.section(document, EVALUATIONS, evaluations::KEYS);
        let tasks = section.get("tasks").and_then(Value::as_array).cloned().unwrap_or_default();
        let is_task = |task: &Value| match task {
            Value::String(name) => !name.is_empty(),
            Value::Object(keys) => {
                ["task", "preset"].iter().any(|key| keys.get(*key).is_some_and(Value::is_string))
            }
            _ => false,
        };
        if tasks.is_empty() || !tasks.iter().all(is_task) {
            let problem = "must be a list of tasks";
            let remedy = "write tasks: [arc_challenge, ./my-task.yaml]; docs/evaluation.md has their names";
            self.problem(join(EVALUATIONS, "tasks"), problem, remedy);
        }
        let when = section.get("when").filter(|when| !when.is_null());
        let when = when.and_then(|when| {
            distribution::read_conditions(&mut self.problems, &join(EVALUATIONS, "when"), when)
        });
        Some(Evaluations {
            tasks,
            when: when.unwrap_or_default(),
            num_fewshot: self.count(&section, EVALUATIONS, "num_fewshot", 0),
            fewshot_order: self.fewshot_order(&section),
            limit: self.count(&section, EVALUATIONS, "limit", 1),
            task_data: self.places(&section, "task_data"),
            fewshot_data: self.places(&section, "fewshot_data"),
        })
    }

    fn fewshot_order(&mut self, section: &Map<String, Value>) -> Option<FewshotOrder> {
        let value = section.get("fewshot_order").filter(|value| !value.is_null())?;
        let order = value.as_str().and_then(FewshotOrder::parse);
        if order.is_none() {
            let problem = format!("must be v0.4 or v0.3, not {}", describe(value));
            let remedy = "name the harness's version whose order it is to be";
            self.problem(join(EVALUATIONS, "fewshot_order"), problem, remedy);
        }
        order
    }

    fn replicates(&mut self, document: &Map<String, Value>) -> Option<Replicates> {
        let count = |reader: &mut Self, key| {
            let whole = reader.whole(document, "", key, 1, Replicates::MOST);
            whole.and_then(|n| u32::try_from(n).ok())
        };
        let (runs, finalists) = (count(self, REPLICATES), count(self, FINALISTS));
        let told = |reader: &Self| reader.problems.iter().any(|problem| problem.path == REPLICATES);
        // One run says that none is run again: an extension overrides replicates alone, and its document has both.
        if finalists.is_some() && runs.is_none() && !told(self) {
            let problem = "says how many trials are run again, and none is";
            self.problem(FINALISTS, problem, "add replicates: 3, or remove it");
        }
        let finalists = finalists.unwrap_or(Replicates::DEFAULT_FINALISTS);
        runs.filter(|runs| *runs > 1).map(|runs| Replicates { runs, finalists })
    }

    /// Paths by tasks' names.
    fn places(&mut self, section: &Map<String, Value>, key: &str) -> BTreeMap<String, String> {
        let path = |(task, path): (&String, &Value)| Some((task.clone(), path.as_str()?.to_owned()));
        let places = match section.get(key) {
            None | Some(Value::Null) => Some(BTreeMap::new()),
            Some(Value::Object(places)) => places.iter().map(path).collect(),
            Some(_) => None,
        };
        if places.is_none() {
            let remedy = format!("write {key}: {{ arc_challenge: ./ARC-Challenge-Test.jsonl }}");
            self.problem(join(EVALUATIONS, key), "must be a mapping of tasks to paths", remedy);
        }
        places.unwrap_or_default()
    }

    fn budget(&mut self, document: &Map<String, Value>) -> Budget {
        let budget = self.section(document, "budget", BUDGET);
        let mut read = |key: &str, remedy: &str, amount: fn(&Value) -> Option<f64>| {
            let value = budget.get(key).filter(|v| !v.is_null())?;
            let found = amount(value).filter(|x| x.is_finite() && *x > 0.0);
            if found.is_none() {
                let problem = format!("must be above 0, not {}", describe(value));
                self.problem(join("budget", key), problem, remedy);
            }
            found
        };
        Budget {
            max_cost_usd: read("max_cost_usd", "give an amount in US dollars", Value::as_f64),
            max_wall_clock_seconds: read("max_wall_clock", "write 6h, 30m, 1h30m or seconds", seconds),
        }
    }

    fn resources(&mut self, document: &Map<String, Value>) -> Resources {
        let resources = self.section(document, "resources", RESOURCES);
        let accelerators = match resources.get("accelerators") {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(items)) => {
                items.iter().map(|i| i.as_str().filter(|s| !s.is_empty()).map(String::from)).collect()
            }
            Some(_) => None,
        };
        if accelerators.is_none() {
            let remedy = "write accelerators: [A100-40GB]; an empty list means any";
            self.problem("resources.accelerators", "must be a list of accelerator names", remedy);
        }
        let max_pack_size = self.count(&resources, "resources", MAX_PACK_SIZE, 1);
        Resources { accelerators: accelerators.unwrap_or_default(), max_pack_size }
    }
}

/// A duration: a number of seconds, or numbers with units, `1h30m`.
fn seconds(value: &Value) -> Option<f64> {
    let Some(text) = value.as_str() else { return value.as_f64() };
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| c.is_ascii_alphabetic())?;
        let amount: f64 = rest[..end].parse().ok()?;
        let unit = match rest.as_bytes()[end] {
            b'd' => 86400.0,
            b'h' => 3600.0,
            b'm' => 60.0,
            b's' => 1.0,
            _ => return None,
        };
        total += amount * unit;
        rest = &rest[end + 1..];
    }
    Some(total)
}
