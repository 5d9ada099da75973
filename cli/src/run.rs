//! `lorafleet run`: the main job. Submits a sweep, shows it live, and ends with its best adapter and report.

use crate::board::Board;
use crate::client::{self, Connection, ServerArgs};
use crate::embedded::{DeviceArgs, Embedded};
use crate::follow::Follow;
use crate::interrupt::Requests;
use crate::output::{self, Format, OutputArgs, say};
use crate::plan::BaseModels;
use crate::submit::submit;
use crate::upload::DataArgs;
use crate::{Failure, plan, sweeps, view};
use config::sweep_file;
use domain::metric;
use domain::trial::{TrialConfig, TrialState};
use gpu_agent::DeviceOptions;
use proto::v1;
use serde_json::{Value, json};
use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::Duration;

/// How long a server that is gone is looked for.
const RECONNECT_FOR: Duration = Duration::from_secs(600);

/// The accelerator that a CPU is.
const CPU: &str = "CPU";

/// Ways of reading rows that are told at the start at most.
const MOST_READINGS: usize = 4;

/// Runs a sweep from its file to adapters and a report.
///
/// Without --endpoint a coordinator and an agent are started in this process. Ctrl-C
/// checkpoints every trial; the same command goes on from there.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet run config/sweeps/quickstart.yaml
  lorafleet run sweep.yaml --set max_steps=100 --set search.max_trials=4
  lorafleet run sweep.yaml --set pretrained_model_id=../models/my-llama --data-dir /data/lorafleet
  lorafleet run config/sweeps/openllama-7b.yaml --simulate A100-40GB:8,V100-16GB:8 --simulate-speed 1000
  lorafleet run sweep.yaml --endpoint http://10.0.0.5:7401 -o json

Exit codes: 0 done, 1 the work failed, 2 usage or invalid spec, 3 unreachable, 130 interrupted.")]
pub(crate) struct Args {
    /// The sweep file.
    #[arg(value_name = "SWEEP")]
    file: PathBuf,
    /// Sets a key of the sweep file; a dotted key reaches inside. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Starts anew where an unfinished sweep of the same file would go on; that one is cancelled.
    #[arg(long)]
    new: bool,
    /// Counts rows that cannot be read instead of ending with an error.
    #[arg(long, alias = "skip_bad_rows")]
    skip_bad_rows: bool,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let endpoint = args.server.endpoint()?;
    let endpoint = endpoint.as_deref();
    let mut loaded = load(&args, endpoint.is_some())?;
    // What lies on a server's machines, only it can check.
    let (mut base_models, mut devices) = (BaseModels::new(), Vec::new());
    if endpoint.is_none() {
        let prices;
        (devices, prices) = args.devices.devices()?;
        check_accelerators(&loaded, &devices)?;
        plan::check_numbers(&loaded, &devices)?;
        if args.devices.are_simulated() {
            base_models = plan::outline(&loaded)?;
            announce(&args, &loaded, &[]);
            say!("simulated: nothing is trained, and every number is a model's");
        } else {
            let planned = plan::check(&loaded)?;
            announce(&args, &loaded, &planned);
            base_models = plan::base_models(&planned);
        }
        prices.into_iter().for_each(|line| say!("{line}"));
    } else if args.devices.are_simulated() {
        return Err(Failure::invalid(
            "--simulate: a server has its own devices; leave --endpoint out, or start an agent there with --simulate",
        ));
    }
    let mut requests = Requests::new()?;
    let connection = match endpoint {
        Some(_) => Connection::open(&args.server).await?,
        None => embedded(&args, devices).await?,
    };
    let sweep_id = OnceCell::new();
    let result = tokio::select! {
        result = drive(&args, &mut loaded, base_models, &connection, &sweep_id) => result,
        () = requests.next() => {
            let command: Vec<_> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
            Err(Failure::interrupted(match endpoint {
                Some(endpoint) => leaving(&command, endpoint, sweep_id.get().map(String::as_str)),
                None => {
                    say!("\ninterrupted: checkpointing (once more ends at once)");
                    going_on(&command)
                }
            }))
        }
    };
    connection.close(&mut requests).await;
    result
}

/// How to go on with a sweep that this process trained, and how to start it anew: the command as it was given,
/// with or without `--new`.
fn going_on(command: &[String]) -> String {
    if command.iter().any(|argument| argument == "--new") {
        let rest: Vec<_> = command.iter().filter(|a| *a != "--new").map(String::as_str).collect();
        return format!("go on with: {}; start anew with the same command", shell(rest));
    }
    // Behind the verb's name, where no `--` can stand before it.
    let (verb, rest) = command.split_at(command.len().min(2));
    let new = verb.iter().map(String::as_str).chain(["--new"]).chain(rest.iter().map(String::as_str));
    format!("go on with the same command; start anew with: {}", shell(new))
}

/// What becomes of a sweep on a server that is left: nothing of it was in this process.
fn leaving(command: &[String], endpoint: &str, sweep_id: Option<&str>) -> String {
    let program = command.first().map_or("lorafleet", String::as_str);
    let call = |verb: &[&str]| shell([program].iter().chain(verb).copied().chain(["--endpoint", endpoint]));
    match sweep_id {
        Some(id) => format!(
            "interrupted; the server trains on\n  follow it with: {}\n  end it with:    {}",
            call(&["watch", id]),
            call(&["cancel", id])
        ),
        None => format!("interrupted before the server named a sweep; see {}", call(&["list"])),
    }
}

/// A command line that a POSIX shell splits into just these arguments.
fn shell<'a>(arguments: impl IntoIterator<Item = &'a str>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+@%/:,.".contains(c);
    let quoted = |argument: &'a str| match argument {
        "" => "''".to_string(),
        plainly if plainly.chars().all(plain) => plainly.to_string(),
        other => format!("'{}'", other.replace('\'', "'\\''")),
    };
    arguments.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}

fn load(args: &Args, elsewhere: bool) -> Result<sweep_file::Loaded, Failure> {
    let mut set = args.set.clone();
    if args.skip_bad_rows {
        set.push("skip_bad_rows=true".into());
    }
    plan::load_for(&args.file, &set, elsewhere)
}

fn announce(args: &Args, loaded: &sweep_file::Loaded, planned: &[plan::Planned]) {
    let search = &loaded.spec.search;
    let algorithm = serde_json::to_value(search.algorithm).unwrap_or_default();
    let trials = search.max_trials.map_or_else(String::new, |n| format!(", {n} trials"));
    let again = loaded.spec.replicates.map_or_else(String::new, |replicates| {
        format!(", the best {} run {} times each", replicates.finalists, replicates.runs)
    });
    say!(
        "LoraFleet {} · sweep {} ({}{trials}{again}) · data in {}",
        env!("CARGO_PKG_VERSION"),
        loaded.spec.name,
        algorithm.as_str().unwrap_or_default(),
        args.server.data_dir().display(),
    );
    let readings = plan::readings(planned);
    readings.iter().take(MOST_READINGS).for_each(|reading| say!("{reading}"));
    if let Some(more @ 1..) = readings.len().checked_sub(MOST_READINGS) {
        say!("… and {more} more ways in which trials read their rows; lorafleet plan shows every trial");
    }
}

/// Refuses a sweep whose trials would wait for a device that this machine will never have.
fn check_accelerators(loaded: &sweep_file::Loaded, devices: &[DeviceOptions]) -> Result<(), Failure> {
    let mut here: Vec<_> = devices.iter().map(|device| device.accelerator.as_str()).collect();
    here.dedup();
    let is_here = |name: &str| here.iter().any(|here| name.eq_ignore_ascii_case(here));
    let what = if here == [CPU] { "its CPU alone".into() } else { here.join(", ") };
    let one = here.first().unwrap_or(&CPU);
    let named = &loaded.spec.resources.accelerators;
    if !named.is_empty() && !named.iter().any(|name| is_here(name)) {
        return Err(Failure::invalid(format!(
            "{}: resources.accelerators: names {}, and this machine trains on {what}; add {one}, leave the key out, or \
             name a server that has them with --endpoint",
            loaded.locate("resources.accelerators"),
            named.join(", "),
        )));
    }
    // Of those any will do; each of these has trials of its own.
    let key = TrialConfig::ACCELERATOR;
    let chosen = loaded.spec.accelerators();
    let lacking: Vec<_> = chosen.iter().copied().filter(|name| !is_here(name)).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let set = chosen.iter().find(|name| is_here(name)).unwrap_or(one);
    Err(Failure::invalid(format!(
        "{}: {key}: trials must run on {}, and this machine trains on {what}; give --set {key}={set}, or name a server that \
         has them with --endpoint",
        plan::place(loaded, key),
        lacking.join(" and "),
    )))
}

async fn embedded(args: &Args, devices: Vec<DeviceOptions>) -> Result<Connection, Failure> {
    let data_dir = args.server.data_dir();
    client::refuse_in_use(data_dir).await?;
    let mut embedded = Embedded::coordinator(data_dir).await?;
    if let Err(failure) = embedded.start_agent(data_dir, devices, gpu_agent::cache::DEFAULT_LIMIT, None).await
    {
        embedded.stop().await;
        return Err(failure);
    }
    say!("live page: {}/", embedded.endpoint());
    Connection::to_embedded(embedded).await
}

/// Submits the sweep or takes it up again, and follows it to its end; `sweep_id` is set once it is known.
async fn drive(
    args: &Args,
    loaded: &mut sweep_file::Loaded,
    mut base_models: BaseModels,
    connection: &Connection,
    sweep_id: &OnceCell<String>,
) -> Result<(), Failure> {
    if args.server.endpoint()?.is_some() {
        base_models = args.data.place(loaded, &args.server, connection).await?;
    }
    let id = match unfinished(args, loaded, connection).await? {
        Some(id) => {
            say!("going on with {id} (--new starts anew)");
            id
        }
        None => {
            let id = submit(loaded, base_models, connection).await?.id;
            say!("submitted {id}");
            id
        }
    };
    let id = sweep_id.get_or_init(|| id);
    let quiet = args.output.format != Format::Table;
    // A coordinator in this process does not come back.
    let reconnect_for = if args.server.endpoint()?.is_some() { RECONNECT_FOR } else { Duration::ZERO };
    let follow = Follow { server: &args.server, sweep: id, quiet, reconnect_for };
    let followed = follow.to_the_end(connection).await?;
    finish(args, followed.connection.as_ref().unwrap_or(connection), id, &followed.board).await
}

/// The unfinished sweep of the same document, unless `--new` asks to cancel it.
async fn unfinished(
    args: &Args,
    loaded: &sweep_file::Loaded,
    connection: &Connection,
) -> Result<Option<String>, Failure> {
    if args.server.endpoint()?.is_some() && !args.new {
        return Ok(None);
    }
    let states = vec![v1::SweepState::Running, v1::SweepState::Paused];
    let running = sweeps::list(connection, states).await?;
    let wanted = json!(loaded.document);
    for sweep in running {
        let document = sweep.spec.clone().map(proto::convert::from_struct).map(Value::Object);
        if sweep.name != loaded.spec.name || document != Some(normal(&wanted)) {
            if sweep.state() == v1::SweepState::Paused {
                continue;
            }
            say!("also going on with the unfinished sweep {} (lorafleet cancel ends it)", sweep.id);
        } else if args.new {
            sweeps::cancel(connection, &sweep.id).await?;
            say!("cancelled the unfinished {}", sweep.id);
        } else {
            // Of a sweep that runs it changes nothing.
            sweeps::resume(connection, &sweep.id).await?;
            return Ok(Some(sweep.id));
        }
    }
    Ok(None)
}

/// A document as it comes back from the wire: whole floats are integers there.
fn normal(document: &Value) -> Value {
    let wrapped = json!({ "d": document });
    let object = wrapped.as_object().cloned().unwrap_or_default();
    proto::convert::from_struct(proto::convert::to_struct(&object)).remove("d").unwrap_or_default()
}

async fn finish(args: &Args, connection: &Connection, sweep_id: &str, board: &Board) -> Result<(), Failure> {
    // The stream's records may be a change behind; the listing is the last word.
    let trials = crate::trials::list(connection, sweep_id).await?;
    let report = sweeps::save_report(connection, sweep_id, None, args.server.data_dir()).await?;
    let best = board.best().and_then(|b| trials.iter().find(|t| t.id == b.id));
    let adapter = match best {
        Some(trial) => crate::adapters::locate(connection, trial).await?,
        None => None,
    };
    let document = json!({
        "sweep": board.sweep.as_ref().map(view::sweep),
        "trials": trials.iter().map(view::trial_document).collect::<Vec<_>>(),
        "best_adapter": adapter,
        "report": report,
    });
    output::print(args.output.format, &document, || {
        let mut text = format!("\n{}\n", view::trial_table(&trials));
        text += &board.sweep.as_ref().map(view::ended_early).unwrap_or_default();
        if let Some(trial) = best {
            text += &format!("best trial  {}{}", trial.id, compared(board));
            text += &format!(" · eval/loss {}", output::loss(trial.eval_loss));
            let base = trial.summary.as_ref().and_then(|s| s.base_eval_loss);
            text += &base.map_or_else(String::new, |b| format!(" (base {b:.4})"));
            text += &format!(" · {}\n", view::parameters(trial));
            text += &adapter.as_ref().map_or_else(String::new, |a| format!("adapter     {a}\n"));
            text += &view::evaluations(trial);
            text += &sample(trial);
        }
        let read = best.or_else(|| trials.iter().find(|trial| trial.summary.is_some()));
        text += &read.map(rows).unwrap_or_default();
        text + &format!("report      {}\n", report.display())
    })?;
    let sweep = board.sweep.as_ref();
    match sweep.map(v1::Sweep::state) {
        Some(v1::SweepState::Failed) => Err(Failure::failed(
            sweep.and_then(|s| s.failure.clone()).unwrap_or_else(|| "no trial could be trained".into()),
        )),
        Some(v1::SweepState::Cancelled) => Err(Failure::failed("the sweep was cancelled")),
        _ if board.count(TrialState::Failed) == board.trials.len() => {
            Err(Failure::failed("no trial could be trained"))
        }
        _ => Ok(()),
    }
}

/// The best trial's value of the metric by which the sweep compares, unless that is the held-out loss.
fn compared(board: &Board) -> String {
    let value = board.sweep.as_ref().and_then(|sweep| sweep.best_value);
    match value {
        Some(value) if board.metric() != metric::EVAL_LOSS => format!(" · {} {value:.4}", board.metric()),
        _ => String::new(),
    }
}

/// Rows that a trial read in part or not at all, if there are any.
fn rows(trial: &domain::trial::Trial) -> String {
    let Some(summary) = &trial.summary else { return String::new() };
    let cut = format!("{} cut to {} tokens", summary.truncated_rows, trial.config.max_sequence_length);
    let skipped = format!("{} skipped as unreadable", summary.skipped_rows);
    match (summary.truncated_rows, summary.skipped_rows) {
        (0, 0) => String::new(),
        (_, 0) => format!("rows        {cut}\n"),
        (0, _) => format!("rows        {skipped}\n"),
        _ => format!("rows        {cut} · {skipped}\n"),
    }
}

/// What the base and the adapter say to the sample prompt.
fn sample(trial: &domain::trial::Trial) -> String {
    let Some(summary) = &trial.summary else { return String::new() };
    let (Some(prompt), Some(before), Some(after)) =
        (&summary.sample_prompt, &summary.sample_before, &summary.sample_after)
    else {
        return String::new();
    };
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    format!(
        "prompt      {}\n  before    {}\n  after     {}\n",
        one_line(prompt),
        one_line(before),
        one_line(after)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_command_can_be_given_again() {
        let command = |line: &[&str]| line.iter().map(ToString::to_string).collect::<Vec<_>>();
        let set = "name=it's 1";
        for (line, want) in [
            (
                command(&["lorafleet", "run", "s.yaml", "--data-dir", "/d", "--set", set]),
                "go on with the same command; start anew with: \
                 lorafleet run --new s.yaml --data-dir /d --set 'name=it'\\''s 1'",
            ),
            (
                command(&["target/release/lorafleet", "run", "--new", "s.yaml", "--set", ""]),
                "go on with: target/release/lorafleet run s.yaml --set ''; start anew with the same command",
            ),
            (
                command(&["lorafleet", "run", "--", "s.yaml"]),
                "go on with the same command; start anew with: lorafleet run --new -- s.yaml",
            ),
        ] {
            assert_eq!(going_on(&line), want);
        }
    }

    #[test]
    fn a_server_that_is_left_trains_on() {
        let command = vec!["lorafleet".to_string(), "run".into(), "s.yaml".into()];
        let endpoint = "http://10.0.0.5:7401";
        let said = leaving(&command, endpoint, Some("s-1a2b"));
        for fragment in [
            "the server trains on",
            "lorafleet watch s-1a2b --endpoint http://10.0.0.5:7401",
            "lorafleet cancel s-1a2b --endpoint http://10.0.0.5:7401",
        ] {
            assert!(said.contains(fragment), "{said} lacks {fragment}");
        }
        assert!(leaving(&command, endpoint, None).contains("lorafleet list --endpoint http://10.0.0.5:7401"));
    }
}
