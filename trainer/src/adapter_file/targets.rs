//! Which linear layers a configuration gives an adapter, of which rank and scale, as PEFT decides it.

use super::PeftConfig;
use crate::error::{Result, TrainError};
use crate::lora::{ModuleSpec, Target};
use crate::model::Base;
use crate::saved::{Kind, SavedSpec, Trainable};
use domain::trial::{PrecisionMode, TargetModules};
use std::collections::{BTreeMap, BTreeSet};

/// The linear layers of `base` that get an adapter, in model order.
///
/// # Errors
/// A pattern is no regular expression; a name or a pattern matches no layer, or the head where it is tied; nothing
/// is left to adapt.
fn resolve_targets(base: &Base, config: &PeftConfig) -> Result<Vec<Target>> {
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
    let saved = config.modules_to_save.as_deref().unwrap_or_default();
    modules.retain(|module| !saved.iter().any(|name| within(&module.path, name)));
    if modules.is_empty() {
        let remedy = "let exclude_modules, layers_to_transform and modules_to_save leave one";
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

/// The modules of `base` that are trained whole, in model order: every one whose path ends in one of the names.
///
/// # Errors
/// A name matches no module, or one that is made of several; a module has an adapter, or is held in 4 bits.
fn resolve_saved(base: &Base, config: &PeftConfig, targets: &[Target]) -> Result<Vec<SavedSpec>> {
    let key = "modules_to_save";
    let (mut modules, names) = (base.modules(), config.modules_to_save.as_deref().unwrap_or_default());
    for name in names {
        // As PEFT, which asks for no dot before the name.
        let matched = || modules.iter().filter(|module| module.path.ends_with(name.as_str()));
        let whole =
            |path: &str| path.match_indices('.').map(|(at, _)| path[..at].to_string()).collect::<Vec<_>>();
        let made_of =
            modules.iter().flat_map(|module| whole(&module.path)).find(|p| p.ends_with(name.as_str()));
        if let Some(path) = made_of {
            let problem = format!("{name:?} matches {path}, which is made of several modules");
            return Err(TrainError::parameter(key, problem, "name those of them that are to be trained"));
        }
        if matched().next().is_none() {
            let known: BTreeSet<_> = modules.iter().map(|m| short_name(&m.path)).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let problem = format!("{name:?} matches no module");
            return Err(TrainError::parameter(key, problem, format!("this model has {known}")));
        }
        let quantised = |m: &&SavedSpec| matches!(m.kind, Kind::Linear(_)) && m.path != base.head.path;
        if base.precision.mode == PrecisionMode::FourBit
            && let Some(module) = matched().find(quantised)
        {
            let problem = format!("{name:?} matches {}, which precision_mode 4bit quantises", module.path);
            let remedy = "leave it out, or set precision_mode to float32, bfloat16 or float16";
            return Err(TrainError::parameter(key, problem, remedy));
        }
    }
    modules.retain(|module| names.iter().any(|name| module.path.ends_with(name.as_str())));
    match modules.iter().find(|module| targets.iter().any(|target| target.module.path == module.path)) {
        None => Ok(modules),
        Some(module) => {
            let problem = format!("matches {}, which has an adapter", module.path);
            let remedy = format!("name it {}, or leave it out of target_modules", short_name(&module.path));
            Err(TrainError::parameter(key, problem, remedy))
        }
    }
}

/// All that a configuration trains of `base`.
///
/// # Errors
/// A pattern is no regular expression; a name or a pattern matches nothing, or the head where it is tied and to get an
/// adapter; nothing is left to adapt; a module cannot be trained whole.
pub fn resolve(base: &Base, config: &PeftConfig) -> Result<Trainable> {
    let targets = resolve_targets(base, config)?;
    let saved = resolve_saved(base, config, &targets)?;
    Ok(Trainable { targets, saved })
}

/// Whether a module is one of that name or stands below one: PEFT gives it no adapter then.
fn within(path: &str, name: &str) -> bool {
    path.match_indices(name).any(|(at, _)| {
        let after = &path[at + name.len()..];
        (at == 0 || path[..at].ends_with('.')) && (after.is_empty() || after.starts_with('.'))
    })
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
