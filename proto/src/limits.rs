//! How much a message may hold, each limit once. What comes from outside is kept, listed, logged and sent on: a limit
//! here is what keeps one caller from filling the server's memory or breaking another caller's answer. All are far
//! above what our own agents and command line send. A message on the wire has at most 4 MiB, tonic's own limit, which
//! holds before it is read into memory.

/// Bytes of a sweep's document. A page of sweeps holds many.
pub const SPEC_BYTES: usize = 256 << 10;

/// Base models of a submission.
pub const BASE_MODELS: usize = 10_000;

/// Bytes of the name of an agent, a device or a metric.
pub const NAME_BYTES: usize = 200;

/// Bytes of a text for people, such as a failure's message; what is longer is cut. It is kept with its trial, and
/// listed with a thousand others.
pub const TEXT_BYTES: usize = 16 << 10;

/// Devices of an agent. Placement looks at each for each waiting trial.
pub const DEVICES: usize = 1024;

/// Labels of an agent.
pub const LABELS: usize = 64;

/// Dollars an hour of a device.
pub const PRICE_PER_HOUR: f64 = domain::machine::MOST_DOLLARS;

/// Seconds of a device that a trial may say it took: three thousand years.
pub const SECONDS: f64 = 1e11;

/// Metrics of a point.
pub const METRICS: usize = 100;

/// Sets of metrics that the points of an attempt have. Ours have fewer than ten: what each step measures, and what is measured
/// beside that at some.
pub const KINDS_OF_POINTS: usize = 100;

/// Steps of a trial whose configuration does not say how many.
pub const STEPS: u64 = 100_000_000;

/// Texts that a trial generated on the way; its record holds them, and has to fit in etcd with them.
pub const SAMPLES: usize = 16;

/// Bytes of each of those; what is longer is cut.
pub const SAMPLE_BYTES: usize = 1 << 10;

/// Scores of a trial's evaluations. MMLU has 57 subjects.
pub const SCORES: usize = 500;

/// Bytes of what a refusal says, its details included. It travels in HTTP/2 headers, of which clients take some 16 kB
/// in all; beyond that they end the connection, and every other call on it.
pub const REFUSAL_BYTES: usize = 2000;

/// The beginning of a text that is at most `most` bytes long, with a mark where it was cut.
pub fn cut(mut text: String, most: usize) -> String {
    const MARK: &str = " …";
    if text.len() > most {
        let most = most.saturating_sub(MARK.len());
        text.truncate((0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn long_texts_are_cut_between_characters() {
        for (text, most, want) in [
            ("abcdef", 6, "abcdef"),
            ("abcdefg", 6, "ab …"),
            ("ééééé", 9, "éé …"),
            ("abc", 0, " …"),
            ("", 0, ""),
        ] {
            assert_eq!(cut(text.into(), most), want, "{text} {most}");
        }
    }
}
