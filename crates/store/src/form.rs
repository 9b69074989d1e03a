//! What the store is told about experts: where their bytes are, and how bytes become something to compute with.

use std::ops::Range;

use bytes::Bytes;

use crate::error::StoreError;
use crate::expert::ExpertId;

/// A contiguous piece of a file that an expert needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the file among those that the store was made with.
    pub file: usize,
    /// Bytes of it.
    pub range: Range<u64>,
}

/// How experts are made of what lies on disk. Experts of one size are made in slots of that size, one after the other.
pub trait Form: Send + Sync + std::fmt::Debug {
    /// An expert that can be computed with. It lives in a memory of the store.
    type Expert: Send + std::fmt::Debug;
    /// Memory that an expert is made in.
    type Memory: Send + std::fmt::Debug;
    /// What making can end in, reading included.
    type Error: From<StoreError>;

    /// Whether there is such an expert. Where layers have different numbers of them, a store is made for the most, and those
    /// that a layer lacks are the last; they are never asked for.
    fn exists(&self, _expert: ExpertId) -> bool {
        true
    }

    /// What must be read for `expert`, in the order of the file.
    fn pieces(&self, expert: ExpertId) -> &[Piece];

    /// Bytes of memory that `expert` is made in.
    fn n_bytes(&self, expert: ExpertId) -> usize;

    /// `n_bytes` of memory; `None` when the system has none left.
    fn memory(&self, n_bytes: usize) -> Option<Self::Memory>;

    /// Makes `expert` in `memory`, where no other is alive, from the bytes of its pieces. Keeps none of these.
    ///
    /// # Errors
    /// The bytes are no weights, such as those of a damaged file.
    fn make(
        &self,
        expert: ExpertId,
        pieces: &[Bytes],
        memory: &mut Self::Memory,
    ) -> Result<Self::Expert, Self::Error>;
}
