//! `lorafleet machines`: what machines cost, by the catalogue that comes with the program and by SkyPilot's.

use crate::listing::{ListingArgs, VALUE};
use crate::output::{self, OutputArgs};
use crate::{Failure, view};
use clap::Subcommand;
use config::machines::{self, Catalogue};
use config::skypilot::{self, Import, Origin};
use domain::machine::Machine;
use domain::{Clock, SystemClock};
use hub::HubError;
use serde_json::{Value, json};

/// Shows what machines cost, and reads prices.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  lorafleet machines list --accelerator A100-40GB --sort price
  lorafleet machines import gcp/vms.csv")]
pub(crate) enum Verb {
    /// Lists machine types with their prices in US dollars an hour, and where those come from.
    ///
    /// `price` is that of one accelerator on demand; `spot` that of the whole machine while nobody else wants it.
    #[command(after_help = "Examples:
  lorafleet machines list --sort price
  lorafleet machines list --accelerator A100-40GB,A100-80GB --sort spot_price_per_hour --limit 5
  lorafleet machines list --filter provider=gcp --filter 'price<2' -o json")]
    List {
        /// Only machines with these accelerators.
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        accelerator: Vec<String>,
        #[command(flatten)]
        listing: ListingArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Reads a provider's prices from SkyPilot's catalogue: catalogs/v8/PROVIDER/vms.csv of
    /// github.com/skypilot-org/skypilot-catalog.
    ///
    /// They go before those that come with the program, and before those of an earlier import. A file with a row that
    /// cannot be read is refused, with line and column.
    #[command(after_help = "Examples:
  lorafleet machines import skypilot-catalog/catalogs/v8/gcp/vms.csv
  lorafleet machines import https://raw.githubusercontent.com/skypilot-org/skypilot-catalog/master/catalogs/v8/aws/vms.csv
  lorafleet machines import prices.csv --provider lambda --date 2026-11-02")]
    Import {
        /// The file, or its address.
        #[arg(value_name = "FILE|URL")]
        source: String,
        /// Whose prices they are; unless given, the name of the folder that holds the file.
        #[arg(long, value_name = "NAME")]
        provider: Option<String>,
        /// When the prices were that; unless given, today.
        #[arg(long, value_name = "YYYY-MM-DD", value_parser = date)]
        date: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

fn date(text: &str) -> Result<String, String> {
    let parsed = chrono::NaiveDate::parse_from_str(text, "%Y-%m-%d");
    // One form alone, so that dates compare as texts.
    let written = parsed.map(|date| date.format("%Y-%m-%d").to_string()).ok().filter(|date| date == text);
    written.ok_or_else(|| "write it as 2026-11-28".into())
}

/// The machine types that are known.
///
/// # Errors
/// The user's own file cannot be read.
pub(crate) fn catalogue() -> Result<Catalogue, Failure> {
    Catalogue::load().map_err(Failure::invalid)
}

/// Runs the verb.
pub(crate) fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { accelerator, listing, output } => {
            let names = accelerator.iter().map(|name| machines::accelerator(name));
            let names: Result<Vec<_>, _> = names.map(|found| found.map(|one| one.name)).collect();
            let names = names.map_err(|problem| Failure::invalid(format!("--accelerator: {problem}")))?;
            let mut all = catalogue()?.machines().to_vec();
            all.retain(|machine| names.is_empty() || names.contains(&machine.accelerator));
            let all = listing.apply(all, VALUE, document)?;
            let documents = all.iter().map(document).collect();
            output::print(output.format, &documents, || table(&all))
        }
        Verb::Import { source, provider, date, output } => {
            let document = import(&source, provider, date)?;
            output::print(output.format, &document, || said(&document))
        }
    }
}

/// A machine type with its prices, and where they come from.
pub(crate) fn record(machine: &Machine) -> Value {
    let mut record = json!(machine);
    // The catalogue's files leave out what they do not know.
    record["spot_price_per_hour"] = json!(machine.spot_price_per_hour);
    record
}

fn document(machine: &Machine) -> Value {
    let mut document = record(machine);
    document["price"] = json!(machine.price_of_one());
    document
}

fn table(all: &[Machine]) -> String {
    let row = |machine: &Machine| {
        vec![
            machine.accelerator.clone(),
            machine.accelerators.to_string(),
            machine.machine.clone(),
            machine.provider.clone(),
            machine.region.clone(),
            output::dollars(machine.price_of_one()),
            output::dollars(machine.price_per_hour),
            output::or_none(machine.spot_price_per_hour.map(output::dollars)),
            machine.date.clone(),
            machine.source.clone(),
        ]
    };
    let headings = [
        "accelerator",
        "count",
        "machine",
        "provider",
        "region",
        "price",
        "machine/h",
        "spot/h",
        "date",
        "source",
    ];
    let rows: Vec<_> = all.iter().map(row).collect();
    output::table(&headings, &rows, &["source", "date", "machine/h", "region", "spot/h"])
}

/// Reads a catalogue into the user's own.
fn import(source: &str, provider: Option<String>, date: Option<String>) -> Result<Value, Failure> {
    let is_address = ["http://", "https://"].iter().any(|scheme| source.starts_with(scheme));
    let provider = provider.or_else(|| folder(source)).ok_or_else(|| {
        Failure::invalid(format!("{source}: whose prices are they? name the provider with --provider"))
    })?;
    let text = match is_address {
        true => hub::page(source).map_err(|error| match error {
            HubError::Unavailable { .. } => Failure::unreachable(error),
            _ => Failure::invalid(error),
        })?,
        false => std::fs::read_to_string(source).map_err(|e| Failure::invalid(format!("{source}: {e}")))?,
    };
    let today = view::time(SystemClock::new().now()).chars().take(10).collect();
    let date = date.unwrap_or(today);
    // It is shown wherever its prices are.
    let source = if is_address { &without_secrets(source) } else { source };
    let origin = Origin { provider: &provider, source, date: &date };
    let read = skypilot::read(&text, &origin).map_err(Failure::invalid)?;
    if read.machines.is_empty() {
        return Err(Failure::invalid(format!(
            "{source}: none of its {} rows has a price for an accelerator that is known here; nothing changed",
            read.rows
        )));
    }
    let path = machines::path().ok_or_else(|| {
        Failure::failed("there is no home for the catalogue; set XDG_CONFIG_HOME to a directory")
    })?;
    let mut own = Catalogue::read(&path).map_err(Failure::invalid)?;
    let Import { machines, rows, without_accelerator, unknown_accelerator, without_price } = read;
    let count = machines.len();
    own.replace(&provider, machines);
    own.write(&path).map_err(Failure::failed)?;
    Ok(json!({
        "provider": provider,
        "machines": count,
        "rows": rows,
        "without_accelerator": without_accelerator,
        "unknown_accelerator": unknown_accelerator,
        "without_price": without_price,
        "date": date,
        "source": source,
        "catalogue": path,
    }))
}

/// An address without what may let its bearer in: a user with a password, and what follows a question mark.
fn without_secrets(address: &str) -> String {
    let plain = address.split(['?', '#']).next().unwrap_or(address);
    let Some((scheme, rest)) = plain.split_once("://") else { return plain.into() };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    format!("{scheme}://{}/{path}", host.rsplit('@').next().unwrap_or(host))
}

/// The name of the folder that holds a file, as in catalogs/v8/gcp/vms.csv.
fn folder(source: &str) -> Option<String> {
    let path = source.split(['?', '#']).next().unwrap_or(source);
    let (before, _) = path.rsplit_once('/')?;
    let name = before.rsplit('/').next()?;
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    plain.then(|| name.into())
}

fn said(document: &Value) -> String {
    let text = |key: &str| document[key].as_str().unwrap_or_default();
    format!(
        "{} machine types of {} at prices of {}, in {}
of {} rows, {} have no accelerator, {} one that is not known here, {} no price on demand",
        document["machines"],
        text("provider"),
        text("date"),
        text("catalogue"),
        document["rows"],
        document["without_accelerator"],
        document["unknown_accelerator"],
        document["without_price"],
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn providers_by_their_folder() {
        for (source, want) in [
            ("catalogs/v8/gcp/vms.csv", Some("gcp")),
            ("https://example.org/v8/runpod/vms.csv?raw=1", Some("runpod")),
            ("./vms.csv", None),
            ("vms.csv", None),
            ("/vms.csv", None),
            ("https://example.org/vms.csv", None),
        ] {
            assert_eq!(folder(source).as_deref(), want, "{source}");
        }
    }

    #[test]
    fn what_lets_its_bearer_in_is_not_kept() {
        for (address, want) in [
            ("https://example.org/v8/gcp/vms.csv", "https://example.org/v8/gcp/vms.csv"),
            ("http://user:hunter2@host/vms.csv?sig=SECRET#x", "http://host/vms.csv"),
            ("https://host/a@b/vms.csv", "https://host/a@b/vms.csv"),
            ("https://host", "https://host/"),
        ] {
            assert_eq!(without_secrets(address), want);
        }
    }

    #[test]
    fn dates_have_one_form() {
        assert_eq!(date("2026-11-28"), Ok("2026-11-28".into()));
        for wrong in ["2026-11-31", "26-11-28", "2026-1-2", "today", ""] {
            assert!(date(wrong).is_err(), "{wrong}");
        }
    }
}
