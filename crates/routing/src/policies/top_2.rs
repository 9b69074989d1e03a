//! GShard's top-2: the best expert, and a second one that may be drawn.
//!
//! Paper: GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, Lepikhin et al., 2020, arXiv
//! 2006.16668; Gumbel noise on the second choice as in DeepSpeed's `top2gating`.
//! Rule: `g = softmax(l)`; e1 has the largest l, e2 the largest l (or l + noise) of the rest; weights are `g / (g1 + g2)`
//! (head B), made before a second pick is dropped; with random dropping the second pick stays when `2 w2 > u`.
//! Shapes: logits [T, E], noise [T, E], uniform [T], ids [T, 1 or 2].
//! Aux: load balance with the shares of the FIRST picks. Differs from paper: no groups of tokens; capacity is a separate
//! stage (`filters`, order `choice_then_position`).
//! Check: policies::top_2::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores::softmax_in_place;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Experts per token.
const PICKS: usize = 2;

/// The two best experts, renormalised. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Top2 {
    n_experts: usize,
}

impl Top2 {
    /// Picks two of `n_experts`.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] for fewer than two experts, [`RoutingError::BadOption`] for more than ids.
    pub fn new(n_experts: usize) -> Result<Self, RoutingError> {
        policy::check_sizes("top_2", n_experts, PICKS)?;
        Ok(Self { n_experts })
    }

    /// Routes as [`Policy::route`] does, with the second choice made on `logits + noise` (of the shape of `logits`). The
    /// weights come from the logits without noise.
    ///
    /// # Errors
    /// As [`Policy::route`]; [`RoutingError::BadOption`] when the shapes differ.
    pub fn route_with_noise(
        &self,
        logits: &[f32],
        noise: &[f32],
        routing: &mut Routing,
    ) -> Result<(), RoutingError> {
        routing.clear();
        let same = noise.len() == logits.len();
        let expected = "one value per logit";
        policy::check_option("top_2", "length of noise", noise.len(), same, expected)?;
        policy::begin(logits, self.n_experts, PICKS, routing)?;
        let rows = logits.chunks_exact(self.n_experts);
        for (row, noise) in rows.zip(noise.chunks_exact(self.n_experts)) {
            let Some((first, best)) = select::next_best(row, None) else {
                continue;
            };
            let noisy = select::numbered(row).zip(noise);
            let rest = noisy.filter(|((id, _), _)| *id != first);
            let (mut second, mut key) = ([0], [0.0]);
            select::top_k(rest.map(|((id, l), g)| (id, l + g)), &mut second, &mut key);
            let mut weights = [best, row[usize::from(second[0])]];
            softmax_in_place(&mut weights);
            routing.push_token(&[first, second[0]], &weights);
        }
        Ok(())
    }
}

/// Which pairs of a top-2 routing stay when second picks are kept at random: firsts always, seconds when
/// `2 w2 > uniform[t]` (`uniform` in 0 to 1, one per token).
///
/// # Panics
/// When there is not one number per token.
#[must_use]
pub fn keep_seconds(routing: &Routing, uniform: &[f32]) -> Vec<bool> {
    assert_eq!(uniform.len(), routing.n_tokens(), "one number per token");
    let tokens = routing.iter().zip(uniform);
    let keep = tokens.flat_map(|((_, weights), u)| {
        weights
            .iter()
            .enumerate()
            .map(move |(slot, w)| slot == 0 || 2.0 * w > *u)
    });
    keep.collect()
}

impl Policy for Top2 {
    fn name(&self) -> &'static str {
        "top_2"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        PICKS
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
        policy::begin(logits, self.n_experts, PICKS, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            let (ids, weights) = routing.push_slots(PICKS);
            select::top_k(select::numbered(row), ids, weights);
            softmax_in_place(weights);
        }
        Ok(())
    }
}

impl Stages for Top2 {
    fn reach(&self) -> Reach {
        Reach::Fixed(PICKS)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        softmax_in_place(weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_moves_the_second_choice_only_and_no_weight() {
        let policy = Top2::new(3).unwrap();
        let (mut plain, mut noisy) = (Routing::new(), Routing::new());
        let logits = [3f32.ln(), 0.0, 0.0];
        policy.route(&logits, &mut plain).unwrap();
        assert_eq!(plain.experts(), [0, 1]);
        assert!((plain.weights()[0] - 0.75).abs() < 1e-6);
        policy
            .route_with_noise(&logits, &[-9.0, 0.0, 0.1], &mut noisy)
            .unwrap();
        assert_eq!(noisy.experts(), [0, 2]);
        assert_eq!(noisy.weights(), plain.weights());
        policy
            .route_with_noise(&logits, &[0.0; 3], &mut noisy)
            .unwrap();
        assert_eq!(noisy, plain);
        assert!(
            policy
                .route_with_noise(&logits, &[0.0], &mut noisy)
                .is_err()
        );
        assert!(Top2::new(1).is_err());
    }

    #[test]
    fn a_second_pick_stays_with_twice_its_weight() {
        let mut routing = Routing::new();
        routing.push_token(&[0, 1], &[0.75, 0.25]);
        routing.push_token(&[1, 0], &[0.75, 0.25]);
        assert_eq!(
            keep_seconds(&routing, &[0.49, 0.51]),
            [true, true, true, false]
        );
    }
}
