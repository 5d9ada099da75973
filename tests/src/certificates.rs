//! Certificates for tests: an authority, and what it signs.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use std::path::{Path, PathBuf};

/// An authority whose files lie in a folder.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub ca: PathBuf,
}

/// The files of a certificate and its private key.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl Pair {
    /// Both.
    pub fn both(&self) -> (PathBuf, PathBuf) {
        (self.cert.clone(), self.key.clone())
    }

    /// Gives these files the content of others.
    ///
    /// # Panics
    /// They cannot be written.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn replace_by(&self, other: &Self) {
        std::fs::copy(&other.cert, &self.cert).expect("the certificate is copied");
        std::fs::copy(&other.key, &self.key).expect("the key is copied");
    }
}

#[allow(clippy::expect_used, reason = "a test fails by panicking")]
impl Authority {
    /// Makes one, in a new folder of that name.
    ///
    /// # Panics
    /// The folder cannot be written.
    pub fn new(dir: &Path, name: &str) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).expect("the folder is made");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key is made");
        let certificate = params.self_signed(&key).expect("it signs itself");
        let ca = dir.join("ca.crt");
        std::fs::write(&ca, certificate.pem()).expect("the file is written");
        Self { dir, issuer: Issuer::new(params, key), ca }
    }

    /// A certificate with this common name, valid for `localhost` and 127.0.0.1.
    pub fn issue(&self, name: &str) -> Pair {
        self.issue_for(name, &["localhost", "127.0.0.1"])
    }

    /// A certificate for these names.
    ///
    /// # Panics
    /// One is no name.
    pub fn issue_for(&self, name: &str, names: &[&str]) -> Pair {
        self.write(name, self.params(name, names))
    }

    /// A certificate that is valid no more.
    pub fn issue_expired(&self, name: &str) -> Pair {
        let mut params = self.params(name, &["localhost"]);
        params.not_after = date_time_ymd(2020, 1, 1);
        self.write(name, params)
    }

    fn params(&self, name: &str, names: &[&str]) -> CertificateParams {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("they are names");
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    fn write(&self, name: &str, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key is made");
        let certificate = params.signed_by(&key, &self.issuer).expect("it is signed");
        let file = |ending: &str| self.dir.join(format!("{name}.{ending}"));
        let pair = Pair { cert: file("crt"), key: file("key") };
        std::fs::write(&pair.cert, certificate.pem()).expect("the file is written");
        std::fs::write(&pair.key, key.serialize_pem()).expect("the file is written");
        pair
    }
}
