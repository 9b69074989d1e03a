//! SparseMixer of PhiMoE: two experts, one after the other, each weighed against those nearly as good.
//!
//! Paper: GRIN: GRadient-INformed MoE, Liu et al., 2024, arXiv 2409.12136.
//! Rule: `m = max(l)`; a logit is near when `(m - l_i) / max(|l_i|, m) <= 2 eps`; the first expert is the one of `m`, its
//! weight the softmax over the near ones at it. Without the first expert the same gives the second.
//! Shapes: logits [T, E], ids [T, 2]. The two weights of a token do not sum to 1; each is at least 1 / E.
//! Aux: none at inference. Differs from paper: no sampling, the form in which transformers evaluates the model
//! (`sparsemixer` of its phimoe with `training = false`).
//! Check: policies::sparse_mixer::tests, with numbers of that function.

use crate::policy::{self, Policy};
use crate::select;
use crate::stages::{Reach, Stages};
use crate::{Routing, RoutingError};

/// Two thresholded softmaxes. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseMixer {
    n_experts: usize,
    eps: f32,
}

/// Experts per token.
const PICKS: usize = 2;

impl SparseMixer {
    /// Picks two of `n_experts`; `eps` is half the width of the threshold, relative (`router_jitter_noise`).
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] or [`RoutingError::TopKTooLarge`] when there are not two experts or more than ids, or
    /// `eps` is negative or not finite.
    pub fn new(n_experts: usize, eps: f32) -> Result<Self, RoutingError> {
        const NAME: &str = "sparse_mixer";
        policy::check_sizes(NAME, n_experts, PICKS)?;
        let valid = eps.is_finite() && eps >= 0.0;
        policy::check_option(NAME, "eps", eps, valid, "a finite number of at least 0")?;
        Ok(Self { n_experts, eps })
    }

    /// Whether `logit` takes part in the softmax of the expert whose logit is `best`.
    #[must_use]
    pub fn is_near(&self, best: f32, logit: f32) -> bool {
        let distance = (best - logit) / logit.abs().max(best);
        // 0 / 0 counts as near: in the reference no comparison with NaN puts a logit aside.
        distance <= 2.0 * self.eps || distance.is_nan()
    }

    /// The softmax at `best` over the logits near it, those of `without` left out.
    fn weight(&self, row: &[f32], best: f32, without: &[u16]) -> f32 {
        let sum: f32 = select::numbered(row)
            .filter(|(id, l)| !without.contains(id) && self.is_near(best, *l))
            .map(|(_, l)| (l - best).exp())
            .sum();
        1.0 / sum
    }
}

impl Policy for SparseMixer {
    fn name(&self) -> &'static str {
        "sparse_mixer"
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
            let (mut ids, mut best) = ([0; PICKS], [0.0; PICKS]);
            select::top_k(select::numbered(row), &mut ids, &mut best);
            let first = self.weight(row, best[0], &[]);
            let second = self.weight(row, best[1], &ids[..1]);
            routing.push_token(&ids, &[first, second]);
        }
        Ok(())
    }
}

impl Stages for SparseMixer {
    fn reach(&self) -> Reach {
        Reach::Fixed(PICKS)
    }

    /// Each pick as the second one is: without those before it.
    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        for (at, (id, w)) in ids.iter().zip(weights).enumerate() {
            *w = self.weight(logits, logits[usize::from(*id)], &ids[..at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn route(eps: f32, logits: &[f32], n_experts: usize) -> Routing {
        let mut routing = Routing::new();
        let policy = SparseMixer::new(n_experts, eps).unwrap();
        policy.route(logits, &mut routing).unwrap();
        routing
    }

    fn close(got: &[f32], want: &[f32]) -> bool {
        got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6)
    }

    #[test]
    fn equals_the_function_of_transformers() {
        // sparsemixer(row, eps, training=False) of transformers 5.23: eps, logits, experts, weights.
        type Case = (f32, [f32; 4], [u16; 2], [f32; 2]);
        let cases: [Case; 5] = [
            (
                0.1,
                [1.0, 0.9, -2.0, 0.95],
                [0, 3],
                [0.350_131_87, 0.512_497_4],
            ),
            (
                0.2,
                [0.5, -0.25, 0.375, 0.4375],
                [0, 3],
                [0.354_369_94, 0.515_619_93],
            ),
            (
                0.05,
                [-1.0, -1.125, -3.0, -1.0625],
                [0, 3],
                [0.515_619_93, 0.515_619_93],
            ),
            (
                0.01,
                [8.0, 7.9, 7.8, 0.0],
                [0, 1],
                [0.524_979_2, 0.524_979_2],
            ),
            (
                0.5,
                [0.0, -0.5, 0.25, 0.0],
                [2, 0],
                [0.390_991_33, 0.383_651_73],
            ),
        ];
        for (eps, logits, experts, weights) in cases {
            let routing = route(eps, &logits, 4);
            assert_eq!(routing.experts(), experts, "{logits:?}");
            assert!(
                close(routing.weights(), &weights),
                "{logits:?}: {routing:?}"
            );
        }
    }

    #[test]
    fn far_experts_do_not_count() {
        // With eps 0.25 what is within half of the best is near. Best 4: near are 4 and 3, not 1; then best 3: only
        // itself, 1 is two thirds below.
        let routing = route(0.25, &[1.0, 4.0, 3.0], 3);
        assert_eq!(routing.experts(), [1, 2]);
        let first = 1.0 / (1.0 + (-1f32).exp());
        assert!(close(routing.weights(), &[first, 1.0]), "{routing:?}");
    }

    #[test]
    fn negative_logits_are_compared_to_their_own_size() {
        // Best -1: (-1 - -1.25) / 1.25 = 0.2 is near, (-1 - -4) / 4 = 0.75 is not. Then best -1.25: 2.75 / 4 is not.
        let routing = route(0.25, &[-4.0, -1.25, -1.0], 3);
        assert_eq!(routing.experts(), [2, 1]);
        let first = 1.0 / (1.0 + (-0.25f32).exp());
        assert!(close(routing.weights(), &[first, 1.0]), "{routing:?}");
    }

    #[test]
    fn zeros_and_ties_go_to_the_lower_id() {
        let routing = route(0.01, &[0.0; 4], 4);
        assert_eq!(routing.experts(), [0, 1]);
        assert!(close(routing.weights(), &[0.25, 1.0 / 3.0]), "{routing:?}");
    }

    #[test]
    fn options_are_checked() {
        assert!(SparseMixer::new(1, 0.1).is_err());
        assert!(SparseMixer::new(4, -0.1).is_err());
        let text = SparseMixer::new(4, f32::NAN).unwrap_err().to_string();
        assert!(text.contains("eps = NaN"), "{text}");
    }

    proptest! {
        #[test]
        fn picks_are_the_two_best_and_weights_are_softmax_values(
            logits in prop::collection::vec(-4f32..4.0, 8),
            eps in 0f32..1.0,
        ) {
            let routing = route(eps, &logits, 8);
            let (mut ids, mut keys) = ([0; 2], [0.0; 2]);
            select::top_k(select::numbered(&logits), &mut ids, &mut keys);
            prop_assert_eq!(routing.experts(), ids);
            prop_assert!(routing.weights()[0] >= 1.0 / 8.0 && routing.weights()[1] >= 1.0 / 7.0);
            prop_assert!(routing.weights().iter().all(|w| *w <= 1.0));
        }
    }
}
