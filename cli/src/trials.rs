//! Verbs about trials: `trials list|get|metrics|logs|stop|retry`.

use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::listing::ListingArgs;
use crate::output::{self, Format, OutputArgs};
use crate::view::{self, TrialRow};
use clap::Subcommand;
use domain::metric::{self, MetricPoint};
use domain::trial::{Trial, TrialState};
use proto::v1;
use serde_json::{Map, Value, json};
use tonic::Status;

/// Reads and ends trials.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  lorafleet trials list quickstart-3fa2
  lorafleet trials get quickstart-3fa2/7 -o yaml")]
pub(crate) enum Verb {
    /// Lists a sweep's trials.
    #[command(after_help = "Examples:
  lorafleet trials list quickstart-3fa2 -o json
  lorafleet trials list quickstart-3fa2 --state completed --sort eval_loss --limit 5
  lorafleet trials list quickstart-3fa2 --filter 'lora_rank>=8' --filter 'eval_loss<2'")]
    List {
        /// The sweep's id.
        #[arg(value_name = "SWEEP_ID")]
        sweep: String,
        /// Only trials in this state. May be given several times.
        #[arg(long, value_parser = TrialState::ALL.map(TrialState::as_str))]
        state: Vec<String>,
        #[command(flatten)]
        listing: ListingArgs,
        #[command(flatten)]
        rest: Rest,
    },
    /// Shows one trial whole: every parameter in force, its numbers, its failure.
    #[command(after_help = "Example:\n  lorafleet trials get quickstart-3fa2/7 -o yaml")]
    Get {
        /// The trial's id, SWEEP_ID/NUMBER.
        #[arg(value_name = "TRIAL_ID")]
        trial: String,
        #[command(flatten)]
        rest: Rest,
    },
    /// Prints a trial's curve, a point a line.
    #[command(after_help = "Example:\n  lorafleet trials metrics quickstart-3fa2/7 -o json | jq '.[].loss'")]
    Metrics {
        /// The trial's id, SWEEP_ID/NUMBER.
        #[arg(value_name = "TRIAL_ID")]
        trial: String,
        #[command(flatten)]
        rest: Rest,
    },
    /// Prints what happened to a trial: when it was assigned to whom, checkpointed, lost, stopped, and why it ended.
    #[command(
        after_help = "Examples:\n  lorafleet trials logs quickstart-3fa2/7\n  lorafleet trials logs -f quickstart-3fa2/7"
    )]
    Logs {
        /// The trial's id, SWEEP_ID/NUMBER.
        #[arg(value_name = "TRIAL_ID")]
        trial: String,
        /// Goes on until the trial is over; with -o json or yaml the document comes then.
        #[arg(short = 'f', long)]
        follow: bool,
        #[command(flatten)]
        rest: Rest,
    },
    /// Ends one trial; its newest adapter stays.
    #[command(after_help = "Example:\n  lorafleet trials stop quickstart-3fa2/7")]
    Stop {
        /// The trial's id, SWEEP_ID/NUMBER.
        #[arg(value_name = "TRIAL_ID")]
        trial: String,
        #[command(flatten)]
        rest: Rest,
    },
    /// Puts a failed, diverged, stopped or cancelled trial back into the queue.
    ///
    /// It goes on from its last checkpoint, and the search does not end it early any more. Its sweep runs again if it
    /// was over.
    #[command(after_help = "Example:\n  lorafleet trials retry quickstart-3fa2/7")]
    Retry {
        /// The trial's id, SWEEP_ID/NUMBER.
        #[arg(value_name = "TRIAL_ID")]
        trial: String,
        #[command(flatten)]
        rest: Rest,
    },
}

/// What all of them take.
#[derive(Debug, clap::Args)]
pub(crate) struct Rest {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `lorafleet trials …`.
pub(crate) async fn run(verb: Verb) -> Result<(), Failure> {
    let rest = match &verb {
        Verb::List { rest, .. }
        | Verb::Get { rest, .. }
        | Verb::Metrics { rest, .. }
        | Verb::Logs { rest, .. }
        | Verb::Stop { rest, .. }
        | Verb::Retry { rest, .. } => rest,
    };
    let format = rest.output.format;
    let (document, table) = Connection::with(&rest.server, async |c| answer(&verb, c).await).await?;
    if format == Format::Table && table.is_empty() {
        return Ok(());
    }
    output::print(format, &document, || table)
}

/// What a verb is answered, for programs and for people.
async fn answer(verb: &Verb, connection: &Connection) -> Result<(Value, String), Failure> {
    match verb {
        Verb::List { sweep, state, listing, rest } => {
            let is_table = rest.output.format == Format::Table;
            let wanted = |trial: &Trial| state.is_empty() || state.iter().any(|s| s == trial.state.as_str());
            if is_table && listing.is_plain() {
                // A table as it comes shows nothing that needs the whole of a trial, and is made as pages come.
                let rows = pages(connection, sweep, false, |trial| {
                    let trial = view::trial_of_unknown_config(trial)?;
                    Ok(wanted(&trial).then(|| TrialRow::of(&trial)))
                });
                let rows = listing.apply(rows.await?, "", |_| Value::Null)?;
                return Ok((Value::Null, view::trial_rows_table(rows)));
            }
            let read = |trial| view::trial(trial).map(|trial| Some(trial).filter(wanted));
            let trials = pages(connection, sweep, true, read).await?;
            let value_key = match listing.names_value() {
                true => metric_key(connection, sweep).await?,
                false => String::new(),
            };
            let trials = listing.apply(trials, &value_key, view::trial_document)?;
            if is_table {
                return Ok((Value::Null, view::trial_table(&trials)));
            }
            Ok((trials.iter().map(view::trial_document).collect(), String::new()))
        }
        Verb::Get { trial, .. } => {
            let trial = get(connection, trial).await?;
            let document = view::trial_document(&trial);
            let text = one(&document);
            Ok((document, text))
        }
        Verb::Metrics { trial, .. } => curve(connection, trial).await,
        Verb::Logs { trial, follow, rest } => {
            log(connection, trial, *follow, rest.output.format == Format::Table).await
        }
        Verb::Stop { trial, .. } => {
            let request = v1::StopTrialRequest { trial_id: trial.clone() };
            let answer = connection.trials().stop_trial(request).await?.into_inner();
            let trial = view::trial(answer.trial.unwrap_or_default())?;
            Ok((view::trial_document(&trial), view::trial_table(&[trial])))
        }
        Verb::Retry { trial, .. } => {
            let request = v1::RetryTrialRequest { trial_id: trial.clone() };
            let answer = connection.trials().retry_trial(request).await?.into_inner();
            let trial = view::trial(answer.trial.unwrap_or_default())?;
            Ok((view::trial_document(&trial), view::trial_table(&[trial])))
        }
    }
}

/// All trials of a sweep in the order of their numbers, page after page.
pub(crate) async fn list(connection: &Connection, sweep_id: &str) -> Result<Vec<Trial>, Failure> {
    pages(connection, sweep_id, true, |trial| view::trial(trial).map(Some)).await
}

/// What `read` makes of a sweep's trials in the order of their numbers, page after page; on demand without the
/// configurations, which are most of the bytes.
async fn pages<T>(
    connection: &Connection,
    sweep_id: &str,
    whole: bool,
    read: impl Fn(v1::Trial) -> Result<Option<T>, Failure>,
) -> Result<Vec<T>, Failure> {
    let mut request = v1::ListTrialsRequest {
        sweep_id: sweep_id.to_string(),
        page_size: 1000,
        page_token: String::new(),
        states: Vec::new(),
        without_config: !whole,
    };
    let mut trials = Vec::new();
    let mut page = connection.trials().list_trials(request.clone()).await?.into_inner();
    loop {
        let items = std::mem::take(&mut page.trials);
        let reading = async {
            for item in items {
                trials.extend(read(item)?);
            }
            Ok::<_, Failure>(())
        };
        if page.next_page_token.is_empty() {
            reading.await?;
            return Ok(trials);
        }
        request.page_token = page.next_page_token;
        // The server gathers the next page while this one is read.
        let mut client = connection.trials();
        let (next, read) = tokio::join!(client.list_trials(request.clone()), reading);
        read?;
        page = next?.into_inner();
    }
}

/// The key under which a trial's document has the value of its sweep's metric.
async fn metric_key(connection: &Connection, sweep_id: &str) -> Result<String, Failure> {
    let request = v1::GetSweepRequest { sweep_id: sweep_id.to_string() };
    let sweep = connection.sweeps().get_sweep(request).await?.into_inner().sweep.unwrap_or_default();
    let document = view::sweep(&sweep);
    Ok(document["spec"]["search"]["metric"].as_str().unwrap_or(metric::EVAL_LOSS).replace('/', "_"))
}

async fn get(connection: &Connection, trial_id: &str) -> Result<Trial, Failure> {
    let request = v1::GetTrialRequest { trial_id: trial_id.to_string() };
    let answer = connection.trials().get_trial(request).await?.into_inner();
    view::trial(answer.trial.unwrap_or_default())
}

/// A record as `key  value` lines, what is nested below its own key.
fn one(document: &Value) -> String {
    fn lines(prefix: &str, value: &Value, out: &mut Vec<Vec<String>>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    lines(&key, value, out);
                }
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                for (i, item) in items.iter().enumerate() {
                    lines(&format!("{prefix}[{i}]"), item, out);
                }
            }
            Value::Null => out.push(vec![prefix.to_string(), output::NONE.to_string()]),
            other => out.push(vec![prefix.to_string(), output::short(other)]),
        }
    }
    let mut rows = Vec::new();
    lines("", document, &mut rows);
    output::table(&["key", "value"], &rows, &[])
}

/// A trial's log. What is followed for people is printed as it comes, and nothing is left for the end.
async fn log(
    connection: &Connection,
    trial_id: &str,
    follow: bool,
    people: bool,
) -> Result<(Value, String), Failure> {
    let request = v1::GetTrialLogRequest { trial_id: trial_id.to_string(), follow };
    let mut stream = connection.trials().get_trial_log(request).await?.into_inner();
    let (mut document, mut text) = (Vec::new(), String::new());
    while let Some(entry) = stream.message().await? {
        let time = view::wire_time(entry.time);
        let line = format!(
            "{}  attempt {}  step {:>6}  {:<15} {}",
            time.as_str().unwrap_or_default(),
            entry.attempt,
            entry.step,
            entry.event,
            entry.message
        );
        if follow && people {
            output::to_stdout(&line)?;
        } else {
            text += &format!("{}\n", line.trim_end());
        }
        document.push(json!({
            "time": time,
            "event": entry.event,
            "attempt": entry.attempt,
            "step": entry.step,
            "message": entry.message,
        }));
    }
    Ok((Value::Array(document), text))
}

/// A trial's whole curve.
pub(crate) async fn points(connection: &Connection, trial_id: &str) -> Result<Vec<MetricPoint>, Failure> {
    points_from(connection, trial_id, 0).await?
}

/// A trial's curve from a step on; the server's refusal by itself, for those who wait for a server that is gone.
pub(crate) async fn points_from(
    connection: &Connection,
    trial_id: &str,
    first_step: u64,
) -> Result<Result<Vec<MetricPoint>, Failure>, Status> {
    let request = v1::GetTrialMetricsRequest { trial_id: trial_id.to_string(), first_step };
    let mut stream = connection.trials().get_trial_metrics(request).await?.into_inner();
    let mut points = Vec::new();
    while let Some(piece) = stream.message().await? {
        points.extend(piece.points);
    }
    Ok(points.into_iter().map(|point| MetricPoint::try_from(point).map_err(Failure::failed)).collect())
}

async fn curve(connection: &Connection, trial_id: &str) -> Result<(Value, String), Failure> {
    let points = points(connection, trial_id).await?;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in points.iter().flat_map(|p| &p.values) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let document = points.iter().map(|point| {
        let mut object = Map::new();
        object.insert("step".into(), json!(point.step));
        object.insert("time".into(), json!(view::time(point.time)));
        object.extend(point.values.iter().map(|(name, value)| (name.clone(), json!(value))));
        Value::Object(object)
    });
    let row = |point: &MetricPoint| {
        let cells =
            names.iter().map(|name| output::or_none(point.get(name).map(|v| output::short(&json!(v)))));
        std::iter::once(point.step.to_string()).chain(cells).collect()
    };
    let rows: Vec<_> = points.iter().map(row).collect();
    let headings: Vec<_> = std::iter::once("step").chain(names.iter().copied()).collect();
    // Losses are what a curve is read for; of the rest, the last are the least.
    let spare: Vec<_> =
        names.iter().rev().copied().filter(|n| ![metric::LOSS, metric::EVAL_LOSS].contains(n)).collect();
    Ok((document.collect(), output::table(&headings, &rows, &spare)))
}
