//! The output directory: the adapter, and `checkpoint-N` directories from which `--resume` goes on.

use crate::Failure;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use trainer::TrainError;
use trainer::adapter_file::{CONFIG_FILE, WEIGHTS_FILE};
use trainer::files::{Outlives, sync_directory};
use trainer::run::{RESUME_FILE, Run};

/// The files by which a directory holds a finished adapter.
const FINISHED: [&str; 2] = [WEIGHTS_FILE, CONFIG_FILE];

/// An output directory.
pub(crate) struct Output {
    dir: PathBuf,
    /// The checkpoint that is being written, by a thread of its own.
    writing: Option<JoinHandle<Result<(), TrainError>>>,
}

impl Output {
    fn of(dir: &Path) -> Self {
        Self { dir: dir.into(), writing: None }
    }

    /// The directory of a run from the beginning. What an earlier run left there is an error unless it is to be
    /// overwritten.
    pub(crate) fn fresh(dir: &Path, overwrite: bool) -> Result<Self, Failure> {
        let output = Self::of(dir);
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
        let output = Self::of(dir);
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

    /// Has `checkpoint-N` written while the run goes on, adapter and resume state together, under another name until it is
    /// whole. One at a time: the one before is waited for.
    ///
    /// # Errors
    /// One of the two cannot be written, of this one as far as that is known by now.
    pub(crate) fn checkpoint(&mut self, run: &mut Run) -> Result<PathBuf, TrainError> {
        self.wait()?;
        let path = self.dir.join(format!("checkpoint-{}", run.step()));
        if path.exists() {
            return Ok(path);
        }
        let partial = self.dir.join(format!(".checkpoint-{}.partial", run.step()));
        let (snapshot, dir, whole) = (run.snapshot()?, self.dir.clone(), path.clone());
        let write = move || {
            snapshot.write(&partial, &partial, Outlives::Machine)?;
            std::fs::rename(&partial, &whole).map_err(TrainError::io(&whole))?;
            sync_directory(&dir)
        };
        let thread = std::thread::Builder::new().name("checkpoints".into()).spawn(write);
        self.writing = Some(thread.map_err(TrainError::io(&path))?);
        Ok(path)
    }

    /// Hears of the checkpoint that is being written, if that is over.
    ///
    /// # Errors
    /// It could not be written.
    pub(crate) fn look(&mut self) -> Result<(), TrainError> {
        let is_over = self.writing.as_ref().is_some_and(JoinHandle::is_finished);
        if is_over { self.wait() } else { Ok(()) }
    }

    /// Waits for the checkpoint that is being written.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn wait(&mut self) -> Result<(), TrainError> {
        let Some(thread) = self.writing.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Writes the adapter into the directory itself, with what a longer run would go on from.
    pub(crate) fn finish(&mut self, run: &mut Run) -> Result<(), TrainError> {
        self.wait()?;
        run.save(&self.dir, &self.dir, Outlives::Machine)
    }
}

fn unusable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::invalid(format!("--output-dir: {}: {error}; name a directory to write to", path.display()))
}
