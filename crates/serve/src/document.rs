//! The body of a request: a JSON document, read whole, with a limit on its length and on the time that it takes.

use std::sync::Arc;

use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::time::{Duration, Instant, timeout_at};

use crate::api::error::{ApiError, Result};
use crate::app::App;

/// A request's body.
pub(crate) struct Document(pub(crate) Bytes);

impl FromRequest<Arc<App>> for Document {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        let limits = &app.limits;
        let most = limits.body_bytes;
        let mut body = request.into_body();
        // What it says itself is enough to refuse it.
        if body.size_hint().lower() > most as u64 {
            return Err(too_large(most));
        }
        let start = Instant::now() + limits.body_time;
        let mut bytes = BytesMut::new();
        loop {
            let earned = bytes.len() as f64 / limits.body_rate.max(1) as f64;
            let deadline = start + Duration::from_secs_f64(earned);
            let Ok(frame) = timeout_at(deadline, body.frame()).await else {
                let message = "the request's body arrives too slowly";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message));
            };
            let Some(frame) = frame else {
                return Ok(Self(bytes.freeze()));
            };
            let frame = frame.map_err(|error| {
                ApiError::bad(format!("the request's body cannot be read: {error}"))
            })?;
            // Fields after the body mean nothing here.
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if data.len() > most - bytes.len() {
                return Err(too_large(most));
            }
            bytes.extend_from_slice(&data);
        }
    }
}

fn too_large(most: usize) -> ApiError {
    let message =
        format!("the request's body is larger than {most} bytes, the most that is read here");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}
