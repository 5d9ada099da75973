//! The output directory: the adapter, and `checkpoint-N` directories from which `--resume` goes on.

use crate::Failure;
use std::path::{Path, PathBuf};
use trainer::TrainError;
use trainer::adapter_file::{CONFIG_FILE, WEIGHTS_FILE};
use trainer::files::{Outlives, sync_directory};
use trainer::run::{RESUME_FILE, Run};

/// The files by which a directory holds a finished adapter.
const FINISHED: [&str; 2] = [WEIGHTS_FILE, CONFIG_FILE];

/// An output directory.
pub(crate) struct Output {
    dir: PathBuf,
}

impl Output {
    /// The directory of a run from the beginning. What an earlier run left there is an error unless it is to be
    /// overwritten.
    pub(crate) fn fresh(dir: &Path, overwrite: bool) -> Result<Self, Failure> {
        let output = Self { dir: dir.into() };
        let checkpoint = output.checkpoints()?.pop().map(|(_, newest)| newest);
        let adapter = FINISHED.iter().map(|name| dir.join(name)).find(|file| file.exists());
        let remedy = "name another directory, or start anew in it with --overwrite-output-dir";
        match (checkpoint, adapter) {
            _ if overwrite => Ok(output),
            (Some(newest), _) => Err(Failure::invalid(format!(
                "--output-dir: {} is a checkpoint of an earlier run; go on from it with --resume, {remedy}",
                newest.display()
            ))),
            (None, Some(file)) => Err(Failure::invalid(format!(
                "--output-dir: {} belongs to an earlier run's adapter; {remedy}",
                file.display()
            ))),
            (None, None) => Ok(output),
        }
    }

    /// Makes the directory ready to be written to. Of an earlier run that this one does not go on from, adapter
    /// and checkpoints are removed: a later `--resume` must not find them.
    pub(crate) fn prepare(&self, resumed: bool) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.dir).map_err(|e| unusable(&self.dir, &e))?;
        if resumed {
            return Ok(());
        }
        for (_, checkpoint) in self.checkpoints()? {
            std::fs::remove_dir_all(&checkpoint).map_err(|e| unusable(&checkpoint, &e))?;
        }
        for file in FINISHED.iter().chain([&RESUME_FILE]).map(|name| self.dir.join(name)) {
            match std::fs::remove_file(&file) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(unusable(&file, &e)),
                _ => {}
            }
        }
        Ok(())
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
        run.save(&partial, &partial, Outlives::Machine)?;
        std::fs::rename(&partial, &path).map_err(TrainError::io(&path))?;
        sync_directory(&self.dir)?;
        Ok(path)
    }

    /// Writes the adapter into the directory itself, with what a longer run would go on from.
    pub(crate) fn finish(&self, run: &Run) -> Result<(), TrainError> {
        run.save(&self.dir, &self.dir, Outlives::Machine)
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::invalid(format!("--output-dir: {}: {error}; name a directory to write to", path.display()))
}
