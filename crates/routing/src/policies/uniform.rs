//! Random routing: experts drawn evenly, without looking at what the token means.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260; also
//! the random baseline that learned routers are compared with.
//! Rule: k distinct experts with equal chances, weight 1 / k each (head D, for k = 1 the weight 1). In training the draw
//! is made once for a whole pass ([`Uniform::fixed`]); here it is a hash of a seed and the bits of the token's logits, so
//! that equal inputs are routed equally in every batch.
//! Shapes: logits [T, E] (of any meaning), ids [T, k].
//! Aux: a consistency loss between two passes (THOR). Differs from paper: at inference the expert follows from the
//! token's state and not from a random stream.
//! Check: policies::uniform::tests.

use crate::filters::mix;
use crate::policy::{self, Policy};
use crate::select;
use crate::{Routing, RoutingError};

/// Experts by hash. Allocates `E` numbers per call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uniform {
    n_experts: usize,
    top_k: usize,
    seed: u64,
}

impl Uniform {
    /// Picks `top_k` of `n_experts`; another `seed` gives other picks.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] and [`RoutingError::BadOption`] as for plain top-k.
    pub fn new(n_experts: usize, top_k: usize, seed: u64) -> Result<Self, RoutingError> {
        policy::check_sizes("uniform", n_experts, top_k)?;
        Ok(Self {
            n_experts,
            top_k,
            seed,
        })
    }

    /// One draw, for all of `n_tokens` tokens: THOR's training pass.
    pub fn fixed(&self, n_tokens: usize, routing: &mut Routing) {
        routing.clear();
        let mut ids = vec![0; self.top_k];
        self.draw(self.seed, &mut ids);
        let weights = vec![self.weight(); self.top_k];
        for _ in 0..n_tokens {
            routing.push_token(&ids, &weights);
        }
    }

    /// Weight of every pick.
    #[must_use]
    pub fn weight(&self) -> f32 {
        1.0 / self.top_k as f32
    }

    /// The `top_k` experts whose hashes are largest.
    fn draw(&self, state: u64, ids: &mut [u16]) {
        let mut best = vec![0.0; ids.len()];
        // 24 bits are exact in f32; ties go to the lower id as everywhere.
        let key = |id: u16| (mix(state ^ mix(u64::from(id) + 1)) >> 40) as f32;
        let candidates = (0..self.n_experts as u16).map(|id| (id, key(id)));
        select::top_k(candidates, ids, &mut best);
    }
}

impl Policy for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        self.top_k
    }

    fn causal(&self) -> bool {
        true
    }

    fn batch_invariant(&self) -> bool {
        true
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        policy::begin(logits, self.n_experts, self.top_k, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            let state = row.iter().fold(mix(self.seed), |state, l| {
                mix(state ^ u64::from(l.to_bits()))
            });
            let (ids, weights) = routing.push_slots(self.top_k);
            self.draw(state, ids);
            weights.fill(1.0 / self.top_k as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(n_tokens: usize) -> Vec<f32> {
        (0..n_tokens * 4).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn draws_are_even_distinct_and_follow_the_seed() {
        let mut routing = Routing::new();
        let policy = Uniform::new(4, 2, 5).unwrap();
        policy.route(&logits(4000), &mut routing).unwrap();
        let mut counts = [0_u32; 4];
        for (ids, weights) in routing.iter() {
            assert_ne!(ids[0], ids[1]);
            assert_eq!(weights, [0.5, 0.5]);
            ids.iter().for_each(|&id| counts[usize::from(id)] += 1);
        }
        // 8000 draws, 2000 expected each; the standard deviation is 32.
        assert!(counts.iter().all(|c| c.abs_diff(2000) < 160), "{counts:?}");
        let mut other = Routing::new();
        let policy = Uniform::new(4, 2, 6).unwrap();
        policy.route(&logits(4000), &mut other).unwrap();
        let same = routing.iter().zip(other.iter()).filter(|(a, b)| a == b);
        // Ordered pairs: one in twelve agrees by chance.
        assert!(same.count().abs_diff(333) < 100);
    }

    #[test]
    fn a_fixed_draw_is_one_for_all_tokens_and_even_over_seeds() {
        let mut counts = [0_u32; 4];
        let mut routing = Routing::new();
        for seed in 0..4000 {
            Uniform::new(4, 1, seed).unwrap().fixed(3, &mut routing);
            assert!(
                routing
                    .experts()
                    .iter()
                    .all(|id| *id == routing.experts()[0])
            );
            counts[usize::from(routing.experts()[0])] += 1;
        }
        assert!(counts.iter().all(|c| c.abs_diff(1000) < 140), "{counts:?}");
        assert_eq!(routing.weights(), [1.0; 3]);
    }

    #[test]
    fn options_are_checked() {
        assert!(Uniform::new(2, 3, 0).is_err());
        assert!(Uniform::new(0, 1, 0).is_err());
    }
}
