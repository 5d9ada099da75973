//! What no log may show. Known are the values of variables that hold secrets by their names, the values of the headers that
//! go to a collector, what [`keep`] was told, what stands before the host in an address, and what an object store says of a key
//! in its refusals.

use std::borrow::Cow;
use std::sync::{OnceLock, PoisonError, RwLock};

/// What stands where a secret stood.
const REDACTED: &str = "[redacted]";

/// Shorter values are words like any other: to take them out would make the log unreadable and keep nothing.
const SHORTEST: usize = 8;

/// A variable whose name has one of these in it holds a secret.
const NAMES: [&str; 8] =
    ["TOKEN", "SECRET", "PASSWORD", "PASSPHRASE", "API_KEY", "ACCESS_KEY", "ACCOUNT_KEY", "CUSTOMER_KEY"];

/// Elements of the XML in which S3, and what speaks its protocol, says why it refuses a request: whose key signed it, and the
/// request itself, whose headers hold a session's token. The key may be one that a machine's role was given.
const ELEMENTS: [&str; 7] = [
    "AWSAccessKeyId",
    "Token-0",
    "SignatureProvided",
    "StringToSign",
    "StringToSignBytes",
    "CanonicalRequest",
    "CanonicalRequestBytes",
];

fn known() -> &'static RwLock<Vec<String>> {
    static KNOWN: OnceLock<RwLock<Vec<String>>> = OnceLock::new();
    KNOWN.get_or_init(|| RwLock::new(of_variables(std::env::vars_os().filter_map(text))))
}

/// A variable that is text.
fn text((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

fn of_variables(variables: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, value) in variables {
        // A file that holds one is no secret; where it lies helps who looks for it.
        if name.starts_with("OTEL_EXPORTER_OTLP_") && name.ends_with("HEADERS") {
            let values = value.split(',').filter_map(|pair| Some(pair.split_once('=')?.1.trim()));
            for value in values {
                found.push(value.to_string());
                found.push(decoded(value));
            }
        } else if NAMES.iter().any(|part| name.contains(part)) && !name.ends_with("_FILE") {
            found.push(value);
        }
    }
    let mut forms = Vec::new();
    found.iter().for_each(|secret| add(&mut forms, secret));
    forms
}

/// Adds a secret in the forms that a log may write it in: as it is, quoted, and quoted within a JSON text. Longer ones
/// come first, so that of one that holds another nothing is left.
fn add(forms: &mut Vec<String>, secret: &str) {
    if secret.len() < SHORTEST {
        return;
    }
    let mut form = secret.to_string();
    for _ in 0..3 {
        if !forms.contains(&form) {
            forms.push(form.clone());
        }
        let quoted = format!("{form:?}");
        form = quoted[1..quoted.len() - 1].into();
    }
    forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
}

/// Headers in variables are percent-encoded.
fn decoded(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let hex = text.get(i + 1..i + 3).filter(|_| bytes[i] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Keeps a value out of every log from now on, such as a token that was read from a file.
pub fn keep(secret: &str) {
    add(&mut known().write().unwrap_or_else(PoisonError::into_inner), secret);
}

/// A text without the secrets in it.
pub fn redact(text: &str) -> Cow<'_, str> {
    without(text, &known().read().unwrap_or_else(PoisonError::into_inner))
}

fn without<'a>(text: &'a str, secrets: &[String]) -> Cow<'a, str> {
    let mut clean = Cow::Borrowed(text);
    for secret in secrets {
        if clean.contains(secret.as_str()) {
            clean = Cow::Owned(clean.replace(secret.as_str(), REDACTED));
        }
    }
    if clean.contains('<') {
        clean = ELEMENTS.iter().fold(clean, |text, name| emptied(text, name));
    }
    // `scheme://name:password@host`, and `scheme://token@host`.
    let mut from = 0;
    while let Some(found) = clean.get(from..).and_then(|rest| rest.find("://")) {
        let start = from + found + 3;
        let ends = |c: char| matches!(c, '/' | '?' | '#' | '"') || c.is_whitespace();
        let end = clean[start..].find(ends);
        let authority = &clean[start..end.map_or(clean.len(), |end| start + end)];
        if let Some((user, _)) = authority.rsplit_once('@') {
            let length = user.len();
            clean = Cow::Owned(format!("{}{REDACTED}{}", &clean[..start], &clean[start + length..]));
        }
        from = start;
    }
    clean
}

/// A text with the elements of a name emptied. Of one that was cut off nothing is left.
fn emptied<'a>(text: Cow<'a, str>, name: &str) -> Cow<'a, str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let Some((before, rest)) = text.split_once(&open) else { return text };
    let mut clean = before.to_string();
    for element in rest.split(&open) {
        let after = element.split_once(&close).map_or("", |(_, after)| after);
        clean.extend([open.as_str(), REDACTED, close.as_str(), after]);
    }
    Cow::Owned(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_secrets_are_taken_out() {
        let variables = [
            ("HF_TOKEN", "hf_0123456789"),
            ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abcdefgh,x=1"),
            ("LORAFLEET_TOKEN_FILE", "/etc/lorafleet/token"),
            ("SHORT_TOKEN", "one"),
            ("ETCD_PASSWORD", r#"quo"ted\pass"#),
            ("LONG_TOKEN", "hf_0123456789-and-more"),
            ("HOME", "/home/someone"),
        ];
        let secrets =
            of_variables(variables.map(|(name, value)| (name.to_string(), value.to_string())).into_iter());
        for (text, want) in [
            ("token hf_0123456789 was refused", "token [redacted] was refused"),
            ("key=wJalrXUtnFEMI;", "key=[redacted];"),
            ("sent Bearer abcdefgh", "sent [redacted]"),
            ("sent Bearer%20abcdefgh", "sent [redacted]"),
            ("reads /etc/lorafleet/token", "reads /etc/lorafleet/token"),
            ("one /home/someone", "one /home/someone"),
            // As it is, quoted, and quoted in a JSON text.
            (r#"quo"ted\pass"#, "[redacted]"),
            (r#"{"why":"quo\"ted\\pass"}"#, r#"{"why":"[redacted]"}"#),
            (r#"{"why":"\"quo\\\"ted\\\\pass\""}"#, r#"{"why":"\"[redacted]\""}"#),
            // One that begins with another.
            ("hf_0123456789-and-more", "[redacted]"),
            (
                "to http://me:secret@host:1/x and http://host/y@z",
                "to http://[redacted]@host:1/x and http://host/y@z",
            ),
            ("to https://a-token@host/x", "to https://[redacted]@host/x"),
            ("to http://host?by=me@host", "to http://host?by=me@host"),
            (
                "<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIA0</AWSAccessKeyId><Token-0>of role</Token-0> end",
                "<Code>InvalidAccessKeyId</Code><AWSAccessKeyId>[redacted]</AWSAccessKeyId><Token-0>[redacted]</Token-0> end",
            ),
            (
                "<CanonicalRequest>x-amz-security-token:of role</CanonicalRequest> <CanonicalRequest>cut",
                "<CanonicalRequest>[redacted]</CanonicalRequest> <CanonicalRequest>[redacted]</CanonicalRequest>",
            ),
            ("nothing", "nothing"),
        ] {
            assert_eq!(without(text, &secrets), want, "{text}");
        }
    }
}
