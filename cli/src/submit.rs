//! `lorafleet submit`: starts a sweep on a server and leaves it to it.

use crate::client::{Connection, ServerArgs};
use crate::output::{self, OutputArgs};
use crate::plan::{self, BaseModels};
use crate::upload::DataArgs;
use crate::{Failure, agents, view};
use config::sweep_file;
use proto::v1;
use std::path::PathBuf;

/// Submits a sweep to a server, which trains it, and prints its id.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet submit sweep.yaml    # to the `lorafleet up` that serves ./lorafleet-data
  lorafleet submit sweep.yaml --set max_steps=100
  lorafleet submit sweep.yaml --endpoint https://fleet.example.org:7401 --data in-place
  lorafleet watch $(lorafleet submit sweep.yaml)")]
pub(crate) struct Args {
    /// The sweep file.
    #[arg(value_name = "SWEEP")]
    file: PathBuf,
    /// Sets a key of the sweep file; a dotted key reaches inside. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let elsewhere = args.server.endpoint()?.is_some();
    let mut loaded = plan::load_for(&args.file, &args.set, elsewhere)?;
    let sweep = Connection::with(&args.server, async |connection| {
        if connection.trains_nothing() {
            return Err(Failure::unreachable(format!(
                "nobody serves {}; start `lorafleet up --data-dir {0}` in another terminal, or use `lorafleet run`",
                args.server.data_dir().display()
            )));
        }
        // What lies on a server's machines, only it can check; this machine's can be checked here.
        let base_models = if elsewhere {
            args.data.place(&mut loaded, &args.server, connection).await?
        } else if agents::are_simulated(connection).await? {
            plan::outline(&loaded)?
        } else {
            plan::base_models(&plan::check(&loaded)?)
        };
        submit(&loaded, base_models, connection).await
    })
    .await?;
    output::print(args.output.format, &view::sweep(&sweep), || sweep.id.clone())
}

/// Starts a sweep. `base_models` are the shapes that could be read here.
pub(crate) async fn submit(
    loaded: &sweep_file::Loaded,
    base_models: BaseModels,
    connection: &Connection,
) -> Result<v1::Sweep, Failure> {
    let request = v1::SubmitSweepRequest {
        request_id: uuid::Uuid::new_v4().to_string(),
        spec: Some(proto::convert::to_struct(&loaded.document)),
        base_models,
    };
    let response = connection.sweeps().submit_sweep(request).await?.into_inner();
    response.sweep.ok_or_else(|| Failure::failed("the server's answer names no sweep"))
}
