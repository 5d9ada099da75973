//! The cache's files.

use domain::Timestamp;
use domain::data::{ContentHash, Tree, TreeFile};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The folder of a tree's files.
pub(super) const DATA: &str = "data";

/// The file that says that a tree is whole.
pub(super) const TREE: &str = "tree";

/// What a file looks like without reading it: its length, and when it was last written.
pub(super) type Stamp = (u64, Option<SystemTime>);

/// A file as far as it came.
pub(super) struct Part {
    pub(super) path: PathBuf,
    /// Of its bytes so far.
    pub(super) digest: Sha256,
    pub(super) bytes: u64,
}

/// The trees of a cache, whole or not: their bytes, and when they were last used. Makes the directory if need be, and
/// removes what was being removed.
pub(super) fn entries(root: &Path) -> io::Result<Vec<(ContentHash, u64, Timestamp)>> {
    std::fs::create_dir_all(root)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        match entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            Some(tree) => {
                let used = modified(&entry.path().join(TREE)).unwrap_or_default();
                // The list of its files is small, and not counted.
                let list = std::fs::metadata(entry.path().join(TREE)).map_or(0, |about| about.len());
                found.push((tree, size(&entry.path())?.saturating_sub(list), used));
            }
            None => remove(&entry.path()),
        }
    }
    Ok(found)
}

/// Bytes of a directory's files and of those in its folders.
fn size(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let about = entry.metadata()?;
        bytes += if about.is_dir() { size(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}

fn modified(path: &Path) -> Option<Timestamp> {
    let since = path.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Timestamp(since.as_millis() as u64))
}

/// Where a tree lies while it is removed.
pub(super) fn gone(root: &Path, tree: ContentHash, number: u64) -> PathBuf {
    root.join(format!("{tree}.gone-{number}"))
}

/// Removes a directory. What cannot be removed goes at the next start.
pub(super) fn remove(dir: &Path) {
    if let Err(error) = std::fs::remove_dir_all(dir) {
        tracing::warn!(path = %dir.display(), %error, "left in the cache until the agent starts again");
    }
}

/// Notes that a tree was used. The time orders removals and says nothing else, so that it may fail.
pub(super) fn touch(dir: &Path, now: Timestamp) {
    let file = File::options().append(true).open(dir.join(TREE));
    let touched = file.and_then(|file| file.set_modified(UNIX_EPOCH + Duration::from_millis(now.0)));
    if let Err(error) = touched {
        tracing::debug!(path = %dir.display(), %error, "its last use is not noted");
    }
}

/// A whole tree, of that id if there is one, and its files' stamps; `None` if it is not whole. Files are compared with their
/// hashes unless all of them look as they did when they were right. A file that is not right is removed.
pub(super) fn whole(
    dir: &Path,
    id: Option<ContentHash>,
    known: Option<&[Stamp]>,
) -> io::Result<Option<(Tree, Vec<Stamp>)>> {
    let text = match std::fs::read_to_string(dir.join(TREE)) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let tree = Tree::parse(&text).ok().filter(|tree| id.is_none_or(|id| tree.id() == id));
    let Some(tree) = tree else { return Ok(None) };
    let stamps: Option<Vec<_>> =
        tree.files().iter().map(|file| stamp(dir, file)).collect::<io::Result<_>>()?;
    let right = match stamps {
        Some(stamps) if known == Some(stamps.as_slice()) => return Ok(Some((tree, stamps))),
        Some(stamps) => {
            let mut all = true;
            for file in tree.files() {
                all &= is_right(dir, file)?;
            }
            all.then_some(stamps)
        }
        None => None,
    };
    match right {
        Some(stamps) => Ok(Some((tree, stamps))),
        None => {
            tracing::warn!(path = %dir.display(), "cached data was damaged; it is made or fetched again");
            std::fs::remove_file(dir.join(TREE))?;
            Ok(None)
        }
    }
}

/// A file's stamp; `None` if it is not there or has another length.
fn stamp(dir: &Path, file: &TreeFile) -> io::Result<Option<Stamp>> {
    match std::fs::metadata(dir.join(DATA).join(&file.name)) {
        Ok(about) => Ok((about.len() == file.bytes).then(|| (about.len(), about.modified().ok()))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a file is what its hash says. One that is not is removed.
fn is_right(dir: &Path, file: &TreeFile) -> io::Result<bool> {
    let path = dir.join(DATA).join(&file.name);
    let (digest, bytes) = match digest(&path) {
        Ok(read) => read,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let right = bytes == file.bytes && ContentHash(digest.finalize().into()) == file.sha256;
    if !right {
        std::fs::remove_file(&path)?;
    }
    Ok(right)
}

/// The digest of a file's bytes, and how many they are.
pub(super) fn digest(path: &Path) -> io::Result<(Sha256, u64)> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; 1 << 20]);
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((digest, bytes)),
            read => {
                digest.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

/// What is here of a file that is to be fetched; `None` if all of it is.
pub(super) fn begin(dir: &Path, file: &TreeFile) -> io::Result<Option<Part>> {
    if stamp(dir, file)?.is_some() && is_right(dir, file)? {
        return Ok(None);
    }
    let path = part(dir, file);
    match digest(&path) {
        Ok((digest, bytes)) if bytes <= file.bytes => return Ok(Some(Part { path, digest, bytes })),
        Ok(_) => std::fs::remove_file(&path)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(Some(Part { path, digest: Sha256::new(), bytes: 0 }))
}

fn part(dir: &Path, file: &TreeFile) -> PathBuf {
    dir.join(format!("part-{}", file.sha256))
}

/// Puts a part that is whole and right in its place.
pub(super) fn accept(dir: &Path, file: &TreeFile) -> io::Result<()> {
    let part = part(dir, file);
    File::open(&part)?.sync_all()?;
    std::fs::rename(part, dir.join(DATA).join(&file.name))
}

/// Has a tree be whole, of which each file is in its place and right.
pub(super) fn publish(dir: &Path, tree: &Tree) -> io::Result<Vec<Stamp>> {
    let stamps: Option<Vec<_>> =
        tree.files().iter().map(|file| stamp(dir, file)).collect::<io::Result<_>>()?;
    let stamps = stamps.ok_or_else(|| io::Error::other("a file that was fetched is gone"))?;
    let draft = dir.join("tree.new");
    std::fs::write(&draft, tree.text())?;
    std::fs::rename(draft, dir.join(TREE))?;
    Ok(stamps)
}
