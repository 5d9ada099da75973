//! The one mapping from errors to gRPC statuses, with google.rpc details that a program can read.

use crate::convert::ConvertError;
use crate::limits::{NAME_BYTES, REFUSAL_BYTES, cut};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain of our `google.rpc.ErrorInfo` details.
pub const ERROR_DOMAIN: &str = "lorafleet";

/// The reason in those details of a server whose disk is full or fails.
pub const STORAGE_REASON: &str = "STORAGE";

/// The reason in those details of a refusal that waiting does not change: a quota is used up.
pub const QUOTA_REASON: &str = "QUOTA";

/// The reason in those details of a coordinator that stands by while another leads.
pub const STANDBY_REASON: &str = "STANDBY";

/// The reason in those details of a coordinator that leads from now on and still reads what is under way.
pub const TAKING_OVER_REASON: &str = "TAKING_OVER";

/// What stands in the details of a coordinator that stands by: the leader's address, where it knows it.
pub const LEADER: &str = "leader";

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
    /// This coordinator does not lead. Ask the one that does, by its address, if one does; or why that is not known.
    Standby(Result<Option<String>, String>),
    /// This coordinator leads from now on, and is not ready yet: what it does, and when to try again.
    TakingOver(String, Duration),
    /// Nobody knows who calls.
    Unauthenticated(String),
    /// Who calls may not do this.
    Denied(String),
    /// A client asks too much: who, why, and when to try again.
    Exhausted {
        /// The client.
        client: String,
        /// What it has too much of, and what to do.
        why: String,
        /// Time until another try may succeed.
        retry: Duration,
    },
    /// Whoever asks has as much as it may: who, and what to do.
    Quota(String, String),
    /// A defect on our side.
    Internal(String),
}

impl RpcError {
    /// The same with no more words than fit the headers that carry them.
    fn shortened(self) -> Self {
        let short = |text| cut(text, REFUSAL_BYTES);
        // A message says again what its details say.
        let id = |text| cut(text, NAME_BYTES);
        match self {
            Self::Invalid(fields) => Self::Invalid(first_of(fields)),
            Self::NotFound(kind, text) => Self::NotFound(kind, id(text)),
            Self::Precondition(kind, text, why) => Self::Precondition(kind, id(text), short(why)),
            Self::Fenced(why) => Self::Fenced(short(why)),
            Self::DataLoss(why) => Self::DataLoss(short(why)),
            Self::Unavailable(why) => Self::Unavailable(short(why)),
            Self::Storage(why) => Self::Storage(short(why)),
            Self::Standby(leader) => Self::Standby(leader.map(|leader| leader.map(short)).map_err(short)),
            Self::TakingOver(what, retry) => Self::TakingOver(short(what), retry),
            Self::Unauthenticated(why) => Self::Unauthenticated(short(why)),
            Self::Denied(why) => Self::Denied(short(why)),
            Self::Exhausted { client, why, retry } => {
                Self::Exhausted { client: id(client), why: short(why), retry }
            }
            Self::Quota(whose, why) => Self::Quota(id(whose), short(why)),
            Self::Internal(why) => Self::Internal(short(why)),
        }
    }
}

/// As many problems as a refusal can say, and how many more there are.
fn first_of(fields: Vec<(String, String)>) -> Vec<(String, String)> {
    let (mut said, mut bytes, all) = (Vec::new(), 0, fields.len());
    for (field, problem) in fields {
        let (field, problem) = (cut(field, NAME_BYTES), cut(problem, REFUSAL_BYTES / 2));
        // With what the encoding adds to each.
        bytes += field.len() + problem.len() + 10;
        if bytes > REFUSAL_BYTES {
            let more = format!("{} more problems; mend these first", all - said.len());
            said.push((field, more));
            break;
        }
        said.push((field, problem));
    }
    said
}

impl From<RpcError> for Status {
    fn from(error: RpcError) -> Self {
        let info = |reason: &str| {
            let mut details = ErrorDetails::new();
            details.set_error_info(reason, ERROR_DOMAIN, std::collections::HashMap::new());
            details
        };
        match error.shortened() {
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
            RpcError::Standby(leader) => {
                let mut details = ErrorDetails::new();
                let known: std::collections::HashMap<_, _> =
                    leader.iter().flatten().map(|address| (LEADER.to_string(), address.clone())).collect();
                details.set_error_info(STANDBY_REASON, ERROR_DOMAIN, known);
                let who = match leader {
                    Ok(Some(address)) => format!("{address} leads"),
                    Ok(None) => "nobody leads now".into(),
                    Err(why) => format!("it is not known who leads: {why}"),
                };
                Status::with_error_details(
                    Code::Unavailable,
                    format!("this coordinator stands by; {who}"),
                    details,
                )
            }
            RpcError::TakingOver(what, retry) => {
                let mut details = info(TAKING_OVER_REASON);
                details.set_retry_info(Some(retry));
                Status::with_error_details(Code::Unavailable, format!("taking over: {what}"), details)
            }
            RpcError::Unauthenticated(why) => {
                Status::with_error_details(Code::Unauthenticated, why, info("UNAUTHENTICATED"))
            }
            RpcError::Denied(why) => {
                Status::with_error_details(Code::PermissionDenied, why, info("PERMISSION_DENIED"))
            }
            RpcError::Exhausted { client, why, retry } => {
                let mut details = info("EXHAUSTED");
                details.set_retry_info(Some(retry));
                details.add_quota_failure_violation(client, why.clone());
                Status::with_error_details(Code::ResourceExhausted, why, details)
            }
            RpcError::Quota(whose, why) => {
                let mut details = info(QUOTA_REASON);
                details.add_quota_failure_violation(whose, why.clone());
                Status::with_error_details(Code::ResourceExhausted, why, details)
            }
            RpcError::Internal(why) => Status::with_error_details(Code::Internal, why, info("INTERNAL")),
        }
    }
}

/// A refusal that came about before our code read the request, with details as ours have: bytes that are no message, a
/// message above the limit, a call that there is not. One of ours stays as it is.
pub fn explained(status: Status) -> Status {
    if status.code() == Code::Ok || !status.details().is_empty() {
        return status;
    }
    let message = status.message();
    match status.code() {
        // Of ours each has details, so that this is about the bytes.
        Code::Internal => {
            RpcError::Invalid(vec![("request".into(), format!("cannot be read: {message}"))]).into()
        }
        Code::OutOfRange => {
            RpcError::Invalid(vec![("request".into(), format!("is above the limit: {message}"))]).into()
        }
        code => {
            let mut details = ErrorDetails::new();
            details.set_error_info("REFUSED", ERROR_DOMAIN, std::collections::HashMap::new());
            Status::with_error_details(code, cut(message.into(), REFUSAL_BYTES), details)
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
            (RpcError::Standby(Ok(Some("http://c1:7401".into()))), Code::Unavailable),
            (RpcError::Standby(Err("etcd has no majority".into())), Code::Unavailable),
            (RpcError::TakingOver("loading".into(), Duration::from_secs(1)), Code::Unavailable),
            (RpcError::Unauthenticated("who".into()), Code::Unauthenticated),
            (RpcError::Denied("no".into()), Code::PermissionDenied),
            (
                RpcError::Exhausted { client: "c".into(), why: "much".into(), retry: Duration::from_secs(1) },
                Code::ResourceExhausted,
            ),
            (RpcError::Quota("namespace a".into(), "full".into()), Code::ResourceExhausted),
            (RpcError::Internal("defect".into()), Code::Internal),
        ] {
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            assert_eq!(status.get_error_details().error_info().unwrap().domain, ERROR_DOMAIN);
        }
        let details = Status::from(invalid).get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "spec.lora_rank");
    }

    #[test]
    fn who_stands_by_says_who_leads_or_why_that_is_not_known() {
        for (leader, says, address) in [
            (Ok(Some("http://c1:7401")), "http://c1:7401 leads", Some("http://c1:7401")),
            (Ok(None), "nobody leads now", None),
            (Err("etcd has no majority"), "it is not known who leads: etcd has no majority", None),
        ] {
            let leader = leader.map(|leader| leader.map(String::from)).map_err(String::from);
            let status = Status::from(RpcError::Standby(leader));
            assert_eq!(status.message(), format!("this coordinator stands by; {says}"));
            let info = status.get_error_details().error_info().cloned().unwrap();
            assert_eq!(info.metadata.get(LEADER).map(String::as_str), address);
        }
    }

    #[test]
    fn refusals_of_others_get_details() {
        for (status, code, reason) in [
            (Status::internal("failed to decode"), Code::InvalidArgument, "INVALID"),
            (Status::out_of_range("5 MB"), Code::InvalidArgument, "INVALID"),
            (Status::unimplemented(""), Code::Unimplemented, "REFUSED"),
            (RpcError::Internal("defect".into()).into(), Code::Internal, "INTERNAL"),
            (RpcError::Fenced("old".into()).into(), Code::Aborted, "FENCED"),
        ] {
            let explained = explained(status);
            assert_eq!(explained.code(), code);
            assert_eq!(explained.get_error_details().error_info().unwrap().reason, reason);
        }
        assert!(super::explained(Status::ok("")).details().is_empty());
    }

    /// Headers hold what a refusal says, whatever a caller's words were: some 16 kB with the text in percent-encoding.
    #[test]
    fn refusals_fit_their_headers() {
        let long = || "é".repeat(1 << 20);
        let many = (0..1000).map(|i| (format!("spec.key{i}"), "is unknown; remove it".to_string())).collect();
        for (error, violations) in [
            (RpcError::Invalid(vec![(long(), long()), (long(), long())]), 2),
            (RpcError::Invalid(many), 50),
            (RpcError::NotFound("sweep", long()), 0),
            (RpcError::Precondition("trial", long(), long()), 0),
            (RpcError::Fenced(long()), 0),
            (RpcError::Internal(long()), 0),
        ] {
            let status = Status::from(error);
            let bytes = 3 * status.message().len() + status.details().len() * 4 / 3;
            assert!(bytes < 15_000, "{bytes} bytes of {:?}", status.code());
            let said = status.get_error_details().bad_request().map_or(0, |b| b.field_violations.len());
            assert_eq!(said, violations);
        }
    }
}
