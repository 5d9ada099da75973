//! A sweep in an MLflow tracking server, by its REST API: an experiment, and a run a trial.
//!
//! A run is found again by its tags. What the server has of it is read first, and only what it lacks is sent: of a metric,
//! the steps behind the last that the server has. Points of a metric are sent in the order of their steps, so that
//! this holds wherever an earlier export was cut off, also in the middle of a batch that the server had stored in part.

mod client;
mod run;

use super::mirror::{Curve, Mirror, Picture};
use crate::Failure;
use client::{Client, Credentials, MlflowError};
use domain::trial::Trial;
use run::{Call, Run};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// Runs of a page of a search.
const PAGE: u32 = 100;

/// The tags by which a run is found again.
const TRIAL: &str = "lorafleet.trial";
const SWEEP: &str = "lorafleet.sweep";

/// A sweep's experiment.
pub(super) struct Tracking {
    client: Arc<Client>,
    sweep: String,
    /// The experiment's id.
    experiment: String,
    /// The runs that the server has, by trial; unknown before they were read, and when it is not known what became of a call.
    runs: Option<HashMap<String, Run>>,
}

impl Tracking {
    /// A sweep at the server of an address, which is not called yet.
    ///
    /// # Errors
    /// The address, or what the environment says of who calls, cannot be used.
    pub(super) fn new(uri: &str, sweep: &str) -> Result<Self, Failure> {
        let client = Arc::new(Client::new(uri, &Credentials::from_env())?);
        Ok(Self { client, sweep: sweep.into(), experiment: String::new(), runs: None })
    }

    /// Finds the experiment of that name, or makes it.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses; the experiment was deleted.
    pub(super) async fn open(&mut self, name: &str) -> Result<(), Failure> {
        let name = name.to_string();
        let document = json!({ "name": name, "tags": [{ "key": SWEEP, "value": self.sweep }] });
        self.experiment = calling(&self.client, move |client| {
            if let Some(id) = found(client, &name)? {
                return Ok(id);
            }
            match client.post("experiments/create", &document) {
                Ok(made) => Ok(text(&made["experiment_id"])),
                // Somebody else made it just now.
                Err(error) if error.is("RESOURCE_ALREADY_EXISTS") => {
                    Ok(found(client, &name)?.unwrap_or_default())
                }
                Err(error) => Err(error),
            }
        })
        .await?;
        Ok(())
    }

    /// The experiment's id.
    pub(super) fn experiment(&self) -> &str {
        &self.experiment
    }

    /// The server's address.
    pub(super) fn uri(&self) -> &str {
        self.client.uri()
    }

    async fn post(&self, call: Call) -> Result<Value, Failure> {
        calling(&self.client, move |client| client.post(call.path, &call.document)).await
    }

    /// The runs that the server has of the sweep, by trial.
    async fn search(&self) -> Result<HashMap<String, Run>, Failure> {
        let mut runs = HashMap::new();
        let mut document = json!({
            "experiment_ids": [self.experiment],
            "filter": format!("tags.`{SWEEP}` = '{}'", self.sweep),
            "max_results": PAGE,
        });
        loop {
            let page = self.post(Call { path: "runs/search", document: document.clone() }).await?;
            for run in page["runs"].as_array().into_iter().flatten().map(Run::read) {
                if let Some(trial) = run.tag(TRIAL) {
                    runs.insert(trial.to_string(), run);
                }
            }
            match page["next_page_token"].as_str() {
                Some(token) if !token.is_empty() => document["page_token"] = json!(token),
                _ => return Ok(runs),
            }
        }
    }

    /// Sends what the server lacks of a trial.
    async fn send(&self, run: Option<Run>, trial: &Trial, curve: Curve<'_>) -> Result<Run, Failure> {
        let mut run = match run {
            Some(run) => run,
            None => Run::read(&self.post(run::create(&self.experiment, &self.sweep, trial)).await?["run"]),
        };
        for call in run.lacking(trial, curve)? {
            run.take(&call);
            self.post(call).await?;
        }
        Ok(run)
    }
}

impl Mirror for Tracking {
    async fn sweep(&mut self, _: &Picture<'_>) -> Result<(), Failure> {
        if self.runs.is_none() {
            self.runs = Some(self.search().await?);
        }
        Ok(())
    }

    async fn trial(&mut self, _: &Picture<'_>, trial: &Trial, curve: Curve<'_>) -> Result<(), Failure> {
        if !super::has_begun(trial) {
            return Ok(());
        }
        // What fails is read again: the server may have done it.
        let mut runs = match self.runs.take() {
            Some(runs) => runs,
            None => self.search().await?,
        };
        let run = self.send(runs.remove(trial.id.as_str()), trial, curve).await?;
        runs.insert(trial.id.to_string(), run);
        self.runs = Some(runs);
        Ok(())
    }
}

/// The id of the experiment of that name.
fn found(client: &Client, name: &str) -> Result<Option<String>, MlflowError> {
    let experiment = match client.get("experiments/get-by-name", "experiment_name", name) {
        Ok(mut answer) => answer["experiment"].take(),
        Err(error) if error.is("RESOURCE_DOES_NOT_EXIST") => return Ok(None),
        Err(error) => return Err(error),
    };
    let id = text(&experiment["experiment_id"]);
    if experiment["lifecycle_stage"] == "deleted" {
        return Err(MlflowError::Deleted { uri: client.uri().into(), name: name.into(), id });
    }
    Ok(Some(id))
}

/// Works with the client on a thread that may wait.
async fn calling<T: Send + 'static>(
    client: &Arc<Client>,
    work: impl FnOnce(&Client) -> Result<T, MlflowError> + Send + 'static,
) -> Result<T, Failure> {
    let client = client.clone();
    Ok(tokio::task::spawn_blocking(move || work(&client)).await.map_err(Failure::failed)??)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
