//! What a connection that failed wants of a person. The reasons lie deep in the chain of an error's sources, whose
//! outermost says "transport error".

use std::error::Error as StdError;
use std::io;
use tokio_rustls::rustls::{CertificateError, Error, InvalidMessage};

/// What went wrong between client and server, and what to do; `None` if it is none of what has to do with TLS.
pub fn explain(error: &(dyn StdError + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        // What an `io::Error` wraps is not its source but itself.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let wrapped = wrapped.and_then(|inner| inner.downcast_ref::<Error>());
        if let Some(tls) = wrapped.or_else(|| error.downcast_ref::<Error>()) {
            return Some(of_tls(tls));
        }
        // What ends a connection that was agreed on keeps its words alone.
        let text = error.to_string();
        if let Some((_, alert)) = text.split_once("received fatal alert: ") {
            let name = alert.split(|c: char| !c.is_alphanumeric()).next();
            return Some(of_alert(name.unwrap_or_default()));
        }
        // HTTP/2 takes the first bytes of TLS for the head of a frame that is far too large.
        if text.contains("frame with invalid size") {
            return Some("the server speaks TLS, or no gRPC at all; write the address with https://".into());
        }
        next = error.source();
    }
    None
}

fn of_tls(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(why) => of_certificate(why),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the server does not speak TLS; write the address with http:// if that is meant".into()
        }
        Error::AlertReceived(alert) => of_alert(&format!("{alert:?}")),
        error => format!("TLS failed: {error}"),
    }
}

fn of_certificate(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer => "the server's certificate is of no authority that is trusted; name the \
             fleet's with --ca, or find out who answers there"
            .into(),
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
fn of_alert(name: &str) -> String {
    match name {
        "CertificateRequired" => {
            "the server wants a certificate of its clients; show one with --cert and --key".into()
        }
        // Go says `BadCertificate` also where there is none.
        "BadCertificate" | "UnknownCA" | "DecryptError" | "UnsupportedCertificate" | "CertificateUnknown" => {
            "the server does not take this client's certificate; show one with --cert and --key that is made by an \
             authority of its --client-ca"
                .into()
        }
        "CertificateExpired" | "CertificateRevoked" => {
            "the server does not take the certificate of --cert any more: it has expired; renew it".into()
        }
        name => format!("the server ended the connection: {name}"),
    }
}
