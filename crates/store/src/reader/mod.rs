//! Reading pieces of files in the background, whichever way this system does that best.
//!
//! A request owns the memory that it is read into and gives it back with its completion, so that nobody can see or reuse
//! bytes that are still being written.

mod direct;
mod faulty;
mod kind;
mod memory;
mod pool;
mod sync;
#[cfg(target_os = "linux")]
mod uring;
mod whole;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;

pub use direct::OpenFile;
pub use faulty::{Fault, FaultyReader, When};
pub use kind::{ReaderKind, best};
pub(crate) use memory::LARGE_PAGE;
pub use memory::{aligned, whole_pages};
pub use pool::PoolReader;
pub use sync::SyncReader;
#[cfg(target_os = "linux")]
pub use uring::UringReader;

/// A piece of a file that is wanted.
#[derive(Debug)]
pub struct Request {
    /// Given back with the completion; means something to the caller alone.
    pub tag: u64,
    /// The open file.
    pub file: Arc<std::fs::File>,
    /// Where to read from; a multiple of [`ALIGN`] where the file was opened past the system's cache.
    pub offset: u64,
    /// Filled as far as the file goes: its length is how much is wanted. Its address and length are multiples of
    /// [`ALIGN`] where the file was opened past the system's cache ([`aligned`] gives such memory).
    pub memory: BytesMut,
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub tag: u64,
    /// The request's memory, of the same length. Beyond what was read it holds anything.
    pub memory: BytesMut,
    /// Bytes that were read: fewer than wanted only where the file ends.
    pub result: io::Result<usize>,
}

/// What addresses, offsets and lengths are multiples of, as reading past the system's cache wants it.
pub const ALIGN: usize = 4096;

/// Requests at a time that a disk is kept busy with.
///
/// Random direct reads of a 2.6 GB file on a virtual disk (virtio, two processors, ext4), in GB/s, the best of eight
/// tries of 0.1 s while other programs ran; columns are requests at a time. One small read took 0.05 ms.
///
/// ```text
///                    pread                         io_uring
///             1     2     4     8    16      1     2     4     8    16
///   128 KiB  0.93  1.25  1.71  2.03  2.04   1.09  1.41  1.68  2.03  2.20
///   256 KiB  1.30  2.01  2.20  2.47  2.49   1.60  2.07  2.46  2.44  2.57
///   512 KiB  1.95  2.59  2.54  2.59  2.32   2.02  2.46  2.73  2.58  2.50
///     1 MiB  2.16  2.57  2.89  2.47  2.42   2.42  2.63  2.80  2.58  2.42
///     4 MiB  2.83  2.65  2.52  2.62  2.57   2.88  2.45  2.46  2.53  2.60
/// ```
///
/// io_uring took 0.06 seconds of processor per GB, threads 0.11. Into memory of small pages both gave 1.0 GB/s. More than
/// four lanes gain nothing from 512 KiB on, which is less than a matrix of most experts.
pub const LANES: usize = 4;

/// Bytes of a request from which on a larger one gains nothing with [`LANES`]: see there. A shorter read is as well sent
/// together with its neighbour; a longer one need not be cut.
pub const REQUEST_BYTES: usize = 512 << 10;

/// Reads in the background. Requests are begun in the order in which they are submitted, and end in any.
///
/// Dropping a reader waits for what it has begun, so that no memory is freed that is still being written.
pub trait Reader: Send {
    /// `pread`, `io_uring`, ...
    fn name(&self) -> &'static str;

    /// Begins a request, now or as soon as an earlier one has ended. Never waits for the disk.
    fn submit(&mut self, request: Request);

    /// The next completion; waits for it as long as `timeout` says, or not at all. `None` when there is none in that
    /// time, or nothing has been submitted.
    fn next(&mut self, timeout: Duration) -> Option<Completion>;

    /// Requests whose completion has not been handed out.
    fn n_pending(&self) -> usize;
}

impl<R: Reader + ?Sized> Reader for Box<R> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn submit(&mut self, request: Request) {
        (**self).submit(request);
    }

    fn next(&mut self, timeout: Duration) -> Option<Completion> {
        (**self).next(timeout)
    }

    fn n_pending(&self) -> usize {
        (**self).n_pending()
    }
}

/// Files and requests for the tests of the readers.
#[cfg(test)]
mod testing {
    use super::{ALIGN, Request, aligned};
    use std::fs::File;
    use std::sync::Arc;

    /// An open file of `n_bytes`, whose every byte is the number of its page.
    pub(super) fn file(n_bytes: usize) -> Arc<File> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..n_bytes).map(|at| (at / ALIGN) as u8).collect();
        std::fs::write(file.path(), bytes).unwrap();
        Arc::new(File::open(file.path()).unwrap())
    }

    /// Asks for page `tag`.
    pub(super) fn request(file: &Arc<File>, tag: u64) -> Request {
        Request {
            tag,
            file: Arc::clone(file),
            offset: tag * ALIGN as u64,
            memory: aligned(ALIGN),
        }
    }
}
