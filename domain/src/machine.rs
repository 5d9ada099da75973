//! Machine types that can be rented.

use serde::{Deserialize, Serialize};

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
    /// Bytes of one of them, its driver's share included.
    pub memory_bytes: u64,
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
