//! Numbers of bytes as people write them.

/// Reads a number of bytes: `8000000000`, `8GB`, `7.5 GiB`.
///
/// # Errors
/// It is none; the message says how to write one.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of bytes; write it as 8000000000, 8GB or 7.5GiB");
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let factor: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        "tib" => 1_099_511_627_776.0,
        _ => return Err(wrong()),
    };
    let bytes = number.trim().parse::<f64>().map_err(|_| wrong())? * factor;
    if bytes >= 1.0 && bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_bytes() {
        for (text, want) in [
            ("8000000000", Some(8_000_000_000)),
            ("8GB", Some(8_000_000_000)),
            ("7.5 GiB", Some(8_053_063_680)),
            (" 300mb ", Some(300_000_000)),
            ("", None),
            ("GB", None),
            ("-1GB", None),
            ("8 G", None),
            ("nan", None),
            ("1e30", None),
        ] {
            assert_eq!(parse(text).ok(), want, "{text:?}");
        }
    }
}
