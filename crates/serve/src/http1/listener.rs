//! Accepting connections, as many at a time as may be, until the server ends.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Body, HttpLimits, Service, connection};

/// How long a client that is turned away may take to hear of it.
const TURN_AWAY: Duration = Duration::from_secs(2);
/// Between two tries when the system has no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until `ending` says so, and then those that are answered. Dropping it drops all of them.
pub(crate) async fn accept<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: HttpLimits,
    mut ending: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
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
        let (service, ending) = (Arc::clone(&service), ending.clone());
        match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => {
                connections.spawn(async move {
                    connection::serve(stream, peer, service, limits, ending).await;
                    drop(permit);
                });
            }
            Err(_) => {
                connections.spawn(async move { turn_away(stream, &*service).await });
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn turn_away<S: Service>(mut stream: TcpStream, service: &S) {
    let message = "the server has as many connections as it may have; try again later".to_owned();
    let response = service.refusal(StatusCode::SERVICE_UNAVAILABLE, message);
    let Body::Full(body) = response.body() else {
        return;
    };
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let text = [head.as_bytes(), body].concat();
    let farewell = async {
        stream.write_all(&text).await?;
        stream.shutdown().await?;
        // Reads what was asked: the system would take the answer back otherwise.
        let mut nowhere = [0; 1024];
        while stream.read(&mut nowhere).await? > 0 {}
        std::io::Result::Ok(())
    };
    // Whether it was heard or not.
    let _ = timeout(TURN_AWAY, farewell).await;
}
