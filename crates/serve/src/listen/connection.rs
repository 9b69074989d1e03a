//! One connection, from its first request to its end in good order.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1::{Builder, Parts};
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::paced::{Paced, Turn, Turns};
use super::{HttpLimits, Peer};

/// Fields of a head.
const MOST_FIELDS: usize = 64;
/// Bytes of a head.
const MOST_HEAD: usize = 32 << 10;
/// Bytes that wait to be read or written.
const MOST_BUFFERED: usize = 64 << 10;
/// How long a client may take to end a connection after the last answer.
const LINGER: Duration = Duration::from_secs(1);

/// Serves a connection until either side ends it. `slow` is what a client hears whose head takes too long.
pub(super) async fn serve(
    stream: TcpStream,
    peer: Peer,
    router: Router,
    slow: fn() -> String,
    limits: HttpLimits,
    mut ending: watch::Receiver<bool>,
) {
    let turns = Turns::default();
    let io = TokioIo::new(Paced::new(stream, turns.clone(), limits));
    let app = TowerToHyperService::new(router);
    let between = turns.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let turn = turns.begin();
        request.extensions_mut().insert(peer);
        let answer = app.call(request);
        Box::pin(async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(response.map(|body| Answer { body, _turn: turn }))
        })
    });
    let mut connection = Builder::new()
        .max_headers(MOST_FIELDS)
        .max_header_size(MOST_HEAD)
        .max_buf_size(MOST_BUFFERED)
        .serve_connection(io, service);
    let mut is_ending = false;
    loop {
        tokio::select! {
            // Its errors are those of a client: `hyper` has told it what can be told, and nobody else is concerned.
            _ = poll_fn(|context| connection.poll_without_shutdown(context)) => break,
            _ = ending.wait_for(|ending| *ending), if !is_ending => {
                is_ending = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            // Half a head is not waited for.
            () = tokio::time::sleep(LINGER), if is_ending && between.is_between() => break,
        }
    }
    let Parts { io, .. } = connection.into_parts();
    farewell(io.into_inner(), slow).await;
}

/// Says why, where nothing was said yet, and waits for the client to have read it: systems that are closed while something
/// is unread take back what they have sent.
async fn farewell(mut io: Paced, slow: fn() -> String) {
    if io.is_late() {
        let body = slow();
        let answer = format!(
            "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        // Whether it is heard or not.
        let _ = io.write_all(answer.as_bytes()).await;
    }
    let _ = io.shutdown().await;
    let rest = async {
        let mut nowhere = [0; 4096];
        while let Ok(1..) = io.read(&mut nowhere).await {}
    };
    let _ = timeout(LINGER, rest).await;
}

/// The body of an answer. When it is dropped, the connection waits for the next request.
struct Answer {
    body: Body,
    _turn: Turn,
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
