//! Least frequently used, where uses fade: every use counts half after a half-life in tokens.
//!
//! Source: the hit counts of SE-MoE's memory for experts (arXiv 2205.10034), which fade by a moving average every so many
//! steps. Differences: counts fade smoothly, there is no threshold, and counts go on while an expert is not cached.
//! An expert takes a place only when its count is above the least one, so that the many experts which a long prompt
//! touches once do not push out those that every token uses. Of a pass of many tokens one use counts at once and the
//! others when the pass is over: otherwise the first layers of a prompt, whose tokens are counted already, would push
//! out the experts of the last ones just before their turn.

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what has been used most of late.
#[derive(Debug)]
pub struct Lfu {
    uses: PerExpert<Uses>,
    half_life: f64,
}

/// Counts are log2 of the sum over uses of `2^(token / half_life)`. All fade alike, so the order of these is that of the
/// faded counts at any moment, and nothing has to be updated while time passes.
#[derive(Clone, Copy, Debug)]
struct Uses {
    /// Of the pass at `token` only the first use.
    before: f64,
    /// With all uses of that pass.
    after: f64,
    /// The last pass that used the expert.
    token: u64,
}

impl Uses {
    fn at(self, now: Now) -> f64 {
        if self.token == now.token {
            self.before
        } else {
            self.after
        }
    }
}

impl Lfu {
    /// For a model of `n_layers` layers with `n_experts` experts each; a use counts half after `half_life` tokens.
    pub fn new(n_layers: usize, n_experts: usize, half_life: f64) -> Self {
        let never = Uses {
            before: f64::NEG_INFINITY,
            after: f64::NEG_INFINITY,
            token: 0,
        };
        Self {
            uses: PerExpert::new(n_layers, n_experts, never),
            half_life,
        }
    }

    /// A count and `n` uses more at `now`.
    fn plus(&self, count: f64, n: u32, now: Now) -> f64 {
        if n == 0 {
            return count;
        }
        let new = f64::from(n).log2() + now.token as f64 / self.half_life;
        let (low, high) = (count.min(new), count.max(new));
        high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2
    }
}

impl Policy for Lfu {
    fn used(&mut self, expert: ExpertId, n_tokens: u32, now: Now) {
        if n_tokens == 0 {
            return;
        }
        let before = self.plus(self.uses[expert].at(now), 1, now);
        self.uses[expert] = Uses {
            before,
            after: self.plus(before, n_tokens - 1, now),
            token: now.token,
        };
    }

    fn worth(&self, expert: ExpertId, now: Now) -> f64 {
        self.uses[expert].at(now)
    }

    fn admits(&self, new: f64, least: f64) -> bool {
        new > least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(token: u64) -> Now {
        Now { token, layer: 0 }
    }

    const fn id(expert: u16) -> ExpertId {
        ExpertId { layer: 0, expert }
    }

    #[test]
    fn uses_fade_by_half() {
        let mut lfu = Lfu::new(1, 3, 100.0);
        // Two uses at 0 weigh as much as one at 100, and three of either as much as six at 0.
        lfu.used(id(0), 2, at(0));
        lfu.used(id(1), 1, at(100));
        assert_eq!(lfu.worth(id(0), at(100)), lfu.worth(id(1), at(100)));
        lfu.used(id(0), 1, at(100));
        let n_uses = (lfu.worth(id(0), at(500)) - lfu.worth(id(1), at(500))).exp2();
        assert!((n_uses - 2.0).abs() < 1e-12, "{n_uses}");
        assert_eq!(lfu.worth(id(2), at(0)), f64::NEG_INFINITY);
    }

    #[test]
    fn a_prompt_counts_when_it_is_over() {
        let mut lfu = Lfu::new(1, 2, 100.0);
        lfu.used(id(0), 3, at(0));
        lfu.used(id(1), 60, at(50));
        // One use at 50 against three at 0, of which none is left to wait for.
        assert!(lfu.worth(id(1), at(50)) < lfu.worth(id(0), at(50)));
        let ratio = (lfu.worth(id(1), at(51)) - lfu.worth(id(0), at(51))).exp2();
        assert!((ratio - 20.0 * 0.5_f64.exp2()).abs() < 1e-9, "{ratio}");
        // Several sequences in one pass add up.
        lfu.used(id(0), 1, at(60));
        lfu.used(id(0), 4, at(60));
        let n_uses = lfu.worth(id(0), at(61)).exp2();
        let expected = 3.0 + 5.0 * 0.6_f64.exp2();
        assert!((n_uses - expected).abs() < 1e-9, "{n_uses} {expected}");
    }

    #[test]
    fn a_scan_takes_no_place_from_what_is_used_often() {
        let mut lfu = Lfu::new(1, 3, 100.0);
        lfu.used(id(0), 1, at(0));
        lfu.used(id(0), 1, at(1));
        lfu.used(id(1), 1, at(2));
        assert!(!lfu.admits(lfu.worth(id(1), at(2)), lfu.worth(id(0), at(2))));
        // A billion tokens later the numbers still tell one token from the next.
        lfu.used(id(1), 1, at(1_000_000_000));
        lfu.used(id(2), 1, at(1_000_000_001));
        assert!(lfu.worth(id(2), at(0)) > lfu.worth(id(1), at(0)));
    }
}
