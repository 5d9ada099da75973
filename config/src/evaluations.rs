//! The tasks that a sweep names by their files: what these say stands in the sweep instead, so that it means the same on
//! each machine.

use crate::{paths, tasks};
use domain::sweep::Problem;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Puts what task files say in the place of their names. `base` says against which folder a document path's values
/// resolve. A file that is not there is told of unless `missing` are to be ignored: then its name stays.
pub(crate) fn inline(
    document: &mut Map<String, Value>,
    base: &dyn Fn(&str) -> PathBuf,
    ignore_missing: bool,
) -> Vec<Problem> {
    let tasks = document.get_mut("evaluations").and_then(|section| section.get_mut("tasks"));
    let tasks = tasks.and_then(Value::as_array_mut).into_iter().flatten().enumerate();
    let mut problems = Vec::new();
    for (i, task) in tasks {
        let Some(name) = task.as_str().filter(|name| tasks::is_file(name)) else { continue };
        let at = format!("evaluations.tasks[{i}]");
        let path = base(&at).join(paths::home(name).unwrap_or_else(|| name.into()));
        let mut wrong = |problem: String, remedy: &str| problems.push(Problem::new(&at, problem, remedy));
        match std::fs::read_to_string(&path) {
            Err(_) if ignore_missing => {}
            Err(error) => wrong(
                format!("{name}: cannot be read: {error} (looked for {})", path.display()),
                "name a task file, or a task that ships",
            ),
            Ok(text) => match tasks::read(&text) {
                Err(problem) => wrong(format!("{name}:{problem}"), "docs/evaluation.md shows a task file"),
                Ok(value) if value.get("include").and_then(Value::as_str).is_some_and(tasks::is_file) => {
                    wrong(
                        format!("{name}: includes a file"),
                        "include a task that ships, or copy what the file says",
                    )
                }
                Ok(value) => *task = value,
            },
        }
    }
    problems
}
