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
//! Check: policies::uniform::tests, golden/cadre_moe/uniform in the engine.

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

/// [`Uniform`] by random numbers that the caller has drawn, such as those of [`UniformDraws::draw`]: the largest win.
/// Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UniformDraws {
    n_experts: usize,
    top_k: usize,
}

impl UniformDraws {
    /// Picks `top_k` of `n_experts`.
    ///
    /// # Errors
    /// As [`Uniform::new`].
    pub fn new(n_experts: usize, top_k: usize) -> Result<Self, RoutingError> {
        policy::check_sizes("uniform", n_experts, top_k)?;
        Ok(Self { n_experts, top_k })
    }

    /// The random number, 0 to 1, of `expert` for the token at `position` in `layer`: 24 bits of a chain of hashes over
    /// all four. A token's picks depend on nothing else, so that text is generated as it was read, in any pass and batch.
    #[must_use]
    pub fn draw(seed: u64, layer: usize, position: usize, expert: usize) -> f32 {
        let chain = [layer, position, expert];
        let mixed = chain
            .iter()
            .fold(mix(seed), |state, value| mix(state ^ *value as u64));
        (mixed >> 40) as f32 / (1u32 << 24) as f32
    }
}

impl Policy for UniformDraws {
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
            let (ids, weights) = routing.push_slots(self.top_k);
            select::top_k(select::numbered(row), ids, weights);
            weights.fill(1.0 / self.top_k as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_by_position_are_even_and_follow_all_that_they_are_made_of() {
        let policy = UniformDraws::new(4, 2).unwrap();
        let row = |position| (0..4).map(move |expert| UniformDraws::draw(7, 3, position, expert));
        let draws: Vec<f32> = (0..4000).flat_map(row).collect();
        assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
        let mut routing = Routing::new();
        policy.route(&draws, &mut routing).unwrap();
        let mut pairs = [[0_u32; 4]; 4];
        for (ids, weights) in routing.iter() {
            assert_eq!(weights, [0.5, 0.5]);
            pairs[usize::from(ids[0])][usize::from(ids[1])] += 1;
        }
        for (a, row) in pairs.iter().enumerate() {
            for (b, n) in row.iter().enumerate() {
                // 12 ordered pairs, 333 each; 5 standard deviations are 88.
                let expected = if a == b { 0 } else { 333 };
                assert!(n.abs_diff(expected) < 88, "{a} {b}: {n}");
            }
        }
        let one = UniformDraws::draw(1, 2, 3, 4);
        for (seed, layer, position, expert) in [
            (0, 2, 3, 4),
            (1, 3, 3, 4),
            (1, 2, 4, 4),
            (1, 2, 3, 5),
            (1, 3, 2, 4),
        ] {
            assert_ne!(one, UniformDraws::draw(seed, layer, position, expert));
        }
    }

    #[test]
    fn hashes_are_those_of_the_published_generator() {
        // First outputs of SplitMix64 seeded with 0, as java.util.SplittableRandom gives them.
        assert_eq!(mix(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix(0x9E37_79B9_7F4A_7C15), 0x6E78_9E6A_A1B9_65F4);
    }

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
