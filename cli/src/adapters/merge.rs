//! `adapters merge`: a base and an adapter as one model.

use super::fetch;
use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::interrupt::Requests;
use crate::output::{self, OutputArgs, say};
use domain::TrialId;
use domain::trial::{Precision, Trial};
use futures::FutureExt;
use proto::v1;
use serde_json::json;
use std::path::{Path, PathBuf};
use trainer::adapter_file::{CONFIG_FILE, PeftConfig};
use trainer::merge::{Merge, MergeInto};
use trainer::new_model::SHARD_BYTES;
use trainer::{TrainError, checkpoint, locate};

/// Writes a model with an adapter in its weights: one that needs no PEFT.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet adapters merge quickstart-3fa2/7 --to ./model
  lorafleet adapters merge ./adapter --model ./llama --to ./model

  lorafleet adapters merge ./adapter --model ./llama --into dequantized --to ./model

The new directory has the base's configuration and tokenizer, and its weights in the base's type; over 5 GB they are
in several files. AutoModelForCausalLM.from_pretrained reads it.

A trial in 4 bits was trained on what these 4 bits mean, and its adapter is added to that: --into dequantized. The new
model's weights are no 4 bits; lorafleet quantize makes them so again.")]
pub(crate) struct Args {
    /// A trial's id (SWEEP_ID/NUMBER), or a directory with an adapter in PEFT's format.
    #[arg(value_name = "TRIAL_ID|ADAPTER_DIR")]
    adapter: String,
    /// Where to write the model: a directory that is empty or not there.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// The base model's directory. Without it, the one that the trial or adapter_config.json names.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The weights that the adapter is added to: the base's own, or what they mean once they are in 4 bits. Unless given,
    /// what the trial was trained on; for an adapter's directory, dequantized if the base's files are in 4 bits.
    #[arg(long, value_name = "WEIGHTS", value_parser = ["original", "dequantized"])]
    into: Option<String>,
    /// With --into dequantized and a base that is not in 4 bits: whether the magnitudes of the blocks were quantised too.
    #[arg(long, alias = "double_quant", value_name = "BOOL", action = clap::ArgAction::Set)]
    double_quant: Option<bool>,
    /// Replaces a model that is in the directory already.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let named = Path::new(&args.adapter);
    if named.join(CONFIG_FILE).is_file() {
        let of_adapter = || PeftConfig::load(named).map(|config| config.base_model_name_or_path);
        let base = match &args.model {
            Some(model) => model.clone(),
            None => directory(&of_adapter().map_err(unusable)?, CONFIG_FILE)?,
        };
        return merge(&args, &base, named, None);
    }
    if TrialId::new(args.adapter.clone()).number().is_none() {
        return Err(Failure::invalid(format!(
            "{} is neither a directory with an {CONFIG_FILE} nor a trial's id; a trial's id is SWEEP_ID/NUMBER",
            args.adapter
        )));
    }
    let pulled = tempfile::tempdir().map_err(|e| Failure::failed(format!("a temporary directory: {e}")))?;
    let trial = Connection::with(&args.server, async |connection| {
        let request = v1::GetTrialRequest { trial_id: args.adapter.clone() };
        let trial = connection.trials().get_trial(request).await?.into_inner().trial.unwrap_or_default();
        let trial = Trial::try_from(trial).map_err(Failure::failed)?;
        fetch(connection, &args.adapter, pulled.path()).await?;
        Ok(trial)
    })
    .await?;
    let base = match &args.model {
        Some(model) => model.clone(),
        None => directory(&trial.config.pretrained_model_id, &args.adapter)?,
    };
    check_digest(&trial, &base)?;
    merge(&args, &base, pulled.path(), Some(trial.config.base_model().precision))
}

/// The weights that an adapter is added to: what is asked for, else what it was trained on as far as that is known.
fn into(args: &Args, base: &Path, trained: Option<Precision>) -> Result<MergeInto, Failure> {
    let of_files = MergeInto::of_files(base).map_err(unusable)?;
    let known = match (of_files, trained) {
        (MergeInto::Original, Some(precision)) => MergeInto::of(precision),
        (of_files, _) => of_files,
    };
    let asked = match args.into.as_deref() {
        None => known,
        Some("original") => MergeInto::Original,
        Some(_) => match known {
            MergeInto::Original => MergeInto::Dequantized { double_quant: true },
            known => known,
        },
    };
    match (asked, args.double_quant) {
        (asked, None) => Ok(asked),
        (MergeInto::Dequantized { .. }, Some(double_quant)) => Ok(MergeInto::Dequantized { double_quant }),
        (MergeInto::Original, Some(_)) => Err(Failure::invalid(
            "--double-quant: the adapter is added to the original weights; leave it out, or give --into dequantized",
        )),
    }
}

/// The base that a trial or an adapter names, on this machine.
fn directory(base: &str, named_by: &str) -> Result<PathBuf, Failure> {
    locate::model(&config::paths::absolute(base)).map_err(|_| {
        Failure::invalid(format!(
            "the base model that {named_by} names, {base:?}, is no directory of this machine and not in the hub's \
             cache; say with --model where it is"
        ))
    })
}

/// Refuses another base than the one that the trial was trained on.
fn check_digest(trial: &Trial, base: &Path) -> Result<(), Failure> {
    let Some(digests) = &trial.digests else { return Ok(()) };
    let found = checkpoint::digest(base).map_err(unusable)?;
    if found == digests.base_model {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "{} is not the base that {} was trained on, {}: its digest is {found}, that one's {}; say with --model \
         where that one is",
        base.display(),
        trial.id,
        trial.config.pretrained_model_id,
        digests.base_model
    )))
}

fn merge(args: &Args, base: &Path, adapter: &Path, trained: Option<Precision>) -> Result<(), Failure> {
    let Args { to, overwrite, .. } = args;
    let into = into(args, base, trained)?;
    let merge = Merge { base, adapter, to, into, shard_bytes: SHARD_BYTES, overwrite: *overwrite };
    let mut requests = Requests::new()?;
    let merged =
        merge.run(&mut || requests.next().now_or_never().is_some()).map_err(|error| match error {
            TrainError::Io { .. } => Failure::failed(error),
            error => unusable(error),
        })?;
    let Some(merged) = merged else {
        return Err(Failure::interrupted("interrupted; nothing was written"));
    };
    let document = json!({
        "model": to.display().to_string(),
        "base": base.display().to_string(),
        "into": into.name(),
        "double_quant": match into {
            MergeInto::Dequantized { double_quant } => Some(double_quant),
            MergeInto::Original => None,
        },
        "layers": merged.layers,
        "weight_files": merged.weight_files,
        "bytes": merged.bytes,
    });
    output::print(args.output.format, &document, || {
        say!("{} of {} layers, merged into {}", output::bytes(merged.bytes), merged.layers, what(into));
        format!("{}\n", to.display())
    })
}

fn what(into: MergeInto) -> &'static str {
    match into {
        MergeInto::Original => "the base's own weights",
        MergeInto::Dequantized { double_quant: true } => {
            "the base's weights as 4 bits with double quantisation mean them"
        }
        MergeInto::Dequantized { double_quant: false } => "the base's weights as 4 bits mean them",
    }
}

/// Something that was given cannot be used; only a failed tensor operation is no fault of the input.
fn unusable(error: TrainError) -> Failure {
    match error {
        TrainError::Tensor(_) => Failure::failed(error),
        _ => Failure::invalid(error),
    }
}
