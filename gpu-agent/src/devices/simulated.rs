//! Devices that are not there (`--simulate A100-40GB:8`).

use super::choose::{PACK_SIZE, RESERVE};
use crate::{DeviceOptions, EngineHost};
use config::machines::{self, Catalogue};
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
    /// The devices, at the catalogue's price for one accelerator of the cheapest machine; none without `--simulate`.
    ///
    /// # Errors
    /// What is not in the catalogue, or is no number of devices; a catalogue of the user's that cannot be read.
    pub fn devices(&self) -> Result<Vec<DeviceOptions>, String> {
        match self.simulate.is_empty() {
            true => Ok(Vec::new()),
            false => self.priced_by(&Catalogue::load().map_err(|error| error.to_string())?),
        }
    }

    fn priced_by(&self, catalogue: &Catalogue) -> Result<Vec<DeviceOptions>, String> {
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
            let price = catalogue.cheapest(&accelerator.name).map_or(0.0, |machine| machine.price_of_one());
            for _ in 0..count {
                devices.push(DeviceOptions {
                    id: DeviceId::new(format!("simulated:{}", devices.len())),
                    accelerator: accelerator.name.clone(),
                    memory_bytes: accelerator.memory_bytes.saturating_sub(RESERVE),
                    max_pack_size: PACK_SIZE,
                    price_per_hour: price,
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
    use super::*;

    fn devices(names: &[&str]) -> Result<Vec<DeviceOptions>, String> {
        let simulate = names.iter().map(ToString::to_string).collect();
        SimulateArgs { simulate, simulate_speed: 60.0 }.priced_by(&Catalogue::shipped())
    }

    #[test]
    fn devices_by_name_and_number() {
        let three = devices(&["a100-40gb:2", "V100-16GB"]).unwrap();
        let named: Vec<_> = three.iter().map(|d| (d.id.as_str(), d.accelerator.as_str())).collect();
        let want = [("simulated:0", "A100-40GB"), ("simulated:1", "A100-40GB"), ("simulated:2", "V100-16GB")];
        assert_eq!(named, want);
        assert_eq!(three[0].memory_bytes, 42_949_672_960 - RESERVE);
        assert_eq!(three[0].price_per_hour, 3.673385);
        assert!(matches!(three[2].host, EngineHost::Simulated { speed: 60.0, .. }));
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
