//! A connection's bytes, with deadlines: for the first byte of a request, for the rest of its head, and for the client to
//! take what is sent. Bodies have theirs where they are read, in `document.rs`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use super::HttpLimits;

/// Whether a connection's request is answered now, or it waits for the next one.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Turns {
    /// A request's head is complete. Its turn ends when what is returned is dropped.
    pub(super) fn begin(&self) -> Turn {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        Turn(Self::clone(self))
    }

    /// No request is answered.
    pub(super) fn is_between(&self) -> bool {
        self.begun() == self.0.ended.load(Ordering::Relaxed)
    }

    fn begun(&self) -> usize {
        self.0.begun.load(Ordering::Relaxed)
    }
}

/// From the end of a request's head to the end of its answer.
#[derive(Debug)]
pub(super) struct Turn(Turns);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection that ends when its deadlines pass.
pub(super) struct Paced {
    stream: TcpStream,
    turns: Turns,
    limits: HttpLimits,
    /// Requests that had begun when something was read last.
    seen: usize,
    /// The head of the next one has begun.
    in_head: bool,
    is_late: bool,
    reading: Deadline,
    writing: Deadline,
}

/// Set while something is waited for.
#[derive(Default)]
struct Deadline(Option<Pin<Box<Sleep>>>);

impl Deadline {
    /// Ready when `limit` has passed since the first call after [`Self::clear`].
    fn poll(&mut self, limit: Duration, context: &mut Context<'_>) -> Poll<()> {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep(limit)));
        timer.as_mut().poll(context)
    }

    fn clear(&mut self) {
        self.0 = None;
    }
}

impl Paced {
    pub(super) fn new(stream: TcpStream, turns: Turns, limits: HttpLimits) -> Self {
        Self {
            stream,
            turns,
            limits,
            seen: 0,
            in_head: false,
            is_late: false,
            reading: Deadline::default(),
            writing: Deadline::default(),
        }
    }

    /// The head of a request took too long, and nobody has been told yet.
    pub(super) fn is_late(&self) -> bool {
        self.is_late
    }

    /// What writing came to, or an error when the client takes nothing for too long.
    fn written<T>(
        &mut self,
        polled: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.writing.clear();
            return polled;
        }
        ready!(self.writing.poll(self.limits.write_time, context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Paced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let begun = self.turns.begun();
        if begun != self.seen {
            self.seen = begun;
            self.in_head = false;
            self.reading.clear();
        }
        let n_before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if !self.turns.is_between() || self.is_late {
            return polled;
        }
        if polled.is_ready() {
            if !self.in_head && buffer.filled().len() > n_before {
                self.in_head = true;
                self.reading.clear();
            }
            return polled;
        }
        let limit = match self.in_head {
            true => self.limits.head_time,
            false => self.limits.idle_time,
        };
        ready!(self.reading.poll(limit, context));
        match self.in_head {
            true => {
                self.is_late = true;
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            // As if the client had closed it.
            false => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Paced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(polled, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.written(polled, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
