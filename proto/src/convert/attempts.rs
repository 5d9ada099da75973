//! A trial's attempts: on the wire one list, in a record where each started and where each is or was.

use super::{from_timestamp, timestamp};
use crate::v1;
use domain::trial::TrialPlacement;
use domain::{AgentId, Attempt, DeviceId};

/// The attempts of a trial.
pub(super) fn starts(attempts: &[(Attempt, u64)], placements: &[TrialPlacement]) -> Vec<v1::AttemptStart> {
    let start = |(attempt, step): &(Attempt, u64)| {
        let placed = placements.iter().find(|placed| placed.attempt == *attempt);
        v1::AttemptStart {
            attempt: attempt.0,
            step: *step,
            agent_id: placed.map(|placed| placed.agent.to_string()),
            device_id: placed.map(|placed| placed.device.to_string()),
            started_at: placed.and_then(|placed| placed.started_at).map(timestamp),
            ended_at: placed.and_then(|placed| placed.ended_at).map(timestamp),
        }
    };
    attempts.iter().map(start).collect()
}

/// Where those are or were of which that is said.
pub(super) fn placements(starts: &[v1::AttemptStart]) -> Vec<TrialPlacement> {
    let placed = |start: &v1::AttemptStart| {
        let (agent, device) = start.agent_id.clone().zip(start.device_id.clone())?;
        Some(TrialPlacement {
            attempt: Attempt(start.attempt),
            agent: AgentId::new(agent),
            device: DeviceId::new(device),
            started_at: start.started_at.map(from_timestamp),
            ended_at: start.ended_at.map(from_timestamp),
        })
    };
    starts.iter().filter_map(placed).collect()
}
