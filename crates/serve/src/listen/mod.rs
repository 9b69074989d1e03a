//! Connections: as many at a time as may be, each served by `hyper` with a deadline on everything that it may keep
//! others waiting for, until the server ends.

mod connection;
mod paced;

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How long a client that is turned away may take to ask and to hear of it.
const TURN_AWAY: Duration = Duration::from_secs(2);
/// Between two tries when the system has no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Where a request came from; an extension of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

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

/// Who answers.
#[derive(Clone)]
pub(crate) struct Answers {
    /// Requests.
    pub(crate) app: Router,
    /// Requests of connections that are one too many.
    pub(crate) full: Router,
    /// Heads that take too long: the body of a 408.
    pub(crate) slow: fn() -> String,
}

/// Serves connections until `ending` says so, and then those that are answered. Dropping it drops all of them.
pub(crate) async fn accept(
    listener: TcpListener,
    answers: Answers,
    limits: HttpLimits,
    mut ending: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let hasty = HttpLimits {
        head_time: TURN_AWAY,
        idle_time: TURN_AWAY,
        write_time: TURN_AWAY,
        ..limits
    };
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|ending| *ending) => break,
        };
        // Forgets the connections that have ended.
        while connections.try_join_next().is_some() {}
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Tokens are small and should not wait for each other.
        let _ = stream.set_nodelay(true);
        let permit = Arc::clone(&permits).try_acquire_owned().ok();
        let (router, limits) = match &permit {
            Some(_) => (answers.app.clone(), limits),
            None => (answers.full.clone(), hasty),
        };
        let (slow, ending) = (answers.slow, ending.clone());
        connections.spawn(async move {
            connection::serve(stream, Peer(peer), router, slow, limits, ending).await;
            drop(permit);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}
