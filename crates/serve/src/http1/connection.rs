//! One connection: requests one after the other, each read, answered and written.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderValue, Method, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::reader::{Pace, ReadError, Reader};
use super::request::{self, Head, Refused};
use super::{Body, HttpLimits, Peer, Response, Service};

/// How long a client may take to end a connection after the last answer.
const LINGER: Duration = Duration::from_secs(1);

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Next,
    Close,
}

/// Serves a connection until either side ends it.
pub(crate) async fn serve<S: Service>(
    mut stream: TcpStream,
    peer: SocketAddr,
    service: Arc<S>,
    limits: HttpLimits,
    mut ending: watch::Receiver<bool>,
) {
    let (read, write) = stream.split();
    let mut connection = Connection {
        reader: Reader::new(read),
        writer: write,
        limits,
        peer,
    };
    loop {
        let head = tokio::select! {
            head = connection.head() => head,
            // Between two requests nobody is kept waiting.
            _ = ending.wait_for(|ending| *ending) => return,
        };
        let then = match head {
            Ok(Some(head)) => connection.exchange(&service, head).await,
            Ok(None) => return,
            Err(refused) => connection.refuse(&*service, refused).await,
        };
        if then == Then::Close || *ending.borrow() {
            break;
        }
    }
    // Nobody is left to hear of a failure.
    let _ = connection.writer.shutdown().await;
    connection.reader.linger(LINGER).await;
}

struct Connection<R, W> {
    reader: Reader<R>,
    writer: W,
    limits: HttpLimits,
    peer: SocketAddr,
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Connection<R, W> {
    /// The next head; `None` when the client has no further request.
    async fn head(&mut self) -> Result<Option<Head>, Refused> {
        let mut deadline = Instant::now() + self.limits.idle_time;
        let mut begun = false;
        loop {
            if !begun && !self.reader.buffered().is_empty() {
                begun = true;
                deadline = Instant::now() + self.limits.head_time;
            }
            if let Some((head, n_bytes)) = request::parse(self.reader.buffered())? {
                self.reader.skip(n_bytes);
                return Ok(Some(head));
            }
            match self.reader.fill(deadline).await {
                Ok(()) => {}
                Err(ReadError::Slow) if begun => {
                    return Err(Refused {
                        status: StatusCode::REQUEST_TIMEOUT,
                        message: "the request's head arrives too slowly".to_owned(),
                    });
                }
                Err(_) => return Ok(None),
            }
        }
    }

    /// Reads the body that belongs to `head`, and answers.
    async fn exchange<S: Service>(&mut self, service: &Arc<S>, head: Head) -> Then {
        let most = match service.admit(&head.request) {
            Ok(most) => most.min(self.limits.body_bytes),
            Err(response) => {
                // The body is not read, so nothing can follow it.
                let is_head = head.request.method() == Method::HEAD;
                let _ = self.write(*response, is_head, Then::Close).await;
                return Then::Close;
            }
        };
        if head.waits && self.send(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_err() {
            return Then::Close;
        }
        let pace = Pace::new(self.limits.body_time, self.limits.body_rate);
        let body = match request::body(&mut self.reader, head.framing, most, pace).await {
            Ok(body) => body,
            Err(refused) => return self.refuse(&**service, refused).await,
        };
        let is_head = head.request.method() == Method::HEAD;
        let mut request = head.request.map(|()| body);
        request.extensions_mut().insert(Peer(self.peer));
        let response = tokio::select! {
            response = Arc::clone(service).answer(request) => response,
            () = self.reader.gone() => return Then::Close,
        };
        let then = if head.stays { Then::Next } else { Then::Close };
        match self.write(response, is_head, then).await {
            Ok(()) => then,
            Err(()) => Then::Close,
        }
    }

    async fn refuse<S: Service>(&mut self, service: &S, refused: Refused) -> Then {
        let response = service.refusal(refused.status, refused.message);
        let _ = self.write(response, false, Then::Close).await;
        Then::Close
    }

    async fn write(&mut self, response: Response, is_head: bool, then: Then) -> Result<(), ()> {
        let (mut parts, body) = response.into_parts();
        let headers = &mut parts.headers;
        if then == Then::Close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        match &body {
            Body::Full(_) if parts.status == StatusCode::NO_CONTENT => {}
            Body::Full(bytes) => {
                headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            }
            Body::Stream(_) => {
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
        let mut out = BytesMut::with_capacity(512);
        let status = parts.status;
        out.put_slice(format!("HTTP/1.1 {} ", status.as_u16()).as_bytes());
        out.put_slice(status.canonical_reason().unwrap_or("").as_bytes());
        out.put_slice(b"\r\n");
        for (name, value) in &parts.headers {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        out.put_slice(b"\r\n");
        match body {
            Body::Full(bytes) => {
                if !is_head {
                    out.put_slice(&bytes);
                }
                self.send(&out).await
            }
            Body::Stream(pieces) => {
                self.send(&out).await?;
                if is_head {
                    return Ok(());
                }
                self.stream(pieces).await
            }
        }
    }

    /// Writes pieces as chunks, until there are no more or the client has gone.
    async fn stream(&mut self, mut pieces: mpsc::Receiver<Bytes>) -> Result<(), ()> {
        let mut out = BytesMut::new();
        loop {
            let piece = tokio::select! {
                piece = pieces.recv() => piece,
                () = self.reader.gone() => return Err(()),
            };
            let Some(mut piece) = piece else {
                return self.send(b"0\r\n\r\n").await;
            };
            out.clear();
            // What is ready already goes out together.
            loop {
                if !piece.is_empty() {
                    out.put_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                    out.put_slice(&piece);
                    out.put_slice(b"\r\n");
                }
                match pieces.try_recv() {
                    Ok(next) => piece = next,
                    Err(_) => break,
                }
            }
            self.send(&out).await?;
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let written = timeout(self.limits.write_time, self.writer.write_all(bytes)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(()),
        }
    }
}
