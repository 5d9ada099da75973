//! SkyPilot's public catalogues of machine types, `catalogs/v8/PROVIDER/vms.csv`: a row a machine type and zone.
//!
//! The columns are known by their names; providers order them as they like and add their own. A row that cannot be
//! read ends the reading, since a price that is half right is worse than none. Rows that say nothing of use here are
//! left out and counted: machines without accelerators, accelerators that `accelerators.yaml` does not know, shares
//! of one, and what has no price on demand.

use crate::machines;
use csv::{ReaderBuilder, StringRecord};
use domain::machine::{Accelerator, MOST_DOLLARS, Machine};
use std::collections::BTreeMap;
use std::fmt;

/// Problems of rows that are told at most.
const MOST_TOLD: usize = 8;

/// How far a size of memory may be from the accelerator's, as makers and providers round it.
const MEMORY_TOLERANCE: f64 = 0.12;

/// SkyPilot's names of accelerators, and those of `accelerators.yaml`.
const NAMES: &[(&str, &str)] = &[
    ("V100", "V100-16GB"),
    ("V100-32GB", "V100-32GB"),
    ("T4", "T4-16GB"),
    ("L4", "L4-24GB"),
    ("A10", "A10-24GB"),
    ("L40S", "L40S-48GB"),
    ("A100", "A100-40GB"),
    ("A100-80GB", "A100-80GB"),
    ("A100-80GB-SXM", "A100-80GB"),
    ("H100", "H100-80GB"),
    ("H100-SXM", "H100-80GB"),
    ("H200", "H200-141GB"),
    ("H200-SXM", "H200-141GB"),
    ("RTX3090", "RTX-3090-24GB"),
    ("RTX4090", "RTX-4090-24GB"),
];

/// Whose prices are read, and where they come from.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// `gcp`, `runpod`, ….
    pub provider: &'a str,
    /// The file or address, as people see it.
    pub source: &'a str,
    /// When the prices were that, `YYYY-MM-DD`.
    pub date: &'a str,
}

/// What a catalogue says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Import {
    /// One machine type a region, at its lowest prices among the region's zones; by name, then region.
    pub machines: Vec<Machine>,
    /// Rows read.
    pub rows: usize,
    /// Rows of machines without accelerators, or with a share of one.
    pub without_accelerator: usize,
    /// Rows of accelerators that the catalogue does not know.
    pub unknown_accelerator: usize,
    /// Rows without a price on demand, or of an accelerator that no machine of the catalogue holds.
    pub without_price: usize,
}

/// Why a catalogue cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SkypilotError {
    /// A column is missing.
    #[error("{source_name}: has no column {column}; give a vms.csv of SkyPilot's catalogue, schema v8")]
    Column {
        /// The file or address.
        source_name: String,
        /// The column.
        column: &'static str,
    },
    /// Rows cannot be read.
    #[error("{source_name}: {} of its rows cannot be read, and nothing was taken from it:\n{}", problems.len(), told(problems))]
    Rows {
        /// The file or address.
        source_name: String,
        /// What is wrong, in the order of the lines.
        problems: Vec<RowProblem>,
    },
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowProblem {
    /// The line at which the row begins, from 1.
    pub line: u64,
    /// The column, if it is one column's.
    pub column: Option<&'static str>,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for RowProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        self.column.map_or(Ok(()), |column| write!(f, "{column}: "))?;
        f.write_str(&self.problem)
    }
}

fn told(problems: &[RowProblem]) -> String {
    let lines: Vec<_> = problems.iter().take(MOST_TOLD).map(|problem| format!("  {problem}")).collect();
    let more = problems.len().saturating_sub(MOST_TOLD);
    lines.join("\n") + &if more > 0 { format!("\n  and {more} more") } else { String::new() }
}

/// Where the columns stand.
struct Columns {
    machine: usize,
    accelerator: usize,
    count: usize,
    price: usize,
    spot: usize,
    region: usize,
    info: Option<usize>,
    zone: Option<usize>,
}

impl Columns {
    fn of(headings: &StringRecord, origin: &Origin) -> Result<Self, SkypilotError> {
        let find = |name: &str| headings.iter().position(|heading| heading.trim() == name);
        let must = |column: &'static str| {
            find(column).ok_or_else(|| SkypilotError::Column { source_name: origin.source.into(), column })
        };
        Ok(Self {
            machine: must("InstanceType")?,
            accelerator: must("AcceleratorName")?,
            count: must("AcceleratorCount")?,
            price: must("Price")?,
            spot: must("SpotPrice")?,
            region: must("Region")?,
            info: find("GpuInfo"),
            zone: find("AvailabilityZone"),
        })
    }
}

/// On demand and spot, in US dollars an hour.
type Prices = (Option<f64>, Option<f64>);

/// An accelerator whose row leaves the machine out: Google's, priced apart.
struct Apart {
    accelerator: Accelerator,
    name: String,
    count: u32,
    region: String,
    zone: String,
    prices: Prices,
}

/// Reads a catalogue.
///
/// # Errors
/// A column is missing, or rows cannot be read: a wrong number of fields, a price or count that is no number.
pub fn read(text: &str, origin: &Origin) -> Result<Import, SkypilotError> {
    let mut problems = Vec::new();
    let import = gather(text, origin, &mut problems)?;
    if problems.is_empty() {
        return Ok(import);
    }
    Err(SkypilotError::Rows { source_name: origin.source.into(), problems })
}

fn gather(text: &str, origin: &Origin, problems: &mut Vec<RowProblem>) -> Result<Import, SkypilotError> {
    let mut reader = ReaderBuilder::new().from_reader(text.as_bytes());
    let known = machines::accelerators();
    let headings = reader.headers().cloned().unwrap_or_default();
    let columns = Columns::of(&headings, origin)?;
    let mut import = Import::default();
    let mut offers = Offers { origin: *origin, machines: BTreeMap::new() };
    // Prices of machines without accelerators, by machine and zone.
    let mut hosts: BTreeMap<(String, String), Prices> = BTreeMap::new();
    let mut apart = Vec::new();
    for record in reader.records() {
        import.rows += 1;
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let line = line_of(text, error.position());
                problems.push(RowProblem { line, column: None, problem: problem_of(error.kind()) });
                continue;
            }
        };
        let row = Row { line: line_of(text, record.position()), record: &record, problems };
        let Some((count, prices)) = row.numbers(&columns) else { continue };
        let cell = |at: usize| record.get(at).unwrap_or_default().trim().to_string();
        let (machine, region, name) =
            (cell(columns.machine), cell(columns.region), cell(columns.accelerator));
        let zone = columns.zone.map(cell).filter(|zone| !zone.is_empty()).unwrap_or_else(|| region.clone());
        if name.is_empty() {
            import.without_accelerator += 1;
            hosts.insert((machine, zone), prices);
            continue;
        }
        let info = columns.info.map(cell).unwrap_or_default();
        let Some(accelerator) = accelerator(&known, &name, memory(&info)) else {
            import.unknown_accelerator += 1;
            continue;
        };
        let Some(count) = count else {
            import.without_accelerator += 1;
            continue;
        };
        if machine.is_empty() {
            apart.push(Apart { accelerator: accelerator.clone(), name, count, region, zone, prices });
        } else if !offers.add(machine, &region, accelerator, count, prices) {
            import.without_price += 1;
        }
    }
    for row in apart {
        let host = host(&row.name, row.count);
        let priced = host.and_then(|(machine, name)| Some((hosts.get(&(machine, row.zone.clone()))?, name)));
        let sum = |a: Option<f64>, b: Option<f64>| Some(a? + b?);
        let added = priced.is_some_and(|(host, machine)| {
            let prices = (sum(host.0, row.prices.0), sum(host.1, row.prices.1));
            offers.add(machine, &row.region, &row.accelerator, row.count, prices)
        });
        import.without_price += usize::from(!added);
    }
    import.machines = offers.machines.into_values().collect();
    Ok(import)
}

/// The line at which a row begins. The reader's place may be that of blank lines before it.
fn line_of(text: &str, position: Option<&csv::Position>) -> u64 {
    let Some(position) = position else { return 0 };
    let from = usize::try_from(position.byte()).unwrap_or(usize::MAX).min(text.len());
    let ends = text.as_bytes()[from..].iter().take_while(|byte| [b'\r', b'\n'].contains(byte));
    position.line() + ends.filter(|byte| **byte == b'\n').count() as u64
}

fn problem_of(error: &csv::ErrorKind) -> String {
    match error {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} fields, where the headings are {expected_len}")
        }
        // What was read is a text; the reader has no other.
        _ => "cannot be read".into(),
    }
}

/// A row whose numbers are read.
struct Row<'a> {
    line: u64,
    record: &'a StringRecord,
    problems: &'a mut Vec<RowProblem>,
}

impl Row<'_> {
    /// How many accelerators, unless it is a share of one, and the prices; `None` if one of them is no number.
    fn numbers(mut self, columns: &Columns) -> Option<(Option<u32>, Prices)> {
        let count = self.number(columns.count, "AcceleratorCount");
        let price = self.number(columns.price, "Price");
        let spot = self.number(columns.spot, "SpotPrice");
        let whole = |count: f64| count.fract() == 0.0 && (1.0..=1024.0).contains(&count);
        Some((count?.filter(|count| whole(*count)).map(|count| count as u32), (price?, spot?)))
    }

    /// A field's number from 0, if it has one; `None` if it is none.
    fn number(&mut self, at: usize, column: &'static str) -> Option<Option<f64>> {
        let text = self.record.get(at).unwrap_or_default().trim();
        if text.is_empty() {
            return Some(None);
        }
        match text.parse::<f64>() {
            Ok(number) if (0.0..=MOST_DOLLARS).contains(&number) => Some(Some(number)),
            _ => {
                let problem = format!("{text:?} is no number from 0 to {MOST_DOLLARS}");
                self.problems.push(RowProblem { line: self.line, column: Some(column), problem });
                None
            }
        }
    }
}

/// The machine types found so far, by name, region, accelerator and how many of it.
struct Offers<'a> {
    origin: Origin<'a>,
    machines: BTreeMap<(String, String, String, u32), Machine>,
}

impl Offers<'_> {
    /// Adds a zone's offer to its region's; false if it has no price on demand.
    fn add(
        &mut self,
        machine: String,
        region: &str,
        accelerator: &Accelerator,
        count: u32,
        (price, spot): Prices,
    ) -> bool {
        // Free machines are ones whose price nobody knows. A sum of two prices may be more than one may be.
        let is_known = |price: &f64| *price > 0.0 && *price <= MOST_DOLLARS;
        let Some(price) = price.filter(is_known) else { return false };
        let spot = spot.filter(is_known);
        let key = (machine.clone(), region.to_string(), accelerator.name.clone(), count);
        let entry = self.machines.entry(key).or_insert_with(|| Machine {
            machine,
            provider: self.origin.provider.into(),
            region: region.into(),
            accelerator: accelerator.name.clone(),
            accelerators: count,
            price_per_hour: price,
            spot_price_per_hour: spot,
            date: self.origin.date.into(),
            source: format!("SkyPilot's catalogue, {}", self.origin.source),
        });
        entry.price_per_hour = entry.price_per_hour.min(price);
        entry.spot_price_per_hour = match (entry.spot_price_per_hour, spot) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        true
    }
}

/// The accelerator of that name; where its memory is told, one of that memory.
fn accelerator<'a>(known: &'a [Accelerator], name: &str, memory: Option<f64>) -> Option<&'a Accelerator> {
    let (_, ours) = NAMES.iter().find(|(theirs, _)| theirs.eq_ignore_ascii_case(name))?;
    let fits = |accelerator: &Accelerator| {
        let own = accelerator.memory_bytes as f64;
        memory.is_none_or(|memory| (memory - own).abs() <= MEMORY_TOLERANCE * own)
    };
    let model = ours.rsplit_once('-').map_or(*ours, |(model, _)| model);
    let same = |one: &&Accelerator| one.name.rsplit_once('-').is_some_and(|(other, _)| other == model);
    let named = known.iter().find(|one| one.name == *ours && fits(one));
    named.or_else(|| known.iter().filter(same).find(|one| fits(one)))
}

/// Bytes of one accelerator's memory, where `GpuInfo` tells them: `{'Gpus': [{…, 'MemoryInfo': {'SizeInMiB': 81920}}]}`.
fn memory(info: &str) -> Option<f64> {
    let (_, after) = info.split_once("SizeInMiB")?;
    let digits = after.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse::<f64>().ok().filter(|mib| *mib > 0.0).map(|mib| mib * 1_048_576.0)
}

/// The machine of Google's that holds so many accelerators, and what both together are called: machines made for
/// them, or for V100 and T4, to which any is attached, n1-highmem with 8 processors each.
fn host(accelerator: &str, count: u32) -> Option<(String, String)> {
    let made_for = match (accelerator, count) {
        ("A100", 16) => "a2-megagpu-16g".to_string(),
        ("A100", 1 | 2 | 4 | 8) => format!("a2-highgpu-{count}g"),
        ("A100-80GB", 1 | 2 | 4 | 8) => format!("a2-ultragpu-{count}g"),
        ("H100", 1 | 2 | 4 | 8) => format!("a3-highgpu-{count}g"),
        ("H200", 8) => "a3-ultragpu-8g".into(),
        ("L4", 1) => "g2-standard-4".into(),
        ("L4", 2 | 4 | 8) => format!("g2-standard-{}", 12 * count),
        ("V100", 1 | 2 | 4 | 8) | ("T4", 1 | 2 | 4) => {
            let host = format!("n1-highmem-{}", 8 * count);
            let name = format!("{host} with {count} {accelerator}");
            return Some((host, name));
        }
        _ => return None,
    };
    Some((made_for.clone(), made_for))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ORIGIN: Origin = Origin { provider: "p", source: "p/vms.csv", date: "2026-11-28" };
    const HEADINGS: &str = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice,\
                            AvailabilityZone";

    fn import(rows: &str) -> Result<Import, SkypilotError> {
        read(&format!("{HEADINGS}\n{rows}"), &ORIGIN)
    }

    /// Machine, region, accelerator, count, price, spot.
    type Offer<'a> = (&'a str, &'a str, &'a str, u32, f64, Option<f64>);

    fn check(rows: &str, want: &[Offer]) -> Import {
        let import = import(rows).unwrap();
        let got: Vec<Offer> = import
            .machines
            .iter()
            .map(|m| {
                let (machine, region, accelerator) = (&*m.machine, &*m.region, &*m.accelerator);
                (machine, region, accelerator, m.accelerators, m.price_per_hour, m.spot_price_per_hour)
            })
            .collect();
        assert_eq!(got, want, "{rows}");
        import
    }

    #[test]
    fn the_lowest_price_of_a_region() {
        let import = check(
            "one,A100,1.0,8,64,2.5,east,,1.5,east-a
one,A100,1.0,8,64,2.25,east,,,east-b
one,A100,1.0,8,64,2.75,east,,1.25,east-c
one,A100,1,8,64,3,west,,,
eight,H100,8.0,8,64,24,west,\"{'Gpus': [{'Name': 'H100', 'MemoryInfo': {'SizeInMiB': 81920}}], 'TotalGpuMemoryInMiB': 655360}\",,
",
            &[
                ("eight", "west", "H100-80GB", 8, 24.0, None),
                ("one", "east", "A100-40GB", 1, 2.25, Some(1.25)),
                ("one", "west", "A100-40GB", 1, 3.0, None),
            ],
        );
        assert_eq!(import.rows, 5);
        let first = &import.machines[0];
        let told = (first.provider.as_str(), first.source.as_str(), first.date.as_str());
        assert_eq!(told, ("p", "SkyPilot's catalogue, p/vms.csv", "2026-11-28"));
    }

    #[test]
    fn memory_decides_between_accelerators_of_one_name() {
        let info = |mib: u32| format!("\"{{'Gpus': [{{'MemoryInfo': {{'SizeInMiB': {mib}}}}}]}}\"");
        for (name, mib, want) in [
            ("A100", None, Some("A100-40GB")),
            ("A100", Some(40_960), Some("A100-40GB")),
            ("A100", Some(81_920), Some("A100-80GB")),
            ("A100-80GB", Some(81_920), Some("A100-80GB")),
            ("A100", Some(20_480), None),
            ("V100", Some(32_768), Some("V100-32GB")),
            ("v100", None, Some("V100-16GB")),
            ("rtx4090", Some(24_576), Some("RTX-4090-24GB")),
            ("A10G", None, None),
            ("tpu-v6e-8", None, None),
        ] {
            let info = mib.map(info).unwrap_or_default();
            let import = import(&format!("m,{name},1,,,1,r,{info},,")).unwrap();
            let got = import.machines.first().map(|machine| machine.accelerator.as_str());
            assert_eq!(got, want, "{name} {mib:?}");
            assert_eq!(import.unknown_accelerator, usize::from(want.is_none()), "{name}");
        }
    }

    #[test]
    fn what_is_of_no_use_is_counted() {
        let import = check(
            "cpu,,,8,64,0.5,east,,0.25,
share,L4,0.125,8,64,0.5,east,,,
spot,L4,1,8,64,,east,,0.25,
free,L4,1,8,64,0,east,,,
tpu,tpu-v4-8,1,8,64,12,east,,,
",
            &[],
        );
        assert_eq!(import.rows, 5);
        let counts = (import.without_accelerator, import.unknown_accelerator, import.without_price);
        assert_eq!(counts, (2, 1, 2));
    }

    #[test]
    fn accelerators_priced_apart_have_their_machine_added() {
        let import = check(
            ",A100,2.0,,,5.5,east,,2.5,east-a
,V100,1.0,,,2.5,east,,,east-a
,A100,2.0,,,5,west,,,west-a
a2-highgpu-2g,,,24,170,1.5,east,,0.5,east-a
n1-highmem-8,,,8,52,0.5,east,,0.25,east-a
",
            &[
                ("a2-highgpu-2g", "east", "A100-40GB", 2, 7.0, Some(3.0)),
                ("n1-highmem-8 with 1 V100", "east", "V100-16GB", 1, 3.0, None),
            ],
        );
        // The west has no such machine.
        assert_eq!((import.without_price, import.without_accelerator), (1, 2));
    }

    #[test]
    fn bad_rows_are_told_by_line_and_column() {
        let text = "m,A100,1,,,cheap,r,,,
m,A100,1,,,1,r,,,

m,A100,one,,,1,r,,-1,
m,A100
";
        let Err(SkypilotError::Rows { problems, .. }) = import(text) else { panic!("it reads") };
        let told: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "line 2: Price: \"cheap\" is no number from 0 to 1000000",
                "line 5: AcceleratorCount: \"one\" is no number from 0 to 1000000",
                "line 5: SpotPrice: \"-1\" is no number from 0 to 1000000",
                "line 6: has 2 fields, where the headings are 10",
            ]
        );
        let many = "m,A100,1,,,x,r,,,\n".repeat(20);
        let error = import(&many).unwrap_err().to_string();
        assert!(error.starts_with("p/vms.csv: 20 of its rows") && error.ends_with("and 12 more"), "{error}");
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        for text in ["", "a,b\n1,2\n", "InstanceType,AcceleratorName\n", "{\"json\": true}"] {
            let error = read(text, &ORIGIN).unwrap_err().to_string();
            assert!(error.starts_with("p/vms.csv: has no column "), "{error}");
        }
    }

    proptest! {
        /// Whatever a file holds, it is read or refused, and what is read has prices.
        #[test]
        fn nothing_panics(text in any::<String>(), rows in "([ -~é\n\",]|(A100|L4|1|0\\.5|SizeInMiB|'),){0,60}") {
            let _ = read(&text, &ORIGIN);
            if let Ok(import) = import(&rows) {
                prop_assert!(import.machines.iter().all(Machine::is_sound));
                prop_assert!(import.machines.len() <= import.rows);
            }
        }

        /// A row's numbers come out as they went in, in whatever order the columns stand.
        #[test]
        fn numbers_are_kept(price in 0.01..500.0f64, spot in 0.01..500.0f64, count in 1..=16u32, turned in any::<bool>()) {
            let cells = [
                ("InstanceType", "m".to_string()),
                ("AcceleratorName", "L4".into()),
                ("AcceleratorCount", format!("{count}.0")),
                ("Price", price.to_string()),
                ("SpotPrice", spot.to_string()),
                ("Region", "r".into()),
            ];
            let mut cells = cells.to_vec();
            if turned {
                cells.reverse();
            }
            let line = |of: fn(&(&str, String)) -> String| cells.iter().map(of).collect::<Vec<_>>().join(",");
            let text = format!("{}\n{}\n", line(|c| c.0.into()), line(|c| c.1.clone()));
            let import = read(&text, &ORIGIN).unwrap();
            let machine = &import.machines[0];
            prop_assert_eq!(machine.price_per_hour, price);
            prop_assert_eq!(machine.spot_price_per_hour, Some(spot));
            prop_assert_eq!(machine.accelerators, count);
        }
    }
}
