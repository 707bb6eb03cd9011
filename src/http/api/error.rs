//! Errors as clients of this kind of API read them: `{"error": {"message", "type", "param", "code"}}` under a fitting status code.
//!
//! What the service says as a gRPC status becomes one here, and nowhere else.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// When a full queue gives no time of its own.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub struct Error {
    pub status: StatusCode,
    message: String,
    /// The field of the body that is at fault.
    pub param: Option<String>,
    code: Option<&'static str>,
    /// When to try again.
    retry: Option<Duration>,
}

impl Error {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry: None }
    }

    /// A request that cannot be read, or whose fields do not go together.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        Self { param: param.map(str::to_owned), ..Self::new(StatusCode::BAD_REQUEST, None, message) }
    }

    /// A field's value cannot be taken.
    pub fn field(param: &str, reason: impl std::fmt::Display) -> Self {
        Self::invalid(Some(param), format!("{param}: {reason}"))
    }

    /// A field that means nothing here, or something that cannot be done.
    pub fn unknown(param: &str) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::field(param, "it is not known here, or cannot be honoured: leave it out")
        }
    }

    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, Some("unknown_url"), "there is nothing at this path")
    }

    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, None, "this path does not take this method")
    }

    pub fn content_type() -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, "the content-type is not application/json")
    }

    /// The body could not be read to its end.
    pub fn body(status: StatusCode, reason: String) -> Self {
        Self::new(status, None, format!("the body could not be read: {reason}"))
    }

    /// The service's verdict. `path` says where in the body a field of the API's message stands.
    pub fn of(status: &Status, path: impl Fn(&str) -> String) -> Self {
        let details = status.get_error_details();
        let retry = details.retry_info().map(|info| info.retry_delay.unwrap_or(RETRY));
        let told = |status_code, code| Self { retry, ..Self::new(status_code, code, status.message()) };
        match status.code() {
            Code::InvalidArgument => match details.bad_request().and_then(|bad| bad.field_violations.first()) {
                Some(found) if !found.field.is_empty() => Self::field(&path(&found.field), &found.description),
                _ => told(StatusCode::BAD_REQUEST, None),
            },
            Code::FailedPrecondition | Code::OutOfRange => told(StatusCode::BAD_REQUEST, Some("model_cannot")),
            Code::NotFound => Self { param: Some("model".into()), ..told(StatusCode::NOT_FOUND, Some("model_not_found")) },
            Code::Unauthenticated => told(StatusCode::UNAUTHORIZED, Some("invalid_api_key")),
            Code::PermissionDenied => told(StatusCode::FORBIDDEN, Some("permission_denied")),
            // Memory that ran out is the server's trouble, a full queue is everybody's, and what can never fit is the client's.
            Code::ResourceExhausted if details.request_info().is_some() => {
                told(StatusCode::SERVICE_UNAVAILABLE, Some("out_of_memory"))
            }
            Code::ResourceExhausted if details.error_info().is_some() => {
                told(StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"))
            }
            Code::ResourceExhausted if retry.is_some() => told(StatusCode::TOO_MANY_REQUESTS, Some("queue_full")),
            Code::ResourceExhausted => told(StatusCode::PAYLOAD_TOO_LARGE, Some("too_large")),
            Code::Unavailable => told(StatusCode::SERVICE_UNAVAILABLE, Some("unavailable")),
            Code::DeadlineExceeded => told(StatusCode::GATEWAY_TIMEOUT, Some("deadline_exceeded")),
            _ => told(StatusCode::INTERNAL_SERVER_ERROR, Some("internal")),
        }
    }

    /// The body, which streams send too.
    pub fn json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(retry) = self.retry {
            let seconds = retry.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Failure, Refused};
    use crate::service::status;

    #[test]
    fn what_the_service_says_gets_a_fitting_status() {
        let retry = Duration::from_millis(2300);
        for (status, code, kind, after) in [
            (status::refused(&Refused::QueueFull { waiting: 3, retry }), 429, "rate_limit_error", Some("3")),
            (status::refused(&Refused::TooLarge { needed: 3, budget: 2 }), 413, "invalid_request_error", None),
            (status::refused(&Refused::Stopping), 503, "server_error", Some("1")),
            (status::failure(&Failure::OutOfMemory, "id"), 503, "server_error", Some("1")),
            (status::failure(&Failure::Unread, "id"), 429, "rate_limit_error", Some("1")),
            (status::failure(&Failure::DeadlineExceeded, "id"), 504, "server_error", None),
            (status::failure(&Failure::Internal, "id"), 500, "server_error", None),
            (status::unable("it cannot".into()), 400, "invalid_request_error", None),
            (status::unknown_model("x", "nano"), 404, "invalid_request_error", None),
        ] {
            let error = Error::of(&status, str::to_owned);
            assert_eq!(error.json()["error"]["type"], kind, "{status:?}");
            let response = error.into_response();
            assert_eq!(response.status(), code, "{status:?}");
            let said = response.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
            assert_eq!(said.as_deref(), after, "{status:?}");
        }
        let error = Error::of(&status::bad_field("stopping.stop", "it is empty"), |path| path.replace("stopping.", ""));
        assert_eq!((error.param.as_deref(), error.message.as_str()), (Some("stop"), "stop: it is empty"));
    }
}
