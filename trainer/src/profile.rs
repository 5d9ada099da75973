//! Where a GPU's time goes: the device's own clock around each kernel and product that the trainer launches. What lies
//! between them is candle's few kernels, transfers, and waiting for the CPU.

use crate::error::Result;
use candle_core::Device;

/// What took how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// A kernel's name, or the kind of a product.
    pub what: String,
    /// How often it ran.
    pub calls: u64,
    /// The device's seconds for all of them.
    pub seconds: f64,
}

/// The time of some work on a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// From its beginning to its end.
    pub seconds: f64,
    /// What it went to, most first.
    pub shares: Vec<Share>,
}

/// Does some work on a device, and says where its time went. To take the times makes it slower. `None` on the CPU.
///
/// # Errors
/// Those of the work; the device fails.
pub fn of<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Option<Profile>)> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let (done, seconds, times) = crate::ops::timed(device, work)?;
        return Ok((done, Some(Profile::new(seconds, times))));
    }
    let _ = device;
    Ok((work()?, None))
}

impl Profile {
    #[cfg(any(feature = "cuda", test))]
    fn new(seconds: f64, times: Vec<(String, f64)>) -> Self {
        let mut shares: std::collections::BTreeMap<String, (u64, f64)> = Default::default();
        for (what, seconds) in times {
            let (calls, sum) = shares.entry(what).or_default();
            *calls += 1;
            *sum += seconds;
        }
        let share = |(what, (calls, seconds))| Share { what, calls, seconds };
        let mut shares: Vec<Share> = shares.into_iter().map(share).collect();
        shares.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self { seconds, shares }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_most_comes_first() {
        let times = [("a", 1.0), ("b", 2.5), ("a", 0.5), ("c", 0.25)];
        let profile = Profile::new(8.0, times.map(|(what, seconds)| (what.to_string(), seconds)).into());
        let shares = profile.shares.iter().map(|s| (s.what.as_str(), s.calls, s.seconds));
        assert_eq!(shares.collect::<Vec<_>>(), [("b", 1, 2.5), ("a", 2, 1.5), ("c", 1, 0.25)]);
        assert_eq!(of(&Device::Cpu, || Ok(7)).unwrap(), (7, None));
    }
}
