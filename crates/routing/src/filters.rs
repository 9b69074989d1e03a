//! Capacity: limits on how many tokens an expert takes, applied to a finished routing.
//!
//! Dropping is never part of a policy. A filter reads one [`Routing`] and writes another with the same tokens and some
//! pairs removed, weights unchanged. Loads for balance losses are counted before it, loads for efficiency after it.

use serde::{Deserialize, Serialize};

use crate::Routing;

/// How many pairs an expert may take: `n_pairs / n_experts * factor`, rounded, at least `min`.
///
/// For top-k routing `n_pairs` is `T k`, which gives the doubled capacity that GShard's top-2 uses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capacity {
    /// 1.0 leaves no slack at a perfectly even load.
    pub factor: f64,
    /// Lower bound, so that small batches are not starved.
    pub min: usize,
    /// How the fraction is rounded; implementations differ.
    pub rounding: Rounding,
}

impl Default for Capacity {
    /// No slack and at least four pairs per expert, as DeepSpeed does.
    fn default() -> Self {
        Self {
            factor: 1.0,
            min: 4,
            rounding: Rounding::Ceil,
        }
    }
}

/// Rounding of a fractional capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// Towards zero (Switch).
    Floor,
    /// Up (DeepSpeed).
    Ceil,
}

impl Capacity {
    /// Pairs per expert for a routing of `n_pairs` pairs over `n_experts` experts.
    ///
    /// # Panics
    /// When `n_experts` is 0.
    #[must_use]
    pub fn slots(&self, n_pairs: usize, n_experts: usize) -> usize {
        assert!(n_experts > 0, "capacity needs at least one expert");
        let share = n_pairs as f64 / n_experts as f64 * self.factor;
        let rounded = match self.rounding {
            Rounding::Floor => share.floor(),
            Rounding::Ceil => share.ceil(),
        };
        (rounded as usize).max(self.min)
    }
}

/// Who gets a slot first. Every order is deterministic; equal ranks fall back to token order, then pick order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropOrder {
    /// Earlier tokens first (Switch). The only causal one.
    Position,
    /// All first picks before all second picks, each by position (GShard).
    ChoiceThenPosition,
    /// Tokens by their largest weight (batch-prioritised routing, V-MoE), then by pick.
    Priority,
    /// Pairs by weight.
    Weight,
    /// A random order drawn from the seed (random token selection, DeepSpeed).
    Random(u64),
}

impl DropOrder {
    /// Whether a token's pairs are independent of the tokens after it, at a fixed capacity.
    #[must_use]
    pub fn causal(self) -> bool {
        self == Self::Position
    }
}

/// Writes to `kept` the pairs of `routing` that get one of the `slots` of their expert, and returns how many did not.
///
/// `slots` holds one limit per real expert (`[n_real_experts]`); ids beyond it are null experts and are always kept.
/// Every token stays, if need be without picks. Allocates scratch per call.
pub fn limit(routing: &Routing, slots: &[usize], order: DropOrder, kept: &mut Routing) -> usize {
    let keep = keep(routing, slots, order);
    *kept = routing.kept(&keep);
    keep.len() - kept.n_pairs()
}

/// One flag per pair of `routing`: whether it gets one of the `slots` of its expert, as in [`limit`].
#[must_use]
pub fn keep(routing: &Routing, slots: &[usize], order: DropOrder) -> Vec<bool> {
    let mut free = slots.to_vec();
    let mut keep = vec![true; routing.n_pairs()];
    for pair in ranked(routing, order) {
        if let Some(free) = free.get_mut(usize::from(routing.experts()[pair])) {
            keep[pair] = *free > 0;
            *free = free.saturating_sub(1);
        }
    }
    keep
}

/// Pair indices in the order in which slots are given out. Pairs are stored by token and pick, so a stable sort keeps
/// that order among equals.
fn ranked(routing: &Routing, order: DropOrder) -> Vec<usize> {
    let mut pairs: Vec<usize> = (0..routing.n_pairs()).collect();
    let weights = routing.weights();
    match order {
        DropOrder::Position => {}
        DropOrder::ChoiceThenPosition => {
            let choice: Vec<usize> = routing.iter().flat_map(|(ids, _)| 0..ids.len()).collect();
            pairs.sort_by_key(|&pair| choice[pair]);
        }
        DropOrder::Priority => {
            let best = |w: &[f32]| w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let rank: Vec<f32> = routing
                .iter()
                .flat_map(|(_, w)| std::iter::repeat_n(best(w), w.len()))
                .collect();
            pairs.sort_by(|&a, &b| rank[b].total_cmp(&rank[a]));
        }
        DropOrder::Weight => pairs.sort_by(|&a, &b| weights[b].total_cmp(&weights[a])),
        DropOrder::Random(seed) => pairs.sort_by_cached_key(|&pair| mix(seed ^ mix(pair as u64))),
    }
    pairs
}

/// A bijective mixing of 64 bits: distinct inputs never collide. It is a step of SplitMix64 and its output (Steele, Lea and
/// Flood, 2014), so that draws from states that lie that step apart are that generator's.
#[must_use]
pub fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn routing(tokens: &[&[(u16, f32)]]) -> Routing {
        let mut routing = Routing::new();
        for token in tokens {
            token.iter().for_each(|&(id, w)| routing.push_pair(id, w));
            routing.end_token();
        }
        routing
    }

    fn kept(routing: &Routing, slots: &[usize], order: DropOrder) -> Vec<Vec<u16>> {
        let mut out = Routing::new();
        limit(routing, slots, order, &mut out);
        out.iter().map(|(ids, _)| ids.to_vec()).collect()
    }

    #[test]
    fn each_order_prefers_its_own() {
        let r = routing(&[
            &[(1, 0.6), (0, 0.4)],
            &[(0, 0.7), (1, 0.3)],
            &[(0, 0.9), (1, 0.1)],
        ]);
        assert_eq!(
            kept(&r, &[1, 1], DropOrder::Position),
            [vec![1, 0], vec![], vec![]]
        );
        assert_eq!(
            kept(&r, &[1, 1], DropOrder::ChoiceThenPosition),
            [vec![1], vec![0], vec![]]
        );
        assert_eq!(
            kept(&r, &[1, 1], DropOrder::Priority),
            [vec![], vec![], vec![0, 1]]
        );
        assert_eq!(
            kept(&r, &[1, 1], DropOrder::Weight),
            [vec![1], vec![], vec![0]]
        );
    }

    #[test]
    fn null_experts_take_no_slot() {
        let r = routing(&[&[(2, 0.0), (0, 1.0)], &[(2, 0.0), (0, 1.0)]]);
        assert_eq!(
            kept(&r, &[1, 1], DropOrder::Position),
            [vec![2, 0], vec![2]]
        );
    }

    #[test]
    fn capacity_rounds_as_told() {
        let capacity = |factor, min, rounding| Capacity {
            factor,
            min,
            rounding,
        };
        assert_eq!(capacity(1.0, 0, Rounding::Ceil).slots(6, 8), 1);
        assert_eq!(capacity(1.0, 0, Rounding::Floor).slots(6, 8), 0);
        assert_eq!(capacity(1.0, 4, Rounding::Floor).slots(6, 8), 4);
        assert_eq!(capacity(1.25, 0, Rounding::Floor).slots(64, 8), 10);
    }

    proptest! {
        #[test]
        fn slots_are_filled_and_never_overfilled(
            ids in prop::collection::vec(prop::collection::vec((0u16..4, 0f32..1.0), 0..4), 1..20),
            slots in prop::collection::vec(0usize..6, 4),
            seed in any::<u64>(),
        ) {
            let tokens: Vec<&[(u16, f32)]> = ids.iter().map(Vec::as_slice).collect();
            let before = routing(&tokens);
            for order in [DropOrder::Position, DropOrder::ChoiceThenPosition, DropOrder::Priority, DropOrder::Weight,
                          DropOrder::Random(seed)] {
                let mut after = Routing::new();
                let n_dropped = limit(&before, &slots, order, &mut after);
                prop_assert_eq!(after.n_pairs() + n_dropped, before.n_pairs());
                prop_assert_eq!(after.n_tokens(), before.n_tokens());
                for (expert, &slots) in (0u16..).zip(&slots) {
                    let count = |r: &Routing| r.experts().iter().filter(|&&id| id == expert).count();
                    prop_assert_eq!(count(&after), count(&before).min(slots));
                }
            }
        }
    }
}
