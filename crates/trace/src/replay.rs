//! What a cache of experts would have done: hits of LRU and of Belady's optimum on a recorded sequence of picks.
//!
//! A cache belongs to one layer, holds `capacity` experts, starts empty, and brings every missed expert in. The picks
//! of a token are accesses one after the other, in the order in which they are recorded. LRU evicts the expert that
//! was used longest ago; Belady evicts the one whose next use is farthest away, which no policy can beat, so
//! the distance between the two is what a better policy could still gain.

use std::collections::BinaryHeap;

/// A next use that never comes.
const NEVER: usize = usize::MAX;

/// Hits of an LRU cache for every capacity from 0 to `n_experts`, in one pass.
///
/// Uses the inclusion property: an access hits in every capacity above its stack distance. Ids at or above
/// `n_experts` never hit.
pub fn lru_hits(accesses: &[u16], n_experts: usize) -> Vec<u64> {
    let mut stack: Vec<u16> = Vec::with_capacity(n_experts);
    let mut hits = vec![0_u64; n_experts + 1];
    for &expert in accesses {
        if let Some(distance) = stack.iter().position(|&other| other == expert) {
            if let Some(count) = hits.get_mut(distance + 1) {
                *count += 1;
            }
            stack[..=distance].rotate_right(1);
        } else {
            stack.insert(0, expert);
        }
    }
    for capacity in 1..hits.len() {
        hits[capacity] += hits[capacity - 1];
    }
    hits
}

/// Hits of Belady's optimal cache of `capacity` experts.
pub fn belady_hits(accesses: &[u16], capacity: usize) -> u64 {
    belady_hits_with(accesses, &next_uses(accesses), capacity)
}

/// For each access, the index of the next access to the same expert, or [`NEVER`].
pub(crate) fn next_uses(accesses: &[u16]) -> Vec<usize> {
    let mut upcoming = vec![NEVER; usize::from(u16::MAX) + 1];
    let mut next = vec![NEVER; accesses.len()];
    for (i, &expert) in accesses.iter().enumerate().rev() {
        next[i] = upcoming[usize::from(expert)];
        upcoming[usize::from(expert)] = i;
    }
    next
}

/// [`belady_hits`] with the next uses computed once for several capacities.
pub(crate) fn belady_hits_with(accesses: &[u16], next_uses: &[usize], capacity: usize) -> u64 {
    if capacity == 0 {
        return 0;
    }
    let n_ids = accesses
        .iter()
        .max()
        .map_or(0, |&expert| usize::from(expert) + 1);
    // Next use of each cached expert. The heap may hold stale entries; an entry counts only if it agrees with this.
    let mut cached: Vec<Option<usize>> = vec![None; n_ids];
    let mut farthest: BinaryHeap<(usize, u16)> = BinaryHeap::new();
    let (mut n_cached, mut hits) = (0, 0);
    for (&expert, &next_use) in accesses.iter().zip(next_uses) {
        if cached[usize::from(expert)].is_some() {
            hits += 1;
        } else if n_cached < capacity {
            n_cached += 1;
        } else {
            while let Some((next_use, victim)) = farthest.pop() {
                if cached[usize::from(victim)] == Some(next_use) {
                    cached[usize::from(victim)] = None;
                    break;
                }
            }
        }
        cached[usize::from(expert)] = Some(next_use);
        farthest.push((next_use, expert));
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The golden trace of the routing specification, section 16.
    const GOLDEN: [u16; 16] = [0, 1, 2, 0, 3, 1, 4, 0, 2, 1, 3, 0, 4, 2, 1, 0];

    #[test]
    fn the_golden_trace_is_reproduced() {
        let lru = lru_hits(&GOLDEN, 5);
        for (capacity, lru_expected, belady_expected) in [(2, 0, 4), (3, 1, 7), (4, 6, 9)] {
            assert_eq!(lru[capacity], lru_expected, "LRU, capacity {capacity}");
            assert_eq!(
                belady_hits(&GOLDEN, capacity),
                belady_expected,
                "Belady, capacity {capacity}"
            );
        }
    }

    #[test]
    fn the_edges_are_right() {
        assert_eq!(lru_hits(&[], 3), [0, 0, 0, 0]);
        assert_eq!(belady_hits(&[], 3), 0);
        assert_eq!(belady_hits(&GOLDEN, 0), 0);
        // Everything fits: only the five first uses miss.
        assert_eq!(lru_hits(&GOLDEN, 5)[5], 11);
        assert_eq!(belady_hits(&GOLDEN, 5), 11);
        assert_eq!(belady_hits(&GOLDEN, 500), 11);
    }

    /// LRU as a list with the newest at the end: the obvious, slow twin.
    fn lru_plain(accesses: &[u16], capacity: usize) -> u64 {
        let (mut cache, mut hits): (Vec<u16>, u64) = (Vec::new(), 0);
        for &expert in accesses {
            if let Some(at) = cache.iter().position(|&other| other == expert) {
                cache.remove(at);
                hits += 1;
            } else if cache.len() >= capacity {
                if capacity == 0 {
                    continue;
                }
                cache.remove(0);
            }
            cache.push(expert);
        }
        hits
    }

    /// The best any policy can do, by trying every victim at every miss.
    fn best_possible(accesses: &[u16], cache: &mut Vec<u16>, capacity: usize) -> u64 {
        let Some((&expert, rest)) = accesses.split_first() else {
            return 0;
        };
        if cache.contains(&expert) {
            return 1 + best_possible(rest, cache, capacity);
        }
        if cache.len() < capacity {
            cache.push(expert);
            let hits = best_possible(rest, cache, capacity);
            cache.pop();
            return hits;
        }
        let mut best = 0;
        for victim in 0..cache.len() {
            let old = std::mem::replace(&mut cache[victim], expert);
            best = best.max(best_possible(rest, &mut cache.clone(), capacity));
            cache[victim] = old;
        }
        best
    }

    proptest! {
        #[test]
        fn belady_is_at_least_lru_and_both_grow(accesses in prop::collection::vec(0_u16..12, 0..200)) {
            let lru = lru_hits(&accesses, 12);
            let mut before = (0, 0);
            for (capacity, &lru_hits) in lru.iter().enumerate() {
                let now = (lru_hits, belady_hits(&accesses, capacity));
                prop_assert_eq!(now.0, lru_plain(&accesses, capacity));
                prop_assert!(now.1 >= now.0);
                prop_assert!(now.0 >= before.0 && now.1 >= before.1);
                before = now;
            }
        }

        #[test]
        fn belady_is_optimal(accesses in prop::collection::vec(0_u16..5, 0..10), capacity in 1_usize..4) {
            let best = best_possible(&accesses, &mut Vec::new(), capacity);
            prop_assert_eq!(belady_hits(&accesses, capacity), best);
        }
    }
}
