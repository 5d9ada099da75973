//! Numbers, sizes and times as people read them. GB is 10⁹ bytes.

use domain::Timestamp;
use serde_json::Value;
use std::time::Duration;

/// What stands where nothing was measured.
pub(super) const NONE: &str = "–";

/// The sign before what is below zero.
const MINUS: char = '−';

/// `show(value)`, or a dash where nothing was measured.
pub(super) fn or_dash<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| NONE.into(), show)
}

/// Four significant digits, in powers of ten beyond five places either way: `2.941`, `0.0002`, `3e-5`.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    if !(1e-4..1e6).contains(&size) {
        let text = format!("{value:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", trim(mantissa));
    }
    let digits = (3 - size.log10().floor() as i32).max(0) as usize;
    trim(&format!("{value:.digits$}")).into()
}

/// A fixed number of digits after the point: columns of losses line up.
pub(super) fn loss(value: f64) -> String {
    if value.abs() < 1e4 { format!("{value:.4}") } else { number(value) }
}

/// A whole number with thin groups of three: `92 480`.
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202F}');
        }
        text.push(digit);
    }
    text
}

/// The unit in which so many bytes are told, and the bytes of one.
pub(super) fn byte_unit(bytes: f64) -> (f64, &'static str) {
    match bytes {
        1e9.. => (1e9, "GB"),
        1e6.. => (1e6, "MB"),
        1e3.. => (1e3, "kB"),
        _ => (1.0, "bytes"),
    }
}

/// A size in bytes: `17.2 GB`, `38 kB`.
pub(super) fn bytes(value: u64) -> String {
    let (divisor, unit) = byte_unit(value as f64);
    let value = value as f64 / divisor;
    let digits = usize::from(value < 100.0 && divisor > 1.0);
    format!("{} {unit}", trim(&format!("{value:.digits$}")))
}

/// US dollars, to the cent where it costs something and to two digits where it costs next to nothing.
pub(super) fn usd(value: f64) -> String {
    match value {
        0.0 => "$0".into(),
        v if v < 0.01 => format!("${}", trim(&format!("{v:.6}"))),
        v => format!("${v:.2}"),
    }
}

/// A share in per cent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return NONE.into();
    }
    format!("{} %", trim(&format!("{:.2}", part as f64 / whole as f64 * 100.0)))
}

/// A ratio's distance from 1 in per cent, without its sign: to a tenth below ten.
pub(super) fn change(ratio: f64) -> String {
    let percent = (ratio - 1.0).abs() * 100.0;
    let digits = usize::from(percent < 9.95);
    format!("{} %", trim(&format!("{percent:.digits$}")))
}

/// A change by a ratio with its sign: `+12 %`, `−4.1 %`, `0 %`.
pub(super) fn signed_change(ratio: f64) -> String {
    let change = change(ratio);
    if change == "0 %" { change } else { format!("{}{change}", if ratio > 1.0 { '+' } else { MINUS }) }
}

/// A difference with its sign, to four digits after the point.
pub(super) fn signed(value: f64) -> String {
    minus(&format!("{value:+.4}"))
}

/// The ends of a difference's interval.
pub(super) fn interval((low, high): (f64, f64)) -> String {
    format!("{} to {}", signed(low), signed(high))
}

/// A number's text with the sign that mathematics has.
pub(super) fn minus(text: &str) -> String {
    text.replace('-', &MINUS.to_string())
}

/// The unit in which a length of time is drawn, and the seconds of one.
pub(super) fn time_unit(seconds: f64) -> (f64, &'static str) {
    match seconds {
        7200.0.. => (3600.0, "hours"),
        120.0.. => (60.0, "minutes"),
        _ => (1.0, "seconds"),
    }
}

/// A length of time: `1 h 4 min`, `2 min 5 s`, `7.3 s`.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        3600.. => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        60.. => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// The same of seconds, which may be none that are a length of time.
pub(super) fn seconds(value: f64) -> String {
    Duration::try_from_secs_f64(value).map_or_else(|_| NONE.into(), duration)
}

/// `2026-02-28 23:59 UTC`: Howard Hinnant's days-to-civil over the 400-year cycle.
pub(super) fn date(time: Timestamp) -> String {
    let minutes = time.0 / 60_000;
    let days = minutes / 1440 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60 % 24, minutes % 60)
}

/// A parameter's value: numbers short, texts bare, lists with commas.
pub(super) fn value(value: &Value) -> String {
    match value {
        Value::Number(n) if n.is_f64() => or_dash(n.as_f64(), number),
        Value::String(text) => domain::data::shown(text),
        Value::Array(items) => items.iter().map(self::value).collect::<Vec<_>>().join(", "),
        Value::Null => NONE.into(),
        other => other.to_string(),
    }
}

/// A metric as the title of an axis, with its unit.
pub(super) fn titled(metric: &str) -> String {
    use domain::metric::{EVAL_LOSS, LOSS, task_and_metric};
    match metric {
        EVAL_LOSS | LOSS => format!("{metric}, nats a token"),
        name if task_and_metric(name).is_some() => name.into(),
        name => {
            let unit = domain::metric::definition(name).map(|definition| definition.unit);
            // UCUM's annotations are in braces.
            let said = |unit: &str| format!("{name}, {}", unit.replace(['{', '}'], ""));
            unit.filter(|unit| *unit != "1").map_or_else(|| name.into(), said)
        }
    }
}

/// Without zeros that say nothing.
fn trim(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_read_them() {
        for (got, want) in [
            (number(2.941719), "2.942"),
            (number(0.0002), "0.0002"),
            (number(3e-5), "3e-5"),
            (number(1234.5), "1234"),
            (number(2.5e7), "2.5e7"),
            (number(-0.5), "-0.5"),
            (number(0.0), "0"),
            (number(f64::NAN), "NaN"),
            (count(7), "7"),
            (count(92_480), "92\u{202F}480"),
            (count(6_738_415_616), "6\u{202F}738\u{202F}415\u{202F}616"),
            (bytes(17_200_000_000), "17.2 GB"),
            (bytes(380_123), "380 kB"),
            (bytes(1_500), "1.5 kB"),
            (bytes(12), "12 bytes"),
            (usd(0.0), "$0"),
            (usd(0.000_42), "$0.00042"),
            (usd(12.345), "$12.35"),
            (percent(1, 80), "1.25 %"),
            (percent(1, 0), "–"),
            (change(0.26), "74 %"),
            (change(1.039), "3.9 %"),
            (change(1.0), "0 %"),
            (signed_change(0.959), "−4.1 %"),
            (signed_change(1.12), "+12 %"),
            (signed_change(1.0), "0 %"),
            (titled("eval/loss"), "eval/loss, nats a token"),
            (titled("eval/t/acc"), "eval/t/acc"),
            (titled("samples_per_second"), "samples_per_second, row/s"),
            (signed(-0.05), "−0.0500"),
            (interval((-0.25, 1.0)), "−0.2500 to +1.0000"),
            (duration(Duration::from_millis(7_340)), "7.3 s"),
            (seconds(7.34), "7.3 s"),
            (seconds(f64::INFINITY), "–"),
            (seconds(-1.0), "–"),
            (duration(Duration::from_secs(125)), "2 min 5 s"),
            (duration(Duration::from_secs(3_900)), "1 h 5 min"),
            (date(Timestamp(0)), "1970-01-01 00:00 UTC"),
            (date(Timestamp(951_782_399_000)), "2000-02-28 23:59 UTC"),
            (date(Timestamp(951_782_400_000)), "2000-02-29 00:00 UTC"),
            (date(Timestamp(1_795_491_021_000)), "2026-11-24 03:30 UTC"),
            (value(&serde_json::json!(["q_proj", "v_proj"])), "q_proj, v_proj"),
            (value(&serde_json::json!(1e-3)), "0.001"),
            (value(&serde_json::json!(16)), "16"),
        ] {
            assert_eq!(got, want);
        }
    }
}
