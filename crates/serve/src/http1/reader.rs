//! Reading from a connection: a buffer, deadlines, lines, and noticing that the other side has gone.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

/// Bytes of requests that a client may send before the answer to the first is complete; the rest waits in its own system.
const MOST_AHEAD: usize = 64 << 10;

/// A connection's incoming half.
pub(crate) struct Reader<R> {
    inner: R,
    /// What has arrived and was not taken.
    buffer: Vec<u8>,
}

/// Why reading ended.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The other side closed the connection.
    Gone,
    /// It took too long.
    Slow,
    /// What must be short is long.
    Long,
    /// The connection broke.
    Io,
}

impl From<io::Error> for ReadError {
    fn from(_: io::Error) -> Self {
        // Why it broke changes nothing: there is nobody left to tell.
        Self::Io
    }
}

/// When a body has to be complete: a fixed time, and what its bytes take at the lowest rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    start: Instant,
    fixed: Duration,
    rate: usize,
    n_bytes: usize,
}

impl Pace {
    pub(crate) fn new(fixed: Duration, rate: usize) -> Self {
        Self {
            start: Instant::now(),
            fixed,
            rate: rate.max(1),
            n_bytes: 0,
        }
    }

    fn deadline(&self) -> Instant {
        let earned = self.n_bytes as f64 / self.rate as f64;
        self.start + self.fixed + Duration::from_secs_f64(earned)
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: Vec::with_capacity(4096),
        }
    }

    /// What has arrived and was not taken.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Takes the first `n` bytes of the buffer, which has them.
    pub(crate) fn skip(&mut self, n: usize) {
        self.buffer.drain(..n);
    }

    /// Waits for more bytes. Nothing is lost when it is dropped while it waits.
    pub(crate) async fn fill(&mut self, deadline: Instant) -> Result<(), ReadError> {
        let read = timeout_at(deadline, self.inner.read_buf(&mut self.buffer));
        match read.await {
            Err(_) => Err(ReadError::Slow),
            Ok(Ok(0)) => Err(ReadError::Gone),
            Ok(result) => result.map(drop).map_err(ReadError::from),
        }
    }

    /// Waits until the other side has gone. What it sends meanwhile is kept, up to a limit.
    pub(crate) async fn gone(&mut self) {
        loop {
            if self.buffer.len() >= MOST_AHEAD {
                // Whoever sends so much without waiting is noticed when the answer cannot be written.
                std::future::pending::<()>().await;
            }
            match self.inner.read_buf(&mut self.buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Throws away what the other side sends until it is done: systems that are closed while something is unread take back
    /// what they have sent.
    pub(crate) async fn linger(&mut self, most: Duration) {
        let deadline = Instant::now() + most;
        loop {
            self.buffer.clear();
            if self.fill(deadline).await.is_err() {
                return;
            }
        }
    }

    /// Takes exactly `n` bytes and appends them to `body`.
    pub(crate) async fn take(
        &mut self,
        n: usize,
        body: &mut Vec<u8>,
        pace: &mut Pace,
    ) -> Result<(), ReadError> {
        let mut left = n;
        loop {
            let ready = left.min(self.buffer.len());
            body.extend_from_slice(&self.buffer[..ready]);
            self.buffer.drain(..ready);
            pace.n_bytes += ready;
            left -= ready;
            if left == 0 {
                return Ok(());
            }
            self.fill(pace.deadline()).await?;
        }
    }

    /// Takes a line of at most `most` bytes without its end.
    pub(crate) async fn line(
        &mut self,
        most: usize,
        pace: &mut Pace,
    ) -> Result<Vec<u8>, ReadError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(line);
            }
            if self.buffer.len() > most {
                return Err(ReadError::Long);
            }
            self.fill(pace.deadline()).await?;
        }
    }
}
