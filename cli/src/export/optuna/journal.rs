//! The file of a journal, which several programs may write: a line is added under Optuna's lock, behind those that others
//! added since, and what the lines amount to is known from reading them.

use super::{
    CREATE_STUDY, CREATE_TRIAL, DELETE_STUDY, SET_STUDY_USER_ATTR, SET_TRIAL_INTERMEDIATE_VALUE,
    SET_TRIAL_STATE_VALUES, SET_TRIAL_USER_ATTR, WORKER, is_finished,
};
use crate::Failure;
use crate::export::place;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A journal's file.
pub(super) struct File {
    path: PathBuf,
    /// Bytes of the lines that were read, and how many they are.
    bytes: u64,
    lines: u64,
    kept: Kept,
}

impl File {
    /// The file at a path, of which nothing was read yet.
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.into(), bytes: 0, lines: 0, kept: Kept::default() }
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the lines that are lacking, given what the journal has.
    ///
    /// # Errors
    /// The file cannot be read or written, is no journal, or stays locked.
    pub(super) async fn add(
        &mut self,
        lacking: impl FnOnce(&Kept) -> Result<Vec<Value>, Failure>,
    ) -> Result<(), Failure> {
        let path = self.path.clone();
        let _lock = Lock::take(&path).await?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(place::at(&path))?;
        file.seek(SeekFrom::Start(self.bytes)).map_err(place::at(&path))?;
        let mut new = Vec::new();
        file.read_to_end(&mut new).map_err(place::at(&path))?;
        let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if self.bytes == 0 && whole == 0 && !new.is_empty() {
            return Err(self.no_journal(1, "it has no end"));
        }
        for line in new[..whole].split_inclusive(|byte| *byte == b'\n') {
            self.take(line)?;
        }
        let lines = lacking(&self.kept)?;
        if lines.is_empty() {
            return Ok(());
        }
        // A line without an end is what a program left that was killed as it wrote: nobody writes now.
        file.set_len(self.bytes).map_err(place::at(&path))?;
        file.seek(SeekFrom::Start(self.bytes)).map_err(place::at(&path))?;
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        file.write_all(text.as_bytes()).map_err(place::at(&path))?;
        text.split_inclusive('\n').try_for_each(|line| self.take(line.as_bytes()))
    }

    fn take(&mut self, line: &[u8]) -> Result<(), Failure> {
        self.lines += 1;
        self.bytes += line.len() as u64;
        let line: Value =
            serde_json::from_slice(line).map_err(|error| self.no_journal(self.lines, &error.to_string()))?;
        let Some(op) = line["op_code"].as_u64() else {
            return Err(self.no_journal(self.lines, "it has no op_code"));
        };
        self.kept.apply(op, &line);
        Ok(())
    }

    fn no_journal(&self, line: u64, why: &str) -> Failure {
        Failure::invalid(format!(
            "{}:{line}: is no line of an Optuna journal ({why}); name another file with --to",
            self.path.display()
        ))
    }
}

/// What a journal's lines amount to, as far as it matters to whoever adds to them.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Names of studies by id; `None` of one that was deleted.
    studies: Vec<Option<String>>,
    /// User attributes of the first study.
    attributes: Map<String, Value>,
    /// Trials of all studies by id: the lines that made them, with what happened to them since. Of a finished one, its state.
    trials: Vec<Value>,
    /// Ids of our trials.
    ours: HashMap<String, usize>,
}

impl Kept {
    /// Whether no study was made yet.
    pub(super) fn is_empty(&self) -> bool {
        self.studies.is_empty()
    }

    /// The first study's name.
    pub(super) fn study(&self) -> Option<&str> {
        self.studies.first()?.as_deref()
    }

    /// An attribute of the first study.
    pub(super) fn study_attribute(&self, key: &str) -> Option<&Value> {
        self.attributes.get(key)
    }

    /// Optuna's id of a trial, and what it has of it.
    pub(super) fn trial(&self, id: &str) -> Option<(usize, &Value)> {
        let at = *self.ours.get(id)?;
        Some((at, self.trials.get(at)?))
    }

    /// Takes a line in.
    pub(super) fn apply(&mut self, op: u64, line: &Value) {
        let number = |key: &str| line[key].as_u64().and_then(|number| usize::try_from(number).ok());
        match (u8::try_from(op), number("study_id"), number("trial_id")) {
            (Ok(CREATE_STUDY), _, _) => {
                let name = line["study_name"].as_str().unwrap_or_default();
                // A second of the same name is none.
                if !self.studies.iter().flatten().any(|study| study == name) {
                    self.studies.push(Some(name.into()));
                }
            }
            (Ok(DELETE_STUDY), Some(study), _) => {
                if let Some(name) = self.studies.get_mut(study) {
                    *name = None;
                }
            }
            (Ok(SET_STUDY_USER_ATTR), Some(0), _) => extend(&mut self.attributes, &line["user_attr"]),
            (Ok(CREATE_TRIAL), Some(study), _) if self.studies.get(study).is_some_and(Option::is_some) => {
                let id = line["user_attrs"]["id"].as_str();
                if let Some(id) = id.filter(|_| study == 0 && line["worker_id"] == WORKER) {
                    self.ours.insert(id.into(), self.trials.len());
                }
                self.trials.push(slim(line.clone()));
            }
            (Ok(op), _, Some(trial)) => {
                if let Some(trial) = self.trials.get_mut(trial).filter(|trial| !is_finished(trial)) {
                    apply_to_trial(trial, op, line);
                }
            }
            _ => {}
        }
    }
}

fn apply_to_trial(trial: &mut Value, op: u8, line: &Value) {
    match op {
        SET_TRIAL_STATE_VALUES => {
            trial["state"] = line["state"].clone();
            *trial = slim(trial.take());
        }
        SET_TRIAL_INTERMEDIATE_VALUE => {
            if let Some(step) = line["step"].as_u64() {
                let value = line["intermediate_value"].clone();
                extend_in(trial, "intermediate_values", &json!({ step.to_string(): value }));
            }
        }
        SET_TRIAL_USER_ATTR => extend_in(trial, "user_attrs", &line["user_attr"]),
        _ => {}
    }
}

/// What is kept of a trial.
fn slim(mut trial: Value) -> Value {
    if is_finished(&trial) {
        return json!({ "state": trial["state"] });
    }
    json!({
        // Without a state it was made by `create_trial`, which runs.
        "state": trial.get("state").map_or(json!(super::RUNNING), Value::clone),
        "intermediate_values": trial["intermediate_values"].take(),
        "user_attrs": trial["user_attrs"].take(),
    })
}

fn extend_in(trial: &mut Value, key: &str, with: &Value) {
    if !trial[key].is_object() {
        trial[key] = json!({});
    }
    if let Some(object) = trial[key].as_object_mut() {
        extend(object, with);
    }
}

fn extend(object: &mut Map<String, Value>, with: &Value) {
    object.extend(with.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
}

/// The first and the longest pause between two attempts to lock a journal, and how many there are: 10 s.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));
const ATTEMPTS: u32 = 19;

/// Optuna's `JournalFileSymlinkLock`: whoever makes the link beside the journal holds it.
struct Lock(PathBuf);

impl Lock {
    /// Waits for the lock of a journal.
    ///
    /// # Errors
    /// It stays held, or cannot be made.
    async fn take(journal: &Path) -> Result<Self, Failure> {
        let mut link = journal.as_os_str().to_owned();
        link.push(".lock");
        let link = PathBuf::from(link);
        let mut pause = PAUSES.0;
        for _ in 0..ATTEMPTS {
            match std::os::unix::fs::symlink(journal, &link) {
                Ok(()) => return Ok(Self(link)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(place::at(&link)(error)),
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(PAUSES.1);
        }
        Err(Failure::failed(format!(
            "{}: another program holds the lock of the journal; if it was killed and none writes now, remove the lock",
            link.display()
        )))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Whoever waits makes a new one.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn journal(lines: &[Value]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn study() -> Value {
        json!({ "op_code": 0, "worker_id": "w", "study_name": "s", "directions": [1] })
    }

    fn made(id: &str) -> Value {
        json!({ "op_code": 4, "worker_id": WORKER, "study_id": 0, "state": 0, "user_attrs": { "id": id } })
    }

    fn asked() -> Value {
        json!({ "op_code": 4, "worker_id": "other", "study_id": 0, "datetime_start": "2020-01-01T00:00:00" })
    }

    #[tokio::test]
    async fn what_others_wrote_counts() {
        let (_dir, path) = journal(&[study(), made("a"), asked(), made("b")]);
        let mut file = File::new(&path);
        let mut found = Vec::new();
        file.add(|kept| {
            found.extend(["a", "b", "c"].map(|id| kept.trial(id).map(|(at, _)| at)));
            Ok(vec![made("c")])
        })
        .await
        .unwrap();
        assert_eq!(found, [Some(0), Some(2), None]);
        // Somebody else's study is asked, and a line of theirs was cut short.
        let mut theirs = OpenOptions::new().append(true).open(&path).unwrap();
        write!(theirs, "{}\n{{\"op_code\":4,\"wor", asked()).unwrap();
        file.add(|kept| {
            assert_eq!(kept.trial("c").map(|(at, _)| at), Some(3));
            Ok(vec![made("d")])
        })
        .await
        .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let want = [study(), made("a"), asked(), made("b"), made("c"), asked(), made("d")];
        assert_eq!(text, want.iter().map(|line| format!("{line}\n")).collect::<String>());
        File::new(&path)
            .add(|kept| {
                assert_eq!((kept.study(), kept.trial("d").map(|(at, _)| at)), (Some("s"), Some(5)));
                Ok(vec![])
            })
            .await
            .unwrap();
        assert!(!path.with_extension("lock").exists());
    }

    #[tokio::test]
    async fn a_file_that_is_no_journal_stays_as_it_is() {
        for text in ["notes", "notes\nmore", "{\"op_code\":0}\n{}\nx", "[1]\n"] {
            let (_dir, path) = journal(&[]);
            std::fs::write(&path, text).unwrap();
            let failure = File::new(&path).add(|_| Ok(vec![study()])).await.unwrap_err();
            assert!(failure.message().contains("is no line of an Optuna journal"), "{failure:?}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_stays_is_told() {
        let (_dir, path) = journal(&[]);
        let lock = Lock::take(&path).await.unwrap();
        let failure = File::new(&path).add(|_| Ok(vec![study()])).await.unwrap_err();
        assert!(failure.message().contains("journal.lock: another program holds the lock"), "{failure:?}");
        drop(lock);
        File::new(&path).add(|_| Ok(vec![study()])).await.unwrap();
    }

    #[test]
    fn a_trial_as_optuna_replays_it() {
        let mut kept = Kept::default();
        let line = |op: u8, rest: Value| {
            let mut line = json!({ "op_code": op, "trial_id": 0 });
            extend(line.as_object_mut().unwrap(), &rest);
            line
        };
        for line in [
            study(),
            made("a"),
            line(SET_TRIAL_INTERMEDIATE_VALUE, json!({ "step": 3, "intermediate_value": 1.5 })),
            line(SET_TRIAL_USER_ATTR, json!({ "user_attr": { "step": 3 } })),
        ] {
            kept.apply(line["op_code"].as_u64().unwrap(), &line);
        }
        let (_, have) = kept.trial("a").unwrap();
        assert_eq!(
            (&have["intermediate_values"], &have["user_attrs"]["step"]),
            (&json!({ "3": 1.5 }), &json!(3))
        );
        // Nothing happens to it once it is finished.
        for state in [1, 0] {
            kept.apply(6, &line(SET_TRIAL_STATE_VALUES, json!({ "state": state, "values": null })));
        }
        assert_eq!(kept.trial("a").unwrap().1, &json!({ "state": 1 }));
    }
}
