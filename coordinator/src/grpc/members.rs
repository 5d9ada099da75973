//! Agents that are registered in the fleet's etcd, whether or not they are connected.

use super::Services;
use domain::fleet::Agent;
use domain::machine::PriceSource;
use proto::limits::{self, cut};
use proto::v1;
use registry::Member;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};

/// What an agent says of itself where it registers.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Said {
    hostname: String,
    version: String,
    devices: Vec<Device>,
    labels: HashMap<String, String>,
}

/// One of its devices.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Device {
    id: String,
    accelerator: String,
    memory_bytes: u64,
    max_pack_size: u32,
    price_per_hour: f64,
    price_from: Option<PriceSource>,
    simulated_speed: f64,
    compute_capability: Option<String>,
}

impl Services {
    /// The agents that this coordinator knows, and those that it does not although they are registered; by their ids. Where
    /// etcd does not answer, the former alone.
    pub(super) async fn with_members(&self, known: impl Iterator<Item = v1::Agent>) -> Vec<v1::Agent> {
        let mut agents: BTreeMap<_, _> = known.map(|agent| (agent.id.clone(), agent)).collect();
        let members = match &self.leadership {
            Some(leadership) => leadership.members().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "it is not known who is registered");
                Vec::new()
            }),
            None => Vec::new(),
        };
        for member in members {
            agents.entry(member.id.clone()).or_insert_with(|| unknown(member)).registered = true;
        }
        agents.into_values().collect()
    }
}

/// An agent of which nothing is known but what it registered.
fn unknown(member: Member) -> v1::Agent {
    // It may be of another version, which says less.
    let said: Said = serde_json::from_slice(&member.value).unwrap_or_default();
    let device = |device: Device| v1::Device {
        id: device.id,
        accelerator: device.accelerator,
        memory_bytes: device.memory_bytes,
        max_pack_size: device.max_pack_size.max(1),
        price_per_hour: device.price_per_hour,
        price_from: device.price_from.map(Into::into),
        resident_base: String::new(),
        simulated_speed: device.simulated_speed,
        compute_capability: device.compute_capability.unwrap_or_default(),
    };
    let agent = v1::Agent {
        id: member.id,
        version: said.version,
        hostname: said.hostname,
        devices: said.devices.into_iter().map(device).collect(),
        labels: said.labels,
        ..v1::Agent::default()
    };
    // What the coordinator would not take from it, nobody is shown.
    match Agent::try_from(agent.clone()) {
        Ok(_) => agent,
        Err(_) => v1::Agent { id: cut(agent.id, limits::NAME_BYTES), ..v1::Agent::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_an_agent_registered_is_an_agent() {
        let rows: [(&[u8], &str, usize); 5] = [
            (br#"{"hostname": "gpu-7", "devices": [{"id": "cpu", "unknown": 1}], "labels": {}}"#, "gpu-7", 1),
            (br#"{"hostname": "gpu-7", "devices": [{"id": "a\nb"}]}"#, "", 0),
            (b"{}", "", 0),
            (br#"{"hostname": 7}"#, "", 0),
            (b"no JSON", "", 0),
        ];
        for (value, hostname, devices) in rows {
            let agent = unknown(Member { id: "a".into(), value: value.to_vec() });
            assert_eq!(
                (agent.id.as_str(), agent.hostname.as_str(), agent.devices.len()),
                ("a", hostname, devices)
            );
            assert!(!agent.connected);
        }
    }
}
