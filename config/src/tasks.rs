//! The evaluation tasks that come with the program: the files of `config/tasks/`. The `eval` crate says what their
//! keys mean.

use crate::yaml;
use serde_json::Value;

macro_rules! shipped {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../tasks/", $name, ".yaml")))),*]
    };
}

/// Each file's name without `.yaml`, and its text.
pub const SHIPPED: &[(&str, &str)] = shipped!(
    "arc_challenge",
    "arc_easy",
    "gsm8k",
    "hellaswag",
    "mmlu",
    "open-llm-leaderboard-v1",
    "perplexity",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
);

/// Whether a task's name is that of a file: it ends so, or has a folder.
pub fn is_file(name: &str) -> bool {
    name.contains('/') || name.ends_with(".yaml") || name.ends_with(".yml")
}

/// Reads a task file.
///
/// # Errors
/// Where (`LINE:COLUMN`) it is no YAML or has no JSON form, and why.
pub fn read(text: &str) -> Result<Value, String> {
    let parsed = yaml::parse(text).map_err(|(at, why)| format!("{}:{}: {why}", at.line, at.column))?;
    match parsed.problems.first() {
        Some(problem) => Err(format!("{}: {}", problem.path, problem.problem)),
        None => Ok(parsed.value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_folder_ships_and_reads() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tasks");
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        let shipped: Vec<_> = SHIPPED.iter().map(|(name, _)| format!("{name}.yaml")).collect();
        assert_eq!(shipped, names);
        for (name, text) in SHIPPED {
            assert!(read(text).unwrap_or_else(|why| panic!("{name}.yaml:{why}")).is_object());
        }
        assert!(read("task: [").unwrap_err().contains(": "));
        assert!(read("version: .nan").unwrap_err().contains("version"));
    }
}
