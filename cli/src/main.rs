//! The `lorafleet` command. It talks gRPC only, but for [`export`] to MLflow; `run` starts a coordinator and an agent in this
//! process and talks gRPC to them.
//!
//! | module | holds |
//! |---|---|
//! | [`run`] | the main job; [`follow`], [`board`], [`forecast`] and [`progress`] show it live |
//! | [`sweeps`], [`trials`], [`adapters`], [`agents`] | verbs that read and end what a server keeps |
//! | [`listing`], [`export`] | how listings are sorted, filtered and cut; a sweep as files, and in other tools |
//! | [`plan`] | what a sweep needs, before anything runs |
//! | [`machines`] | what machines cost |
//! | [`up`], [`submit`], [`extend`] | this machine as a server; a sweep for one; more of it |
//! | [`doctor`] | whether a machine has what it takes |
//! | [`device`] | what `--device` means |
//! | [`engine_host`] | not for people: the process of a device's engine |
//! | [`fsck`] | whether a data directory is sound |
//! | [`train`] | one fine-tuning run without a server |
//! | [`eval`], [`generate`] | a model on evaluation tasks; what it goes on with after a prompt; [`model`] loads it |
//! | [`quantize`] | a model in 4 bits |
//! | [`bench`] | how fast parts of it are on this machine |
//! | [`context`] | servers by name |
//! | [`token`] | who may call a server |
//! | [`client`], [`embedded`] | the way to a server, or one in this process |
//! | [`interrupt`] | Ctrl-C and SIGTERM |
//! | [`output`], [`view`], [`failure`] | tables, JSON, YAML; how records look; exit codes |

#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic where a pipe is closed: output::to_stdout, output::say!"
)]

mod adapters;
mod agents;
mod bar;
mod bench;
mod board;
mod client;
mod context;
mod device;
mod doctor;
mod download;
mod embedded;
mod engine_host;
mod eval;
mod evaluations;
mod export;
mod extend;
mod failure;
mod follow;
mod forecast;
mod fsck;
mod generate;
mod interrupt;
mod listing;
mod machines;
mod model;
mod output;
mod plan;
mod progress;
mod quantize;
mod run;
mod stale;
mod submit;
mod sweeps;
mod token;
mod train;
mod trials;
mod up;
mod upload;
mod view;

pub(crate) use failure::Failure;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// Finds the best LoRA fine-tuning configuration for a model, a data set and a budget.
#[derive(Parser)]
#[command(
    name = "lorafleet",
    version,
    propagate_version = true,
    after_help = "Examples:
  lorafleet run config/sweeps/quickstart.yaml
  lorafleet plan config/sweeps/quickstart.yaml
  lorafleet adapters pull quickstart-3fa2 --top 3 --to ./adapters

Exit codes: 0 done, 1 the work failed, 2 usage or invalid spec, 3 unreachable, 130 interrupted."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Run(run::Args),
    Plan(plan::Args),
    Up(up::Args),
    Submit(submit::Args),
    Train(Box<train::Args>),
    Eval(Box<eval::Args>),
    Generate(Box<generate::Args>),
    Quantize(quantize::Args),
    #[command(subcommand)]
    Bench(bench::Verb),
    List(sweeps::ListArgs),
    /// Shows one sweep and its trials.
    #[command(after_help = "Example:\n  lorafleet get quickstart-3fa2 -o yaml")]
    Get(sweeps::SweepArgs),
    Watch(sweeps::WatchArgs),
    /// Ends a sweep and its trials; adapters that they uploaded stay.
    #[command(after_help = "Example:\n  lorafleet cancel quickstart-3fa2")]
    Cancel(sweeps::SweepArgs),
    /// Holds a sweep: what trains is checkpointed, and nothing trains until it is resumed.
    #[command(after_help = "Example:\n  lorafleet pause quickstart-3fa2")]
    Pause(sweeps::SweepArgs),
    /// Goes on with a paused sweep from its checkpoints.
    #[command(after_help = "Example:\n  lorafleet resume quickstart-3fa2")]
    Resume(sweeps::SweepArgs),
    Extend(extend::Args),
    Delete(sweeps::DeleteArgs),
    Report(sweeps::ReportArgs),
    Export(export::Args),
    #[command(subcommand)]
    Trials(trials::Verb),
    #[command(subcommand)]
    Adapters(adapters::Verb),
    #[command(subcommand)]
    Agents(agents::Verb),
    #[command(subcommand)]
    Machines(machines::Verb),
    Fsck(fsck::Args),
    Doctor(Box<doctor::Args>),
    EngineHost(engine_host::Args),
    #[command(subcommand)]
    Context(context::Verb),
    #[command(subcommand)]
    Token(token::Verb),
    /// Prints a completion script for a shell.
    #[command(
        after_help = "Example:\n  lorafleet completions bash > ~/.local/share/bash-completion/completions/lorafleet"
    )]
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let options = telemetry::Options {
        service: "lorafleet",
        version: env!("CARGO_PKG_VERSION"),
        level: "warn",
        scraped: cli.verb.is_scraped(),
    };
    let settings = match &cli.verb {
        // Its standard output is the agent's, which also tells of its work.
        Verb::EngineHost(_) => telemetry::Settings::logs_only(),
        _ => telemetry::Settings::from_env(),
    };
    let started = settings.and_then(|settings| telemetry::start(&options, &settings));
    let done = started.map_err(Failure::invalid).and_then(|telemetry| {
        let span = telemetry::trace::command(cli.verb.name());
        let done = span.in_scope(|| dispatch(cli.verb));
        if let Err(failure) = &done {
            telemetry::trace::failed(&span, failure.message());
        }
        // It is told once it is closed, and then flushed.
        drop(span);
        drop(telemetry);
        done
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

impl Verb {
    /// Whether it serves its metrics.
    fn is_scraped(&self) -> bool {
        matches!(self, Self::Up(args) if args.http.is_some())
    }

    /// Whether it leaves nothing half done that it would have to put in order after Ctrl-C.
    fn ends_at_once(&self) -> bool {
        matches!(
            self,
            Self::Plan(_)
                | Self::Eval(_)
                | Self::Generate(_)
                | Self::Bench(_)
                | Self::Machines(_)
                | Self::Fsck(_)
                | Self::Doctor(_)
                | Self::Context(_)
                | Self::Token(_)
        )
    }

    /// The name of its span.
    fn name(&self) -> &'static str {
        match self {
            Self::Run(_) => "lorafleet run",
            Self::Plan(_) => "lorafleet plan",
            Self::Up(_) => "lorafleet up",
            Self::Submit(_) => "lorafleet submit",
            Self::Train(_) => "lorafleet train",
            Self::Eval(_) => "lorafleet eval",
            Self::Generate(_) => "lorafleet generate",
            Self::Quantize(_) => "lorafleet quantize",
            Self::Bench(_) => "lorafleet bench",
            Self::List(_) => "lorafleet list",
            Self::Get(_) => "lorafleet get",
            Self::Watch(_) => "lorafleet watch",
            Self::Cancel(_) => "lorafleet cancel",
            Self::Pause(_) => "lorafleet pause",
            Self::Resume(_) => "lorafleet resume",
            Self::Extend(_) => "lorafleet extend",
            Self::Delete(_) => "lorafleet delete",
            Self::Report(_) => "lorafleet report",
            Self::Export(_) => "lorafleet export",
            Self::Trials(_) => "lorafleet trials",
            Self::Adapters(_) => "lorafleet adapters",
            Self::Agents(_) => "lorafleet agents",
            Self::Machines(_) => "lorafleet machines",
            Self::Fsck(_) => "lorafleet fsck",
            Self::Doctor(_) => "lorafleet doctor",
            Self::EngineHost(_) => "lorafleet engine-host",
            Self::Context(_) => "lorafleet context",
            Self::Token(_) => "lorafleet token",
            Self::Completions { .. } => "lorafleet completions",
        }
    }
}

fn dispatch(verb: Verb) -> Result<(), Failure> {
    if verb.ends_at_once() {
        interrupt::end_at_once()?;
    }
    match verb {
        Verb::Run(args) => block_on(run::run(args)),
        Verb::Plan(args) => plan::run(args),
        Verb::Up(args) => block_on(up::run(args)),
        Verb::Submit(args) => block_on(submit::run(args)),
        Verb::Train(args) => train::run(*args),
        Verb::Eval(args) => eval::run(*args),
        Verb::Generate(args) => generate::run(*args),
        Verb::Quantize(args) => block_on(quantize::run(args)),
        Verb::Bench(verb) => bench::run(verb),
        Verb::List(args) => block_on(sweeps::run_list(args)),
        Verb::Get(args) => block_on(sweeps::run_get(args)),
        Verb::Watch(args) => block_on(sweeps::run_watch(args)),
        Verb::Cancel(args) => block_on(sweeps::run_cancel(args)),
        Verb::Pause(args) => block_on(sweeps::run_pause(args)),
        Verb::Resume(args) => block_on(sweeps::run_resume(args)),
        Verb::Delete(args) => block_on(sweeps::run_delete(args)),
        Verb::Extend(args) => block_on(extend::run(args)),
        Verb::Report(args) => block_on(sweeps::run_report(args)),
        Verb::Export(args) => block_on(export::run(args)),
        Verb::Trials(verb) => block_on(trials::run(verb)),
        Verb::Adapters(verb) => block_on(adapters::run(verb)),
        Verb::Agents(verb) => block_on(agents::run(verb)),
        Verb::Machines(verb) => machines::run(verb),
        Verb::Fsck(args) => fsck::run(args),
        Verb::Doctor(args) => block_on(doctor::run(*args)),
        Verb::EngineHost(args) => engine_host::run(&args),
        Verb::Context(verb) => context::run(verb),
        Verb::Token(verb) => token::run(verb),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "lorafleet", &mut script);
            output::to_stdout(&String::from_utf8_lossy(&script))
        }
    }
}

/// Runs a verb that talks to a server.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    telemetry::program::block_on(work)
        .unwrap_or_else(|error| Err(Failure::failed(format!("cannot start: {error}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks a command's help and that of all commands below it.
    fn check_examples(command: &clap::Command, path: &str) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Example") && help.contains(path), "{path} --help shows no example: {help:?}");
        for verb in command.get_subcommands() {
            check_examples(verb, &format!("{path} {}", verb.get_name()));
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        check_examples(&Cli::command(), "lorafleet");
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
