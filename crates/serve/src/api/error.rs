//! Errors as OpenAI's clients understand them.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::schedule::{JobError, Refusal};

/// Result with an [`ApiError`].
pub(crate) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// What went wrong, for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// The field that is to blame.
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which it is worth another try.
    retry_after: Option<u32>,
    /// Nothing can follow on the connection.
    is_last: bool,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            501 => "not_supported_error",
            503 => "unavailable_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
            // What is left of a body that was not read stands where the next request would.
            is_last: matches!(status.as_u16(), 408 | 413),
        }
    }

    /// The request is wrong.
    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field of the request is wrong.
    pub(crate) fn field(name: &str, problem: impl AsRef<str>) -> Self {
        let problem = problem.as_ref();
        Self::bad(format!("`{name}` {problem}")).param(name)
    }

    /// Something here is broken.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Names the field that is to blame.
    pub(crate) fn param(mut self, name: &str) -> Self {
        self.param = Some(name.to_owned());
        self
    }

    /// Says when it is worth another try.
    pub(crate) fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Ends the connection.
    pub(crate) fn last(mut self) -> Self {
        self.is_last = true;
        self
    }

    /// Adds a word for programs.
    pub(crate) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// The body.
    pub(crate) fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl ApiError {
    /// The body in the words of Anthropic's interface.
    pub(crate) fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            413 => "request_too_large",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => self.kind,
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    /// Puts an answer into the words of Anthropic's interface.
    pub(crate) fn say_to_anthropic(&self, response: &mut Response) {
        *response.body_mut() = Body::from(self.anthropic().to_string());
        // It was that of the other words.
        response.headers_mut().remove(CONTENT_LENGTH);
    }
}

/// The answer in the words of OpenAI's interface, with the error itself as an extension.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.json());
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.is_last {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let (status, message, seconds) = match refusal {
            Refusal::TooLarge { bytes, limit } => {
                let message = format!(
                    "the keys and values of this request take up to {bytes} bytes, and this server has {limit} for all; \
                     ask for fewer tokens, or without `cadre.contrast`, which takes twice as much"
                );
                return Self::bad(message).code("context_length_exceeded");
            }
            Refusal::TooMany { waiting, seconds } => (
                StatusCode::TOO_MANY_REQUESTS,
                format!("{waiting} of your requests wait already; try again in {seconds} s"),
                seconds,
            ),
            Refusal::Full { waiting, seconds } => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{waiting} requests wait already; try again in {seconds} s"),
                seconds,
            ),
            Refusal::Ending => (
                StatusCode::SERVICE_UNAVAILABLE,
                "the server is ending".to_owned(),
                1,
            ),
        };
        Self::new(status, message).retry_after(seconds)
    }
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Failed(message) => Self::internal(message),
            JobError::Form(problem) => Self::bad(format!(
                "the answer cannot be held to this `response_format` any further: {problem}"
            ))
            .param("response_format"),
            JobError::Panicked => Self::internal(
                "the computation of this request broke down; the server's log says more",
            ),
            JobError::Ended => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the server ended before the answer was complete",
            ),
        }
    }
}

/// A JSON document as an answer.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
