//! Certificates and keys in PEM files.

use crate::FileError;
use std::path::Path;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::pki_types::pem::{Error, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// What is said of a file that is no whole PEM: nothing of what it holds.
const DAMAGED: &str = "is no whole PEM file; was it cut off, or is it in another form?";

/// A file's bytes.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|error| FileError::new(path, error))
}

/// The certificates of a file, the server's or client's own first.
///
/// # Errors
/// It cannot be read, or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|_| FileError::new(path, DAMAGED))?;
    match found.is_empty() {
        true => Err(FileError::new(path, "holds no certificate; it begins with -----BEGIN CERTIFICATE-----")),
        false => Ok(found),
    }
}

/// The private key of a file.
///
/// # Errors
/// It cannot be read, or has none.
pub fn key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        Error::NoItemsFound => FileError::new(
            path,
            "holds no private key that can be read; it begins with -----BEGIN PRIVATE KEY-----, without a passphrase",
        ),
        _ => FileError::new(path, DAMAGED),
    })
}

/// The authorities of a file.
///
/// # Errors
/// It cannot be read, has none, or one that is no certificate.
pub fn roots(path: &Path) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| FileError::new(path, format!("is no authority: {error}")))?;
    }
    Ok(roots)
}
