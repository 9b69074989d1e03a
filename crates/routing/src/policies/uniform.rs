//! Random routing: experts drawn evenly, without looking at what the token means.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260; also
//! the random baseline that learned routers are compared with.
//! Rule: rows are not what a router says but random numbers that the caller drew, see [`Uniform::draw`]; the k largest
//! are picked, so that every set of k experts is as likely as any other; every weight is 1 / k (head D for k = 1).
//! Shapes: random numbers [T, E], ids [T, k].
//! Aux: none, there is no router; THOR trains with a consistency loss between two passes. Differs from paper: at inference
//! the draw follows from layer and position, so that text is generated as it was read.
//! Check: policies::uniform::tests, golden/cadre_moe/uniform in the engine.

use crate::filters::mix;
use crate::policy::{self, Policy};
use crate::select;
use crate::stages::{Reach, Stages};
use crate::{Routing, RoutingError};

/// Experts by random numbers that the caller has drawn, such as those of [`Uniform::draw`]: the largest win. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uniform {
    n_experts: usize,
    top_k: usize,
}

impl Uniform {
    /// Picks `top_k` of `n_experts`.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] and [`RoutingError::BadOption`] as for plain top-k.
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

    fn stages(&self) -> Option<&dyn Stages> {
        Some(self)
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

impl Stages for Uniform {
    fn reach(&self) -> Reach {
        Reach::Fixed(self.top_k)
    }

    /// The same for every expert: the rows say nothing about the token.
    fn shares(&self, logits: &[f32], shares: &mut [f32]) {
        let is_there = |logit: &&f32| logit.is_finite();
        let share = 1.0 / logits.iter().filter(is_there).count().max(1) as f32;
        for (one, logit) in shares.iter_mut().zip(logits) {
            *one = if logit.is_finite() { share } else { 0.0 };
        }
    }

    fn weigh(&self, _logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        weights.fill(1.0 / ids.len() as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_by_position_are_even_and_follow_all_that_they_are_made_of() {
        let policy = Uniform::new(4, 2).unwrap();
        let row = |position| (0..4).map(move |expert| Uniform::draw(7, 3, position, expert));
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
        let one = Uniform::draw(1, 2, 3, 4);
        for (seed, layer, position, expert) in [
            (0, 2, 3, 4),
            (1, 3, 3, 4),
            (1, 2, 4, 4),
            (1, 2, 3, 5),
            (1, 3, 2, 4),
        ] {
            assert_ne!(one, Uniform::draw(seed, layer, position, expert));
        }
    }

    #[test]
    fn hashes_are_those_of_the_published_generator() {
        // First outputs of SplitMix64 seeded with 0, as java.util.SplittableRandom gives them.
        assert_eq!(mix(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix(0x9E37_79B9_7F4A_7C15), 0x6E78_9E6A_A1B9_65F4);
    }

    #[test]
    fn options_are_checked() {
        assert!(Uniform::new(2, 3).is_err());
        assert!(Uniform::new(0, 1).is_err());
    }
}
