//! Accelerators, and machine types that can be rented.

use serde::{Deserialize, Serialize};

/// Dollars that an hour of a machine costs at most: a cost must stay a number.
pub const MOST_DOLLARS: f64 = 1e6;

/// An accelerator, as its maker describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accelerator {
    /// `A100-40GB`, `V100-16GB`, ….
    pub name: String,
    /// Bytes of its memory, its driver's share included.
    pub memory_bytes: u64,
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

impl Machine {
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
