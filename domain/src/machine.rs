//! Accelerators, and machine types that can be rented.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Dollars that an hour of a machine costs at most: a cost must stay a number.
pub const MOST_DOLLARS: f64 = 1e6;

/// What instructions a GPU has: NVIDIA's compute capability, written `8.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ComputeCapability {
    /// `8` of `8.6`.
    pub major: u32,
    /// `6` of `8.6`.
    pub minor: u32,
}

/// A text is no compute capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no compute capability; write it as in \"8.0\"")]
pub struct NoComputeCapability(String);

impl ComputeCapability {
    /// The first with arithmetic on bfloat16.
    pub const BFLOAT16: Self = Self { major: 8, minor: 0 };

    /// Why an accelerator of this one does not train in bfloat16; `None`: it does.
    pub fn lacks_bfloat16(self, accelerator: &str) -> Option<String> {
        let needed = Self::BFLOAT16;
        (self < needed).then(|| {
            format!("bfloat16 needs compute capability {needed}; {accelerator} has {self}; use float16")
        })
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for ComputeCapability {
    type Err = NoComputeCapability;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text
            .split_once('.')
            .and_then(|(major, minor)| Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? }));
        // A sign or a zero in front would give one capability two spellings.
        parsed.filter(|parsed| parsed.to_string() == text).ok_or_else(|| NoComputeCapability(text.into()))
    }
}

impl TryFrom<String> for ComputeCapability {
    type Error = NoComputeCapability;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ComputeCapability> for String {
    fn from(capability: ComputeCapability) -> Self {
        capability.to_string()
    }
}

/// An accelerator, as its maker describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accelerator {
    /// `A100-40GB`, `V100-16GB`, ….
    pub name: String,
    /// Bytes of its memory, its driver's share included.
    pub memory_bytes: u64,
    /// Its compute capability.
    pub compute_capability: ComputeCapability,
    /// 10¹² operations a second on 16-bit numbers with sums in float32, dense, at most.
    pub tflops_16bit: f64,
    /// 10¹² operations a second on float32 (not TF32), at most.
    pub tflops_32bit: f64,
    /// Bytes a second that its memory reads and writes, at most.
    pub bandwidth: f64,
    /// Who said so.
    pub source: String,
}

/// A machine type in one region, with its price and where that comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The provider's name for it.
    pub machine: String,
    /// `gcp`, `runpod`, ….
    pub provider: String,
    /// Where.
    pub region: String,
    /// `A100-40GB`, `V100-16GB`, ….
    pub accelerator: String,
    /// How many of them it has.
    pub accelerators: u32,
    /// US dollars an hour for the whole machine, on demand.
    pub price_per_hour: f64,
    /// The same for one that may be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spot_price_per_hour: Option<f64>,
    /// When the price was that, `YYYY-MM-DD`.
    pub date: String,
    /// Who said so.
    pub source: String,
}

/// Where a price of one accelerator comes from: a machine type of a catalogue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PriceSource {
    /// The provider's name for the machine.
    pub machine: String,
    /// `gcp`, `runpod`, ….
    pub provider: String,
    /// Where.
    pub region: String,
    /// How many accelerators the machine has: the price is that part of its.
    pub accelerators: u32,
    /// When the price was that, `YYYY-MM-DD`.
    pub date: String,
    /// Who said so.
    pub source: String,
    /// Whether it is the price of a machine that may be taken back; else it is that on demand.
    #[serde(default)]
    pub spot: bool,
}

impl fmt::Display for PriceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, provider, region, accelerators, date, source, spot } = self;
        write!(f, "{machine} ({provider}, {region})")?;
        if *accelerators > 1 {
            write!(f, ", a part in {accelerators}")?;
        }
        let spot = if *spot { ", spot" } else { "" };
        write!(f, "{spot}, {date}, {source}")
    }
}

impl Machine {
    /// Where [`Machine::price_of_one`] comes from.
    pub fn price_source(&self) -> PriceSource {
        PriceSource {
            machine: self.machine.clone(),
            provider: self.provider.clone(),
            region: self.region.clone(),
            accelerators: self.accelerators,
            date: self.date.clone(),
            source: self.source.clone(),
            spot: false,
        }
    }

    /// What it costs on demand, and who says so, with its accelerator's name before it.
    pub fn price_line(&self) -> String {
        let price = match self.price_per_hour {
            0.0 => "$0".into(),
            price if price < 0.1 => format!("${price:.4}"),
            price => format!("${price:.2}"),
        };
        format!("{}: {price} an hour for {}", self.accelerator, self.price_source())
    }

    /// US dollars an hour on demand for one of its accelerators.
    pub fn price_of_one(&self) -> f64 {
        self.price_per_hour / f64::from(self.accelerators.max(1))
    }

    /// Whether it has accelerators, and prices that are amounts of dollars of [`MOST_DOLLARS`] at most.
    pub fn is_sound(&self) -> bool {
        let amount = |price: f64| (0.0..=MOST_DOLLARS).contains(&price);
        self.accelerators > 0 && amount(self.price_per_hour) && self.spot_price_per_hour.is_none_or(amount)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn compute_capabilities() {
        // (text, what it is, whether that has bfloat16)
        for (text, major, minor, bfloat16) in [
            ("7.0", 7, 0, false),
            ("7.5", 7, 5, false),
            ("8.0", 8, 0, true),
            ("8.9", 8, 9, true),
            ("10.3", 10, 3, true),
        ] {
            let read: ComputeCapability = text.parse().unwrap();
            assert_eq!((read, read.to_string().as_str()), (ComputeCapability { major, minor }, text));
            assert_eq!(serde_json::from_value::<ComputeCapability>(text.into()).unwrap(), read);
            assert_eq!(read.lacks_bfloat16("X").is_none(), bfloat16, "{text}");
        }
        let old = ComputeCapability { major: 7, minor: 0 };
        let why = "bfloat16 needs compute capability 8.0; V100-16GB has 7.0; use float16";
        assert_eq!(old.lacks_bfloat16("V100-16GB").as_deref(), Some(why));
        for text in ["", "8", "8.", ".0", "8.0.0", "+8.0", "08.0", "8.x", "-8.0"] {
            assert!(text.parse::<ComputeCapability>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_price_names_its_source() {
        let mut machine = Machine {
            machine: "m".into(),
            provider: "p".into(),
            region: "r".into(),
            accelerator: "T4-16GB".into(),
            accelerators: 1,
            price_per_hour: 3.673385,
            spot_price_per_hour: None,
            date: "2025-03-06".into(),
            source: "s".into(),
        };
        assert_eq!(machine.price_line(), "T4-16GB: $3.67 an hour for m (p, r), 2025-03-06, s");
        (machine.accelerators, machine.price_per_hour) = (8, 0.05);
        assert_eq!(machine.price_line(), "T4-16GB: $0.0500 an hour for m (p, r), a part in 8, 2025-03-06, s");
        let spot = PriceSource { spot: true, ..machine.price_source() };
        assert_eq!(spot.to_string(), "m (p, r), a part in 8, spot, 2025-03-06, s");
    }
}
