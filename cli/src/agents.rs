//! Verbs about agents: `agents list`.

use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::output::{self, OutputArgs};
use clap::Subcommand;
use proto::v1;
use serde_json::{Value, json};

/// Reads the fleet.
#[derive(Debug, Subcommand)]
#[command(after_help = "Example:\n  lorafleet agents list --endpoint http://10.0.0.5:7401")]
pub(crate) enum Verb {
    /// Lists agents, their devices and what they train.
    #[command(after_help = "Example:\n  lorafleet agents list --endpoint http://10.0.0.5:7401")]
    List {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `lorafleet agents …`.
pub(crate) async fn run(verb: Verb) -> Result<(), Failure> {
    let Verb::List { server, output } = verb;
    let agents = Connection::with(&server, list).await?;
    let document = Value::Array(agents.iter().map(document).collect());
    output::print(output.format, &document, || table(&agents))
}

/// All agents, page after page.
async fn list(connection: &Connection) -> Result<Vec<v1::Agent>, Failure> {
    let mut agents = Vec::new();
    let mut request = v1::ListAgentsRequest { page_size: 1000, page_token: String::new() };
    loop {
        let page = connection.fleet().list_agents(request.clone()).await?.into_inner();
        agents.extend(page.agents);
        if page.next_page_token.is_empty() {
            return Ok(agents);
        }
        request.page_token = page.next_page_token;
    }
}

fn document(agent: &v1::Agent) -> Value {
    let device = |d: &v1::Device| {
        json!({
            "id": d.id,
            "accelerator": d.accelerator,
            "memory_bytes": d.memory_bytes,
            "max_pack_size": d.max_pack_size,
            "price_per_hour": d.price_per_hour,
            "resident_base": d.resident_base,
        })
    };
    json!({
        "id": agent.id,
        "version": agent.version,
        "hostname": agent.hostname,
        "connected": agent.connected,
        "trials": agent.trial_ids,
        "devices": agent.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

fn table(agents: &[v1::Agent]) -> String {
    let mut rows = Vec::new();
    for agent in agents {
        for device in &agent.devices {
            rows.push(vec![
                agent.id.clone(),
                agent.hostname.clone(),
                if agent.connected { "connected" } else { "gone" }.to_string(),
                device.id.clone(),
                device.accelerator.clone(),
                output::bytes(device.memory_bytes),
                format!("{}/{}", agent.trial_ids.len(), device.max_pack_size),
            ]);
        }
    }
    let headings = ["agent", "host", "state", "device", "accelerator", "memory", "trials"];
    output::table(&headings, &rows, &["host", "accelerator", "memory"])
}
