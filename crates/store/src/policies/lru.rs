//! Least recently used: the expert whose last use is longest ago goes first.
//!
//! The baseline of every paper. Its weakness here is the cycle of a token: with less room than one token needs, an
//! expert of layer 0 is always gone before the next token comes to layer 0, and nothing ever hits.

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what was used last.
#[derive(Debug)]
pub struct Lru {
    /// When each expert was used last, in uses; 0 is never.
    last: PerExpert<u64>,
    tick: u64,
}

impl Lru {
    /// For a model of `n_layers` layers with `n_experts` experts each.
    pub fn new(n_layers: usize, n_experts: usize) -> Self {
        Self {
            last: PerExpert::new(n_layers, n_experts, 0),
            tick: 0,
        }
    }
}

impl Policy for Lru {
    fn used(&mut self, expert: ExpertId, _: u32, _: Now) {
        self.tick += 1;
        self.last[expert] = self.tick;
    }

    fn worth(&self, expert: ExpertId, _: Now) -> f64 {
        self.last[expert] as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_use_counts() {
        let id = |expert| ExpertId { layer: 0, expert };
        let (now, mut lru) = (Now::default(), Lru::new(1, 3));
        for expert in [0, 1, 0] {
            lru.used(id(expert), 1, now);
        }
        let worths = [0, 1, 2].map(|expert| lru.worth(id(expert), now));
        assert_eq!(worths, [3.0, 2.0, 0.0]);
    }
}
