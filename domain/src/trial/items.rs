//! What a metric makes of single documents: differences between two adapters are taken document by document.

use serde::{Deserialize, Serialize};

/// Scores of single documents under one metric: with an adapter, and of the base without it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ItemScores {
    /// The metric's full name: `eval/arc_challenge/acc_norm`.
    pub metric: String,
    /// The SHA-256 of what was asked, in hexadecimal: only scores of the same documents, asked in the same way and order,
    /// can be paired. Empty of a mean of tasks.
    pub asked: String,
    /// With the adapter, scores from 0 to 1: a byte a document, 255 of them a score of 1.
    #[serde(with = "hexadecimal")]
    pub scores: Vec<u8>,
    /// Without it, the same documents.
    #[serde(with = "hexadecimal")]
    pub base: Vec<u8>,
    /// Of a mean of tasks, whose documents stand under the tasks' own metrics: the names of those.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
    /// Of a perplexity, which is no mean of documents, instead of scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub texts: Option<TextScores>,
}

/// How likely a model finds each of some texts, or each window of a single one: of two at least, all three lists of as many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScores {
    /// With the adapter: the natural logarithm of each text's probability, a finite number.
    pub log_likelihoods: Vec<f32>,
    /// Without it.
    pub base: Vec<f32>,
    /// Words or bytes of each text, above 0.
    pub weights: Vec<u32>,
}

impl TextScores {
    /// These lists, if they are what they must be.
    pub fn new(log_likelihoods: Vec<f32>, base: Vec<f32>, weights: Vec<u32>) -> Option<Self> {
        let texts = weights.len();
        let alike = log_likelihoods.len() == texts && base.len() == texts;
        let finite = log_likelihoods.iter().chain(&base).all(|value| value.is_finite());
        let sound = alike && finite && texts > 1 && weights.iter().all(|weight| *weight > 0);
        sound.then_some(Self { log_likelihoods, base, weights })
    }
}

impl ItemScores {
    /// Bytes of all scores of a trial at most: they travel in one message, and those beyond are not kept.
    pub const MOST_BYTES: usize = 1 << 20;

    /// A score as it is kept, off by 1/510 at most; 0 and 1 are exact.
    pub fn byte(score: f64) -> u8 {
        (score.clamp(0.0, 1.0) * 255.0).round() as u8
    }

    /// How many bytes its scores are.
    pub fn bytes(&self) -> usize {
        let texts = self.texts.as_ref().map_or(0, |texts| 12 * texts.weights.len());
        self.scores.len() + self.base.len() + texts
    }

    /// Those of a trial that are not too many together ([`ItemScores::MOST_BYTES`]), in their order; the others are left out.
    pub fn fitting(items: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut left = Self::MOST_BYTES;
        let fits = |items: &Self| {
            let rest = left.checked_sub(items.bytes());
            left = rest.unwrap_or(left);
            rest.is_some()
        };
        items.into_iter().filter(fits).collect()
    }
}

/// Bytes as a text of two digits each: an array of numbers would be twice as long.
mod hexadecimal {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};
    use std::fmt::Write;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            write!(text, "{byte:02x}").map_err(serde::ser::Error::custom)?;
        }
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        let byte = |pair: &[u8]| match pair {
            [high, low] => Some(16 * digit(*high)? + digit(*low)?),
            _ => None,
        };
        let bytes = text.as_bytes().chunks(2).map(byte).collect::<Option<_>>();
        bytes.ok_or_else(|| D::Error::custom("an odd number of digits, or one that is not hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_become_bytes_and_come_back_from_json() {
        for (score, byte) in
            [(0.0, 0), (1.0, 255), (0.5, 128), (0.2, 51), (-1.0, 0), (2.0, 255), (f64::NAN, 0)]
        {
            assert_eq!(ItemScores::byte(score), byte, "{score}");
        }
        let items = ItemScores {
            metric: "eval/arc_easy/acc".into(),
            asked: "ab".into(),
            scores: vec![0, 255, 16, 7],
            ..ItemScores::default()
        };
        let text = serde_json::to_string(&items).unwrap();
        assert_eq!(text, r#"{"metric":"eval/arc_easy/acc","asked":"ab","scores":"00ff1007","base":""}"#);
        assert_eq!(serde_json::from_str::<ItemScores>(&text).unwrap(), items);
        let texts = TextScores::new(vec![-6.5, -0.1], vec![-7.0, -1e9], vec![2, 1]);
        let of_texts = ItemScores { metric: "eval/t/word_perplexity".into(), texts, ..ItemScores::default() };
        let json = serde_json::to_string(&of_texts).unwrap();
        assert_eq!(serde_json::from_str::<ItemScores>(&json).unwrap(), of_texts);
        assert_eq!((items.bytes(), of_texts.bytes()), (4, 24));
        for (likelihoods, base, weights) in [
            (vec![-1.0], vec![-1.0], vec![1]),
            (vec![-1.0, -2.0], vec![-1.0], vec![1, 1]),
            (vec![-1.0, f32::NEG_INFINITY], vec![-1.0, -2.0], vec![1, 1]),
            (vec![-1.0, -2.0], vec![-1.0, f32::NAN], vec![1, 1]),
            (vec![-1.0, -2.0], vec![-1.0, -2.0], vec![1, 0]),
        ] {
            assert_eq!(TextScores::new(likelihoods, base, weights), None);
        }
        for wrong in ["0", "0g", "é"] {
            let text = text.replace("00ff1007", wrong);
            assert!(serde_json::from_str::<ItemScores>(&text).is_err(), "{wrong}");
        }
    }

    #[test]
    fn those_that_fit_are_kept_in_their_order() {
        let most = ItemScores::MOST_BYTES;
        for (sizes, kept) in [
            (&[][..], &[][..]),
            (&[most / 2], &[0]),
            (&[most / 2 + 1], &[]),
            // With those of the base it is twice as much. One that is too large leaves its room to those after it.
            (&[most / 4, most / 4 + 1, most / 4, 1, 0], &[0, 2, 4]),
        ] {
            let items = sizes.iter().enumerate().map(|(number, size)| ItemScores {
                metric: number.to_string(),
                scores: vec![0; *size],
                base: vec![0; *size],
                ..ItemScores::default()
            });
            let fitting: Vec<usize> =
                ItemScores::fitting(items).iter().map(|items| items.metric.parse().unwrap()).collect();
            assert_eq!(fitting, kept, "{sizes:?}");
        }
    }
}
