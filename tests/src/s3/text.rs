//! What S3 writes: XML, percent signs, hexadecimal numbers.

const ESCAPES: [(&str, &str); 5] =
    [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\"", "&quot;"), ("'", "&apos;")];

pub(super) fn escaped(text: &str) -> String {
    ESCAPES.iter().fold(text.into(), |text, (plain, escaped)| text.replace(plain, escaped))
}

/// The texts of all elements of a name.
pub(super) fn elements(xml: &[u8], name: &str) -> Vec<String> {
    let (text, open, close) = (String::from_utf8_lossy(xml), format!("<{name}>"), format!("</{name}>"));
    let found = text.split(&open).skip(1).filter_map(|rest| rest.split_once(&close));
    let plain = |text: &str| {
        ESCAPES.iter().rev().fold(text.to_string(), |text, (plain, escaped)| text.replace(escaped, plain))
    };
    found.map(|(text, _)| plain(text)).collect()
}

/// A text without percent signs before hexadecimal numbers.
pub(super) fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let number =
            after.get(..2).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match (first, number) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
