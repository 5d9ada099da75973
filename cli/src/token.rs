//! `lorafleet token`: who may call a server.

use crate::Failure;
use crate::output::{self, OutputArgs};
use clap::Subcommand;
use config::tokens::{self, Principal, Role};
use domain::sweep::DEFAULT_NAMESPACE;
use security::Secret;
use serde_json::json;
use std::path::PathBuf;

/// Makes tokens for a server's `--tokens` file.
#[derive(Debug, Subcommand)]
#[command(after_help = "Example:
  lorafleet token create --name ada --role operator --to ada.token >> tokens.yaml")]
pub(crate) enum Verb {
    /// Makes a token, and the line by which the server's file knows it.
    ///
    /// The token is shown here and nowhere again; the line holds only its SHA-256. With --to the token goes to a file that
    /// its owner alone may read, and the line to standard output.
    #[command(after_help = "Examples:
  lorafleet token create --name ada --role operator
  lorafleet token create --name gpu-1 --role agent --to gpu-1.token >> tokens.yaml")]
    Create {
        /// Whose it is: it stands in the server's log.
        #[arg(long, value_name = "NAME", value_parser = name)]
        name: String,
        /// What it may do: viewers read, submitters start and end sweeps too, operators also delete sweeps and drain
        /// agents; agents train.
        #[arg(long, value_name = "ROLE", value_parser = role)]
        role: Role,
        /// What its sweeps and uploads belong to, which a server's --limits may bound.
        #[arg(long, value_name = "NAMESPACE", default_value = DEFAULT_NAMESPACE, value_parser = name)]
        namespace: String,
        /// File to write the token to; it must not be there yet.
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        #[command(flatten)]
        output: OutputArgs,
    },
}

fn name(text: &str) -> Result<String, String> {
    tokens::check_name(text).map(|()| text.into())
}

fn role(text: &str) -> Result<Role, String> {
    let known = Role::ALL.into_iter().find(|role| role.name() == text);
    known.ok_or_else(|| format!("is none of {}", Role::ALL.map(Role::name).join(", ")))
}

/// `lorafleet token …`.
pub(crate) fn run(verb: Verb) -> Result<(), Failure> {
    let Verb::Create { name, role, namespace, to, output } = verb;
    let token = Secret::random(tokens::PREFIX).map_err(Failure::failed)?;
    let line = tokens::line(
        &Principal { name: name.clone(), role, namespace: namespace.clone() },
        &tokens::hash(token.expose()),
    );
    let mut document = json!({ "name": name, "role": role.name(), "namespace": namespace, "line": line });
    let text = match to {
        Some(path) => {
            token.write(&path).map_err(Failure::invalid)?;
            document["file"] = json!(path);
            line
        }
        None => {
            document["token"] = json!(token.expose());
            format!("{}\n\nThe line for the server's --tokens file:\n{line}", token.expose())
        }
    };
    output::print(output.format, &document, || text)
}
