//! Agents, their devices, and what they hold.

use super::{ConvertError, too_long};
use crate::limits::{self, cut};
use crate::v1;
use domain::fleet::{Agent, Device, Feature, Holding, SIMULATED_SPEED};
use domain::machine::{ComputeCapability, PriceSource};
use domain::{AgentId, Attempt, DeviceId, TrialId};
use std::time::Duration;

impl From<PriceSource> for v1::PriceSource {
    fn from(p: PriceSource) -> Self {
        let PriceSource { machine, provider, region, accelerators, date, source, spot } = p;
        Self { machine, provider, region, accelerators, date, source, spot }
    }
}

impl From<v1::PriceSource> for PriceSource {
    fn from(p: v1::PriceSource) -> Self {
        let name = |text| cut(text, limits::NAME_BYTES);
        Self {
            machine: name(p.machine),
            provider: name(p.provider),
            region: name(p.region),
            accelerators: p.accelerators,
            date: name(p.date),
            source: name(p.source),
            spot: p.spot,
        }
    }
}

impl From<Device> for v1::Device {
    fn from(d: Device) -> Self {
        Self {
            id: d.id.to_string(),
            accelerator: d.accelerator,
            memory_bytes: d.memory_bytes,
            max_pack_size: d.max_pack_size,
            price_per_hour: d.price_per_hour,
            price_from: d.price_from.map(Into::into),
            resident_base: d.resident_base.unwrap_or_default(),
            simulated_speed: d.simulated_speed.unwrap_or_default(),
            compute_capability: d.compute_capability.map(String::from).unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Device> for Device {
    type Error = ConvertError;

    fn try_from(d: v1::Device) -> Result<Self, ConvertError> {
        if d.max_pack_size == 0 {
            return Err(ConvertError::new("max_pack_size", "must be at least 1"));
        }
        if !(0.0..=limits::PRICE_PER_HOUR).contains(&d.price_per_hour) {
            let problem = format!("must be 0 to {}", limits::PRICE_PER_HOUR);
            return Err(ConvertError::new("price_per_hour", problem));
        }
        if d.simulated_speed != 0.0 && !SIMULATED_SPEED.contains(&d.simulated_speed) {
            let (least, most) = (SIMULATED_SPEED.start(), SIMULATED_SPEED.end());
            return Err(ConvertError::new("simulated_speed", format!("must be {least} to {most}, or 0")));
        }
        let compute_capability = Some(d.compute_capability).filter(|text| !text.is_empty());
        let compute_capability = compute_capability
            .map(ComputeCapability::try_from)
            .transpose()
            .map_err(|error| ConvertError::new("compute_capability", error.to_string()))?;
        Ok(Self {
            id: DeviceId::new(named("id", d.id)?),
            accelerator: cut(d.accelerator, limits::NAME_BYTES),
            memory_bytes: d.memory_bytes,
            max_pack_size: d.max_pack_size,
            price_per_hour: d.price_per_hour,
            price_from: d.price_from.map(Into::into),
            resident_base: Some(d.resident_base).filter(|base| !base.is_empty()),
            simulated_speed: Some(d.simulated_speed).filter(|speed| *speed != 0.0),
            compute_capability,
        })
    }
}

impl TryFrom<v1::Agent> for Agent {
    type Error = ConvertError;

    fn try_from(a: v1::Agent) -> Result<Self, ConvertError> {
        let (count, most) = (a.devices.len(), limits::DEVICES);
        if count > most {
            return Err(ConvertError::new("devices", format!("are {count}, above {most}")));
        }
        let (count, most) = (a.labels.len(), limits::LABELS);
        if count > most {
            return Err(ConvertError::new("labels", format!("are {count}, above {most}")));
        }
        let label =
            |(name, value): (String, String)| Ok((named("labels", name)?, cut(value, limits::NAME_BYTES)));
        Ok(Self {
            labels: a.labels.into_iter().map(label).collect::<Result<_, _>>()?,
            understands: Feature::known(&a.understands),
            id: AgentId::new(named("id", a.id)?),
            version: cut(a.version, limits::NAME_BYTES),
            hostname: cut(a.hostname, limits::NAME_BYTES),
            devices: a.devices.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<Holding> for v1::Holding {
    fn from(h: Holding) -> Self {
        let held_seconds = h.held.map(|held| held.as_secs_f64());
        Self { trial_id: h.trial.to_string(), attempt: h.attempt.0, step: h.step, held_seconds }
    }
}

impl From<v1::Holding> for Holding {
    fn from(h: v1::Holding) -> Self {
        // What is no length of time is as good as unsaid.
        let held = h.held_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Self { trial: TrialId::new(h.trial_id), attempt: Attempt(h.attempt), step: h.step, held }
    }
}

/// What a program of this version says that it understands.
pub fn understood(features: impl IntoIterator<Item = Feature>) -> Vec<String> {
    features.into_iter().map(|feature| feature.as_str().to_string()).collect()
}

/// A name that is there, is no longer than a name, and stays on its line in logs and tables.
fn named(field: &'static str, id: String) -> Result<String, ConvertError> {
    if id.is_empty() {
        return Err(ConvertError::new(field, "is missing"));
    }
    if id.len() > limits::NAME_BYTES {
        return Err(too_long(field, &id));
    }
    if id.contains(char::is_control) {
        return Err(ConvertError::new(field, format!("has a control character: {id:?}")));
    }
    Ok(id)
}
