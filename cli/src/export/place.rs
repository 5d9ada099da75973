//! Where an export appears: whole, and in the place of another only when that is asked for.

use crate::Failure;
use std::path::{Path, PathBuf};

/// Names a path in a system's error.
pub(super) fn at(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::failed(format!("{}: {e}", path.display()))
}

/// Refuses what would be lost: a directory that holds something, or where a directory is made, a file.
pub(super) fn refuse_full(to: &Path, overwrite: bool) -> Result<(), Failure> {
    let full = match std::fs::read_dir(to) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Failure::invalid(format!("--to {}: {error}", to.display()))),
    };
    refuse(to, full && !overwrite, "is not empty; name another directory")
}

/// Refuses a file that is there, and a directory where a file is made.
pub(super) fn refuse_file(to: &Path, overwrite: bool) -> Result<(), Failure> {
    if to.is_dir() {
        return Err(Failure::invalid(format!("--to {}: is a directory; name a file", to.display())));
    }
    refuse(to, to.exists() && !overwrite, "is there already; name another file")
}

fn refuse(to: &Path, refused: bool, why: &str) -> Result<(), Failure> {
    if !refused {
        return Ok(());
    }
    Err(Failure::invalid(format!("--to {}: {why}, or give --overwrite to replace it", to.display())))
}

/// A name of this process beside a path, in the same file system.
pub(super) fn beside(to: &Path, what: &str) -> Result<PathBuf, Failure> {
    let to = std::path::absolute(to).map_err(at(to))?;
    let name = to
        .file_name()
        .ok_or_else(|| Failure::invalid(format!("--to {}: name what can be made", to.display())))?;
    Ok(to.with_file_name(format!(".{}.{what}-{}", name.to_string_lossy(), std::process::id())))
}

/// Puts the whole draft in its place. What came there since it was looked at is as safe as what was there then.
pub(super) fn publish(draft: &Path, to: &Path, overwrite: bool) -> Result<(), Failure> {
    // A file takes a file's place at once, and a directory an empty one's; any other has to be made free.
    if draft.is_file() {
        refuse_file(to, overwrite)?;
        return std::fs::rename(draft, to).map_err(at(to));
    }
    if !overwrite || !to.exists() {
        return std::fs::rename(draft, to).map_err(at(to));
    }
    let old = beside(to, "old")?;
    std::fs::rename(to, &old).map_err(at(to))?;
    if let Err(error) = std::fs::rename(draft, to) {
        let _ = std::fs::rename(&old, to);
        return Err(at(to)(error));
    }
    std::fs::remove_dir_all(&old).map_err(at(&old))
}

/// Removes a draft that did not become whole; what cannot be removed is named like one.
pub(super) fn discard(draft: &Path) {
    let _ = if draft.is_dir() { std::fs::remove_dir_all(draft) } else { std::fs::remove_file(draft) };
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_replaced_whole_and_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out");
        refuse_full(&to, false).unwrap();
        std::fs::create_dir(&to).unwrap();
        refuse_full(&to, false).unwrap();
        std::fs::write(to.join("old"), "x").unwrap();
        assert!(format!("{:?}", refuse_full(&to, false).unwrap_err()).contains("--overwrite"));
        refuse_full(&to, true).unwrap();
        assert!(refuse_full(&to.join("old"), true).is_err(), "a file is no directory");
        let draft = beside(&to, "part").unwrap();
        std::fs::create_dir(&draft).unwrap();
        std::fs::write(draft.join("new"), "y").unwrap();
        assert!(publish(&draft, &to, false).is_err() && to.join("old").exists(), "another was faster");
        publish(&draft, &to, true).unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["out"]);
        assert!(to.join("new").exists() && !to.join("old").exists());
    }

    #[test]
    fn a_file_is_replaced_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("journal.log");
        refuse_file(&to, false).unwrap();
        assert!(refuse_file(dir.path(), true).is_err(), "a directory is no file");
        for text in ["one", "two"] {
            let draft = beside(&to, "part").unwrap();
            std::fs::write(&draft, text).unwrap();
            assert_eq!(publish(&draft, &to, false).is_ok(), text == "one", "another was faster");
            publish(&draft, &to, true).unwrap_or_else(|_| assert_eq!(text, "one"));
            assert_eq!(std::fs::read_to_string(&to).unwrap(), text);
            assert!(format!("{:?}", refuse_file(&to, false).unwrap_err()).contains("--overwrite"));
        }
        refuse_file(&to, true).unwrap();
        discard(&to);
        assert!(!to.exists());
    }
}
