//! Devices that are not there (`--simulate A100-40GB:8`).

use super::choose::{PACK_SIZE, RESERVE};
use crate::{DeviceOptions, EngineHost};
use config::machines;
use domain::DeviceId;
use domain::fleet::SIMULATED_SPEED;

/// Simulated devices that an agent may have.
const MOST: u32 = 64;

/// What `--simulate` asks for.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SimulateArgs {
    /// Devices that train nothing and behave as these do by the models of memory and speed: `A100-40GB:8,V100-16GB`.
    /// A model needs its config.json alone, and data are not read. What comes of it is marked as simulated.
    #[arg(long, value_name = "ACCELERATOR[:COUNT][,…]", value_delimiter = ',')]
    pub simulate: Vec<String>,
    /// How many seconds of a simulated device pass in one.
    #[arg(long, alias = "simulate_speed", default_value_t = 1.0, value_name = "FACTOR", value_parser = speed)]
    #[arg(requires = "simulate")]
    pub simulate_speed: f64,
}

fn speed(text: &str) -> Result<f64, String> {
    let (least, most) = (SIMULATED_SPEED.start(), SIMULATED_SPEED.end());
    let parsed = text.parse().ok().filter(|speed| SIMULATED_SPEED.contains(speed));
    parsed.ok_or_else(|| format!("write a number from {least} to {most}"))
}

impl SimulateArgs {
    /// The devices, without a price yet; none without `--simulate`.
    ///
    /// # Errors
    /// What is not in the catalogue, or is no number of devices.
    pub fn devices(&self) -> Result<Vec<DeviceOptions>, String> {
        let mut devices = Vec::new();
        for entry in &self.simulate {
            let (name, count) = match entry.split_once(':') {
                None => (entry.as_str(), Some(1)),
                Some((name, count)) => (name, count.parse().ok().filter(|count| (1..=MOST).contains(count))),
            };
            let said = format!("--simulate {entry}");
            let count = count
                .ok_or_else(|| format!("{said}: write 1 to {MOST} behind the colon, as in A100-40GB:8"))?;
            let accelerator = machines::accelerator(name).map_err(|problem| format!("{said}: {problem}"))?;
            for _ in 0..count {
                devices.push(DeviceOptions {
                    id: DeviceId::new(format!("simulated:{}", devices.len())),
                    accelerator: accelerator.name.clone(),
                    memory_bytes: accelerator.memory_bytes.saturating_sub(RESERVE),
                    max_pack_size: PACK_SIZE,
                    price_per_hour: 0.0,
                    price_from: None,
                    compute_capability: Some(accelerator.compute_capability),
                    host: EngineHost::Simulated {
                        accelerator: accelerator.clone(),
                        speed: self.simulate_speed,
                    },
                });
            }
        }
        if devices.len() > MOST as usize {
            return Err(format!("--simulate: asks for {} devices, above {MOST}", devices.len()));
        }
        Ok(devices)
    }
}

#[cfg(test)]
mod tests {
    use super::super::priced_by;
    use super::*;
    use config::machines::Catalogue;

    fn devices(names: &[&str]) -> Result<Vec<DeviceOptions>, String> {
        let simulate = names.iter().map(ToString::to_string).collect();
        SimulateArgs { simulate, simulate_speed: 60.0 }.devices()
    }

    #[test]
    fn devices_by_name_and_number() {
        let mut three = devices(&["a100-40gb:2", "V100-16GB"]).unwrap();
        let named: Vec<_> = three.iter().map(|d| (d.id.as_str(), d.accelerator.as_str())).collect();
        let want = [("simulated:0", "A100-40GB"), ("simulated:1", "A100-40GB"), ("simulated:2", "V100-16GB")];
        assert_eq!(named, want);
        assert_eq!(three[0].memory_bytes, 42_949_672_960 - RESERVE);
        assert!(matches!(three[2].host, EngineHost::Simulated { speed: 60.0, .. }));
        three[2].accelerator = "V101".into();
        let prices = priced_by(&Catalogue::shipped(), &mut three);
        let machine = |device: &DeviceOptions| device.price_from.as_ref().map(|from| from.machine.clone());
        assert_eq!((three[0].price_per_hour, three[2].price_per_hour), (3.673385, 0.0));
        assert_eq!((machine(&three[1]), machine(&three[2])), (Some("a2-highgpu-1g".into()), None));
        let known = "A100-40GB: $3.67 an hour for a2-highgpu-1g (gcp, us-central1), 2025-03-06, \
                     Cyclenerd/google-cloud-pricing-cost-calculator";
        assert_eq!(prices.known, [known], "a line an accelerator");
        assert!(prices.unknown[0].starts_with("V101: no price is known"), "{:?}", prices.unknown);
        assert_eq!(devices(&[]).unwrap(), []);
        for (names, want) in [
            (["A100:1"], "--simulate A100:1: A100 is not in the catalogue; give one of"),
            (["A100-40GB:0"], "--simulate A100-40GB:0: write 1 to 64 behind the colon"),
            (["A100-40GB:x"], "--simulate A100-40GB:x: write 1 to 64"),
            (["A100-40GB:65"], "write 1 to 64"),
        ] {
            let error = devices(&names).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        assert!(devices(&["A100-40GB:64", "T4-16GB"]).unwrap_err().contains("65 devices"));
        assert_eq!((speed("60"), speed("0.5").is_err(), speed("inf").is_err()), (Ok(60.0), true, true));
    }
}
