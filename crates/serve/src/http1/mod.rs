//! HTTP/1.1: what a server of JSON needs of it, with a limit on everything that a client may send or wait for.
//!
//! A connection carries one request after the other. Heads are parsed by `httparse`; bodies are read whole, by length or
//! in chunks, before a request is answered, because every body here is a JSON document. Answers are whole or stream. A client
//! that goes away while its answer is made ends the making of it: the future of the answer is dropped.

mod connection;
mod listener;
mod reader;
mod request;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::sync::mpsc;

pub(crate) use listener::accept;

/// A request with its whole body, and who sent it.
pub(crate) type Request = http::Request<Bytes>;

/// An answer.
pub(crate) type Response = http::Response<Body>;

/// Where a request came from; an extension of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// What is sent after the head.
#[derive(Debug)]
pub(crate) enum Body {
    /// All of it.
    Full(Bytes),
    /// Pieces until the sender is dropped.
    Stream(mpsc::Receiver<Bytes>),
}

/// What answers requests.
pub(crate) trait Service: Send + Sync + 'static {
    /// Decides from the head whether the body is worth reading; the most bytes that it may have, or a refusal.
    fn admit(&self, head: &http::Request<()>) -> Result<usize, Box<Response>>;

    /// Answers. Dropped when the client goes away.
    fn answer(self: Arc<Self>, request: Request) -> impl Future<Output = Response> + Send;

    /// The answer to what is no proper request.
    fn refusal(&self, status: StatusCode, message: String) -> Response;
}

/// How long clients may take, and how much of everything they may send.
#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Connections at a time; further ones are told to come back.
    pub connections: usize,
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// From the first byte of a head to its end.
    pub head_time: Duration,
    /// For a body, beside the time that it takes at `body_rate`.
    pub body_time: Duration,
    /// Bytes per second that a body arrives at, at least.
    pub body_rate: usize,
    /// Between two requests of a connection.
    pub idle_time: Duration,
    /// For a piece of an answer to be taken by the client.
    pub write_time: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            body_bytes: 8 << 20,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(15),
            body_rate: 32 << 10,
            idle_time: Duration::from_secs(75),
            write_time: Duration::from_secs(30),
        }
    }
}
