//! Which experts are in memory, and in which slots: bookkeeping alone, so that a store and a replay share it.

use crate::expert::ExpertId;

/// Slots of one size. Experts of a layer may differ in size (bit widths); every size has slots of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots of this size.
    pub n_slots: usize,
}

/// Where a missed expert goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Into an empty slot.
    Free(usize),
    /// Into the slot of an expert that has been forgotten for it.
    Evicted(usize, ExpertId),
    /// Nowhere: it is used once, from memory that is not the cache's.
    Refused,
}
