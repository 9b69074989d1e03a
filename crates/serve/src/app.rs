//! The application: which path is answered by what, for whom, and how its trouble is told.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequestParts, MatchedPath, Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use bytes::Bytes;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, CONTENT_TYPE, ORIGIN, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use serde_json::{Value, json};

use crate::access::Access;
use crate::api::error::{ApiError, Result, json_response};
use crate::api::sse::{Growing, stream, whole};
use crate::api::{Prepared, chat, completions, embeddings, messages, models, tokens};
use crate::document::Document;
use crate::listen::{Answers, HttpLimits, Peer};
use crate::metrics::Metrics;
use crate::page;
use crate::panics::{blocking, caught};
use crate::schedule::{Client, Job, Jobs, Scheduler};
use crate::served::Served;

/// What answers requests.
pub(crate) struct App {
    pub(crate) served: Arc<Served>,
    pub(crate) scheduler: Scheduler,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Access,
    pub(crate) limits: HttpLimits,
    /// The server takes no more work.
    pub(crate) ending: AtomicBool,
}

/// A path, its name in metrics, and what answers there.
struct Place {
    path: &'static str,
    name: &'static str,
    answers: fn() -> MethodRouter<Arc<App>>,
}

const fn at(
    path: &'static str,
    name: &'static str,
    answers: fn() -> MethodRouter<Arc<App>>,
) -> Place {
    Place {
        path,
        name,
        answers,
    }
}

/// Everything that is answered, beside the files of the page.
const PLACES: &[Place] = &[
    at("/health", HEALTH, || get(health)),
    at("/v1/health", HEALTH, || get(health)),
    at("/v1/models", "models", || get(model_list)),
    at("/v1/models/{*name}", "models", || get(model)),
    at("/v1/completions", "completions", || {
        generating(completions::prepare)
    }),
    at("/v1/chat/completions", "chat", || generating(chat::prepare)),
    at(MESSAGES, "messages", || generating(messages::prepare)),
    at("/v1/embeddings", "embeddings", || post(embed)),
    at("/tokenize", "tokenize", || computing(tokens::tokenize)),
    at("/detokenize", "detokenize", || {
        computing(tokens::detokenize)
    }),
    at("/tokenizer_info", "tokenizer_info", || get(tokenizer_info)),
    at("/metrics", "metrics", || get(metrics)),
    at("/openapi.json", "openapi", || get(document)),
];
/// What is answered, for programs.
const DOCUMENT: &str = include_str!("openapi.json");
/// Where errors are told in the words of Anthropic's interface.
const MESSAGES: &str = "/v1/messages";
/// The name in metrics of what needs no key, of the page's files, and of everything else.
const HEALTH: &str = "health";
const PAGE: &str = "page";
const OTHER: &str = "other";

/// Who answers the requests of connections.
pub(crate) fn answers(app: &Arc<App>) -> Answers {
    let mut router = Router::new();
    for place in PLACES {
        router = router.route(place.path, (place.answers)());
    }
    for file in page::FILES {
        router = router.route(
            file.path,
            get(move |headers: HeaderMap| async move { file.answer(&headers) }),
        );
    }
    let router = router
        .fallback(nowhere)
        .method_not_allowed_fallback(other_method);
    let around = || from_fn_with_state(Arc::clone(app), around);
    Answers {
        app: router.layer(around()).with_state(Arc::clone(app)),
        full: Router::new().fallback(full).layer(around()),
        slow: || {
            let message = "the request's head arrives too slowly";
            let error = ApiError::new(StatusCode::REQUEST_TIMEOUT, message);
            error.json().to_string()
        },
    }
}

/// What all requests have in common: who may ask, panics, the words of errors, metrics, and a line in the log.
async fn around(
    State(app): State<Arc<App>>,
    matched: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let name = matched.as_ref().map_or(OTHER, |matched| {
        let place = PLACES.iter().find(|place| place.path == matched.as_str());
        place.map_or(PAGE, |place| place.name)
    });
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let origin = request.headers().get(ORIGIN).cloned();
    let mut response = match app.admit(&request, name) {
        Err(error) => error.into_response(),
        Ok(()) if is_preflight(&request) => app.access.preflight(request.headers()),
        Ok(()) => match caught(next.run(request)).await {
            Ok(response) => response,
            Err(panic) => ApiError::from(panic).into_response(),
        },
    };
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        if error.status() == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!("{}", error.json());
        }
        if path == MESSAGES {
            error.say_to_anthropic(&mut response);
        }
    }
    let status = response.status();
    if status == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
    }
    app.access.share(origin.as_ref(), &mut response);
    app.metrics.answered(name, status.as_u16());
    tracing::info!(status = status.as_u16(), "{method} {path}");
    response
}

async fn nowhere(uri: Uri) -> ApiError {
    let shown: String = uri.path().chars().take(100).collect();
    let message = format!("there is nothing at {shown}; ask for /v1/models to begin with");
    ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_url")
}

async fn other_method(method: Method, uri: Uri) -> ApiError {
    let message = format!(
        "{method} is not for {}; the field `allow` of this answer says what is",
        uri.path()
    );
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn full() -> ApiError {
    let message = "the server has as many connections as it may have; try again later";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message)
        .retry_after(1)
        .last()
}

async fn health(State(app): State<Arc<App>>) -> Result<Response> {
    match app.ending.load(Ordering::Relaxed) {
        false => Ok(ok(&json!({"status": "ok"}))),
        true => Err(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the server is ending",
        )),
    }
}

async fn model_list(State(app): State<Arc<App>>) -> Response {
    ok(&models::list(&app.served))
}

async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response> {
    let Path(name) = name.map_err(|error| ApiError::bad(error.body_text()))?;
    app.served.check_name(Some(&name))?;
    Ok(ok(&models::one(&app.served, &name)))
}

async fn tokenizer_info(State(app): State<Arc<App>>) -> Response {
    ok(&tokens::info(&app.served))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let store = app.served.model.store_stats();
    let page = app.metrics.text(app.served.name(), store.as_ref());
    text(page, "text/plain; version=0.0.4; charset=utf-8")
}

async fn document() -> Response {
    text(DOCUMENT, "application/json")
}

/// Answers with vectors.
async fn embed(
    State(app): State<Arc<App>>,
    client: Client,
    Document(body): Document,
) -> Result<Response> {
    let served = Arc::clone(&app.served);
    let asked = blocking(move || embeddings::prepare(&body, &served)).await??;
    let shape = asked.shape();
    let jobs = app.submit(client, asked.jobs)?;
    let value = embeddings::answer(jobs, shape, app.served.name()).await?;
    Ok(ok(&value))
}

/// Answers from the request alone.
fn computing(work: fn(&[u8], &Served) -> Result<Value>) -> MethodRouter<Arc<App>> {
    post(
        move |State(app): State<Arc<App>>, Document(body): Document| async move {
            let served = Arc::clone(&app.served);
            let value = blocking(move || work(&body, &served)).await??;
            Ok::<_, ApiError>(ok(&value))
        },
    )
}

/// Answers with generated text.
fn generating(prepare: fn(&[u8], &Served) -> Result<Prepared>) -> MethodRouter<Arc<App>> {
    post(
        move |State(app): State<Arc<App>>, client: Client, Document(body): Document| async move {
            let served = Arc::clone(&app.served);
            let prepared = blocking(move || prepare(&body, &served)).await??;
            let jobs = app.submit(client, prepared.jobs)?;
            let served = Arc::clone(&app.served);
            let growing = Growing::new(served, jobs, prepared.choices, prepared.n_prompt);
            match prepared.streams {
                true => Ok::<_, ApiError>(stream(growing, prepared.voice)),
                false => whole(growing, prepared.voice).await,
            }
        },
    )
}

impl App {
    /// Whether a request may be made, as far as its head says.
    fn admit(&self, request: &Request, name: &str) -> Result<()> {
        self.access.check_origin(request.headers())?;
        // The page has a field for the key, and nothing that it would protect.
        if ![HEALTH, PAGE, OTHER].contains(&name) && !is_preflight(request) {
            self.access.check_key(request.headers())?;
        }
        Ok(())
    }

    /// Puts jobs into the queue.
    fn submit(&self, client: Client, jobs: Vec<Job>) -> Result<Jobs> {
        let most = self.scheduler.n_waiting();
        if jobs.len() > most {
            let n = jobs.len();
            let message =
                format!("the request asks for {n} answers, but at most {most} can wait here");
            return Err(ApiError::bad(message));
        }
        Ok(self.scheduler.submit(client, jobs)?)
    }
}

/// For whom a request is done.
impl FromRequestParts<Arc<App>> for Client {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Infallible> {
        let unknown = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let peer = parts.extensions.get::<Peer>();
        let address = peer.map_or(unknown, |peer| peer.0.ip());
        Ok(app.access.client(&parts.headers, address))
    }
}

/// A browser asks whether a page may ask.
fn is_preflight(request: &Request) -> bool {
    let asks = |headers: &HeaderMap| headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    *request.method() == Method::OPTIONS && asks(request.headers())
}

fn text(text: impl Into<Bytes>, kind: &'static str) -> Response {
    let mut response = Response::new(Body::from(text.into()));
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn ok(value: &Value) -> Response {
    json_response(StatusCode::OK, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That the methods are the right ones is seen from outside, in `tests/http/protocol.rs`.
    #[test]
    fn the_document_has_every_path_and_no_other() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let documented = document["paths"].as_object().unwrap();
        for place in PLACES {
            let path = place.path.replace("{*", "{");
            assert!(documented.contains_key(&path), "{path}");
        }
        assert_eq!(documented.len(), PLACES.len());
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
