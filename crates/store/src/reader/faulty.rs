//! A reader that fails on purpose: for the tests of everything that reads, here and in other crates.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Completion, Reader, Request};

/// What bytes look like that nobody may use.
const SCRIBBLE: u8 = 0xa5;

/// Which requests a fault strikes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// The one with this number, counted from 0 in the order of submission.
    Nth(u64),
    /// Every one whose number is a multiple of this.
    Every(u64),
    /// Every one that wants a byte of this range of its file.
    Touches(Range<u64>),
    /// Every one.
    Always,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The read ends with this error number of the system, such as `libc::EIO`; the memory holds rubbish.
    Errno(i32),
    /// The file seems to end after so many bytes of the request; the memory holds rubbish behind them.
    EndsAfter(usize),
    /// The completion is held back for so long after its submission. No thread sleeps for it.
    Delay(Duration),
    /// The completion is held back until so many others have been handed out, or there are no others.
    Overtaken(u64),
    /// The request is not begun at all; it ends as an invalid one.
    Refused,
}

/// Wraps a reader and lets the requests fail that a script names. All faults that strike a request strike together.
///
/// For tests. It reads what it is asked to, so that times are those of the reader inside.
#[derive(Debug)]
pub struct FaultyReader<R> {
    inner: R,
    script: Vec<(When, Fault)>,
    /// By the number of the request, which is its tag for the reader inside.
    pending: HashMap<u64, Pending>,
    /// What is held back, in the order of arrival.
    held: Vec<(Pending, Completion)>,
    n_submitted: u64,
    n_handed_out: u64,
}

/// What is known of a request on its way.
#[derive(Debug)]
struct Pending {
    tag: u64,
    faults: Vec<Fault>,
    since: Instant,
    /// [`FaultyReader::n_handed_out`] when it ended.
    handed_out: u64,
}

impl Pending {
    /// When it may be handed out, as far as time decides.
    fn ready_at(&self) -> Instant {
        let delays = self.faults.iter().map(|fault| match fault {
            Fault::Delay(delay) => *delay,
            _ => Duration::ZERO,
        });
        self.since + delays.max().unwrap_or_default()
    }

    /// How many are to be handed out before it, in all.
    fn ready_after(&self) -> u64 {
        let others = self.faults.iter().map(|fault| match fault {
            Fault::Overtaken(n) => *n,
            _ => 0,
        });
        self.handed_out + others.max().unwrap_or_default()
    }

    fn refused(&self) -> bool {
        self.faults.contains(&Fault::Refused)
    }

    /// Does to a completion what the faults say.
    fn spoil(&self, completion: &mut Completion) {
        for fault in &self.faults {
            match *fault {
                Fault::Errno(number) => {
                    completion.memory.fill(SCRIBBLE);
                    completion.result = Err(io::Error::from_raw_os_error(number));
                }
                Fault::EndsAfter(n_bytes) => {
                    if let Ok(n_read) = &mut completion.result {
                        *n_read = n_bytes.min(*n_read);
                        completion.memory[*n_read..].fill(SCRIBBLE);
                    }
                }
                Fault::Delay(_) | Fault::Overtaken(_) | Fault::Refused => {}
            }
        }
    }
}

impl<R: Reader> FaultyReader<R> {
    /// Wraps `inner`, without any fault yet.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            script: Vec::new(),
            pending: HashMap::new(),
            held: Vec::new(),
            n_submitted: 0,
            n_handed_out: 0,
        }
    }

    /// Adds a line to the script.
    #[must_use]
    pub fn with(mut self, when: When, fault: Fault) -> Self {
        self.script.push((when, fault));
        self
    }

    fn faults(&self, request: &Request) -> Vec<Fault> {
        let wanted = request.offset..request.offset + request.memory.len() as u64;
        let strikes = |when: &When| match when {
            When::Nth(number) => self.n_submitted == *number,
            When::Every(step) => self.n_submitted.is_multiple_of(*step),
            When::Touches(range) => range.start < wanted.end && wanted.start < range.end,
            When::Always => true,
        };
        let script = self.script.iter();
        script
            .filter(|(when, _)| strikes(when))
            .map(|(_, fault)| *fault)
            .collect()
    }

    /// The first of those held back that may go.
    fn release(&mut self) -> Option<Completion> {
        let now = Instant::now();
        let is_alone = self.inner.n_pending() == 0;
        let ready = |(pending, _): &(Pending, Completion)| {
            now >= pending.ready_at() && self.n_handed_out >= pending.ready_after()
        };
        let at = self.held.iter().position(ready).or_else(|| {
            // Nothing is left that could overtake them.
            let rest = || {
                self.held
                    .iter()
                    .all(|(pending, _)| now >= pending.ready_at())
            };
            (is_alone && !self.held.is_empty() && rest()).then_some(0)
        })?;
        self.n_handed_out += 1;
        Some(self.held.remove(at).1)
    }

    /// Takes a completion of the reader inside.
    fn arrived(&mut self, mut completion: Completion) {
        let Some(mut pending) = self.pending.remove(&completion.tag) else {
            return;
        };
        completion.tag = pending.tag;
        pending.handed_out = self.n_handed_out;
        pending.spoil(&mut completion);
        self.held.push((pending, completion));
    }
}

impl<R: Reader> Reader for FaultyReader<R> {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn submit(&mut self, mut request: Request) {
        let pending = Pending {
            tag: request.tag,
            faults: self.faults(&request),
            since: Instant::now(),
            handed_out: self.n_handed_out,
        };
        let number = self.n_submitted;
        self.n_submitted += 1;
        if pending.refused() {
            request.memory.fill(SCRIBBLE);
            let refused = Completion {
                tag: request.tag,
                memory: request.memory,
                result: Err(io::ErrorKind::InvalidInput.into()),
            };
            self.held.push((pending, refused));
            return;
        }
        self.pending.insert(number, pending);
        request.tag = number;
        self.inner.submit(request);
    }

    fn next(&mut self, timeout: Duration) -> Option<Completion> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            while let Some(completion) = self.inner.next(Duration::ZERO) {
                self.arrived(completion);
            }
            if let Some(completion) = self.release() {
                return Some(completion);
            }
            let now = Instant::now();
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
            if left.is_zero() || self.n_pending() == 0 {
                return None;
            }
            let delayed = self.held.iter().map(|(pending, _)| pending.ready_at());
            let delayed = delayed.filter(|at| *at > now).min();
            let wait = delayed.map_or(left, |at| left.min(at - now));
            match self.inner.n_pending() {
                0 => std::thread::sleep(wait),
                _ => {
                    if let Some(completion) = self.inner.next(wait) {
                        self.arrived(completion);
                    }
                }
            }
        }
    }

    fn n_pending(&self) -> usize {
        self.pending.len() + self.held.len()
    }
}
