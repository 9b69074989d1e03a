//! What a store has done since it was made: counts and times, to be subtracted from each other.

use std::time::Duration;

/// Counts of a [`crate::Store`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Layers that were computed, a pass of any number of tokens counted once.
    pub passes: u64,
    /// Experts that were wanted, each once per layer and pass.
    pub lookups: u64,
    /// Of these, the ones that were in memory.
    pub hits: u64,
    /// Of these, the ones that a predictor had asked for in time or almost in time.
    pub read_ahead: u64,
    /// Experts that were read ahead and not wanted.
    pub wasted: u64,
    /// Experts that were read.
    pub reads: u64,
    /// Bytes of these, without what alignment adds.
    pub bytes_read: u64,
    /// Experts that were forgotten for others.
    pub evictions: u64,
    /// Experts that were used once and not kept, because everything that was cached was worth more.
    pub refused: u64,
    /// Time in which nothing was computed because experts had not been read yet.
    pub stall: Duration,
    /// Time in which what was read was brought into the order that kernels read.
    pub making: Duration,
}

impl StoreStats {
    /// What has happened since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            passes: self.passes - before.passes,
            lookups: self.lookups - before.lookups,
            hits: self.hits - before.hits,
            read_ahead: self.read_ahead - before.read_ahead,
            wasted: self.wasted - before.wasted,
            reads: self.reads - before.reads,
            bytes_read: self.bytes_read - before.bytes_read,
            evictions: self.evictions - before.evictions,
            refused: self.refused - before.refused,
            stall: self.stall.saturating_sub(before.stall),
            making: self.making.saturating_sub(before.making),
        }
    }

    /// Share of the lookups that were answered from memory, what was read ahead not counted; 1 when there were none.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        match self.lookups {
            0 => 1.0,
            lookups => self.hits as f64 / lookups as f64,
        }
    }
}
