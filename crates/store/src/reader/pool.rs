//! The reference reader: threads that each read one request after the other with plain system calls.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::whole::read_whole;
use super::{Completion, Reader, Request};

/// Reads on threads, which sleep while nothing is wanted. Works everywhere.
///
/// Dropping it forgets what has not been begun, and waits for what has.
#[derive(Debug)]
pub struct PoolReader {
    queue: Arc<Queue>,
    done: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
    n_pending: usize,
}

/// What the threads have in common.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    requests: VecDeque<Request>,
    is_closed: bool,
}

impl PoolReader {
    /// A reader of at most `n_lanes` requests at a time, at least one.
    ///
    /// # Errors
    ///
    /// If the system grants no further thread.
    pub fn new(n_lanes: usize) -> io::Result<Self> {
        let (sender, done) = channel();
        let mut pool = Self {
            queue: Arc::default(),
            done,
            threads: Vec::new(),
            n_pending: 0,
        };
        for lane in 0..n_lanes.max(1) {
            let (queue, sender) = (Arc::clone(&pool.queue), sender.clone());
            let thread = Builder::new().name(format!("cadre-read-{lane}"));
            pool.threads
                .push(thread.spawn(move || queue.serve(&sender))?);
        }
        Ok(pool)
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads until the queue is closed, or nobody takes the results.
    fn serve(&self, sender: &Sender<Completion>) {
        while let Some(mut request) = self.take() {
            let result = read_whole(&request.file, request.offset, &mut request.memory);
            let completion = Completion {
                tag: request.tag,
                memory: request.memory,
                result,
            };
            if sender.send(completion).is_err() {
                return;
            }
        }
    }

    /// The first request; waits for one. `None` when the queue is closed.
    fn take(&self) -> Option<Request> {
        let idle = |state: &mut State| state.requests.is_empty() && !state.is_closed;
        let waited = self.changed.wait_while(self.lock(), idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        match state.is_closed {
            true => None,
            false => state.requests.pop_front(),
        }
    }
}

impl Reader for PoolReader {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn submit(&mut self, request: Request) {
        self.n_pending += 1;
        self.queue.lock().requests.push_back(request);
        self.queue.changed.notify_one();
    }

    fn next(&mut self, timeout: Duration) -> Option<Completion> {
        if self.n_pending == 0 {
            return None;
        }
        let completion = match timeout.is_zero() {
            true => self.done.try_recv().ok(),
            false => self.done.recv_timeout(timeout).ok(),
        }?;
        self.n_pending -= 1;
        Some(completion)
    }

    fn n_pending(&self) -> usize {
        self.n_pending
    }
}

impl Drop for PoolReader {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.is_closed = true;
        state.requests.clear();
        drop(state);
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked holds nothing that is missed.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::ALIGN;
    use crate::reader::testing::{file, request};

    #[test]
    fn one_lane_keeps_the_order_and_gives_memory_back() {
        let file = file(8 * ALIGN + 5);
        let mut pool = PoolReader::new(1).unwrap();
        assert!(pool.next(Duration::MAX).is_none(), "nothing was submitted");
        (0..10).for_each(|tag| pool.submit(request(&file, tag)));
        assert_eq!(pool.n_pending(), 10);
        for tag in 0..10 {
            let done = pool.next(Duration::MAX).unwrap();
            let n_bytes = [ALIGN, 5, 0][(tag as usize).saturating_sub(7).min(2)];
            assert_eq!((done.tag, done.result.unwrap()), (tag, n_bytes));
            assert!(done.memory[..n_bytes].iter().all(|&byte| byte == tag as u8));
            assert_eq!(done.memory.len(), ALIGN);
        }
        assert!(pool.next(Duration::MAX).is_none());
    }

    #[test]
    fn dropping_does_not_wait_for_what_has_not_begun() {
        let file = file(8 * ALIGN);
        let mut pool = PoolReader::new(2).unwrap();
        (0..2000).for_each(|at| pool.submit(request(&file, at % 8)));
        assert!(pool.next(Duration::MAX).is_some());
        drop(pool);
        assert_eq!(Arc::strong_count(&file), 1, "no thread holds the file");
    }

    #[cfg(unix)]
    #[test]
    fn errors_come_with_the_memory() {
        let folder = Arc::new(std::fs::File::open(std::env::temp_dir()).unwrap());
        let mut pool = PoolReader::new(1).unwrap();
        pool.submit(request(&folder, 3));
        let done = pool.next(Duration::MAX).unwrap();
        assert_eq!((done.tag, done.memory.len()), (3, ALIGN));
        assert!(done.result.is_err());
    }
}
