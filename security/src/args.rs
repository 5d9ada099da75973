//! The flags of all programs.

use crate::client::Token;
use crate::server::ServerFiles;
use crate::{Client, FileError, Secret, ServerTls, client};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tonic::transport::Uri;

/// How a server is reached by others.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServerArgs {
    /// The server's certificate, in PEM, with those between it and an authority that clients know. A changed file is
    /// read again.
    #[arg(long, env = "LORAFLEET_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, in PEM.
    #[arg(long, env = "LORAFLEET_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Authorities, in PEM: each client must show a certificate of one of them.
    #[arg(long, env = "LORAFLEET_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub client_ca: Option<PathBuf>,
    /// Serve without encryption at an address that other machines reach. For private networks.
    #[arg(long, env = "LORAFLEET_ALLOW_PLAINTEXT")]
    pub allow_plaintext: bool,
}

/// Why the flags of a server do not go together.
#[derive(Debug, thiserror::Error)]
pub enum ServerArgsError {
    /// Nothing would be encrypted, and nobody said that this is meant.
    #[error(
        "--listen {0}: others could reach it, and it does not encrypt; give it a certificate with --tls-cert and \
         --tls-key, or listen on 127.0.0.1 and reach it through a tunnel, or say --allow-plaintext on a private network"
    )]
    Plaintext(SocketAddr),
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

impl ServerArgs {
    /// What these flags make of a server that listens there.
    ///
    /// # Errors
    /// Plaintext was not asked for, or a file cannot be used.
    pub fn tls(&self, listen: SocketAddr) -> Result<Option<Arc<ServerTls>>, ServerArgsError> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => {
                let files =
                    ServerFiles { cert: cert.clone(), key: key.clone(), client_ca: self.client_ca.clone() };
                Ok(Some(Arc::new(ServerTls::open(files)?)))
            }
            _ if listen.ip().is_loopback() || self.allow_plaintext => Ok(None),
            _ => Err(ServerArgsError::Plaintext(listen)),
        }
    }
}

/// What a client trusts and shows.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ClientArgs {
    /// Authorities of servers' certificates, in PEM; those that browsers trust, unless given.
    #[arg(long, env = "LORAFLEET_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Certificate to show to servers that want one, in PEM.
    #[arg(long, env = "LORAFLEET_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The private key of --cert, in PEM.
    #[arg(long, env = "LORAFLEET_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// File whose first line is the token that says who calls. Without it, LORAFLEET_TOKEN is the token itself.
    #[arg(long, env = "LORAFLEET_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// The variable that holds a token. There is no flag for it: whoever lists processes reads flags.
pub const TOKEN_VARIABLE: &str = "LORAFLEET_TOKEN";

impl ClientArgs {
    /// The client that these flags describe.
    pub fn client(&self) -> Client {
        let given = || std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.trim().is_empty());
        let given = || given().map(|token| Token::Given(token.trim().to_string().into()));
        Client {
            ca: self.ca.clone(),
            identity: self.cert.clone().zip(self.key.clone()),
            token: self.token_file.clone().map(Token::File).or_else(given),
        }
    }
}

/// How etcd is talked to.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct EtcdArgs {
    /// Authorities of etcd's certificates, in PEM; those that browsers trust, unless given.
    #[arg(long, env = "LORAFLEET_ETCD_CA", value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate to show to etcd, in PEM.
    #[arg(long, env = "LORAFLEET_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// The private key of --etcd-cert, in PEM.
    #[arg(long, env = "LORAFLEET_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd.
    #[arg(long, env = "LORAFLEET_ETCD_USER", value_name = "NAME", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// File whose first line is the password of --etcd-user. It is read once, at the start.
    #[arg(long, env = "LORAFLEET_ETCD_PASSWORD_FILE", value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

/// Why etcd is not talked to with these flags.
#[derive(Debug, thiserror::Error)]
pub enum EtcdArgsError {
    /// Certificates were named for a connection that has none.
    #[error(
        "--etcd {0} is not encrypted, so that --etcd-ca, --etcd-cert and --etcd-key say nothing; write https:// or leave \
         them out"
    )]
    Plain(String),
    /// The password would be readable on the way.
    #[error(
        "--etcd {0} is not encrypted, and the password of --etcd-user is sent over https:// or to this machine alone; \
         write https://"
    )]
    ReadablePassword(String),
    /// The file of the password cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

/// How etcd is talked to: what is trusted and shown, and a user and the password.
pub type EtcdAccess = (Client, Option<(String, Secret)>);

impl EtcdArgs {
    /// What these flags make of an etcd at these addresses.
    ///
    /// # Errors
    /// See [`EtcdArgsError`].
    pub fn access(&self, addresses: &[String]) -> Result<EtcdAccess, EtcdArgsError> {
        for address in addresses.iter().filter(|address| !address.starts_with("https://")) {
            if self.etcd_ca.is_some() || self.etcd_cert.is_some() {
                return Err(EtcdArgsError::Plain(address.clone()));
            }
            if self.etcd_user.is_some() && !is_here(address) {
                return Err(EtcdArgsError::ReadablePassword(address.clone()));
            }
        }
        let client = Client {
            ca: self.etcd_ca.clone(),
            identity: self.etcd_cert.clone().zip(self.etcd_key.clone()),
            token: None,
        };
        let user = self.etcd_user.clone().zip(self.etcd_password_file.as_ref());
        let user = user.map(|(user, file)| Ok::<_, FileError>((user, Secret::read(file)?))).transpose()?;
        Ok((client, user))
    }
}

/// Whether an address is this machine's.
fn is_here(address: &str) -> bool {
    address.parse::<Uri>().is_ok_and(|uri| uri.host().is_some_and(client::is_loopback))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is sent in the open that is secret, and no flag says nothing.
    #[test]
    fn etcd_in_plaintext_gets_no_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let password = dir.path().join("password");
        std::fs::write(&password, "secret").unwrap();
        let ca = EtcdArgs { etcd_ca: Some("ca".into()), ..EtcdArgs::default() };
        let cert =
            EtcdArgs { etcd_cert: Some("cert".into()), etcd_key: Some("key".into()), ..EtcdArgs::default() };
        let user = EtcdArgs {
            etcd_user: Some("me".into()),
            etcd_password_file: Some(password),
            ..EtcdArgs::default()
        };
        let gone = EtcdArgs { etcd_password_file: Some("gone".into()), ..user.clone() };
        let (plain, here, tls) = ("http://10.0.0.2:2379", "http://127.0.0.1:2379", "https://10.0.0.2:2379");
        for (args, addresses, want) in [
            (&EtcdArgs::default(), &[plain, tls][..], None),
            (&ca, &[tls], None),
            (&ca, &[tls, plain], Some("--etcd http://10.0.0.2:2379 is not encrypted, so that --etcd-ca")),
            (&cert, &[here], Some("--etcd-cert")),
            (&cert, &["10.0.0.2:2379"], Some("--etcd 10.0.0.2:2379 is not encrypted")),
            (&user, &[tls, here, "localhost:2379"], None),
            (&user, &[plain], Some("the password of --etcd-user")),
            (&user, &["10.0.0.2:2379"], Some("the password of --etcd-user")),
            (&gone, &[tls], Some("gone: No such file")),
        ] {
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            match (args.access(&addresses), want) {
                (Ok(_), None) => {}
                (Err(error), Some(want)) => assert!(error.to_string().contains(want), "{error}"),
                (found, want) => panic!("{args:?} {addresses:?}: {found:?}, not {want:?}"),
            }
        }
    }
}
