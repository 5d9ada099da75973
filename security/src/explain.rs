//! What a connection that failed wants of a person. The reasons lie deep in the chain of an error's sources, whose
//! outermost says "transport error".

use std::error::Error as StdError;
use std::io;
use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage};

/// Whose flags a person is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    /// Those for a server of ours: `--ca`, `--cert`, `--key`.
    Server,
    /// Those for etcd: `--etcd-ca`, `--etcd-cert`, `--etcd-key`.
    Etcd,
}

impl Flags {
    /// What these flags begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Server => "--",
            Self::Etcd => "--etcd-",
        }
    }

    /// The flags that show a certificate.
    pub fn identity(self) -> String {
        let prefix = self.prefix();
        format!("{prefix}cert and {prefix}key")
    }

    /// The server's own flag for the authorities of its clients.
    fn client_ca(self) -> &'static str {
        match self {
            Self::Server => "--client-ca",
            Self::Etcd => "--trusted-ca-file",
        }
    }
}

/// What went wrong between client and server of ours, and what to do; `None` if it is none of what has to do with TLS.
pub fn explain(error: &(dyn StdError + 'static)) -> Option<String> {
    explain_for(Flags::Server, error)
}

/// The same, in the words of these flags.
pub fn explain_for(flags: Flags, error: &(dyn StdError + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // What an `io::Error` wraps is not its source but itself.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let wrapped = wrapped.and_then(|inner| inner.downcast_ref::<Error>());
        if let Some(tls) = wrapped.or_else(|| error.downcast_ref::<Error>()) {
            return Some(of_tls(flags, tls));
        }
        // What ends a connection that was agreed on keeps its words alone.
        let text = error.to_string();
        if let Some((_, alert)) = text.split_once("received fatal alert: ") {
            let name = alert.split(|c: char| !c.is_alphanumeric()).next();
            return Some(of_alert(flags, name.unwrap_or_default()));
        }
        // HTTP/2 takes the first bytes of TLS for the head of a frame that is far too large.
        if text.contains("frame with invalid size") {
            return Some("the server speaks TLS, or no gRPC at all; write the address with https://".into());
        }
        next = error.source();
    }
    None
}

fn of_tls(flags: Flags, error: &Error) -> String {
    match error {
        Error::InvalidCertificate(why) => of_certificate(flags, why),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the server does not speak TLS; write the address with http:// if that is meant".into()
        }
        Error::AlertReceived(alert) => of_alert(flags, &format!("{alert:?}")),
        error => format!("TLS failed: {error}"),
    }
}

fn of_certificate(flags: Flags, why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer => format!(
            "the server's certificate is of no authority that is trusted; name the fleet's with {}ca, or find out who \
             answers there",
            flags.prefix()
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the server's certificate has expired; replace its file on the server, which reads it again by itself"
                .into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the server's certificate is not valid yet; set this machine's clock, or wait".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => format!(
            "{why}; write one of its names as the address, or make a certificate for this one (subjectAltName)"
        ),
        why => format!("the server's certificate cannot be used: {why}"),
    }
}

/// What the other side's refusal means, by the name that its kind has in TLS.
fn of_alert(flags: Flags, name: &str) -> String {
    match name {
        "CertificateRequired" => {
            format!("the server wants a certificate of its clients; show one with {}", flags.identity())
        }
        // Go says `BadCertificate` also where there is none.
        "BadCertificate" | "UnknownCA" | "DecryptError" | "UnsupportedCertificate" | "CertificateUnknown" => {
            format!(
                "the server does not take this client's certificate; show one with {} that is made by an authority of its {}",
                flags.identity(),
                flags.client_ca()
            )
        }
        "CertificateExpired" | "CertificateRevoked" => format!(
            "the server does not take the certificate of {}cert any more: it has expired; renew it",
            flags.prefix()
        ),
        name => format!("the server ended the connection: {name}"),
    }
}
