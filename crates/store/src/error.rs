//! What can go wrong between the disk and an expert; every message names the file, the offset and the expert.

use std::path::PathBuf;

use crate::expert::ExpertId;

/// Result with a [`StoreError`].
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file could not be opened or asked about.
    #[error("cannot {action} {}", path.display())]
    Open {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Bytes of an expert could not be read.
    #[error(
        "cannot read {n_bytes} bytes at offset {offset} of {}, which hold expert {} of MoE layer {}; \
         nothing was computed with it: check the disk, then run again",
        path.display(), expert.expert, expert.layer
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Where the bytes begin.
        offset: u64,
        /// How many were wanted.
        n_bytes: usize,
        /// The expert that they belong to.
        expert: ExpertId,
        /// The reason.
        source: std::io::Error,
    },
    /// Bytes of weights that every token uses could not be read.
    #[error("cannot read {n_bytes} bytes at offset {offset} of {}; check the disk, then run again", path.display())]
    ReadWeights {
        /// The file.
        path: PathBuf,
        /// Where the bytes begin.
        offset: u64,
        /// How many were wanted.
        n_bytes: usize,
        /// The reason.
        source: std::io::Error,
    },
    /// The file ended before the bytes of an expert did.
    #[error(
        "{} ended at byte {end}, but expert {} of MoE layer {} reaches to byte {needed}: the file was cut off while it \
         was in use; restore it and run again",
        path.display(), expert.expert, expert.layer
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where it ends.
        end: u64,
        /// Where the expert's bytes end.
        needed: u64,
        /// The expert.
        expert: ExpertId,
    },
    /// The file is not the one that was opened any more.
    #[error(
        "{} was changed while it was in use (its size or time of change is another than at the start); \
         run again, and keep the file as it is meanwhile",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A name that is not known.
    #[error("unknown {what} \"{found}\"; known: {known}")]
    Unknown {
        /// What kind of thing was named.
        what: &'static str,
        /// The name.
        found: String,
        /// All names.
        known: String,
    },
    /// The way of reading that was asked for is not there.
    #[error("this system does not let {kind} read; choose `auto`")]
    Reader {
        /// What was asked for.
        kind: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// The system has no memory left.
    #[error("the system gives no {n_bytes} bytes of memory for an expert; lower the memory budget")]
    NoMemory {
        /// How much was asked for.
        n_bytes: usize,
    },
}

/// The one of `all` that `found` names; `what` they are is said where there is none.
pub(crate) fn by_name<T: Copy>(
    what: &'static str,
    all: &[T],
    name: impl Fn(T) -> &'static str,
    found: &str,
) -> Result<T> {
    let known = all.iter().copied().find(|one| name(*one) == found);
    known.ok_or_else(|| StoreError::Unknown {
        what,
        found: found.to_owned(),
        known: all.iter().copied().map(name).collect::<Vec<_>>().join(", "),
    })
}
