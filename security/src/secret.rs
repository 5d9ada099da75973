//! A text that nobody may read by accident.

use crate::FileError;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tokio_rustls::rustls::crypto::ring;

/// The system gives no random numbers.
#[derive(Debug, thiserror::Error)]
#[error("the system gives no random numbers")]
pub struct NoRandomness;

/// A password or a token. It has no `Display`, and its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Secret {
    /// 256 random bits after a prefix, as hexadecimal digits.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random(prefix: &str) -> Result<Self, NoRandomness> {
        let mut bits = [0; 32];
        let filled = ring::default_provider().secure_random.fill(&mut bits);
        filled.map_err(|_| NoRandomness)?;
        Ok(Self(bits.iter().fold(prefix.into(), |text: String, byte| format!("{text}{byte:02x}"))))
    }

    /// Writes it to a new file that nobody else may read.
    ///
    /// # Errors
    /// The file is there already, or cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let mut options = OpenOptions::new();
        let written = options.write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
            writeln!(file, "{}", self.0)?;
            file.sync_all()
        });
        written.map_err(|error| FileError::new(path, error))
    }

    /// The first line of a file.
    ///
    /// # Errors
    /// It cannot be read, or is empty.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let text = std::fs::read_to_string(path).map_err(|error| FileError::new(path, error))?;
        match text.lines().next().map(str::trim) {
            Some(line) if !line.is_empty() => Ok(Self(line.into())),
            _ => Err(FileError::new(path, "its first line is empty")),
        }
    }

    /// The text itself, for whom it is meant.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn secrets_are_random_and_stay_their_owners() {
        let (one, other) = (Secret::random("lft_").unwrap(), Secret::random("lft_").unwrap());
        assert!(one != other && one.expose().len() == 4 + 64 && one.expose().starts_with("lft_"));
        assert_eq!(format!("{one:?}"), "Secret(…)");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        one.write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Secret::read(&path).unwrap(), one);
        assert!(other.write(&path).unwrap_err().to_string().contains("exists"), "no token is overwritten");
        std::fs::write(&path, "\nlft_").unwrap();
        assert!(Secret::read(&path).unwrap_err().to_string().contains("first line is empty"));
    }
}
