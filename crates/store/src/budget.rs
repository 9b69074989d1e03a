//! How a budget is divided: memory to read into, memory for what is used once, and slots of every size for the cache.

use crate::cache::Capacity;

/// What is read ahead and not yet used fits here, and so do enough requests to keep a disk busy.
const STAGING_BYTES: usize = 32 << 20;
/// With fewer buffers the disk would wait for the processor; more do not help.
const STAGING_BUFFERS: std::ops::RangeInclusive<usize> = 4..=24;
/// Experts of a size that can be used at once without being kept.
const TRANSIT: usize = 2;

/// Experts of one size: bytes of one, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SizeClass {
    pub(crate) slot_bytes: usize,
    pub(crate) n_experts: usize,
}

/// A division of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Division {
    pub(crate) staging_buffers: usize,
    /// Slots of each size for what is used once.
    pub(crate) transit: usize,
    /// Slots of each size.
    pub(crate) cache: Vec<Capacity>,
}

impl Division {
    /// Divides `budget` bytes, for buffers of `buffer_bytes`. The least that works is taken where the budget is smaller.
    pub(crate) fn new(budget: u64, buffer_bytes: usize, classes: &[SizeClass]) -> Self {
        let per_transit: usize = classes.iter().map(|class| class.slot_bytes).sum();
        let wanted = (STAGING_BYTES / buffer_bytes.max(1))
            .clamp(*STAGING_BUFFERS.start(), *STAGING_BUFFERS.end());
        // Memory to read into is worth less than a cache when there is little of both.
        let affordable = (budget / 8) as usize / buffer_bytes.max(1);
        let staging_buffers = wanted.min(affordable.max(2));
        let transit = if budget / 16 >= (per_transit * TRANSIT) as u64 {
            TRANSIT
        } else {
            1
        };
        let machinery = (staging_buffers * buffer_bytes + transit * per_transit) as u64;
        let rest = budget.saturating_sub(machinery);
        let sizes: Vec<(usize, usize)> = classes
            .iter()
            .map(|class| (class.slot_bytes, class.n_experts))
            .collect();
        let cache = Capacity::divide(rest, &sizes);
        Self {
            staging_buffers,
            transit,
            cache,
        }
    }

    /// Bytes that are taken when everything is in use.
    pub(crate) fn n_bytes(&self, buffer_bytes: usize) -> u64 {
        let transit: usize = self
            .cache
            .iter()
            .map(|class| class.slot_bytes * self.transit)
            .sum();
        let cache: u64 = self.cache.iter().map(bytes_of).sum();
        (self.staging_buffers * buffer_bytes + transit) as u64 + cache
    }
}

fn bytes_of(capacity: &Capacity) -> u64 {
    capacity.slot_bytes as u64 * capacity.n_slots as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_large_budget_holds_everything() {
        let classes = [SizeClass {
            slot_bytes: 1000,
            n_experts: 8,
        }];
        let division = Division::new(1 << 30, 4096, &classes);
        assert_eq!(division.cache[0].n_slots, 8);
        assert_eq!((division.staging_buffers, division.transit), (24, 2));
        let none = Division::new(0, 4096, &classes);
        assert_eq!(
            (none.staging_buffers, none.transit, none.cache[0].n_slots),
            (2, 1, 0)
        );
        assert_eq!(none.n_bytes(4096), 2 * 4096 + 1000);
    }

    proptest! {
        #[test]
        fn no_more_than_the_budget_is_taken(
            budget in 0_u64..200_000_000,
            sizes in prop::collection::vec((1_usize..4_000_000, 1_usize..300), 1..4),
        ) {
            let classes: Vec<SizeClass> = sizes
                .iter()
                .map(|(slot_bytes, n_experts)| SizeClass { slot_bytes: *slot_bytes, n_experts: *n_experts })
                .collect();
            let largest = sizes.iter().map(|size| size.0).max().unwrap() + 8192;
            let division = Division::new(budget, largest, &classes);
            let least = Division::new(0, largest, &classes).n_bytes(largest);
            prop_assert!(division.n_bytes(largest) <= budget.max(least));
            for (capacity, class) in division.cache.iter().zip(&classes) {
                prop_assert!(capacity.n_slots <= class.n_experts);
            }
        }
    }
}
