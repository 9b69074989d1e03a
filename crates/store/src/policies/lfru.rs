//! Frequency times recency: the number of uses, times a decay to the power of the tokens since the last one.
//!
//! Source: the score `freq * decay^age` that was proposed for expert caches of llama.cpp (issue 20757, pull request
//! 21609). Differences: age is in tokens, and uses go on being counted while an expert is not cached. Compared with `lfu`, a count does
//! not fade use by use: an old favourite that is used once more has all of its past back.

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what has been used often, and not too long ago.
#[derive(Debug)]
pub struct Lfru {
    uses: PerExpert<Uses>,
    half_life: f64,
}

#[derive(Clone, Copy, Debug)]
struct Uses {
    n: u64,
    /// Log2 of `n * 2^(last / half_life)`: the age of all is taken from the same start, which keeps the order.
    score: f64,
}

impl Lfru {
    /// For a model of `n_layers` layers with `n_experts` experts each; the decay is a half after `half_life` tokens.
    pub fn new(n_layers: usize, n_experts: usize, half_life: f64) -> Self {
        let never = Uses {
            n: 0,
            score: f64::NEG_INFINITY,
        };
        Self {
            uses: PerExpert::new(n_layers, n_experts, never),
            half_life,
        }
    }
}

impl Policy for Lfru {
    fn used(&mut self, expert: ExpertId, n_tokens: u32, now: Now) {
        let uses = &mut self.uses[expert];
        uses.n += u64::from(n_tokens);
        uses.score = (uses.n as f64).log2() + now.token as f64 / self.half_life;
    }

    fn worth(&self, expert: ExpertId, _: Now) -> f64 {
        self.uses[expert].score
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_brings_the_past_back() {
        let at = |token| Now { token, layer: 0 };
        let id = |expert| ExpertId { layer: 0, expert };
        let mut lfru = Lfru::new(1, 2, 10.0);
        lfru.used(id(0), 7, at(0));
        lfru.used(id(1), 4, at(10));
        // 7 against 4 * 2.
        assert!(lfru.worth(id(1), at(10)) > lfru.worth(id(0), at(10)));
        lfru.used(id(0), 1, at(10));
        let ratio = (lfru.worth(id(0), at(30)) - lfru.worth(id(1), at(30))).exp2();
        assert!((ratio - 2.0).abs() < 1e-12, "8 uses against 4, not {ratio}");
    }
}
