//! A fleet that is brought up to date: every program ends and is started again, in the order that `docs/fleet.md` has.

use crate::common::{results, submit, submit_as, until};
use crate::faults::agents;
use crate::{Fleet, REPLACED_WITHIN, attempts, soon};
use proto::v1;
use proto::v1::trial_service_client::TrialServiceClient;

/// The steps from which the attempts of a trial began, and the step at which its first one was given back.
async fn handed_over(endpoint: &str, trial_id: String) -> (Vec<u64>, Option<u64>) {
    let mut client = TrialServiceClient::connect(endpoint.to_string()).await.unwrap();
    let request = v1::GetTrialRequest { trial_id: trial_id.clone() };
    let trial = client.get_trial(request).await.unwrap().into_inner().trial.unwrap();
    let mut log =
        client.get_trial_log(v1::GetTrialLogRequest { trial_id, follow: false }).await.unwrap().into_inner();
    let mut given_back = None;
    while let Some(entry) = log.message().await.unwrap() {
        if (entry.event.as_str(), entry.attempt) == ("queued", 1) {
            given_back = Some(entry.step);
        }
    }
    (trial.attempts.iter().map(|attempt| attempt.step).collect(), given_back)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_is_started_again_one_program_after_the_other() {
    let Some(fleet) = Fleet::new() else { return };
    let mut first = fleet.coordinator();
    let first_at = first.says("listening on ");
    first.says("leading");
    let mut second = fleet.coordinator();
    second.says("listening on ");
    let agent = fleet.agent("agent");
    let sweep = submit(&first_at).await;
    soon("the sweep", until(&first_at, &sweep, u64::MAX)).await;
    let undisturbed = results(&first_at, &sweep).await;

    let sweep = submit_as(&first_at, 2).await.unwrap();
    soon("training", until(&first_at, &sweep, 10)).await;
    // Who stands by first, then who leads.
    assert!(second.terminate());
    let mut second = fleet.coordinator();
    let second_at = second.says("listening on ");
    assert!(first.terminate());
    second.says("leading");
    let mut first = fleet.coordinator();
    first.says("listening on ");
    soon("training under the second", until(&second_at, &sweep, 30)).await;
    let trials = attempts(&second_at, &sweep).await;
    assert!(trials.values().all(|attempt| *attempt == 1), "no training was interrupted: {trials:?}");
    // Then the agent, which gives back what it has made.
    assert!(agent.terminate());
    let agent = fleet.agent("agent");
    soon("the sweep", until(&second_at, &sweep, u64::MAX)).await;
    let found = results(&second_at, &sweep).await;
    for (number, trial) in &found {
        assert_eq!((trial.state, trial.attempts), (v1::TrialState::Completed, 2), "trial {number}");
        assert_eq!(trial.losses, undisturbed[number].losses, "trial {number}");
    }
    for trial in trials.into_keys() {
        let (begins, given_back) = handed_over(&second_at, trial.clone()).await;
        assert_eq!(begins, [0, given_back.unwrap()], "{trial}: no step was made twice");
    }
    // It joined a coordinator with trials that waited. An agent tells how long it waited with its next sign of life, which may
    // come after the sweep's end.
    let joined = async {
        loop {
            if let Some(seconds) =
                agents(&second_at).await.into_iter().find_map(|agent| agent.first_trial_seconds)
            {
                break seconds;
            }
            tokio::task::yield_now().await;
        }
    };
    let joined = soon("its next sign of life", joined).await;
    println!("a trial {joined} s after joining");
    assert!(joined <= REPLACED_WITHIN, "{joined}");
    assert!(agent.terminate() && first.terminate() && second.terminate());
}
