//! What lies in a local store, read and checked without a change.

use super::cleanup::{entries, in_progress, parts};
use super::{ArtifactError, MANIFEST, Manifest, names};
use domain::data::ContentHash;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

/// A part or a spec, or what is left of one.
#[derive(Debug, PartialEq, Eq)]
pub enum Inspected {
    /// It has a manifest.
    Whole {
        /// Its path in the store.
        path: String,
        /// Files that the manifest names.
        files: usize,
        /// Their bytes.
        bytes: u64,
        /// What is not as the manifest says.
        problems: Vec<String>,
    },
    /// A sweep's spec. Whether it is what its name says, [`super::read_spec`] sees.
    Spec {
        /// Its path in the store.
        path: String,
        /// Its bytes.
        bytes: u64,
    },
    /// The rest of an upload.
    Unfinished {
        /// Its path in the store.
        path: String,
    },
}

/// Reads every byte of a local store, which need not be there.
///
/// # Errors
/// The store's root cannot be read.
pub fn inspect(root: &Path) -> Result<Vec<Inspected>, ArtifactError> {
    if let Err(error) = std::fs::read_dir(root)
        && error.kind() != ErrorKind::NotFound
    {
        let source = object_store::Error::Generic { store: "LocalFileSystem", source: error.into() };
        return Err(ArtifactError::Store { path: root.display().to_string(), error: source });
    }
    let mut found = Vec::new();
    let path_of = |file: &Path| file.strip_prefix(root).unwrap_or(file).to_string_lossy().into_owned();
    for sweep in entries(&root.join("sweeps")) {
        for entry in entries(&sweep.path()) {
            let path = path_of(&entry.path());
            if in_progress(&entry) {
                found.push(Inspected::Unfinished { path });
            } else if names::parse_spec(&path).is_ok() {
                let bytes = entry.metadata().map_or(0, |metadata| metadata.len());
                found.push(Inspected::Spec { path, bytes });
            }
        }
    }
    for dir in parts(root) {
        let path = path_of(&dir);
        if !dir.join(MANIFEST).exists() {
            found.push(Inspected::Unfinished { path });
            continue;
        }
        for entry in entries(&dir).iter().filter(|entry| in_progress(entry)) {
            found.push(Inspected::Unfinished {
                path: format!("{path}/{}", entry.file_name().to_string_lossy()),
            });
        }
        found.push(whole(&dir, path));
    }
    Ok(found)
}

fn whole(dir: &Path, path: String) -> Inspected {
    let manifest = std::fs::read(dir.join(MANIFEST)).map_err(|error| error.to_string());
    let manifest =
        manifest.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()));
    let Manifest { part, files } = match manifest {
        Ok(manifest) => manifest,
        Err(problem) => {
            let problems = vec![format!("its {MANIFEST} cannot be read: {problem}")];
            return Inspected::Whole { path, files: 0, bytes: 0, problems };
        }
    };
    let mut problems = Vec::new();
    if !path.rsplit('/').next().is_some_and(|name| name.starts_with(names::folder(part))) {
        problems.push(format!("its {MANIFEST} is of another part"));
    }
    for file in &files {
        match measure(&dir.join(&file.name)) {
            Err(error) => problems.push(format!("`{}`: {error}", file.name)),
            Ok((bytes, _)) if bytes != file.bytes => {
                problems.push(format!("`{}` has {bytes} bytes, and should have {}", file.name, file.bytes));
            }
            Ok((_, sha256)) if sha256 != file.sha256 => {
                problems.push(format!("`{}`: SHA-256 is {sha256}, and should be {}", file.name, file.sha256));
            }
            Ok(_) => {}
        }
    }
    Inspected::Whole { path, files: files.len(), bytes: files.iter().map(|file| file.bytes).sum(), problems }
}

/// A file's length and SHA-256.
fn measure(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, ContentHash(hash.finalize().into()).to_string())),
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}
