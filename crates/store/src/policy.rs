//! What it means to have an opinion about which cached expert makes room for the next.

use crate::expert::{ExpertId, Now};

/// A rule of what is worth keeping. It is told about everything that is used, and asked for numbers to compare.
pub trait Policy: Send + std::fmt::Debug {
    /// `expert` serves `n_tokens` tokens of the pass at `now`, whether it was cached or not.
    fn used(&mut self, expert: ExpertId, n_tokens: u32, now: Now);

    /// How much `expert` is worth keeping at `now`: the cached expert of the least worth goes first, and of several the
    /// one that was used longest ago. Never NaN.
    fn worth(&self, expert: ExpertId, now: Now) -> f64;

    /// [`Policy::worth`] of many, so that an eviction is one loop over inlined calls. `worths` is as long as `experts`.
    fn worths(&self, experts: &[ExpertId], now: Now, worths: &mut [f64]) {
        for (worth, &expert) in worths.iter_mut().zip(experts) {
            *worth = self.worth(expert, now);
        }
    }

    /// Whether an expert of worth `new`, just read and used at `now`, takes the place of the least worthy cached one.
    /// Where it does not, it is used and forgotten.
    fn admits(&self, new: f64, least: f64) -> bool {
        let _ = (new, least);
        true
    }

    /// `expert` is certain to be used at `now`, told in the order of time by those who know the routing in advance: a
    /// replay, or a model whose router does not wait for its layers.
    fn foresee(&mut self, expert: ExpertId, now: Now) {
        let _ = (expert, now);
    }

    /// `expert` has been put into the cache.
    fn inserted(&mut self, expert: ExpertId) {
        let _ = expert;
    }

    /// `expert` has been taken out of the cache.
    fn evicted(&mut self, expert: ExpertId) {
        let _ = expert;
    }
}
