//! The one mapping from errors to gRPC statuses, with google.rpc details that a program can read.

use crate::convert::ConvertError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain of our `google.rpc.ErrorInfo` details.
pub const ERROR_DOMAIN: &str = "lorafleet";

/// The reason in those details of a server whose disk is full or fails.
pub const STORAGE_REASON: &str = "STORAGE";

/// What went wrong in a call, in the terms of gRPC. Crates convert their errors to this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RpcError {
    /// Fields of the request are wrong: `(field, what is wrong and what to do)`.
    Invalid(Vec<(String, String)>),
    /// There is no such thing: `(kind, id)`.
    NotFound(&'static str, String),
    /// The thing is in a state that forbids the call: `(kind, id, why)`.
    Precondition(&'static str, String, String),
    /// The caller's attempt or leadership is old.
    Fenced(String),
    /// Bytes that arrived are not those that were sent.
    DataLoss(String),
    /// Try again later.
    Unavailable(String),
    /// The disk of the server is full or fails; try again later.
    Storage(String),
    /// A defect on our side.
    Internal(String),
}

impl From<RpcError> for Status {
    fn from(error: RpcError) -> Self {
        let info = |reason: &str| {
            let mut details = ErrorDetails::new();
            details.set_error_info(reason, ERROR_DOMAIN, std::collections::HashMap::new());
            details
        };
        match error {
            RpcError::Invalid(fields) => {
                let text: Vec<_> =
                    fields.iter().map(|(field, problem)| format!("{field}: {problem}")).collect();
                let mut details = info("INVALID");
                for (field, problem) in &fields {
                    details.add_bad_request_violation(field, problem);
                }
                Status::with_error_details(Code::InvalidArgument, text.join("\n"), details)
            }
            RpcError::NotFound(kind, id) => {
                let mut details = info("NOT_FOUND");
                details.set_resource_info(kind, &id, "", "no such id");
                Status::with_error_details(Code::NotFound, format!("there is no {kind} {id}"), details)
            }
            RpcError::Precondition(kind, id, why) => {
                let mut details = info("PRECONDITION");
                details.add_precondition_failure_violation(kind, &id, &why);
                Status::with_error_details(Code::FailedPrecondition, format!("{kind} {id}: {why}"), details)
            }
            RpcError::Fenced(why) => Status::with_error_details(Code::Aborted, why, info("FENCED")),
            RpcError::DataLoss(why) => Status::with_error_details(Code::DataLoss, why, info("DATA_LOSS")),
            RpcError::Unavailable(why) => {
                Status::with_error_details(Code::Unavailable, why, info("UNAVAILABLE"))
            }
            RpcError::Storage(why) => {
                Status::with_error_details(Code::Unavailable, why, info(STORAGE_REASON))
            }
            RpcError::Internal(why) => Status::with_error_details(Code::Internal, why, info("INTERNAL")),
        }
    }
}

impl From<ConvertError> for RpcError {
    fn from(error: ConvertError) -> Self {
        Self::Invalid(vec![(error.field.to_string(), error.problem)])
    }
}

impl From<ConvertError> for Status {
    fn from(error: ConvertError) -> Self {
        RpcError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_carry_details() {
        let invalid = RpcError::Invalid(vec![("spec.lora_rank".into(), "must be at least 1".into())]);
        for (error, code) in [
            (invalid.clone(), Code::InvalidArgument),
            (RpcError::NotFound("sweep", "x".into()), Code::NotFound),
            (RpcError::Precondition("trial", "x/1".into(), "is over".into()), Code::FailedPrecondition),
            (RpcError::Fenced("old attempt".into()), Code::Aborted),
            (RpcError::DataLoss("sha256".into()), Code::DataLoss),
            (RpcError::Unavailable("later".into()), Code::Unavailable),
            (RpcError::Storage("disk".into()), Code::Unavailable),
            (RpcError::Internal("defect".into()), Code::Internal),
        ] {
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            assert_eq!(status.get_error_details().error_info().unwrap().domain, ERROR_DOMAIN);
        }
        let details = Status::from(invalid).get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "spec.lora_rank");
    }
}
