//! Files that are whole or absent, and their digests.

use crate::error::{Result, TrainError};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

/// What a file outlives, once it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlives {
    /// The process, however that ends. What the system has not brought to the disk yet goes with the machine.
    Process,
    /// The machine too: writing waits for the disk.
    Machine,
}

/// Writes a file so that a crash of what it outlives leaves the old one or the new one, never a part: a temporary file beside
/// it, made durable if it is to outlive the machine, then renamed.
///
/// # Errors
/// The system refuses.
pub fn write_atomically(path: &Path, bytes: &[u8], outlives: Outlives) -> Result<()> {
    write_with(path, outlives, |out| out.write_all(bytes))
}

/// [`write_atomically`], of what `write` writes.
///
/// # Errors
/// The system refuses.
pub(crate) fn write_with(
    path: &Path,
    outlives: Outlives,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.partial"));
    let file = File::create(&temporary).map_err(TrainError::io(&temporary))?;
    let mut out = BufWriter::new(&file);
    let written = write(&mut out).and_then(|()| out.flush());
    drop(out);
    let written =
        if outlives == Outlives::Machine { written.and_then(|()| file.sync_all()) } else { written };
    written.map_err(TrainError::io(&temporary))?;
    domain::crash::point("file/before-rename");
    std::fs::rename(&temporary, path).map_err(TrainError::io(path))?;
    domain::crash::point("file/after-rename");
    match outlives {
        Outlives::Machine => sync_directory(path.parent().unwrap_or(Path::new("."))),
        Outlives::Process => Ok(()),
    }
}

/// Makes the names in a directory durable.
///
/// # Errors
/// The system refuses.
pub fn sync_directory(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(TrainError::io(dir))
}

/// `sha256:<hex>` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    named(Sha256::digest(bytes).as_ref())
}

/// `sha256:<hex>` of files, each with its name and length in front, so that no two lists of files share one.
///
/// # Errors
/// A file cannot be read.
pub fn digest_files<'a>(files: impl IntoIterator<Item = &'a Path>) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let mut file = File::open(path).map_err(TrainError::io(path))?;
        let length = file.metadata().map_err(TrainError::io(path))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hasher.update(format!("{name}\0{length}\0"));
        loop {
            match file.read(&mut buffer).map_err(TrainError::io(path))? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
    }
    Ok(named(hasher.finalize().as_ref()))
}

fn named(hash: &[u8]) -> String {
    hash.iter().fold("sha256:".to_string(), |text, byte| text + &format!("{byte:02x}"))
}
