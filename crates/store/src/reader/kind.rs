//! Which readers there are, by name, and which of them this system lets us use.

use std::io;
use std::str::FromStr;

use super::{PoolReader, Reader, SyncReader};
use crate::error::{StoreError, by_name};

/// A way of reading, as a user names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReaderKind {
    /// The best that works.
    #[default]
    Auto,
    /// Plain system calls on threads.
    Pread,
    /// io_uring, on Linux.
    IoUring,
    /// Plain system calls at the moment at which the bytes are needed.
    Sync,
}

impl ReaderKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Pread, Self::IoUring, Self::Sync];

    /// The name that [`FromStr`] knows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Pread => "pread",
            Self::IoUring => "io_uring",
            Self::Sync => "sync",
        }
    }

    /// A reader of this kind, for `n_lanes` requests at a time ([`super::LANES`] is a good number); with [`ReaderKind::Auto`], [`best`].
    ///
    /// # Errors
    ///
    /// If this system refuses this kind. `Auto` and `Sync` always work.
    pub fn open(self, n_lanes: usize) -> io::Result<Box<dyn Reader>> {
        Ok(match self {
            Self::Auto => best(n_lanes).0,
            Self::Pread => Box::new(PoolReader::new(n_lanes)?),
            Self::IoUring => uring(n_lanes)?,
            Self::Sync => Box::new(SyncReader::default()),
        })
    }
}

impl FromStr for ReaderKind {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        by_name("reader", &Self::ALL, Self::name, name)
    }
}

/// The best reader that this system has, and why it is not io_uring, if it is not.
pub fn best(n_lanes: usize) -> (Box<dyn Reader>, Option<io::Error>) {
    or_pool(uring(n_lanes), n_lanes)
}

fn or_pool(
    wanted: io::Result<Box<dyn Reader>>,
    n_lanes: usize,
) -> (Box<dyn Reader>, Option<io::Error>) {
    match (wanted, PoolReader::new(n_lanes)) {
        (Ok(reader), _) => (reader, None),
        (Err(why), Ok(pool)) => (Box::new(pool), Some(why)),
        (Err(_), Err(why)) => (Box::new(SyncReader::default()), Some(why)),
    }
}

/// The kernel gets more at a time than the lanes of a disk: without a thread of ours, nothing follows what has ended
/// while the caller computes.
#[cfg(target_os = "linux")]
fn uring(n_lanes: usize) -> io::Result<Box<dyn Reader>> {
    const AHEAD: usize = 8;
    let depth = n_lanes.saturating_mul(AHEAD);
    Ok(Box::new(super::UringReader::new(depth)?))
}

#[cfg(not(target_os = "linux"))]
fn uring(_n_lanes: usize) -> io::Result<Box<dyn Reader>> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "io_uring is a part of Linux",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused_with_the_list() {
        for kind in ReaderKind::ALL {
            assert_eq!(kind.name().parse::<ReaderKind>().unwrap(), kind);
        }
        let error = "aio".parse::<ReaderKind>().unwrap_err().to_string();
        assert!(error.contains("\"aio\"") && error.contains("io_uring, sync"));
    }

    #[test]
    fn where_io_uring_is_refused_threads_read_and_the_reason_is_told() {
        let refused = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let (reader, why) = or_pool(refused(), 2);
        assert_eq!(reader.name(), "pread");
        assert_eq!(why.unwrap().kind(), io::ErrorKind::PermissionDenied);
        let (reader, why) = best(2);
        assert_eq!(why.is_none(), reader.name() == "io_uring");
    }
}
