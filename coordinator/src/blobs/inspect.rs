//! What lies in a local store, read and checked without a change.

use super::{FILES, TREES, WHOLE};
use domain::data::{ContentHash, Tree};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::DirEntry;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// Uploaded data as it lies there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inspected {
    /// Trees that can be read.
    pub trees: BTreeMap<ContentHash, Tree>,
    /// Files that are whole, and their lengths.
    pub files: BTreeMap<ContentHash, u64>,
    /// Paths of what an upload that never finished left.
    pub unfinished: Vec<String>,
    /// Paths, and what is wrong there.
    pub problems: Vec<(String, String)>,
}

/// Reads every byte of the uploaded data of a local store, which need not be there.
///
/// # Errors
/// A directory or file cannot be read.
pub fn inspect(root: &Path) -> io::Result<Inspected> {
    let mut found = Inspected::default();
    for entry in entries(&root.join(TREES[0]).join(TREES[1]))? {
        let path = shown(root, &entry);
        match hash(&entry) {
            Some(id) => match tree(&entry.path(), id)? {
                Ok(tree) => drop(found.trees.insert(id, tree)),
                Err(problem) => found.problems.push((path, problem)),
            },
            None => found.unfinished.push(path),
        }
    }
    for entry in entries(&root.join(FILES[0]).join(FILES[1]))? {
        let path = shown(root, &entry);
        let Some(file) = hash(&entry) else {
            found.unfinished.push(path);
            continue;
        };
        let said = match std::fs::read(entry.path().join(WHOLE)) {
            Ok(said) => String::from_utf8_lossy(&said).into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                found.unfinished.push(path);
                continue;
            }
            Err(error) => return Err(error),
        };
        let (bytes, sha256) = measure(&entry.path())?;
        if sha256 != file {
            found.problems.push((path, format!("its bytes have the SHA-256 {sha256}")));
        } else if said != bytes.to_string() {
            found.problems.push((path, format!("it has {bytes} bytes, and should have {said}")));
        } else {
            found.files.insert(file, bytes);
        }
    }
    Ok(found)
}

/// What lies in a directory, in the order of names; nothing if it is not there.
fn entries(dir: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

fn shown(root: &Path, entry: &DirEntry) -> String {
    let path = entry.path();
    path.strip_prefix(root).unwrap_or(&path).display().to_string()
}

/// The hash that names an entry; what the store was writing when it was killed has another name.
fn hash(entry: &DirEntry) -> Option<ContentHash> {
    entry.file_name().to_str()?.parse().ok()
}

fn tree(path: &Path, id: ContentHash) -> io::Result<Result<Tree, String>> {
    let bytes = std::fs::read(path)?;
    if ContentHash::of(&bytes) != id {
        return Ok(Err(format!("its bytes have the SHA-256 {}", ContentHash::of(&bytes))));
    }
    let text = String::from_utf8(bytes).map_err(|error| error.to_string());
    Ok(text.and_then(|text| Tree::parse(&text).map_err(|error| error.to_string())))
}

/// Length and SHA-256 of a file's pieces, up to the first that is missing.
fn measure(dir: &Path) -> io::Result<(u64, ContentHash)> {
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    for piece in 0.. {
        let mut piece = match std::fs::File::open(dir.join(format!("{piece:08}"))) {
            Ok(piece) => piece,
            Err(error) if error.kind() == ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        loop {
            match piece.read(&mut buffer)? {
                0 => break,
                read => {
                    digest.update(&buffer[..read]);
                    bytes += read as u64;
                }
            }
        }
    }
    Ok((bytes, ContentHash(digest.finalize().into())))
}
