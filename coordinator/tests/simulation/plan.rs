//! What a seed draws: a sweep, its agents, and a schedule of faults.

use crate::draws::Draws;
use serde_json::{Value, json};
use std::time::Duration;

/// The time for which an agent is stubborn.
pub const STUBBORN: Duration = Duration::from_secs(60);

/// A schedule.
#[derive(Debug)]
pub struct Plan {
    /// The sweep as submitted.
    pub document: Value,
    pub agents: Vec<AgentPlan>,
    /// What goes wrong, or is asked for, and when.
    pub faults: Vec<(Duration, Fault)>,
    /// The time from the last of them until everything heals.
    pub rest: Duration,
}

#[derive(Debug, Clone)]
pub struct AgentPlan {
    /// Trials that it may train together.
    pub pack: u32,
    /// The time of a step.
    pub step: Duration,
}

/// What goes wrong, or is asked for. A `usize` is an agent.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It is killed, and started again after a while: with its disk, or as another on an empty one.
    KillAgent {
        agent: usize,
        down: Duration,
        keeps_disk: bool,
    },
    /// It ends in order, giving its trials back, and is started again after a while.
    Leave {
        agent: usize,
        down: Duration,
    },
    /// Its engine dies with all that it trains.
    EngineDies(usize),
    /// Its stream breaks.
    Cut(usize),
    /// It says again what is not acknowledged.
    Repeat(usize),
    /// Nothing comes through between it and the coordinator for a while, and no side is told. A stubborn agent then does
    /// not let go of what it is told to drop for [`STUBBORN`], and goes on to train it and to tell of it.
    Partition {
        agent: usize,
        length: Duration,
        stubborn: bool,
    },
    /// What is said takes up to so long, and answers are lost.
    Delay(usize, Duration, u64),
    /// The coordinator is killed, and started again after a while.
    KillCoordinator(Duration),
    /// Another takes the lead; the one before goes on until it notices, so long at most.
    TakeOver(Duration),
    /// Storage refuses for a while.
    Full(Storage, Duration),
    /// An agent is drained for a while.
    Drain(usize, Duration),
    /// The sweep is paused for a while.
    Pause(Duration),
    Cancel,
    Extend,
    StopTrial(u32),
    Retry(u32),
    /// The hour jumps.
    Jump(i64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Registry,
    History,
    Artifacts,
}

impl Plan {
    pub fn draw(seed: u64) -> Self {
        let draws = &mut Draws::new(seed, "plan");
        let mut document = document(draws);
        // A stream of its own, so that seeds draw the rest as they did.
        let again = &mut Draws::new(seed, "replicates");
        if again.chance(0.25) {
            let (runs, finalists) = (again.whole(2, 3), again.whole(1, 3));
            // As many as adapters are kept at most.
            let most = document.get("keep_adapters").and_then(Value::as_u64).unwrap_or(finalists);
            (document["replicates"], document["finalists"]) = (json!(runs), json!(finalists.min(most)));
        }
        if Draws::new(seed, "spec").chance(0.3) {
            // What was asked is more than a record in etcd takes, and asks for no more.
            let holds = |number: u32| format!("max_steps <= {}", 100_000 + number);
            document["constraints"] = json!((0..300).map(holds).collect::<Vec<_>>());
        }
        let agents = draws.whole(1, 4) as usize;
        let agents: Vec<_> = (0..agents)
            .map(|_| AgentPlan { pack: draws.whole(1, 3) as u32, step: draws.millis(700, 4000) })
            .collect();
        let window = draws.whole(30, 600);
        let count = draws.whole(1, 10);
        let fault = |_| (draws.seconds(1, window), fault(draws, agents.len()));
        let mut faults: Vec<_> = (0..count).map(fault).collect();
        faults.sort_by_key(|(at, _)| *at);
        let rest = Duration::from_secs(draws.pick(&[5, 120, 650]));
        Self { document, agents, faults, rest }
    }
}

fn document(draws: &mut Draws) -> Value {
    let steps = draws.whole(4, 24);
    let logging = draws.pick(&[1, 1, 2, 3]);
    let mut document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": steps,
        "logging_steps": logging, "save_steps": draws.pick(&[0, 1, 2, 3, 5]),
    });
    let rates = json!({"learning_rate": {"log_uniform": [1e-6, 1e-1]}});
    let trials = draws.whole(1, 10);
    (document["search"], document["parameters"]) = match draws.whole(0, 2) {
        0 => {
            let ranks: Vec<_> = (1..=draws.whole(1, 4)).map(|n| 2 * n).collect();
            let alphas: Vec<_> = (1..=draws.whole(1, 3)).map(|n| 8 * n).collect();
            (json!({"algorithm": "grid"}), json!({"lora_rank": ranks, "lora_alpha": alphas}))
        }
        1 => (json!({"algorithm": "random", "max_trials": trials}), rates),
        _ => {
            let search = json!({
                "algorithm": "asha", "max_trials": trials + 2, "min_steps": logging, "reduction_factor": 2,
            });
            (search, rates)
        }
    };
    document["search"]["metric"] = json!("loss");
    if draws.chance(0.3) {
        document["search"]["max_concurrent_trials"] = json!(draws.whole(1, 3));
    }
    if draws.chance(0.2) {
        document["keep_adapters"] = json!(draws.whole(1, 3));
    }
    if draws.chance(0.1) {
        document["budget"] = json!({"max_cost_usd": draws.whole(1, 300) as f64 / 10.0});
    } else if draws.chance(0.1) {
        document["budget"] = json!({"max_wall_clock": format!("{}s", draws.whole(20, 600))});
    }
    document
}

fn fault(draws: &mut Draws, agents: usize) -> Fault {
    let agent = draws.whole(0, agents as u64 - 1) as usize;
    let down = draws.pick(&[0, 1, 20, 60, 600]);
    let down = Duration::from_secs(down);
    let trial = draws.whole(1, 10) as u32;
    match draws.whole(0, 30) {
        0..=3 => Fault::KillAgent { agent, down, keeps_disk: draws.chance(0.7) },
        4 => Fault::Leave { agent, down },
        5 => Fault::EngineDies(agent),
        6 => Fault::Cut(agent),
        7 => Fault::Repeat(agent),
        8..=10 => {
            let (length, stubborn) = (draws.seconds(1, 120), draws.chance(0.5));
            Fault::Partition { agent, length, stubborn }
        }
        11..=12 => Fault::Delay(agent, draws.seconds(5, 120), draws.whole(100, 8000)),
        13..=16 => Fault::KillCoordinator(down),
        17..=18 => Fault::TakeOver(draws.seconds(0, 20)),
        19 => Fault::Full(Storage::Registry, draws.seconds(1, 90)),
        20 => Fault::Full(Storage::History, draws.seconds(1, 90)),
        21 => Fault::Full(Storage::Artifacts, draws.seconds(1, 90)),
        22 => Fault::Drain(agent, draws.seconds(1, 120)),
        23 => Fault::Pause(draws.seconds(1, 120)),
        24 if draws.chance(0.3) => Fault::Cancel,
        24 | 25 => Fault::Extend,
        26 | 27 => Fault::StopTrial(trial),
        28 | 29 => Fault::Retry(trial),
        _ => Fault::Jump(draws.pick(&[-1, 1])),
    }
}
