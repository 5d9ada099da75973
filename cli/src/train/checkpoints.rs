//! The output directory: the adapter, and `checkpoint-N` directories from which `--resume` goes on.

use crate::Failure;
use std::path::{Path, PathBuf};
use trainer::TrainError;
use trainer::files::sync_directory;
use trainer::run::{RESUME_FILE, Run};

/// An output directory.
pub(crate) struct Output {
    dir: PathBuf,
}

impl Output {
    /// Makes the directory ready for a run from the beginning.
    pub(crate) fn fresh(dir: &Path) -> Result<Self, Failure> {
        let output = Self { dir: dir.into() };
        if let Some((_, newest)) = output.checkpoints()?.pop() {
            return Err(Failure::invalid(format!(
                "--output-dir: {} is a checkpoint of an earlier run; go on from it with --resume, or name \
                 another directory",
                newest.display()
            )));
        }
        std::fs::create_dir_all(dir).map_err(|e| unusable(dir, &e))?;
        let stale = dir.join(RESUME_FILE);
        match std::fs::remove_file(&stale) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(unusable(&stale, &e)),
            _ => Ok(output),
        }
    }

    /// The directory of an earlier run, and the whole checkpoint in it with the most steps.
    pub(crate) fn resumed(dir: &Path) -> Result<(Self, PathBuf), Failure> {
        let output = Self { dir: dir.into() };
        let mut found = output.checkpoints()?;
        if let Some(step) = Run::saved_step(dir) {
            found.push((step, dir.to_path_buf()));
        }
        match found.into_iter().max_by_key(|(step, _)| *step) {
            Some((_, newest)) => Ok((output, newest)),
            None => Err(Failure::invalid(format!(
                "--resume: {} holds no checkpoint; leave --resume out to start anew",
                dir.display()
            ))),
        }
    }

    /// The whole checkpoints, fewest steps first. A directory gets its name when it is whole.
    fn checkpoints(&self) -> Result<Vec<(u64, PathBuf)>, Failure> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(unusable(&self.dir, &e)),
        };
        let named = |path: PathBuf| {
            let step = path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            path.join(RESUME_FILE).is_file().then_some((step, path))
        };
        let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|entry| named(entry.ok()?.path())).collect();
        found.sort();
        Ok(found)
    }

    /// Writes `checkpoint-N`, adapter and resume state together, under another name until it is whole.
    pub(crate) fn checkpoint(&self, run: &Run) -> Result<PathBuf, TrainError> {
        let path = self.dir.join(format!("checkpoint-{}", run.step()));
        if path.exists() {
            return Ok(path);
        }
        let partial = self.dir.join(format!(".checkpoint-{}.partial", run.step()));
        run.save(&partial, &partial)?;
        std::fs::rename(&partial, &path).map_err(TrainError::io(&path))?;
        sync_directory(&self.dir)?;
        Ok(path)
    }

    /// Writes the adapter into the directory itself, with what a longer run would go on from.
    pub(crate) fn finish(&self, run: &Run) -> Result<(), TrainError> {
        run.save(&self.dir, &self.dir)
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::invalid(format!("--output-dir: {}: {error}; name a directory to write to", path.display()))
}
