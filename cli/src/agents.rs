//! Verbs about agents: `agents list|get|drain`.

use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::listing::{ListingArgs, VALUE};
use crate::output::{self, OutputArgs};
use clap::Subcommand;
use domain::machine::PriceSource;
use proto::v1;
use serde_json::{Value, json};

/// Where an agent may stand.
const STATES: [&str; 4] = ["connected", "drained", "registered", "gone"];

/// Reads the fleet, and takes agents out of use.
#[derive(Debug, Subcommand)]
#[command(after_help = "Example:\n  lorafleet agents list --endpoint http://10.0.0.5:7401")]
pub(crate) enum Verb {
    /// Lists agents, their devices and what they train.
    #[command(after_help = "Examples:
  lorafleet agents list --endpoint http://10.0.0.5:7401
  lorafleet agents list --state drained --sort hostname")]
    List {
        /// Only agents in this state. May be given several times.
        #[arg(long, value_parser = STATES)]
        state: Vec<String>,
        #[command(flatten)]
        listing: ListingArgs,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Shows one agent whole.
    #[command(after_help = "Example:\n  lorafleet agents get gpu-7 -o yaml")]
    Get {
        /// The agent's id, as `lorafleet agents list` shows it.
        #[arg(value_name = "AGENT_ID")]
        agent: String,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Takes an agent out of use: it gets no more trials, and those that it trains go on elsewhere.
    ///
    /// They are checkpointed first. It stays out of use, over restarts too, until --undo.
    #[command(
        after_help = "Examples:\n  lorafleet agents drain gpu-7\n  lorafleet agents drain gpu-7 --undo"
    )]
    Drain {
        /// The agent's id, as `lorafleet agents list` shows it.
        #[arg(value_name = "AGENT_ID")]
        agent: String,
        /// Puts it into use again.
        #[arg(long)]
        undo: bool,
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// `lorafleet agents …`.
pub(crate) async fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { state: states, listing, server, output } => {
            let mut agents = Connection::with(&server, list).await?;
            agents.retain(|agent| states.is_empty() || states.iter().any(|s| s == state(agent)));
            let agents = listing.apply(agents, VALUE, document)?;
            let document = Value::Array(agents.iter().map(document).collect());
            output::print(output.format, &document, || table(&agents))
        }
        Verb::Get { agent, server, output } => {
            let request = v1::GetAgentRequest { agent_id: agent };
            let agent = Connection::with(&server, async |c| {
                named(c.fleet().get_agent(request).await?.into_inner().agent)
            });
            show(&agent.await?, &output)
        }
        Verb::Drain { agent, undo, server, output } => {
            let request = v1::DrainAgentRequest { agent_id: agent, undo };
            let agent = Connection::with(&server, async |c| {
                named(c.fleet().drain_agent(request).await?.into_inner().agent)
            });
            show(&agent.await?, &output)
        }
    }
}

fn named(agent: Option<v1::Agent>) -> Result<v1::Agent, Failure> {
    agent.ok_or_else(|| Failure::failed("the server's answer names no agent"))
}

fn show(agent: &v1::Agent, output: &OutputArgs) -> Result<(), Failure> {
    output::print(output.format, &document(agent), || {
        let mut text = table(std::slice::from_ref(agent));
        if let (Some(trial), Some(step)) = (agent.first_trial_seconds, agent.first_step_seconds) {
            text.push_str(&format!(
                "\nfirst training step {step:.1} s after it joined; its first trial came after {trial:.1} s\n"
            ));
        }
        text
    })
}

/// Every agent that the server knows.
pub(crate) async fn list(connection: &Connection) -> Result<Vec<v1::Agent>, Failure> {
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

/// Whether there are agents, and all of their devices are simulated.
pub(crate) async fn are_simulated(connection: &Connection) -> Result<bool, Failure> {
    let agents = list(connection).await?;
    let mut devices =
        agents.iter().filter(|agent| agent.connected).flat_map(|agent| &agent.devices).peekable();
    Ok(devices.peek().is_some() && devices.all(|device| device.simulated_speed > 0.0))
}

/// What a device is called where people read it.
fn accelerator(device: &v1::Device) -> String {
    let simulated = if device.simulated_speed > 0.0 { " (simulated)" } else { "" };
    format!("{}{simulated}", device.accelerator)
}

/// What an hour of a device costs, and whose machine that is the price of; nothing of one that is free or whose price nobody
/// knows.
fn price(device: &v1::Device) -> String {
    let by = device.price_from.as_ref().map(|from| format!(" ({}, {})", from.provider, from.date));
    output::or_none(
        Some(device.price_per_hour)
            .filter(|price| *price > 0.0)
            .map(|price| output::dollars(price) + by.as_deref().unwrap_or_default()),
    )
}

fn document(agent: &v1::Agent) -> Value {
    let device = |d: &v1::Device| {
        json!({
            "id": d.id,
            "accelerator": d.accelerator,
            "memory_bytes": d.memory_bytes,
            "max_pack_size": d.max_pack_size,
            "price_per_hour": d.price_per_hour,
            "price_from": d.price_from.clone().map(PriceSource::from),
            "resident_base": d.resident_base,
            "simulated": d.simulated_speed > 0.0,
            "simulated_speed": (d.simulated_speed > 0.0).then_some(d.simulated_speed),
            "compute_capability": (!d.compute_capability.is_empty()).then_some(&d.compute_capability),
        })
    };
    json!({
        "id": agent.id,
        "version": agent.version,
        "hostname": agent.hostname,
        "labels": agent.labels.iter().collect::<std::collections::BTreeMap<_, _>>(),
        "state": state(agent),
        "connected": agent.connected,
        "registered": agent.registered,
        "last_seen": crate::view::wire_time(agent.last_seen),
        "drained": agent.drained,
        "understands": agent.understands,
        "trials": agent.trial_ids,
        "first_trial_seconds": agent.first_trial_seconds,
        "first_step_seconds": agent.first_step_seconds,
        "devices": agent.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

/// Where an agent stands, in a word.
fn state(agent: &v1::Agent) -> &'static str {
    match (agent.connected, agent.drained) {
        (true, false) => STATES[0],
        (true, true) => STATES[1],
        // Its machine lives, and has no stream to the coordinator.
        (false, _) if agent.registered => STATES[2],
        (false, _) => STATES[3],
    }
}

fn table(agents: &[v1::Agent]) -> String {
    let mut rows = Vec::new();
    for agent in agents {
        for device in &agent.devices {
            rows.push(vec![
                agent.id.clone(),
                agent.hostname.clone(),
                state(agent).to_string(),
                device.id.clone(),
                accelerator(device),
                output::bytes(device.memory_bytes),
                price(device),
                format!("{}/{}", agent.trial_ids.len(), device.max_pack_size),
            ]);
        }
    }
    let headings = ["agent", "host", "state", "device", "accelerator", "memory", "price/h", "trials"];
    output::table(&headings, &rows, &["host", "accelerator", "price/h", "memory"])
}
