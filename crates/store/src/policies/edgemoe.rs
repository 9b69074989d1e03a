//! EdgeMoE's rule: how often an expert is used, divided by how many layers it will be until its layer comes.
//!
//! Source: EdgeMoE (arXiv 2308.14352), eviction of the expert buffer. Difference: the printed formula,
//! `-f / ((S - i + I) mod S)` with the expert's layer i, the current layer I and S layers, divides by the distance
//! *behind* the current layer (and by zero in it), the opposite of what the text explains. Here the next layer is at
//! distance 1 and the layer just computed at distance S.

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what is popular and soon to come.
#[derive(Debug)]
pub struct EdgeMoe {
    uses: PerExpert<u64>,
    n_layers: u32,
    distance: fn(u32, u32, u32) -> u32,
}

impl EdgeMoe {
    /// For a model of `n_layers` layers with `n_experts` experts each.
    pub fn new(n_layers: usize, n_experts: usize) -> Self {
        Self {
            uses: PerExpert::new(n_layers, n_experts, 0),
            n_layers: n_layers as u32,
            distance: ahead,
        }
    }

    /// The rule as it is printed, to show the difference.
    #[cfg(test)]
    fn printed(n_layers: usize, n_experts: usize) -> Self {
        Self {
            distance: |of, now, n| (n - of + now) % n,
            ..Self::new(n_layers, n_experts)
        }
    }
}

/// Layers from the current one, `now`, until layer `of` is computed, out of `n`: 1 to `n`.
fn ahead(of: u32, now: u32, n: u32) -> u32 {
    1 + (of + n - now % n - 1) % n
}

impl Policy for EdgeMoe {
    fn used(&mut self, expert: ExpertId, n_tokens: u32, _: Now) {
        self.uses[expert] += u64::from(n_tokens);
    }

    fn worth(&self, expert: ExpertId, now: Now) -> f64 {
        let (of, at) = (u32::from(expert.layer), u32::from(now.layer));
        self.uses[expert] as f64 / f64::from((self.distance)(of, at, self.n_layers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worths(mut policy: EdgeMoe) -> [f64; 4] {
        let now = Now { token: 9, layer: 1 };
        let ids = [0, 1, 2, 3].map(|layer| ExpertId { layer, expert: 0 });
        for id in ids {
            policy.used(id, 12, now);
        }
        ids.map(|id| policy.worth(id, now))
    }

    #[test]
    fn the_next_layer_is_worth_most() {
        // From layer 1 of 4: layer 2 is next, then 3, 0, and 1 again.
        assert_eq!(worths(EdgeMoe::new(4, 1)), [4.0, 3.0, 12.0, 6.0]);
    }

    #[test]
    fn as_printed_the_next_layer_would_go_first() {
        let [before, current, next, after] = worths(EdgeMoe::printed(4, 1));
        assert_eq!([before, next, after], [12.0, 4.0, 6.0]);
        assert_eq!(current, f64::INFINITY);
    }

    #[test]
    fn popularity_weighs_against_distance() {
        let (now, mut policy) = (Now { token: 0, layer: 0 }, EdgeMoe::new(2, 2));
        let id = |layer, expert| ExpertId { layer, expert };
        policy.used(id(0, 0), 5, now);
        policy.used(id(1, 0), 2, now);
        // 5 uses two layers away against 2 uses one layer away.
        assert_eq!(policy.worth(id(0, 0), now), 2.5);
        assert_eq!(policy.worth(id(1, 0), now), 2.0);
    }
}
