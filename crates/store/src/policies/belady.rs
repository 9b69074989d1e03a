//! The optimum: the expert whose next use is farthest away goes first, which takes knowing the future.
//!
//! Source: Belady (1966); for experts, Read-ME (arXiv 2410.19123), whose router knows the routing of whole requests
//! before they are computed. For ordinary routers it is the bound that a replay compares with. Differences: an expert
//! whose own next use is the farthest is not cached at all, which no rule that must cache everything can match; and
//! where only some of the future is known, what nobody foresees counts as never.

use std::collections::VecDeque;

use crate::expert::{ExpertId, Now};
use crate::per_expert::PerExpert;
use crate::policy::Policy;

/// Keeps what is used next.
#[derive(Debug)]
pub struct Belady {
    n_layers: u64,
    /// The moments at which each expert will be used, the next one first.
    next: PerExpert<VecDeque<u64>>,
}

impl Belady {
    /// For a model of `n_layers` layers with `n_experts` experts each, of whose future nothing is known yet.
    pub fn new(n_layers: usize, n_experts: usize) -> Self {
        Self {
            n_layers: n_layers as u64,
            next: PerExpert::new(n_layers, n_experts, VecDeque::new()),
        }
    }

    /// With the whole `future`, all uses in order.
    pub fn with_future(
        n_layers: usize,
        n_experts: usize,
        future: impl IntoIterator<Item = (ExpertId, Now)>,
    ) -> Self {
        let mut policy = Self::new(n_layers, n_experts);
        for (expert, now) in future {
            policy.foresee(expert, now);
        }
        policy
    }

    fn moment(&self, now: Now) -> u64 {
        now.token * self.n_layers + u64::from(now.layer)
    }
}

impl Policy for Belady {
    fn used(&mut self, expert: ExpertId, _: u32, now: Now) {
        let moment = self.moment(now);
        let next = &mut self.next[expert];
        while next.front().is_some_and(|&next| next <= moment) {
            next.pop_front();
        }
    }

    fn worth(&self, expert: ExpertId, _: Now) -> f64 {
        let next = self.next[expert].front();
        next.map_or(f64::NEG_INFINITY, |&moment| -(moment as f64))
    }

    fn admits(&self, new: f64, least: f64) -> bool {
        // Where of neither is known when it is used again, the newer one is the better guess.
        new >= least
    }

    fn foresee(&mut self, expert: ExpertId, now: Now) {
        let moment = self.moment(now);
        self.next[expert].push_back(moment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_use_counts() {
        let id = |layer, expert| ExpertId { layer, expert };
        let at = |token, layer| Now { token, layer };
        let future = [
            (id(0, 0), at(0, 0)),
            (id(1, 1), at(0, 1)),
            (id(0, 1), at(1, 0)),
            (id(1, 1), at(1, 1)),
            (id(0, 0), at(5, 0)),
        ];
        let mut belady = Belady::with_future(2, 2, future);
        belady.used(id(0, 0), 1, at(0, 0));
        let now = at(0, 0);
        let worths = [id(0, 0), id(0, 1), id(1, 0), id(1, 1)].map(|id| belady.worth(id, now));
        assert_eq!(worths, [-10.0, -2.0, f64::NEG_INFINITY, -1.0]);
        belady.used(id(1, 1), 1, at(0, 1));
        assert_eq!(belady.worth(id(1, 1), now), -3.0);
        belady.used(id(1, 1), 1, at(1, 1));
        assert_eq!(belady.worth(id(1, 1), now), f64::NEG_INFINITY);
        belady.foresee(id(1, 1), at(7, 1));
        assert_eq!(belady.worth(id(1, 1), now), -15.0);
    }
}
