//! The application: which path is answered by what, for whom, and how its trouble is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, ALLOW, CONTENT_TYPE, ORIGIN, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::json;

use crate::access::Access;
use crate::api::error::{ApiError, Result, json_response};
use crate::api::sse::{Growing, stream, whole};
use crate::api::{Prepared, chat, completions, embeddings, messages, models, tokens};
use crate::http1::{Body, Peer, Request, Response, Service};
use crate::metrics::Metrics;
use crate::page;
use crate::panics::{blocking, caught};
use crate::schedule::{Job, Jobs, Scheduler};
use crate::served::Served;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoint {
    Health,
    Models,
    Completions,
    Chat,
    Messages,
    Embeddings,
    Tokenize,
    Detokenize,
    Metrics,
    OpenApi,
    /// A file of the page.
    Page,
}

/// A path, its method, what it leads to, and the name of that in metrics.
struct Route {
    method: Verb,
    path: &'static str,
    endpoint: Endpoint,
    name: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Get,
    Post,
}

const fn get(path: &'static str, endpoint: Endpoint, name: &'static str) -> Route {
    Route {
        method: Verb::Get,
        path,
        endpoint,
        name,
    }
}

const fn post(path: &'static str, endpoint: Endpoint, name: &'static str) -> Route {
    Route {
        method: Verb::Post,
        path,
        endpoint,
        name,
    }
}

/// Everything that is answered. Below [`MODELS`] there is a path for every name of the model.
const ROUTES: &[Route] = &[
    get("/health", Endpoint::Health, "health"),
    get("/v1/health", Endpoint::Health, "health"),
    get("/v1/models", Endpoint::Models, "models"),
    post("/v1/completions", Endpoint::Completions, "completions"),
    post("/v1/chat/completions", Endpoint::Chat, "chat"),
    post("/v1/messages", Endpoint::Messages, "messages"),
    post("/v1/embeddings", Endpoint::Embeddings, "embeddings"),
    post("/tokenize", Endpoint::Tokenize, "tokenize"),
    post("/detokenize", Endpoint::Detokenize, "detokenize"),
    get("/metrics", Endpoint::Metrics, "metrics"),
    get("/openapi.json", Endpoint::OpenApi, "openapi"),
];
/// What is answered, for programs.
const DOCUMENT: &str = include_str!("openapi.json");
const MODELS: &str = "/v1/models/";
static GET: [Method; 2] = [Method::GET, Method::HEAD];
static POST: [Method; 1] = [Method::POST];
/// In metrics, what is not in the table.
const OTHER: &str = "other";

/// What answers requests.
pub(crate) struct App {
    pub(crate) served: Arc<Served>,
    pub(crate) scheduler: Scheduler,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: Access,
    pub(crate) body_bytes: usize,
    /// The server takes no more work.
    pub(crate) ending: AtomicBool,
}

impl Service for App {
    fn admit(&self, head: &http::Request<()>) -> std::result::Result<usize, Box<Response>> {
        let (name, checked) = self.check(head);
        match checked {
            Ok(()) => Ok(self.body_bytes),
            Err(error) => {
                let mut response = error.response(is_anthropic(head));
                self.complete(head, name, &mut response);
                Err(Box::new(response))
            }
        }
    }

    async fn answer(self: Arc<Self>, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let head = http::Request::from_parts(parts, ());
        let name = route(head.uri().path()).map_or(OTHER, |(_, name)| name);
        let mut response = if is_preflight(&head) {
            let mut response = Response::new(Body::Full(Bytes::new()));
            *response.status_mut() = StatusCode::NO_CONTENT;
            self.access.preflight(head.headers(), &mut response);
            response
        } else {
            match caught(self.dispatch(&head, body)).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => told(&error, &head),
                Err(panic) => told(&panic.into(), &head),
            }
        };
        self.complete(&head, name, &mut response);
        response
    }

    fn refusal(&self, status: StatusCode, message: String) -> Response {
        self.metrics.answered(OTHER, status.as_u16());
        ApiError::new(status, message).response(false)
    }
}

impl App {
    /// Whether a request may be made, as far as its head says.
    fn check(&self, head: &http::Request<()>) -> (&'static str, Result<()>) {
        let found = route(head.uri().path());
        let name = found.map_or(OTHER, |(_, name)| name);
        (
            name,
            self.check_found(head, found.map(|(endpoint, _)| endpoint)),
        )
    }

    fn check_found(&self, head: &http::Request<()>, endpoint: Option<Endpoint>) -> Result<()> {
        self.access.check_origin(head.headers())?;
        if is_preflight(head) {
            return Ok(());
        }
        let path = head.uri().path();
        let Some(endpoint) = endpoint else {
            let shown: String = path.chars().take(100).collect();
            let message = format!("there is nothing at {shown}; ask for /v1/models to begin with");
            return Err(ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_url"));
        };
        let allowed = methods(endpoint);
        if !allowed.contains(head.method()) {
            let message = format!("{} is not for {path}; use {}", head.method(), allowed[0]);
            return Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message));
        }
        // The page has a field for the key, and nothing that it would protect.
        if !matches!(endpoint, Endpoint::Health | Endpoint::Page) {
            self.access.check_key(head.headers())?;
        }
        Ok(())
    }

    async fn dispatch(&self, head: &http::Request<()>, body: Bytes) -> Result<Response> {
        let path = head.uri().path();
        // What is not in the table was refused before.
        let endpoint = route(path).map_or(Endpoint::Health, |(endpoint, _)| endpoint);
        match endpoint {
            Endpoint::Health => self.health(),
            Endpoint::Models => match path.strip_prefix(MODELS) {
                None => Ok(ok(&models::list(&self.served))),
                Some(name) => {
                    self.served.check_name(Some(name))?;
                    Ok(ok(&models::one(&self.served, name)))
                }
            },
            Endpoint::Completions => self.generate(head, body, completions::prepare).await,
            Endpoint::Chat => self.generate(head, body, chat::prepare).await,
            Endpoint::Messages => self.generate(head, body, messages::prepare).await,
            Endpoint::Embeddings => self.embed(head, body).await,
            Endpoint::Tokenize => self.compute(body, tokens::tokenize).await,
            Endpoint::Detokenize => self.compute(body, tokens::detokenize).await,
            Endpoint::Metrics => Ok(self.metrics_page()),
            Endpoint::Page => match page::find(path) {
                Some(file) => Ok(file.answer(head.headers())),
                None => Err(ApiError::internal(format!("the page has no {path}"))),
            },
            Endpoint::OpenApi => Ok(text(DOCUMENT, "application/json")),
        }
    }

    fn health(&self) -> Result<Response> {
        match self.ending.load(Ordering::Relaxed) {
            false => Ok(ok(&json!({"status": "ok"}))),
            true => Err(ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the server is ending",
            )),
        }
    }

    fn metrics_page(&self) -> Response {
        let store = self.served.model.store_stats();
        let page = self.metrics.text(self.served.name(), store.as_ref());
        text(page, "text/plain; version=0.0.4; charset=utf-8")
    }

    /// Answers from the request alone.
    async fn compute(
        &self,
        body: Bytes,
        work: fn(&[u8], &Served) -> Result<serde_json::Value>,
    ) -> Result<Response> {
        let served = Arc::clone(&self.served);
        let value = blocking(move || work(&body, &served)).await??;
        Ok(ok(&value))
    }

    /// Answers with generated text.
    async fn generate(
        &self,
        head: &http::Request<()>,
        body: Bytes,
        prepare: fn(&[u8], &Served) -> Result<Prepared>,
    ) -> Result<Response> {
        let served = Arc::clone(&self.served);
        let prepared = blocking(move || prepare(&body, &served)).await??;
        let jobs = self.submit(head, prepared.jobs)?;
        let served = Arc::clone(&self.served);
        let growing = Growing::new(served, jobs, prepared.choices, prepared.n_prompt);
        match prepared.streams {
            true => Ok(stream(growing, prepared.voice)),
            false => whole(growing, prepared.voice).await,
        }
    }

    /// Answers with vectors.
    async fn embed(&self, head: &http::Request<()>, body: Bytes) -> Result<Response> {
        let served = Arc::clone(&self.served);
        let asked = blocking(move || embeddings::prepare(&body, &served)).await??;
        let shape = asked.shape();
        let jobs = self.submit(head, asked.jobs)?;
        let value = embeddings::answer(jobs, shape, self.served.name()).await?;
        Ok(ok(&value))
    }

    /// Puts jobs into the queue.
    fn submit(&self, head: &http::Request<()>, jobs: Vec<Job>) -> Result<Jobs> {
        let most = self.scheduler.n_waiting();
        if jobs.len() > most {
            let n = jobs.len();
            let message =
                format!("the request asks for {n} answers, but at most {most} can wait here");
            return Err(ApiError::bad(message));
        }
        let client = self.access.client(head.headers(), address(head));
        Ok(self.scheduler.submit(client, jobs)?)
    }

    /// What every answer has, and a line in the log.
    fn complete(&self, head: &http::Request<()>, name: &'static str, response: &mut Response) {
        let status = response.status();
        self.metrics.answered(name, status.as_u16());
        tracing::info!(
            status = status.as_u16(),
            "{} {}",
            head.method(),
            head.uri().path()
        );
        let endpoint = route(head.uri().path()).map(|(endpoint, _)| endpoint);
        if let (StatusCode::METHOD_NOT_ALLOWED, Some(endpoint)) = (status, endpoint) {
            let allowed = HeaderValue::from_static(match methods(endpoint).len() {
                1 => "POST",
                _ => "GET, HEAD",
            });
            response.headers_mut().insert(ALLOW, allowed);
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
        }
        self.access.share(head.headers().get(ORIGIN), response);
    }
}

/// What a path leads to, and its name in metrics.
fn route(path: &str) -> Option<(Endpoint, &'static str)> {
    if path.starts_with(MODELS) {
        return Some((Endpoint::Models, "models"));
    }
    if page::find(path).is_some() {
        return Some((Endpoint::Page, "page"));
    }
    let found = ROUTES.iter().find(|route| route.path == path)?;
    Some((found.endpoint, found.name))
}

/// The methods of an endpoint.
fn methods(endpoint: Endpoint) -> &'static [Method] {
    let route = ROUTES.iter().find(|route| route.endpoint == endpoint);
    match route.map(|route| route.method) {
        Some(Verb::Post) => &POST,
        _ => &GET,
    }
}

fn is_preflight(head: &http::Request<()>) -> bool {
    let asks = |headers: &HeaderMap| headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    *head.method() == Method::OPTIONS && asks(head.headers())
}

/// Where a request is from.
fn address(head: &http::Request<()>) -> std::net::IpAddr {
    let unknown = std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    head.extensions()
        .get::<Peer>()
        .map_or(unknown, |peer| peer.0.ip())
}

/// The answer to a request that failed; what is broken here is logged.
fn told(error: &ApiError, head: &http::Request<()>) -> Response {
    if error.status() == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!("{}", error.json());
    }
    error.response(is_anthropic(head))
}

/// Whether errors are told in the words of Anthropic's interface.
fn is_anthropic(head: &http::Request<()>) -> bool {
    route(head.uri().path()).is_some_and(|(endpoint, _)| endpoint == Endpoint::Messages)
}

fn text(text: impl Into<Bytes>, kind: &'static str) -> Response {
    let mut response = Response::new(Body::Full(text.into()));
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn ok(value: &serde_json::Value) -> Response {
    json_response(StatusCode::OK, value)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn the_document_has_every_path_and_no_other() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let documented = document["paths"].as_object().unwrap();
        for route in ROUTES {
            let verb = match route.method {
                Verb::Get => "get",
                Verb::Post => "post",
            };
            let has = documented
                .get(route.path)
                .is_some_and(|path| path.get(verb).is_some());
            assert!(has, "{verb} {}", route.path);
        }
        assert_eq!(
            documented.len(),
            ROUTES.len() + 1,
            "and the path of one model"
        );
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
