//! The flags of all programs.

use crate::client::Token;
use crate::server::ServerFiles;
use crate::{Client, FileError, Secret, ServerTls};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// File whose first line is the password of --etcd-user.
    #[arg(long, env = "LORAFLEET_ETCD_PASSWORD_FILE", value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

impl EtcdArgs {
    /// The client of etcd that these flags describe.
    pub fn client(&self) -> Client {
        Client {
            ca: self.etcd_ca.clone(),
            identity: self.etcd_cert.clone().zip(self.etcd_key.clone()),
            token: None,
        }
    }

    /// The user and the password.
    ///
    /// # Errors
    /// The file of the password cannot be used.
    pub fn user(&self) -> Result<Option<(String, Secret)>, FileError> {
        let user = self.etcd_user.clone().zip(self.etcd_password_file.as_ref());
        user.map(|(user, file)| Ok((user, Secret::read(file)?))).transpose()
    }
}
