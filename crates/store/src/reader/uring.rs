//! Reading through io_uring: the kernel reads in the background without a thread of ours.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::whole::{Progress, read_rest, read_whole};
use super::{Completion, Reader, Request};

/// Bytes per call: lengths are 32 bits there, and the rest is asked for like that of any short read.
const MOST: usize = 1 << 30;

/// The longest that one call waits; the caller's time is kept by a loop around it.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How long dropping waits for a disk that does not answer, before it leaks the memory instead of freeing it.
const LAST_WAIT: Duration = Duration::from_secs(60);

/// Reads with io_uring: one ring, no thread, results taken in [`Reader::next`].
///
/// Dropping it forgets what has not been begun, and waits for what has.
pub struct UringReader {
    ring: IoUring,
    /// What the kernel has, by the number that it gives back. It writes into their memory: they stay here until it says
    /// that it is done.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Slots that are in the ring and that the kernel has not taken, in order.
    unsent: VecDeque<usize>,
    /// What waits for a slot.
    queue: VecDeque<Request>,
    finished: VecDeque<Completion>,
    /// The kernel has refused to go on: everything that it does not have yet is read by plain calls.
    is_broken: bool,
}

#[derive(Debug)]
struct Slot {
    request: Request,
    progress: Progress,
}

impl UringReader {
    /// A reader that gives the kernel up to `depth` requests at a time, at least one.
    ///
    /// # Errors
    ///
    /// If the kernel has no io_uring, forbids it, or has one too old (before Linux 5.11).
    pub fn new(depth: usize) -> io::Result<Self> {
        let depth = depth.clamp(1, 1024);
        let ring: IoUring = IoUring::builder().dontfork().build(depth as u32)?;
        let params = ring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            let old = "this kernel's io_uring cannot wait for a limited time (Linux 5.11 can)";
            return Err(io::Error::new(io::ErrorKind::Unsupported, old));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            let lacks = "this kernel's io_uring does not read files";
            return Err(io::Error::new(io::ErrorKind::Unsupported, lacks));
        }
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            unsent: VecDeque::new(),
            queue: VecDeque::new(),
            finished: VecDeque::new(),
            is_broken: false,
        })
    }

    /// Moves what waits into free slots, and tells the kernel.
    fn feed(&mut self) {
        while !self.is_broken && !self.free.is_empty() {
            let Some(request) = self.queue.pop_front() else {
                break;
            };
            if request.memory.is_empty() {
                self.finished.push_back(completed(request, Ok(0)));
                continue;
            }
            let slot = Slot {
                request,
                progress: Progress::default(),
            };
            if let Some(index) = self.free.pop() {
                self.push(index, slot);
            }
        }
        // The kernel stops taking entries at one that it refuses; the others are still wanted.
        while !self.is_broken && !self.unsent.is_empty() {
            let n_before = self.unsent.len();
            self.enter(None);
            if self.unsent.len() == n_before {
                break;
            }
        }
    }

    /// Puts the next call of a slot into the ring.
    fn push(&mut self, index: usize, mut slot: Slot) {
        let (request, from) = (&mut slot.request, slot.progress.from);
        let memory = &mut request.memory[from..];
        let n_bytes = memory.len().min(MOST) as u32;
        let fd = Fd(request.file.as_raw_fd());
        let entry = opcode::Read::new(fd, memory.as_mut_ptr(), n_bytes)
            .offset(request.offset + from as u64)
            .build()
            .user_data(index as u64);
        self.slots[index] = Some(slot);
        // SAFETY: the memory and the file belong to the slot, which is neither touched nor dropped before the completion of
        // this entry has been seen: `reap` alone takes it out, or `break_down`, where the kernel has not got it and
        // never will, and dropping the reader waits or leaks. Moving the slot does not move the memory behind it.
        #[expect(unsafe_code, reason = "the kernel is given an address")]
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has an entry for every slot");
        self.unsent.push_back(index);
    }

    /// Tells the kernel of what is in the ring, and waits for a completion if `wait` says so.
    fn enter(&mut self, wait: Option<Duration>) {
        let result = match wait {
            None => self.ring.submit(),
            Some(wait) => {
                let timespec = Timespec::from(wait.min(LONGEST_WAIT));
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        let n_left = self.ring.submission().len();
        while self.unsent.len() > n_left {
            self.unsent.pop_front();
        }
        let Err(error) = result else {
            return;
        };
        match error.raw_os_error() {
            Some(libc::EINTR | libc::ETIME) => {}
            // Short of memory; what is in the ring stays there for the next call.
            Some(libc::EAGAIN | libc::EBUSY) => std::thread::sleep(Duration::from_millis(1)),
            _ => self.break_down(&error),
        }
    }

    /// Goes on without the ring, as far as the kernel has not got the requests.
    fn break_down(&mut self, error: &io::Error) {
        tracing::warn!(%error, "io_uring does not go on; reading with plain system calls from now on");
        self.is_broken = true;
        // What is still in the ring is never shown to the kernel again, since the ring is not entered any more.
        while let Some(index) = self.unsent.pop_back() {
            if let Some(slot) = self.slots[index].take() {
                self.queue.push_front(slot.request);
            }
        }
    }

    /// Takes what the kernel has finished.
    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            let index = entry.user_data() as usize;
            let Some(mut slot) = self.slots.get_mut(index).and_then(Option::take) else {
                continue;
            };
            if let Some(result) = slot.took(entry.result()) {
                self.finished.push_back(completed(slot.request, result));
                self.free.push(index);
            } else if self.is_broken {
                let result = slot.read_rest();
                self.finished.push_back(completed(slot.request, result));
            } else {
                self.push(index, slot);
            }
        }
    }

    /// Waits for the kernel, or does what it does not.
    fn wait(&mut self, wait: Duration) {
        if !self.is_broken {
            self.enter(Some(wait));
        } else if let Some(mut request) = self.queue.pop_front() {
            let result = read_whole(&request.file, request.offset, &mut request.memory);
            self.finished.push_back(completed(request, result));
        } else {
            std::thread::sleep(wait.min(Duration::from_millis(1)));
        }
    }
}

impl Slot {
    /// Takes the kernel's result of the last call; the request's result, unless it needs another call.
    fn took(&mut self, result: i32) -> Option<io::Result<usize>> {
        if result >= 0 {
            let n_wanted = self.request.memory.len();
            let goes_on = self.progress.advance(result as usize, n_wanted);
            return (!goes_on).then_some(Ok(self.progress.n_read));
        }
        let error = io::Error::from_raw_os_error(-result);
        match error.raw_os_error() {
            // The kernel could not do it without waiting, or was disturbed. It is rare: read by a plain call.
            Some(libc::EINTR | libc::EAGAIN) => Some(self.read_rest()),
            _ => Some(Err(error)),
        }
    }

    fn read_rest(&mut self) -> io::Result<usize> {
        let request = &mut self.request;
        let memory = &mut request.memory;
        read_rest(&request.file, request.offset, memory, self.progress)
    }
}

fn completed(request: Request, result: io::Result<usize>) -> Completion {
    Completion {
        tag: request.tag,
        memory: request.memory,
        result,
    }
}

impl Reader for UringReader {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn submit(&mut self, request: Request) {
        self.queue.push_back(request);
        self.feed();
    }

    fn next(&mut self, timeout: Duration) -> Option<Completion> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            self.reap();
            self.feed();
            if let Some(completion) = self.finished.pop_front() {
                return Some(completion);
            }
            let left = deadline.map_or(LONGEST_WAIT, |at| {
                at.saturating_duration_since(Instant::now())
            });
            if left.is_zero() || self.n_pending() == 0 {
                return None;
            }
            self.wait(left);
        }
    }

    fn n_pending(&self) -> usize {
        let n_slots = self.slots.iter().flatten().count();
        n_slots + self.queue.len() + self.finished.len()
    }
}

impl Drop for UringReader {
    fn drop(&mut self) {
        self.queue.clear();
        while self.next(LAST_WAIT).is_some() {}
        if self.slots.iter().any(Option::is_some) {
            tracing::warn!(
                "a disk does not answer; the memory that it may still write to is not freed"
            );
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl std::fmt::Debug for UringReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringReader")
            .field("depth", &self.slots.len())
            .field("n_pending", &self.n_pending())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::testing::{file, request};
    use crate::reader::{ALIGN, aligned};

    /// A ring, unless this system forbids it.
    fn ring(depth: usize) -> Option<UringReader> {
        UringReader::new(depth).ok()
    }

    #[test]
    fn more_requests_than_slots_wait_their_turn() {
        let (Some(mut reader), file) = (ring(3), file(50 * ALIGN)) else {
            return;
        };
        (0..50).for_each(|tag| reader.submit(request(&file, tag)));
        let mut tags: Vec<u64> = Vec::new();
        while let Some(done) = reader.next(Duration::from_secs(60)) {
            assert_eq!(done.result.unwrap(), ALIGN);
            assert!(done.memory.iter().all(|&byte| u64::from(byte) == done.tag));
            tags.push(done.tag);
        }
        tags.sort_unstable();
        assert_eq!(tags, Vec::from_iter(0..50));
    }

    #[test]
    fn a_ring_that_the_kernel_gives_up_is_replaced_by_plain_calls() {
        let (Some(mut reader), file) = (ring(4), file(20 * ALIGN)) else {
            return;
        };
        (0..10).for_each(|tag| reader.submit(request(&file, tag)));
        reader.break_down(&io::Error::from_raw_os_error(libc::EPERM));
        (10..20).for_each(|tag| reader.submit(request(&file, tag)));
        let mut n_done = 0;
        while let Some(done) = reader.next(Duration::from_secs(60)) {
            assert_eq!(done.result.unwrap(), ALIGN);
            assert!(done.memory.iter().all(|&byte| u64::from(byte) == done.tag));
            n_done += 1;
        }
        assert_eq!((n_done, reader.n_pending()), (20, 0));
    }

    #[test]
    fn results_of_the_kernel_end_a_request_or_ask_for_more() {
        let file = file(4 * ALIGN);
        let mut slot = Slot {
            request: Request {
                memory: aligned(3 * ALIGN),
                ..request(&file, 1)
            },
            progress: Progress::default(),
        };
        assert!(slot.took(ALIGN as i32).is_none(), "short, so it goes on");
        assert_eq!(slot.progress.from, ALIGN);
        // Disturbed: the rest is read by a plain call.
        assert_eq!(slot.took(-libc::EINTR).unwrap().unwrap(), 3 * ALIGN);
        assert_eq!(slot.request.memory[2 * ALIGN], 3);
        let error = slot.took(-libc::EIO).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
}
