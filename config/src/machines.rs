//! The catalogues of accelerators and of machine types: those that come with the program, and the user's own machine
//! types, `machines.yaml` in the user's configuration directory.

use crate::{user, yaml};
use domain::machine::{Accelerator, MOST_DOLLARS, Machine};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

const MACHINES: &str = include_str!("../machines.yaml");
const ACCELERATORS: &str = include_str!("../accelerators.yaml");

/// The accelerators of `config/accelerators.yaml`, in its order.
pub fn accelerators() -> Vec<Accelerator> {
    // A test reads the file; what ships reads.
    static KNOWN: LazyLock<Vec<Accelerator>> = LazyLock::new(|| read(ACCELERATORS).unwrap_or_default());
    KNOWN.clone()
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

/// Why the user's machine types cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MachinesError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It does not say what it should.
    #[error("{}: {problem}; mend or remove the file, or import the prices again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Machine types with their prices.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalogue {
    machines: Vec<Machine>,
}

/// Where the user's machine types lie: in `$XDG_CONFIG_HOME`, else in `~/.config`; `None` without a home.
pub fn path() -> Option<PathBuf> {
    user::path("machines.yaml")
}

impl Catalogue {
    /// The machine types that come with the program: `config/machines.yaml`, in its order.
    pub fn shipped() -> Self {
        Self { machines: read(MACHINES).unwrap_or_default() }
    }

    /// The user's machine types, and behind them those that come with the program of other providers.
    ///
    /// # Errors
    /// The user's file cannot be read, or does not say what it should.
    pub fn load() -> Result<Self, MachinesError> {
        let Some(path) = path() else { return Ok(Self::shipped()) };
        let mut machines = Self::read(&path)?.machines;
        let is_own = |machine: &Machine| machines.iter().any(|own| own.provider == machine.provider);
        let others: Vec<_> =
            Self::shipped().machines.into_iter().filter(|machine| !is_own(machine)).collect();
        machines.extend(others);
        Ok(Self { machines })
    }

    /// Reads a file of machine types; one that is not there has none.
    ///
    /// # Errors
    /// It cannot be read, or does not say what it should.
    pub fn read(path: &Path) -> Result<Self, MachinesError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { machines: Vec::new() });
            }
            Err(source) => return Err(MachinesError::Io { path: path.into(), source }),
        };
        let machines: Vec<Machine> =
            read(&text).map_err(|problem| MachinesError::Invalid { path: path.into(), problem })?;
        match machines.iter().find(|machine| !machine.is_sound()) {
            Some(wrong) => {
                let problem = format!(
                    "{} in {}: has no accelerator, or a price that is not from 0 to {MOST_DOLLARS}",
                    wrong.machine, wrong.region
                );
                Err(MachinesError::Invalid { path: path.into(), problem })
            }
            None => Ok(Self { machines }),
        }
    }

    /// Puts a provider's machine types in the place of those that it had.
    pub fn replace(&mut self, provider: &str, machines: Vec<Machine>) {
        self.machines.retain(|machine| machine.provider != provider);
        self.machines.extend(machines);
    }

    /// Writes a file of machine types, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), MachinesError> {
        // JSON is YAML; an entry a line keeps thousands of them readable.
        let entry = |machine: &Machine| serde_json::to_value(machine).map(|entry| format!("- {entry}\n"));
        let entries: Result<Vec<_>, _> = self.machines.iter().map(entry).collect();
        let text = "# Machine types and their prices in US dollars an hour: `lorafleet machines import` writes them.\n";
        let entries =
            entries.map(|entries| if entries.is_empty() { "[]\n".into() } else { entries.concat() });
        let written = entries.map_err(std::io::Error::from);
        let written = written.and_then(|entries| user::write(path, &format!("{text}{entries}")));
        written.map_err(|source| MachinesError::Io { path: path.into(), source })
    }

    /// The machine types.
    pub fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// The cheapest machine on demand that has accelerators of that name, by the price of one.
    pub fn cheapest(&self, accelerator: &str) -> Option<&Machine> {
        let with = self.machines.iter().filter(|machine| machine.accelerator == accelerator);
        with.min_by(|a, b| a.price_of_one().total_cmp(&b.price_of_one()))
    }
}

/// Reads a catalogue.
///
/// # Errors
/// Where it is no YAML, or which key is missing, unknown or of another sort.
fn read<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, String> {
    let parsed = yaml::parse(text).map_err(|(at, why)| format!("line {}:{}: {why}", at.line, at.column))?;
    let Value::Array(entries) = parsed.value else { return Err("must be a list".into()) };
    let entry = |(n, entry): (usize, Value)| {
        let place = parsed.positions.get(&format!("[{n}]"));
        let place = place.map_or_else(|| format!("entry {}", n + 1), |at| format!("line {}", at.line));
        serde_json::from_value(entry).map_err(|error| format!("{place}: {error}"))
    };
    entries.into_iter().enumerate().map(entry).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_catalogues_read() {
        let machines: Vec<Machine> = read(MACHINES).unwrap();
        assert!(machines.len() >= 4);
        for machine in &machines {
            assert!(machine.price_per_hour > 0.0 && machine.accelerators > 0, "{machine:?}");
            assert!(machine.is_sound(), "{machine:?}");
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
        assert_eq!(Catalogue::shipped().machines, machines);
    }

    #[test]
    fn by_name() {
        assert_eq!(accelerator("a100-40gb").unwrap().name, "A100-40GB");
        let error = accelerator("A100").unwrap_err();
        assert!(error.starts_with("A100 is not in the catalogue; give one of V100-16GB, "), "{error}");
        let catalogue = Catalogue::shipped();
        let cheapest = catalogue.cheapest("H100-80GB").unwrap();
        let dearer =
            |m: &Machine| m.accelerator != "H100-80GB" || m.price_of_one() >= cheapest.price_of_one();
        assert!(catalogue.machines().iter().all(dearer));
        assert_eq!(catalogue.cheapest("T5"), None);
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/machines.yaml");
        let mut catalogue = Catalogue::read(&path).unwrap();
        assert_eq!(catalogue.machines(), []);
        catalogue.write(&path).unwrap();
        assert_eq!(Catalogue::read(&path).unwrap(), catalogue);
        let mut one = Catalogue::shipped().machines.remove(0);
        one.source = "\"quoted\": # é\n- x".into();
        let other = Machine { provider: "aws".into(), spot_price_per_hour: None, ..one.clone() };
        catalogue.replace("gcp", vec![one.clone()]);
        catalogue.replace("aws", vec![other.clone()]);
        catalogue.replace("gcp", vec![one.clone(), one.clone()]);
        assert_eq!(catalogue.machines(), [other, one.clone(), one]);
        catalogue.write(&path).unwrap();
        assert_eq!(Catalogue::read(&path).unwrap(), catalogue);
    }

    #[test]
    fn a_file_that_says_something_else_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machines.yaml");
        let entry = |price: &str, accelerators: u32| {
            format!(
                "{{machine: m, provider: p, region: r, accelerator: A, accelerators: {accelerators}, price_per_hour: {price}, \
                 date: d, source: s}}"
            )
        };
        for (text, want) in [
            ("- [".to_string(), "line "),
            ("{}".into(), "must be a list"),
            ("- machine: x".into(), "missing field"),
            (format!("- {}\n- {{machine: x}}", entry("1", 1)), "line 2: missing field"),
            (format!("- {}", entry("-1", 1)), "m in r"),
            (format!("- {}", entry("1", 0)), "m in r"),
            (format!("- {}", entry("many", 1)), "line 1: invalid type"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = Catalogue::read(&path).unwrap_err().to_string();
            assert!(error.contains(want) && error.contains("machines.yaml"), "{text}: {error}");
        }
    }
}
