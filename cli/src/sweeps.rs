//! Verbs about sweeps: `list`, `get`, `watch`, `pause`, `resume`, `cancel`, `report`.

use crate::client::{Connection, ServerArgs};
use crate::follow::{self, Follow};
use crate::listing::ListingArgs;
use crate::output::{self, Format, OutputArgs};
use crate::{Failure, trials, view};
use clap::ValueEnum;
use proto::v1;
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Where a sweep stands, for filters.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum State {
    /// Proposes and trains trials.
    Running,
    /// Held by a person.
    Paused,
    /// All its trials are over.
    Completed,
    /// Ended by a person.
    Cancelled,
    /// No trial could be trained.
    Failed,
}

impl From<State> for v1::SweepState {
    fn from(state: State) -> Self {
        match state {
            State::Running => Self::Running,
            State::Paused => Self::Paused,
            State::Completed => Self::Completed,
            State::Cancelled => Self::Cancelled,
            State::Failed => Self::Failed,
        }
    }
}

/// Lists sweeps, newest first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet list
  lorafleet list --state running -o json
  lorafleet list --sort -cost_usd --limit 5")]
pub(crate) struct ListArgs {
    /// Only sweeps in this state. May be given several times.
    #[arg(long, value_enum)]
    state: Vec<State>,
    #[command(flatten)]
    listing: ListingArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Names one sweep.
#[derive(Debug, clap::Args)]
pub(crate) struct SweepArgs {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    pub(crate) sweep: String,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Follows a sweep to its end, over restarts of its server.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet watch quickstart-3fa2 --endpoint http://10.0.0.5:7401
  lorafleet watch quickstart-3fa2 --reconnect-for 0")]
pub(crate) struct WatchArgs {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// How long a server that is gone is looked for: 10m, 1h30m or seconds.
    #[arg(long, alias = "reconnect_for", value_name = "TIME", default_value = "10m", value_parser = follow::duration)]
    reconnect_for: Duration,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Deletes a sweep that is over, with its trials, metrics and checkpoints.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  lorafleet delete quickstart-3fa2\n  lorafleet delete quickstart-3fa2 --force"
)]
pub(crate) struct DeleteArgs {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// Cancels it first, and waits for its end.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// As what a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum ReportFormat {
    /// One self-contained file.
    #[default]
    Html,
    /// A directory: report.md and its figures, figures/*.svg.
    Markdown,
}

/// Writes a sweep's report: which configuration to use, what it costs, and the figures behind the answer.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet report quickstart-3fa2 --file report.html
  lorafleet report quickstart-3fa2 --format markdown --file ./report
  lorafleet report quickstart-3fa2 -o json

Its numbers as CSV: lorafleet export SWEEP_ID --to DIR")]
pub(crate) struct ReportArgs {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// As what.
    #[arg(long, value_enum, default_value_t)]
    format: ReportFormat,
    /// Where to write it, a file or, as Markdown, a directory; unless given, `reports/SWEEP_ID.html` or
    /// `reports/SWEEP_ID` in the data directory.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `lorafleet list`.
pub(crate) async fn run_list(args: ListArgs) -> Result<(), Failure> {
    let states = args.state.iter().map(|s| v1::SweepState::from(*s)).collect();
    let sweeps = Connection::with(&args.server, async |c| list(c, states).await).await?;
    let sweeps = args.listing.apply(sweeps, "best_value", view::sweep)?;
    let document = Value::Array(sweeps.iter().map(view::sweep).collect());
    output::print(args.output.format, &document, || view::sweep_table(&sweeps))
}

/// `lorafleet get`: one sweep with its trials.
pub(crate) async fn run_get(args: SweepArgs) -> Result<(), Failure> {
    let (sweep, trials) = Connection::with(&args.server, async |connection| {
        Ok((get(connection, &args.sweep).await?, trials::list(connection, &args.sweep).await?))
    })
    .await?;
    let mut document = view::sweep(&sweep);
    document["trials"] = Value::Array(trials.iter().map(view::trial_document).collect());
    output::print(args.output.format, &document, || {
        let table = view::sweep_table(std::slice::from_ref(&sweep));
        format!("{table}{}\n{}", view::ended_early(&sweep), view::trial_table(&trials))
    })
}

/// `lorafleet watch`: follows a sweep to its end.
pub(crate) async fn run_watch(args: WatchArgs) -> Result<(), Failure> {
    let (board, trials) = Connection::with(&args.server, async |connection| {
        refuse_untrained(connection, &args.sweep, &args.server).await?;
        let follow = Follow {
            server: &args.server,
            sweep: &args.sweep,
            quiet: args.output.format != Format::Table,
            reconnect_for: args.reconnect_for,
        };
        let followed = follow.to_the_end(connection).await?;
        let connection = followed.connection.as_ref().unwrap_or(connection);
        let trials = trials::list(connection, &args.sweep).await?;
        Ok((followed.board, trials))
    })
    .await?;
    let document = json!({
        "sweep": board.sweep.as_ref().map(view::sweep),
        "trials": trials.iter().map(view::trial_document).collect::<Vec<_>>(),
    });
    let early = board.sweep.as_ref().map(view::ended_early).unwrap_or_default();
    output::print(args.output.format, &document, || view::trial_table(&trials) + &early)
}

/// Refuses to wait for the end of a sweep that nobody trains.
///
/// # Errors
/// Nobody does, or there is no such sweep.
pub(crate) async fn refuse_untrained(
    connection: &Connection,
    sweep: &str,
    server: &ServerArgs,
) -> Result<(), Failure> {
    let unfinished = [v1::SweepState::Running, v1::SweepState::Paused];
    if !connection.trains_nothing() || !unfinished.contains(&get(connection, sweep).await?.state()) {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "nobody trains {sweep} now; `lorafleet up --data-dir {}`, or the `lorafleet run` that began it, goes on with it",
        server.data_dir().display()
    )))
}

/// `lorafleet cancel`: ends a sweep and its trials.
pub(crate) async fn run_cancel(args: SweepArgs) -> Result<(), Failure> {
    let sweep = Connection::with(&args.server, async |c| cancel(c, &args.sweep).await).await?;
    show(&sweep, &args.output)
}

pub(crate) fn show(sweep: &v1::Sweep, output: &OutputArgs) -> Result<(), Failure> {
    output::print(output.format, &view::sweep(sweep), || view::sweep_table(std::slice::from_ref(sweep)))
}

pub(crate) fn named(sweep: Option<v1::Sweep>) -> Result<v1::Sweep, Failure> {
    sweep.ok_or_else(|| Failure::failed("the server's answer names no sweep"))
}

/// `lorafleet pause`: what trains is checkpointed and waits.
pub(crate) async fn run_pause(args: SweepArgs) -> Result<(), Failure> {
    let request = v1::PauseSweepRequest { sweep_id: args.sweep };
    let sweep = Connection::with(&args.server, async |c| {
        named(c.sweeps().pause_sweep(request).await?.into_inner().sweep)
    });
    show(&sweep.await?, &args.output)
}

/// `lorafleet resume`: goes on from the checkpoints.
pub(crate) async fn run_resume(args: SweepArgs) -> Result<(), Failure> {
    let sweep = Connection::with(&args.server, async |c| resume(c, &args.sweep).await).await?;
    show(&sweep, &args.output)
}

/// `lorafleet delete`.
pub(crate) async fn run_delete(args: DeleteArgs) -> Result<(), Failure> {
    let request = v1::DeleteSweepRequest { sweep_id: args.sweep, force: args.force };
    let answer =
        Connection::with(&args.server, async |c| Ok(c.sweeps().delete_sweep(request).await?.into_inner()))
            .await?;
    let document = json!({ "sweep": answer.sweep_id, "deleted_at": view::wire_time(answer.deleted_at) });
    output::print(args.output.format, &document, || format!("deleted {}", answer.sweep_id))
}

/// `lorafleet report`.
pub(crate) async fn run_report(args: ReportArgs) -> Result<(), Failure> {
    let path = Connection::with(&args.server, async |connection| {
        let (to, data_dir) = (args.file.as_deref(), args.server.data_dir());
        match args.format {
            ReportFormat::Html => save_report(connection, &args.sweep, to, data_dir).await,
            ReportFormat::Markdown => save_markdown(connection, &args.sweep, to, data_dir).await,
        }
    })
    .await?;
    let document = json!({ "sweep": args.sweep, "report": path });
    output::print(args.output.format, &document, || path.display().to_string())
}

/// All sweeps in some states (none means all), page after page.
pub(crate) async fn list(
    connection: &Connection,
    states: Vec<v1::SweepState>,
) -> Result<Vec<v1::Sweep>, Failure> {
    let mut request = v1::ListSweepsRequest {
        page_size: 1000,
        page_token: String::new(),
        states: states.into_iter().map(Into::into).collect(),
    };
    let mut sweeps = Vec::new();
    loop {
        let page = connection.sweeps().list_sweeps(request.clone()).await?.into_inner();
        sweeps.extend(page.sweeps);
        if page.next_page_token.is_empty() {
            return Ok(sweeps);
        }
        request.page_token = page.next_page_token;
    }
}

/// One sweep.
pub(crate) async fn get(connection: &Connection, sweep_id: &str) -> Result<v1::Sweep, Failure> {
    let request = v1::GetSweepRequest { sweep_id: sweep_id.to_string() };
    named(connection.sweeps().get_sweep(request).await?.into_inner().sweep)
}

/// Ends a sweep.
pub(crate) async fn cancel(connection: &Connection, sweep_id: &str) -> Result<v1::Sweep, Failure> {
    let request = v1::CancelSweepRequest { sweep_id: sweep_id.to_string() };
    named(connection.sweeps().cancel_sweep(request).await?.into_inner().sweep)
}

/// Goes on with a paused sweep.
pub(crate) async fn resume(connection: &Connection, sweep_id: &str) -> Result<v1::Sweep, Failure> {
    let request = v1::ResumeSweepRequest { sweep_id: sweep_id.to_string() };
    named(connection.sweeps().resume_sweep(request).await?.into_inner().sweep)
}

/// Fetches a sweep's report and writes it to `file`, or to `reports/` in the data directory.
pub(crate) async fn save_report(
    connection: &Connection,
    sweep_id: &str,
    file: Option<&Path>,
    data_dir: &Path,
) -> Result<PathBuf, Failure> {
    let files = fetch_report(connection, sweep_id, v1::ReportFormat::Html).await?;
    let html: Vec<u8> = files.into_iter().flat_map(|(_, bytes)| bytes).collect();
    let path =
        file.map_or_else(|| data_dir.join("reports").join(format!("{sweep_id}.html")), Path::to_path_buf);
    write(&path, &html)?;
    Ok(path)
}

/// The same as Markdown beside its figures, in a directory.
async fn save_markdown(
    connection: &Connection,
    sweep_id: &str,
    directory: Option<&Path>,
    data_dir: &Path,
) -> Result<PathBuf, Failure> {
    let files = fetch_report(connection, sweep_id, v1::ReportFormat::Markdown).await?;
    let directory = directory.map_or_else(|| data_dir.join("reports").join(sweep_id), Path::to_path_buf);
    for (name, bytes) in files {
        // What a server names is not to leave the directory.
        let is_below = |name: &str| Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if name.is_empty() || !is_below(&name) {
            return Err(Failure::failed(format!(
                "the server's answer names a file {name:?}, which is none of a report"
            )));
        }
        write(&directory.join(name), &bytes)?;
    }
    Ok(directory)
}

/// The tables for programs that a report has beside it, by their plain names.
pub(crate) async fn report_tables(
    connection: &Connection,
    sweep_id: &str,
) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let mut files = fetch_report(connection, sweep_id, v1::ReportFormat::Markdown).await?;
    // What a server names is not to leave the directory, nor to be what else an export has.
    let is_table = |name: &str| name.ends_with(".csv") && !name.contains(['/', '\\']);
    files.retain(|(name, _)| is_table(name) && !["trials.csv", "metrics.csv"].contains(&name.as_str()));
    Ok(files)
}

/// A report's files, by name, in the server's order.
async fn fetch_report(
    connection: &Connection,
    sweep_id: &str,
    format: v1::ReportFormat,
) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let request = v1::GetReportRequest { sweep_id: sweep_id.to_string(), format: format.into() };
    let mut stream = connection.sweeps().get_report(request).await?.into_inner();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    while let Some(piece) = stream.message().await? {
        match files.last_mut() {
            Some((name, bytes)) if *name == piece.file => bytes.extend(piece.chunk),
            _ => files.push((piece.file, piece.chunk)),
        }
    }
    Ok(files)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, bytes)
    };
    write().map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}
