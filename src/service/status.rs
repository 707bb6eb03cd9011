//! The one place where errors become gRPC statuses, with google.rpc details that programs can read.
//!
//! INTERNAL always carries details: that is how [`super::boundary`] tells ours from tonic's.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tracing::error;

use super::tokens::Turned;
use crate::engine::request::Invalid;
use crate::engine::{Failure, Refused};
use crate::telemetry::account;

/// Bytes of the longest message: it travels in a header, and may quote the client.
const MESSAGE_BYTES_MAX: usize = 1024;
/// Whose the reasons in ErrorInfo are.
const DOMAIN: &str = "lacuna.v1";
/// When to try a server that stops again: another one may have taken its place.
const RETRY: Duration = Duration::from_secs(1);

/// A field's value cannot be taken. `field` is its path in the request.
pub fn bad_field(field: &str, reason: impl Into<String>) -> Status {
    let reason = clip(reason.into());
    let details = ErrorDetails::with_bad_request_violation(field, reason.as_str());
    status(Code::InvalidArgument, format!("{field}: {reason}"), details)
}

/// A status that is about one of several: `whose` says which one, and `path` gives the path of a field that it names.
pub fn within(given: &Status, whose: &str, path: impl Fn(&str) -> String) -> Status {
    let details = given.get_error_details();
    let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
    match violation {
        Some(found) => bad_field(&path(&found.field), format!("{whose}: {}", found.description)),
        None => status(given.code(), format!("{whose}: {}", given.message()), details),
    }
}

/// The engine's verdict on a request. `path` gives a field's path in the request.
pub fn invalid(invalid: Invalid, path: impl Fn(&'static str) -> String) -> Status {
    match invalid {
        Invalid::Field { field, reason } => bad_field(&path(field), reason),
        Invalid::Unsupported(reason) => unable(reason),
    }
}

/// The model cannot do it, whatever the values.
pub fn unable(reason: String) -> Status {
    let details = ErrorDetails::with_precondition_failure_violation("MODEL", "model", clip(reason.clone()));
    status(Code::FailedPrecondition, reason, details)
}

pub fn unknown_model(name: &str, known: &str) -> Status {
    let name = clip(name.into());
    let details = ErrorDetails::with_resource_info("model", name.as_str(), "", "not served here");
    status(Code::NotFound, format!("model: there is no '{name}'; served are {known}"), details)
}

/// It may be there a moment later.
pub fn unavailable(message: String) -> Status {
    status(Code::Unavailable, message, ErrorDetails::with_retry_info(Some(RETRY)))
}

pub fn stopping() -> Status {
    unavailable("the server is stopping".into())
}

/// Whoever calls has no token, or has called too much.
pub fn turned(turned: &Turned) -> Status {
    let (reason, name, retry) = match turned {
        Turned::Missing => ("TOKEN_MISSING", None, None),
        Turned::Malformed => ("TOKEN_MALFORMED", None, None),
        Turned::Unknown => ("TOKEN_UNKNOWN", None, None),
        Turned::InFlight { name, retry, .. } => ("REQUESTS_IN_FLIGHT", Some(name), Some(*retry)),
        Turned::PerMinute { name, retry, .. } => ("REQUESTS_PER_MINUTE", Some(name), Some(*retry)),
    };
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, []);
    if let (Some(name), Some(retry)) = (name, retry) {
        details.set_retry_info(Some(retry)).add_quota_failure_violation(name.as_str(), turned.to_string());
        return status(Code::ResourceExhausted, turned.to_string(), details);
    }
    status(Code::Unauthenticated, turned.to_string(), details)
}

/// The token does not go so far.
pub fn denied(reason: &str, message: String) -> Status {
    status(Code::PermissionDenied, message, ErrorDetails::with_error_info(reason, DOMAIN, []))
}

pub fn no_library() -> Status {
    unable("the server loads and unloads no models by request: it was started without --model-folder".into())
}

pub fn not_in_library(name: &str) -> Status {
    let name = clip(name.into());
    let details = ErrorDetails::with_resource_info("model", name.as_str(), "", "not in the server's model folders");
    status(Code::NotFound, format!("name: the server's model folders have no '{name}'"), details)
}

/// The model is there, but cannot be used.
pub fn unloadable(reason: String) -> Status {
    unable(format!("name: the model cannot be loaded: {reason}"))
}

/// The budget does not suffice; `sum` shows why.
pub fn no_room(sum: String) -> Status {
    let details = ErrorDetails::with_quota_failure_violation("memory budget", clip(sum.clone()));
    status(Code::ResourceExhausted, sum, details)
}

pub fn refused(refused: &Refused) -> Status {
    let (code, details) = match refused {
        Refused::QueueFull { retry, .. } | Refused::TokensFull { retry, .. } => {
            (Code::ResourceExhausted, ErrorDetails::with_retry_info(Some(*retry)))
        }
        // Trying again would not help.
        Refused::TooLarge { .. } => (Code::ResourceExhausted, ErrorDetails::new()),
        Refused::Stopping => (Code::Unavailable, ErrorDetails::with_retry_info(Some(RETRY))),
    };
    status(code, refused.to_string(), details)
}

/// A request that was taken ended without finishing.
pub fn failure(failure: &Failure, request: &str) -> Status {
    match failure {
        Failure::Cancelled => status(Code::Cancelled, failure.to_string(), ErrorDetails::new()),
        Failure::DeadlineExceeded => deadline_exceeded(),
        Failure::Stopping => status(Code::Unavailable, failure.to_string(), ErrorDetails::with_retry_info(Some(RETRY))),
        Failure::Unread => status(Code::ResourceExhausted, failure.to_string(), ErrorDetails::with_retry_info(Some(RETRY))),
        Failure::OutOfMemory => {
            let mut details = ErrorDetails::with_retry_info(Some(RETRY));
            details.set_request_info(request, "");
            status(Code::ResourceExhausted, failure.to_string(), details)
        }
        Failure::Internal => internal(request),
    }
}

pub fn deadline_exceeded() -> Status {
    status(Code::DeadlineExceeded, "the deadline passed before the call was complete".into(), ErrorDetails::new())
}

/// A fault of ours. What it was stays in the log.
pub fn fault(what: &str, request: Option<&str>) -> Status {
    let id = request.map_or_else(account::new_id, str::to_owned);
    error!(request = id, what, "a fault in the service");
    internal(&id)
}

fn internal(request: &str) -> Status {
    let details = ErrorDetails::with_request_info(request, "");
    status(Code::Internal, format!("the request failed; the server's log has more under its id, {request}"), details)
}

/// A message that is not what the API says.
pub fn unreadable(reason: &str) -> Status {
    let reason = clip(reason.into());
    let details = ErrorDetails::with_bad_request_violation("", reason.as_str());
    status(Code::InvalidArgument, format!("the request could not be read: {reason}"), details)
}

/// A message that is larger than the server takes. Trying again would not help, hence no RetryInfo.
pub fn oversize(reason: &str) -> Status {
    status(Code::ResourceExhausted, format!("the request is too large: {reason}"), ErrorDetails::new())
}

fn status(code: Code, message: String, details: ErrorDetails) -> Status {
    Status::with_error_details(code, clip(message), details)
}

/// Cuts a text to what fits a header.
fn clip(mut text: String) -> String {
    if text.len() > MESSAGE_BYTES_MAX {
        let end = (0..=MESSAGE_BYTES_MAX).rfind(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_ran_out_is_told_with_an_id_and_when_to_come_again() {
        let status = failure(&Failure::OutOfMemory, "request-7");
        let details = status.get_error_details();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(details.request_info().map(|info| info.request_id.as_str()), Some("request-7"));
        assert!(details.retry_info().is_some());
    }
}
