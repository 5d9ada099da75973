//! Verbs about adapters: `adapters list|pull|merge`.
//!
//! | file | holds |
//! |---|---|
//! | `merge.rs` | a base and an adapter as one model |

mod merge;

use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::listing::{ListingArgs, VALUE};
use crate::output::{self, OutputArgs};
use crate::{trials, view};
use clap::Subcommand;
use domain::trial::Trial;
use proto::v1;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Lists, fetches and merges adapters in PEFT's format.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  lorafleet adapters list quickstart-3fa2
  lorafleet adapters pull quickstart-3fa2 --top 3 --to ./adapters
  lorafleet adapters merge quickstart-3fa2/7 --to ./model")]
pub(crate) enum Verb {
    /// Lists a sweep's adapters, best first.
    #[command(after_help = "Examples:
  lorafleet adapters list quickstart-3fa2
  lorafleet adapters list quickstart-3fa2 --filter 'lora_rank<=8' --sort bytes --limit 3")]
    List {
        /// The sweep's id.
        #[arg(value_name = "SWEEP_ID")]
        sweep: String,
        #[command(flatten)]
        listing: ListingArgs,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Fetches adapters: one trial's, or a sweep's best.
    #[command(after_help = "Examples:
  lorafleet adapters pull quickstart-3fa2/7 --to ./adapter
  lorafleet adapters pull quickstart-3fa2 --top 3 --to ./adapters

Each adapter is a directory that PeftModel.from_pretrained reads.")]
    Pull {
        /// A trial's id (SWEEP_ID/NUMBER), or a sweep's.
        #[arg(value_name = "TRIAL_ID|SWEEP_ID")]
        id: String,
        /// How many of a sweep's best adapters.
        #[arg(long, default_value_t = 1, value_name = "N")]
        top: usize,
        /// Where to write: the adapter's files for one trial, one folder a trial (by its number) for a sweep.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    Merge(merge::Args),
}

/// `lorafleet adapters …`.
pub(crate) async fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { sweep, listing, server, output } => {
            let adapters = Connection::with(&server, async |c| chosen(c, &sweep, &listing).await).await?;
            let document = Value::Array(adapters.iter().map(document).collect());
            output::print(output.format, &document, || table(&adapters))
        }
        Verb::Pull { id, top, to, server, output } => {
            let pulled = Connection::with(&server, async |c| pull(c, &id, top, &to).await).await?;
            let document = json!(pulled.iter().map(|p| p.display().to_string()).collect::<Vec<_>>());
            output::print(output.format, &document, || {
                pulled.iter().map(|p| format!("{}\n", p.display())).collect()
            })
        }
        Verb::Merge(args) => merge::run(args).await,
    }
}

fn document(adapter: &v1::Adapter) -> Value {
    json!({
        "trial": adapter.trial_id,
        "step": adapter.step,
        "eval_loss": adapter.eval_loss,
        "bytes": adapter.bytes,
        "path": adapter.path,
        "local_path": adapter.local_path,
    })
}

fn table(adapters: &[v1::Adapter]) -> String {
    let row = |a: &v1::Adapter| {
        vec![
            a.trial_id.clone(),
            a.step.to_string(),
            output::loss(a.eval_loss),
            output::bytes(a.bytes),
            a.local_path.clone().unwrap_or_else(|| a.path.clone()),
        ]
    };
    let rows: Vec<_> = adapters.iter().map(row).collect();
    output::table(&["trial", "step", "eval/loss", "size", "path"], &rows, &["size", "step"])
}

/// A sweep's adapters as a listing asks for them. They are sorted and filtered by what is known of their trials too.
async fn chosen(
    connection: &Connection,
    sweep_id: &str,
    listing: &ListingArgs,
) -> Result<Vec<v1::Adapter>, Failure> {
    let adapters = list(connection, sweep_id).await?;
    let mut trials = HashMap::new();
    if !listing.is_plain() {
        let known = trials::list(connection, sweep_id).await?;
        trials.extend(known.iter().map(|trial| (trial.id.to_string(), view::trial_document(trial))));
    }
    listing.apply(adapters, VALUE, |adapter| {
        let mut known = trials.get(&adapter.trial_id).cloned().unwrap_or_else(|| json!({}));
        if let (Some(known), Value::Object(own)) = (known.as_object_mut(), document(adapter)) {
            known.extend(own);
        }
        known
    })
}

/// A sweep's adapters, best first, page after page.
async fn list(connection: &Connection, sweep_id: &str) -> Result<Vec<v1::Adapter>, Failure> {
    let mut request = v1::ListAdaptersRequest {
        sweep_id: sweep_id.to_string(),
        page_size: 1000,
        page_token: String::new(),
    };
    let mut adapters = Vec::new();
    loop {
        let page = connection.adapters().list_adapters(request.clone()).await?.into_inner();
        adapters.extend(page.adapters);
        if page.next_page_token.is_empty() {
            return Ok(adapters);
        }
        request.page_token = page.next_page_token;
    }
}

/// Where a trial's adapter lies: a path on this machine if the store is local, else its name in the store.
pub(crate) async fn locate(connection: &Connection, trial: &Trial) -> Result<Option<String>, Failure> {
    let Some(sweep) = trial.id.sweep() else { return Ok(None) };
    let adapters = list(connection, sweep.as_str()).await?;
    let found = adapters.into_iter().find(|a| a.trial_id == trial.id.as_str());
    Ok(found.map(|a| a.local_path.unwrap_or(a.path)))
}

async fn pull(connection: &Connection, id: &str, top: usize, to: &Path) -> Result<Vec<PathBuf>, Failure> {
    if domain::TrialId::new(id).number().is_some() {
        fetch(connection, id, to).await?;
        return Ok(vec![to.to_path_buf()]);
    }
    let best = list(connection, id).await?;
    if best.is_empty() {
        return Err(Failure::failed(format!("{id} has no adapter yet")));
    }
    let mut pulled = Vec::new();
    for adapter in best.iter().take(top) {
        let number = domain::TrialId::new(adapter.trial_id.clone()).number().unwrap_or_default();
        let dir = to.join(number.to_string());
        fetch(connection, &adapter.trial_id, &dir).await?;
        pulled.push(dir);
    }
    Ok(pulled)
}

/// Fetches one adapter's files into a directory. A file appears under its name once it is whole and its
/// checksum is right.
pub(crate) async fn fetch(connection: &Connection, trial_id: &str, dir: &Path) -> Result<(), Failure> {
    let at = |path: &Path, e: std::io::Error| Failure::failed(format!("{}: {e}", path.display()));
    std::fs::create_dir_all(dir).map_err(|e| at(dir, e))?;
    let request = v1::DownloadAdapterRequest { trial_id: trial_id.to_string() };
    let mut stream = connection.adapters().download_adapter(request).await?.into_inner();
    let mut open: Option<(String, std::fs::File, sha2::Sha256)> = None;
    while let Some(piece) = stream.message().await? {
        use sha2::Digest;
        if Path::new(&piece.file).file_name().is_none_or(|name| name != piece.file.as_str()) {
            return Err(Failure::failed(format!(
                "the server names a file {:?} that is no file name",
                piece.file
            )));
        }
        let part = dir.join(format!("{}.part", piece.file));
        if open.as_ref().is_none_or(|(name, ..)| *name != piece.file) {
            let file = std::fs::File::create(&part).map_err(|e| at(&part, e))?;
            open = Some((piece.file.clone(), file, sha2::Sha256::new()));
        }
        let Some((_, file, sha)) = open.as_mut() else { continue };
        file.write_all(&piece.data).map_err(|e| at(&part, e))?;
        sha.update(&piece.data);
        if !piece.sha256.is_empty() {
            if sha.clone().finalize().as_slice() != piece.sha256 {
                return Err(Failure::failed(format!("{}: checksum mismatch; pull again", part.display())));
            }
            let whole = dir.join(&piece.file);
            std::fs::rename(&part, &whole).map_err(|e| at(&whole, e))?;
            open = None;
        }
    }
    match open {
        Some((name, ..)) => Err(Failure::failed(format!("{name} arrived cut off; pull again"))),
        None => Ok(()),
    }
}
