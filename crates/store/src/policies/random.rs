//! Any expert may go, by a die that falls the same way in every run: what a policy must at least be better than.

use crate::expert::{ExpertId, Now};
use crate::policy::Policy;

/// Keeps at random.
#[derive(Debug)]
pub struct Random {
    /// Changed by every insertion, so that every eviction throws anew.
    state: u64,
}

impl Random {
    /// The same seed and accesses give the same evictions.
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed) }
    }
}

impl Policy for Random {
    fn used(&mut self, _: ExpertId, _: u32, _: Now) {}

    fn worth(&self, expert: ExpertId, _: Now) -> f64 {
        let id = u64::from(expert.layer) << 16 | u64::from(expert.expert);
        (mix(self.state ^ id) >> 11) as f64
    }

    fn inserted(&mut self, _: ExpertId) {
        self.state = mix(self.state);
    }
}

/// The next value of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that spreads every bit.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evictions_are_spread_and_reproducible() {
        let choose = |random: &Random| {
            let worth = |expert| {
                let id = ExpertId { layer: 3, expert };
                random.worth(id, Now::default())
            };
            (0..4_u16).min_by(|&a, &b| worth(a).total_cmp(&worth(b)))
        };
        let id = ExpertId {
            layer: 0,
            expert: 0,
        };
        let (mut one, mut other) = (Random::new(1), Random::new(1));
        let mut chosen = [0; 4];
        for _ in 0..400 {
            assert_eq!(choose(&one), choose(&other));
            chosen[usize::from(choose(&one).unwrap())] += 1;
            one.inserted(id);
            other.inserted(id);
        }
        assert!(chosen.iter().all(|&n| n > 60), "{chosen:?}");
    }
}
