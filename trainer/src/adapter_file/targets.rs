//! Which linear layers a configuration gives an adapter, of which rank and scale, as PEFT decides it.

use super::PeftConfig;
use crate::error::{Result, TrainError};
use crate::lora::{ModuleSpec, Target};
use crate::model::Base;
use domain::trial::TargetModules;
use std::collections::{BTreeMap, BTreeSet};

/// The linear layers of `base` that get an adapter, in model order.
///
/// # Errors
/// A pattern is no regular expression; a name or a pattern matches no layer, or the head where it is tied; nothing
/// is left to adapt.
pub fn resolve_targets(base: &Base, config: &PeftConfig) -> Result<Vec<Target>> {
    let mut modules = matched(base, &config.target_modules)?;
    if let Some(exclude) = &config.exclude_modules {
        let excluded = selection(exclude, "exclude_modules")?;
        let all = base.linear_modules().into_iter().chain([base.head_module()]);
        if let Some(name) = excluded.idle(&all.map(|m| m.path).collect::<Vec<_>>()) {
            let remedy = "name layers that the model has, or leave it out";
            return Err(TrainError::parameter(
                "exclude_modules",
                format!("{name:?} matches no linear layer"),
                remedy,
            ));
        }
        modules.retain(|module| !excluded.has(&module.path));
    }
    if let Some(layers) = &config.layers_to_transform {
        transformed(base, config, layers)?;
        modules.retain(|module| layer(&module.path).is_some_and(|number| layers.contains(&number)));
    }
    if modules.is_empty() {
        let remedy = "let exclude_modules and layers_to_transform leave one";
        return Err(TrainError::parameter("target_modules", "no linear layer is left to adapt", remedy));
    }
    let ranks = patterned("rank_pattern", &config.rank_pattern, &modules)?;
    let alphas = patterned("alpha_pattern", &config.alpha_pattern, &modules)?;
    let target = |((module, rank), alpha): ((ModuleSpec, Option<usize>), Option<f64>)| {
        let (rank, alpha) = (rank.unwrap_or(config.r), alpha.unwrap_or(config.lora_alpha));
        let divisor = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Target {
            module,
            rank,
            scaling: alpha / divisor,
            use_dora: config.use_dora,
            init: config.init_lora_weights,
        }
    };
    Ok(modules.into_iter().zip(ranks).zip(alphas).map(target).collect())
}

/// Checks `layers_to_transform`.
fn transformed(base: &Base, config: &PeftConfig, layers: &[u32]) -> Result<()> {
    let key = "layers_to_transform";
    let pattern =
        matches!(&config.target_modules, TargetModules::Pattern(p) if p != TargetModules::ALL_LINEAR);
    if pattern {
        let remedy = "give target_modules as a list, or write the layers into the pattern";
        return Err(TrainError::parameter(key, "does not go with a pattern in target_modules", remedy));
    }
    let count = base.layers.len();
    match layers.iter().find(|layer| **layer as usize >= count) {
        None => Ok(()),
        Some(layer) => {
            let problem = format!("names layer {layer}, but the model has {count}, counted from 0");
            Err(TrainError::parameter(key, problem, format!("name layers up to {}", count - 1)))
        }
    }
}

/// A module's decoder layer.
fn layer(path: &str) -> Option<u32> {
    path.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// For each module the value of the key that matches its path, if one does: PEFT's `(.*\.)?(key)`. It takes the first
/// of several; an order of keys is nothing to rely on, so several are refused, and so is a key that matches nothing.
fn patterned<T: Copy>(
    key: &'static str,
    patterns: &BTreeMap<String, T>,
    modules: &[ModuleSpec],
) -> Result<Vec<Option<T>>> {
    let mut values: Vec<Option<(&str, T)>> = vec![None; modules.len()];
    for (pattern, value) in patterns {
        let matches = regex(key, pattern, &format!(r"\A(?:.*\.)?(?:{pattern})\z"))?;
        let mut used = false;
        for (place, module) in values.iter_mut().zip(modules).filter(|(_, module)| matches(&module.path)) {
            if let Some((other, _)) = place {
                let problem = format!("{other:?} and {pattern:?} both match {}", module.path);
                return Err(TrainError::parameter(key, problem, "let one of them leave it out"));
            }
            *place = Some((pattern.as_str(), *value));
            used = true;
        }
        if !used {
            let problem = format!("{pattern:?} matches no adapted layer");
            return Err(TrainError::parameter(
                key,
                problem,
                "write the end of a layer's path, such as q_proj",
            ));
        }
    }
    Ok(values.into_iter().map(|place| place.map(|(_, value)| value)).collect())
}

/// The layers that `targets` means.
fn matched(base: &Base, targets: &TargetModules) -> Result<Vec<ModuleSpec>> {
    let key = "target_modules";
    let decoder = base.linear_modules();
    let tied = base.config.tie_word_embeddings;
    let known: BTreeSet<_> = decoder.iter().map(|m| short_name(&m.path)).collect();
    let mut known = known.into_iter().collect::<Vec<_>>().join(", ");
    if !tied {
        known.push_str(", and the head lm_head");
    }
    if *targets == TargetModules::default() {
        return Ok(decoder);
    }
    let head = base.head_module().path;
    let all: Vec<ModuleSpec> = decoder.into_iter().chain([base.head_module()]).collect();
    let selection = selection(targets, key)?;
    if let Some(name) = selection.idle(&all.iter().map(|m| m.path.clone()).collect::<Vec<_>>()) {
        let (problem, remedy) = match targets {
            TargetModules::Names(_) => (
                format!("{name:?} matches no linear layer"),
                format!("this model has {known}; all-linear means all but the head"),
            ),
            TargetModules::Pattern(_) => (
                format!("no linear layer's whole path is {name:?}"),
                format!("{}; this model has {known}", as_list(name)),
            ),
        };
        return Err(TrainError::parameter(key, problem, remedy));
    }
    let matched: Vec<ModuleSpec> = all.into_iter().filter(|m| selection.has(&m.path)).collect();
    if tied && matched.iter().any(|m| m.path == head) {
        let problem = format!("{head} is tied: this model's head is its embedding, which takes no adapter");
        return Err(TrainError::parameter(key, problem, format!("leave {head} out")));
    }
    Ok(matched)
}

/// Paths, as PEFT matches them: by name, or by a regular expression for the whole of one.
enum Selection<'a> {
    Names(&'a [String]),
    Pattern(&'a str, Box<dyn Fn(&str) -> bool>),
}

fn selection<'a>(modules: &'a TargetModules, key: &'static str) -> Result<Selection<'a>> {
    Ok(match modules {
        TargetModules::Names(names) => Selection::Names(names),
        TargetModules::Pattern(pattern) => {
            let matches = regex(key, pattern, &format!(r"\A(?:{pattern})\z"))?;
            Selection::Pattern(pattern, Box::new(matches))
        }
    })
}

impl Selection<'_> {
    fn has(&self, path: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| named(path, name)),
            Self::Pattern(_, matches) => matches(path),
        }
    }

    /// A name, or the pattern, that matches none of the paths.
    fn idle(&self, paths: &[String]) -> Option<&str> {
        match self {
            Self::Names(names) => {
                let idle = |name: &&String| !paths.iter().any(|path| named(path, name));
                names.iter().find(idle).map(String::as_str)
            }
            Self::Pattern(pattern, matches) => (!paths.iter().any(|path| matches(path))).then_some(*pattern),
        }
    }
}

/// Whether a path is a name, or ends in it after a dot.
fn named(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// What to write instead of a text that is no layer's whole path: a list, if it looks like names.
fn as_list(pattern: &str) -> String {
    let names: Vec<_> = pattern.split(',').map(str::trim).collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
    if !names.iter().all(|name| !name.is_empty() && name.chars().all(is_name)) {
        return "a text is a regular expression of whole paths, such as .*q_proj".into();
    }
    let pattern = match names.as_slice() {
        [name] => format!(".*{name}"),
        names => format!(".*({})", names.join("|")),
    };
    // Under `parameters` a list is one of choices, of which each may be a list.
    let list = names.join(", ");
    format!("write a list, [{list}] (among choices [[{list}]]), or a pattern of whole paths, {pattern}")
}

/// Whether a regular expression, `pattern` as it was given and `whole` as it is applied, matches a path.
fn regex(key: &'static str, pattern: &str, whole: &str) -> Result<impl Fn(&str) -> bool + use<>> {
    // Alone first, so that a place in the message is one in the pattern.
    let compiled = fancy_regex::Regex::new(pattern).and_then(|_| fancy_regex::Regex::new(whole));
    let regex = compiled.map_err(|error| {
        // The parser's own message draws the pattern on several lines; the last says what is wrong.
        let text = error.to_string();
        let why = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
        let remedy = match key {
            "target_modules" => "give all-linear, a list of names, or a pattern of whole module paths",
            _ => "give the end of a layer's path, or a regular expression for it",
        };
        TrainError::parameter(key, format!("{pattern:?} is no regular expression: {why}"), remedy)
    })?;
    // A path is short; only a pattern that backtracks without end gives up on one, and so does not match it.
    Ok(move |path: &str| regex.is_match(path).unwrap_or(false))
}

/// `targets` as PEFT writes it: `all-linear` becomes the sorted list of names.
pub fn written_targets(base: &Base, targets: &TargetModules) -> TargetModules {
    match targets {
        TargetModules::Pattern(word) if word == TargetModules::ALL_LINEAR => {
            let names: BTreeSet<_> =
                base.linear_modules().iter().map(|m| short_name(&m.path).to_string()).collect();
            TargetModules::Names(names.into_iter().collect())
        }
        other => other.clone(),
    }
}

fn short_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}
