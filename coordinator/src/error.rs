//! What can go wrong in the coordinator, and how each looks to a gRPC client.

use crate::artifacts::ArtifactError;
use crate::blobs::BlobError;
use crate::history::HistoryError;
use domain::sweep::Problem;
use domain::trial::IllegalTransition;
use domain::{Attempt, SweepId, TrialId};
use proto::status::RpcError;
use registry::RegistryError;
use std::fmt::Display;
use std::net::SocketAddr;

/// What an object store said, without what it repeats of keys: errors are told to whoever asks.
pub(crate) fn said(error: &impl Display) -> String {
    telemetry::secrets::redact(&error.to_string()).into_owned()
}

/// What to do about an object, where its error does not say so.
fn restore(error: &ArtifactError) -> &'static str {
    match error {
        ArtifactError::Damaged(_) => "",
        _ => "; restore it from a copy",
    }
}

/// The coordinator's error.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address or stop what holds it")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The durable state cannot be read or written, or this coordinator leads no more.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Metric history cannot be read or written.
    #[error(transparent)]
    History(HistoryError),
    /// A checkpoint cannot be read or written, or its bytes are not those announced.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// Uploaded data cannot be read or written, or is not what was announced.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A record is not one that this version writes.
    #[error("record `{key}` cannot be read: {problem}; was the data directory written by another version?")]
    Corrupt {
        /// The record's key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What was asked of a sweep lies in an object that is not there any more, or is damaged. It does not run.
    #[error(
        "sweep {sweep} cannot be read, as what was asked of it lies in an object: {error}{}; then start the coordinator \
         again, or delete the sweep",
        restore(error)
    )]
    Unreadable {
        /// The sweep.
        sweep: SweepId,
        /// What is the matter with the object, with its name.
        error: ArtifactError,
    },
    /// Fields of a request are wrong: `(field, what is wrong and what to do)`.
    #[error("{}", fields.iter().map(|(field, problem)| format!("{field}: {problem}")).collect::<Vec<_>>().join("\n"))]
    Invalid {
        /// The fields.
        fields: Vec<(String, String)>,
    },
    /// There is no such thing.
    #[error("there is no {kind} {id}")]
    NotFound {
        /// `sweep`, `trial`, `adapter`, ….
        kind: &'static str,
        /// What was asked for.
        id: String,
    },
    /// The thing is over, so that it cannot be changed.
    #[error("{kind} {id} is {state}")]
    Over {
        /// `sweep` or `trial`.
        kind: &'static str,
        /// Which.
        id: String,
        /// Its terminal state.
        state: &'static str,
    },
    /// The message belongs to an assignment that is not current.
    #[error("trial {trial}: attempt {attempt} is not current")]
    Fenced {
        /// The trial.
        trial: TrialId,
        /// The attempt that the message carries.
        attempt: Attempt,
    },
    /// Who calls may not do this: why, and what to do.
    #[error("{0}")]
    Denied(String),
    /// A namespace has as much as it may: which, and how much, and what to do.
    #[error("{why}")]
    Quota {
        /// The namespace.
        namespace: String,
        /// What it has, and what to do.
        why: String,
    },
    /// The disk refuses, so that nothing can be changed now.
    #[error("nothing can be written at the moment, so nothing was changed: {0}; make room, then ask again")]
    Trouble(String),
    /// A trial cannot go where a message would send it.
    #[error(transparent)]
    Transition(#[from] IllegalTransition),
    /// The services cannot be described to whoever asks for that.
    #[error("the description of the services: {0}")]
    Described(#[from] tonic_reflection::server::Error),
    /// The coordinator is ending.
    #[error(transparent)]
    Gone(#[from] actor::Gone),
}

impl CoordinatorError {
    /// Whether the data directory that a program was given is a wrong argument: it is somebody else's now, or of a later version.
    pub fn refuses_directory(&self) -> bool {
        let of_registry = |error: &RegistryError| {
            matches!(
                error,
                RegistryError::InUse { .. } | RegistryError::Newer { .. } | RegistryError::Foreign { .. }
            )
        };
        match self {
            Self::Registry(error) => of_registry(error),
            Self::History(error) => matches!(error, HistoryError::Newer { .. }),
            _ => false,
        }
    }

    /// One wrong field.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { fields: vec![(field.into(), problem.into())] }
    }

    /// A sweep document's problems, as fields of the request's `spec`.
    pub fn problems(problems: Vec<Problem>) -> Self {
        let field = |p: &Problem| if p.path.is_empty() { "spec".into() } else { format!("spec.{}", p.path) };
        let fields = problems.iter().map(|p| (field(p), format!("{}; {}", p.problem, p.remedy))).collect();
        Self::Invalid { fields }
    }

    /// Whether the disk, or what is in its place, refused: trying again may be right.
    pub fn is_storage(&self) -> bool {
        match self {
            Self::Trouble(_) => true,
            Self::Registry(error) => error.is_storage(),
            Self::Artifact(ArtifactError::Store { .. }) | Self::Blob(BlobError::Store { .. }) => true,
            Self::History(error) => error.is_storage(),
            _ => false,
        }
    }

    /// Nothing of that kind has this id.
    pub fn not_found(kind: &'static str, id: impl ToString) -> Self {
        Self::NotFound { kind, id: id.to_string() }
    }
}

impl From<HistoryError> for CoordinatorError {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::Leader(error) => Self::Registry(error),
            error => Self::History(error),
        }
    }
}

impl From<CoordinatorError> for RpcError {
    fn from(error: CoordinatorError) -> Self {
        let text = error.to_string();
        if error.is_storage() {
            return Self::Storage(text);
        }
        match error {
            CoordinatorError::Invalid { fields } => Self::Invalid(fields),
            CoordinatorError::NotFound { kind, id } => Self::NotFound(kind, id),
            CoordinatorError::Over { kind, id, state } => Self::Precondition(kind, id, format!("is {state}")),
            CoordinatorError::Fenced { .. } => Self::Fenced(text),
            CoordinatorError::Denied(why) => Self::Denied(why),
            CoordinatorError::Quota { namespace, why } => Self::Quota(format!("namespace {namespace}"), why),
            CoordinatorError::Unreadable { .. } => Self::DataLoss(text),
            CoordinatorError::Artifact(error) => artifact(&error),
            CoordinatorError::Blob(error) => blob(&error),
            CoordinatorError::Registry(RegistryError::Fenced { .. }) | CoordinatorError::Gone(_) => {
                Self::Unavailable(text)
            }
            CoordinatorError::Trouble(_)
            | CoordinatorError::Listen { .. }
            | CoordinatorError::Registry(_)
            | CoordinatorError::History(_)
            | CoordinatorError::Corrupt { .. }
            | CoordinatorError::Described(_)
            | CoordinatorError::Transition(_) => Self::Internal(text),
        }
    }
}

fn artifact(error: &ArtifactError) -> RpcError {
    let text = error.to_string();
    match error {
        ArtifactError::Trial(_)
        | ArtifactError::Name(_)
        | ArtifactError::Duplicate(_)
        | ArtifactError::Empty
        | ArtifactError::TooMany(_)
        | ArtifactError::Exists(_) => RpcError::Invalid(vec![("header".into(), text)]),
        ArtifactError::Checksum { .. }
        | ArtifactError::Short { .. }
        | ArtifactError::Long
        | ArtifactError::Damaged(_) => RpcError::DataLoss(text),
        ArtifactError::NotFound(path) => RpcError::NotFound("checkpoint", path.clone()),
        ArtifactError::Path(_)
        | ArtifactError::Failed
        | ArtifactError::Manifest { .. }
        | ArtifactError::Store { .. } => RpcError::Internal(text),
    }
}

fn blob(error: &BlobError) -> RpcError {
    let text = error.to_string();
    match error {
        BlobError::Behind { file, .. } | BlobError::Short { file, .. } => {
            RpcError::Precondition("file", file.to_string(), text)
        }
        BlobError::Missing(files) => {
            RpcError::Precondition("file", files.first().cloned().unwrap_or_default(), text)
        }
        BlobError::Length { .. } => RpcError::Invalid(vec![("bytes".into(), text)]),
        BlobError::Checksum { .. } => RpcError::DataLoss(text),
        BlobError::Busy { .. } => RpcError::Unavailable(text),
        BlobError::NotFound(id) => RpcError::NotFound("uploaded data", id.to_string()),
        BlobError::Corrupt { .. } | BlobError::Store { .. } => RpcError::Internal(text),
    }
}

impl From<CoordinatorError> for tonic::Status {
    fn from(error: CoordinatorError) -> Self {
        RpcError::from(error).into()
    }
}

/// The coordinator's result.
pub type Result<T> = std::result::Result<T, CoordinatorError>;
