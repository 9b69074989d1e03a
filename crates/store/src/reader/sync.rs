//! Reading at the moment at which a result is asked for: nothing in the background, everything in order.

use std::collections::VecDeque;
use std::time::Duration;

use super::whole::read_whole;
use super::{Completion, Reader, Request};

/// Reads in [`Reader::next`], on the caller's thread. For comparison, for tests, and where no thread can be had.
///
/// Its `next` reads and so takes as long as that takes, whatever the timeout.
#[derive(Debug, Default)]
pub struct SyncReader {
    requests: VecDeque<Request>,
}

impl Reader for SyncReader {
    fn name(&self) -> &'static str {
        "sync"
    }

    fn submit(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    fn next(&mut self, _timeout: Duration) -> Option<Completion> {
        let mut request = self.requests.pop_front()?;
        let result = read_whole(&request.file, request.offset, &mut request.memory);
        Some(Completion {
            tag: request.tag,
            memory: request.memory,
            result,
        })
    }

    fn n_pending(&self) -> usize {
        self.requests.len()
    }
}
