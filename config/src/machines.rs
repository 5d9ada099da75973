//! The catalogue of machine types that comes with the program.

use crate::yaml;
use domain::machine::Machine;

const CATALOGUE: &str = include_str!("../machines.yaml");

/// The machine types of `config/machines.yaml`, in its order.
pub fn catalogue() -> Vec<Machine> {
    // A test reads the file; what ships reads.
    read(CATALOGUE).unwrap_or_default()
}

/// Reads a catalogue.
///
/// # Errors
/// Where it is no YAML, or which key is missing, unknown or of another sort.
fn read(text: &str) -> Result<Vec<Machine>, String> {
    let parsed = yaml::parse(text).map_err(|(at, why)| format!("{}:{}: {why}", at.line, at.column))?;
    serde_json::from_value(parsed.value).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_catalogue_reads() {
        let machines = read(CATALOGUE).unwrap();
        assert!(machines.len() >= 4);
        for machine in &machines {
            assert!(machine.price_per_hour > 0.0 && machine.memory_bytes > 1 << 33, "{machine:?}");
            assert!(
                machine.spot_price_per_hour.is_none_or(|spot| spot < machine.price_per_hour),
                "{machine:?}"
            );
            assert!(machine.date.len() == 10 && !machine.source.is_empty(), "{machine:?}");
            // An accelerator's memory is the same wherever it is rented.
            let same = machines.iter().filter(|other| other.accelerator == machine.accelerator);
            assert!(same.into_iter().all(|other| other.memory_bytes == machine.memory_bytes), "{machine:?}");
        }
        assert!(read("- machine: x").unwrap_err().contains("missing field"));
        assert!(read("- [").unwrap_err().contains(": "));
    }
}
