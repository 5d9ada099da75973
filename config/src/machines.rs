//! The catalogues of accelerators and of machine types that come with the program.

use crate::yaml;
use domain::machine::{Accelerator, Machine};
use serde::de::DeserializeOwned;

const MACHINES: &str = include_str!("../machines.yaml");
const ACCELERATORS: &str = include_str!("../accelerators.yaml");

/// The machine types of `config/machines.yaml`, in its order.
pub fn catalogue() -> Vec<Machine> {
    // A test reads the file; what ships reads.
    read(MACHINES).unwrap_or_default()
}

/// The accelerators of `config/accelerators.yaml`, in its order.
pub fn accelerators() -> Vec<Accelerator> {
    read(ACCELERATORS).unwrap_or_default()
}

/// The accelerator of that name, in whatever case.
///
/// # Errors
/// There is none; the message names those that there are.
pub fn accelerator(name: &str) -> Result<Accelerator, String> {
    let known = accelerators();
    let found = known.iter().find(|accelerator| accelerator.name.eq_ignore_ascii_case(name));
    found.cloned().ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|accelerator| accelerator.name.as_str()).collect();
        format!("{name} is not in the catalogue; give one of {}", names.join(", "))
    })
}

/// The cheapest machine on demand that has accelerators of that name, by the price of one.
pub fn cheapest(accelerator: &str) -> Option<Machine> {
    let with = catalogue().into_iter().filter(|machine| machine.accelerator == accelerator);
    with.min_by(|a, b| a.price_of_one().total_cmp(&b.price_of_one()))
}

/// Reads a catalogue.
///
/// # Errors
/// Where it is no YAML, or which key is missing, unknown or of another sort.
fn read<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, String> {
    let parsed = yaml::parse(text).map_err(|(at, why)| format!("{}:{}: {why}", at.line, at.column))?;
    serde_json::from_value(parsed.value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_catalogues_read() {
        let machines: Vec<Machine> = read(MACHINES).unwrap();
        assert!(machines.len() >= 4);
        for machine in &machines {
            assert!(machine.price_per_hour > 0.0 && machine.accelerators > 0, "{machine:?}");
            assert!(
                machine.spot_price_per_hour.is_none_or(|spot| spot < machine.price_per_hour),
                "{machine:?}"
            );
            assert!(machine.date.len() == 10 && !machine.source.is_empty(), "{machine:?}");
            assert_eq!(accelerator(&machine.accelerator).map(|a| a.name), Ok(machine.accelerator.clone()));
        }
        let accelerators: Vec<Accelerator> = read(ACCELERATORS).unwrap();
        for (n, one) in accelerators.iter().enumerate() {
            assert!(accelerators[..n].iter().all(|other| other.name != one.name), "{one:?}");
            assert!(one.memory_bytes > 1 << 33 && one.bandwidth > 1e11 && !one.source.is_empty(), "{one:?}");
            assert!(one.tflops_16bit > one.tflops_32bit && one.tflops_32bit > 1.0, "{one:?}");
        }
        assert!(read::<Machine>("- machine: x").unwrap_err().contains("missing field"));
        assert!(read::<Machine>("- [").unwrap_err().contains(": "));
    }

    #[test]
    fn by_name() {
        assert_eq!(accelerator("a100-40gb").unwrap().name, "A100-40GB");
        let error = accelerator("A100").unwrap_err();
        assert!(error.starts_with("A100 is not in the catalogue; give one of V100-16GB, "), "{error}");
        let cheapest = cheapest("H100-80GB").unwrap();
        assert!(
            catalogue()
                .iter()
                .all(|m| m.accelerator != "H100-80GB" || m.price_of_one() >= cheapest.price_of_one())
        );
        assert_eq!(super::cheapest("T5"), None);
    }
}
