//! `lorafleet context`: servers by name.

use crate::Failure;
use crate::output::{self, OutputArgs};
use clap::Subcommand;
use config::contexts::{self, Contexts, Server};
use security::Client;
use security::args::ClientArgs;
use security::client::Token;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Names servers, and chooses the one that verbs talk to.
///
/// --endpoint, LORAFLEET_ENDPOINT, --data-dir and LORAFLEET_DATA_DIR go before the context in use.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  lorafleet context add lab https://lab.example.org:7401 --ca lab-ca.crt
  lorafleet context use lab")]
pub(crate) enum Verb {
    /// Lists the contexts; a star stands at the one in use.
    #[command(after_help = "Example:\n  lorafleet context list -o json")]
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Uses a context from now on; without a name, none.
    #[command(after_help = "Examples:\n  lorafleet context use lab\n  lorafleet context use")]
    Use {
        /// The context's name.
        name: Option<String>,
    },
    /// Adds a context, or gives one another address or other files; those that are not given stay.
    #[command(after_help = "Examples:
  lorafleet context add lab https://lab.example.org:7401 --ca lab-ca.crt
  lorafleet context add old http://10.0.0.5:7401")]
    Add {
        /// The context's name.
        name: String,
        /// The server's address, or those of a fleet's coordinators.
        #[arg(value_name = "URL[,URL…]")]
        endpoint: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Removes a context.
    #[command(after_help = "Example:\n  lorafleet context remove lab")]
    Remove {
        /// The context's name.
        name: String,
    },
}

/// The server of the context in use, if there is one.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn current() -> Result<Option<Server>, Failure> {
    let Some(path) = contexts::path() else { return Ok(None) };
    let contexts = Contexts::read(&path).map_err(Failure::invalid)?;
    Ok(contexts.server().cloned())
}

/// How a context's server is talked to.
pub(crate) fn client(server: &Server) -> Client {
    Client {
        ca: server.ca.clone(),
        identity: server.cert.clone().zip(server.key.clone()),
        token: server.token_file.clone().map(Token::File),
    }
}

/// A context of these flags; what they do not say is as it was. Its files are found from everywhere.
fn server(endpoint: String, client: &ClientArgs, before: Server) -> Result<Server, Failure> {
    let found = |file: &Option<PathBuf>| {
        let found = file.as_ref().map(|file| {
            std::path::absolute(file).map_err(|e| Failure::invalid(format!("{}: {e}", file.display())))
        });
        found.transpose()
    };
    Ok(Server {
        endpoint,
        ca: found(&client.ca)?.or(before.ca),
        cert: found(&client.cert)?.or(before.cert),
        key: found(&client.key)?.or(before.key),
        token_file: found(&client.token_file)?.or(before.token_file),
    })
}

/// `lorafleet context …`.
pub(crate) fn run(verb: Verb) -> Result<(), Failure> {
    let path = path()?;
    let mut contexts = Contexts::read(&path).map_err(Failure::invalid)?;
    let known = |contexts: &Contexts, name: &str| match contexts.servers.contains_key(name) {
        true => Ok(()),
        false => Err(Failure::invalid(format!(
            "there is no context {name}; `lorafleet context list` shows them, `lorafleet context add` makes one"
        ))),
    };
    match verb {
        Verb::List { output } => return list(&contexts, &output),
        Verb::Use { name } => {
            name.iter().try_for_each(|name| known(&contexts, name))?;
            contexts.current = name;
        }
        Verb::Add { name, endpoint, client } => {
            let before = contexts.servers.get(&name).cloned().unwrap_or_default();
            let server = server(endpoint, &client, before)?;
            // With what it will be talked to with, and not with what else this command could be told.
            crate::client::check_endpoint(&server.endpoint, &self::client(&server))?;
            contexts.servers.insert(name, server);
        }
        Verb::Remove { name } => {
            known(&contexts, &name)?;
            contexts.servers.remove(&name);
            contexts.current = contexts.current.filter(|current| *current != name);
        }
    }
    contexts.write(&path).map_err(Failure::failed)
}

fn path() -> Result<PathBuf, Failure> {
    contexts::path().ok_or_else(|| Failure::invalid("neither XDG_CONFIG_HOME nor HOME is set; set one"))
}

fn list(contexts: &Contexts, output: &OutputArgs) -> Result<(), Failure> {
    let current = |name: &String| contexts.current.as_ref() == Some(name);
    let entries = || contexts.servers.iter();
    let document = entries().map(|(name, server)| {
        let mut entry = json!({ "name": name, "endpoint": server.endpoint, "current": current(name) });
        for (key, file) in server.files() {
            entry[key] = json!(file);
        }
        entry
    });
    output::print(output.format, &Value::Array(document.collect()), || {
        let star = |name| if current(name) { "*" } else { "" };
        let rows: Vec<_> = entries()
            .map(|(name, server)| vec![star(name).to_string(), name.clone(), server.endpoint.clone()])
            .collect();
        output::table(&["", "context", "endpoint"], &rows, &[])
    })
}
