//! A client's side: what it trusts and what it shows.

use crate::{FileError, Secret, pem};
use std::path::PathBuf;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic::{Request, Status};

/// What a client trusts and shows. Its files are read at each connection that is made with them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Client {
    /// Authorities of servers; `None`: those that browsers trust.
    pub ca: Option<PathBuf>,
    /// Its own certificate and its private key, for servers that want one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The token that says who it is.
    pub token: Option<Token>,
}

/// Where a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// The first line of a file.
    File(PathBuf),
    /// Here.
    Given(Secret),
}

/// A connection over which each call says who makes it.
pub type Line = InterceptedService<Channel, Credentials>;

/// Says with each call who makes it.
#[derive(Debug, Clone, Default)]
pub struct Credentials(Option<MetadataValue<Ascii>>);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// Why an address cannot be connected to.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// It is no address.
    #[error("{problem}; write https://HOST:PORT, or http://HOST:PORT without TLS")]
    Invalid {
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate was named for a connection that has none.
    #[error(
        "{address} is not encrypted, so that --ca, --cert and --key say nothing; write https:// or leave them out"
    )]
    Plain {
        /// The address.
        address: String,
    },
    /// A token would be readable on the way.
    #[error(
        "{address} is not encrypted, and a token is sent over https:// or to this machine alone; write https://"
    )]
    ReadableToken {
        /// The address.
        address: String,
    },
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A token has characters that none has.
    #[error("the token is none: it has characters that no token has")]
    Token,
}

/// Whether a host is this machine.
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl Client {
    /// These files where they are named, else the other's.
    pub fn or(self, other: Self) -> Self {
        Self {
            ca: self.ca.or(other.ca),
            identity: self.identity.or(other.identity),
            token: self.token.or(other.token),
        }
    }

    /// A server's address, to connect to. One without a scheme is taken for `http://` on this machine, and for
    /// `https://` elsewhere.
    ///
    /// # Errors
    /// It is none, or a file cannot be used.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, AddressError> {
        let invalid = |problem: String| AddressError::Invalid { problem };
        let uri = match address.contains("://") {
            true => address.to_string(),
            false => {
                let uri: Uri = address.parse().map_err(|e| invalid(format!("{address}: {e}")))?;
                let scheme = if uri.host().is_some_and(is_loopback) { "http" } else { "https" };
                format!("{scheme}://{address}")
            }
        };
        let endpoint = Endpoint::from_shared(uri).map_err(|e| invalid(format!("{address}: {e}")))?;
        let uri = endpoint.uri();
        match (uri.scheme_str(), uri.host()) {
            (Some("https"), Some(_)) => {
                let tls = self.tls()?;
                endpoint.tls_config(tls).map_err(|e| invalid(format!("{address}: {}", innermost(&e))))
            }
            (Some("http"), Some(host)) => {
                let address = || address.to_string();
                match is_loopback(host) {
                    true => Ok(endpoint),
                    false if self.token.is_some() => Err(AddressError::ReadableToken { address: address() }),
                    false if self.ca.is_some() || self.identity.is_some() => {
                        Err(AddressError::Plain { address: address() })
                    }
                    false => Ok(endpoint),
                }
            }
            (Some(scheme), Some(_)) => Err(invalid(format!("{address}: {scheme}:// is not known"))),
            _ => Err(invalid(format!("{address} is no address"))),
        }
    }

    /// The token as it is now.
    ///
    /// # Errors
    /// Its file cannot be used.
    pub fn secret(&self) -> Result<Option<Secret>, FileError> {
        match &self.token {
            None => Ok(None),
            Some(Token::File(path)) => Secret::read(path).map(Some),
            Some(Token::Given(secret)) => Ok(Some(secret.clone())),
        }
    }

    /// Calls over a connection to what [`Client::endpoint`] gave, with the token as it is now.
    ///
    /// # Errors
    /// The token cannot be used.
    pub fn line(&self, channel: Channel) -> Result<Line, AddressError> {
        Ok(InterceptedService::new(channel, self.credentials()?))
    }

    /// What each call says, with the token as it is now.
    ///
    /// # Errors
    /// The token cannot be used.
    pub fn credentials(&self) -> Result<Credentials, AddressError> {
        let token = self.secret()?;
        let header = |token: Secret| {
            let text = format!("Bearer {}", token.expose());
            let mut value = MetadataValue::try_from(text).map_err(|_| AddressError::Token)?;
            // Its `Debug` does not show it then.
            value.set_sensitive(true);
            Ok::<_, AddressError>(value)
        };
        Ok(Credentials(token.map(header).transpose()?))
    }

    /// These files, read now.
    ///
    /// # Errors
    /// One cannot be used.
    pub fn tls(&self) -> Result<ClientTlsConfig, FileError> {
        let mut tls = ClientTlsConfig::new();
        tls = match &self.ca {
            None => tls.with_enabled_roots(),
            Some(ca) => {
                // Read for what it says of the file; what is not read right is left out silently otherwise.
                pem::roots(ca)?;
                tls.ca_certificate(Certificate::from_pem(pem::read(ca)?))
            }
        };
        if let Some((cert, key)) = &self.identity {
            pem::certificates(cert)?;
            pem::key(key)?;
            tls = tls.identity(Identity::from_pem(pem::read(cert)?, pem::read(key)?));
        }
        Ok(tls)
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
