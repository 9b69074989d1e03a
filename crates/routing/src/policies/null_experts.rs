//! Null experts: top-k over real and zero-cost experts, so that each token gets its own number of real ones.
//!
//! Paper: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, Zeng et al., 2024,
//! arXiv 2406.13233.
//! Rule: `p = softmax(l)` over n real and m null experts; take the k largest; weights are p over the sum of the REAL
//! picks (head B); null picks have weight 0 and are never computed. A token with null picks only gets output 0.
//! Shapes: logits [T, n + m], ids [T, k]; ids from n on are null.
//! Aux: load balance in which all null experts share their mean load. Differs from paper: nothing.
//! Check: policies::null_experts::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Top-k over real and null experts. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NullExperts {
    n_experts: usize,
    n_null: usize,
    top_k: usize,
}

impl NullExperts {
    /// Picks `top_k` of `n_experts` in all, of which the last `n_null` are null.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] and [`RoutingError::BadOption`] as for plain top-k, and when no expert is real.
    pub fn new(n_experts: usize, n_null: usize, top_k: usize) -> Result<Self, RoutingError> {
        policy::check_sizes("null_experts", n_experts, top_k)?;
        policy::check_option(
            "null_experts",
            "n_null",
            n_null,
            n_null < n_experts,
            "fewer than n_experts",
        )?;
        Ok(Self {
            n_experts,
            n_null,
            top_k,
        })
    }

    /// Turns the logits of a token's picks into their weights.
    fn finish(&self, ids: &[u16], weights: &mut [f32]) {
        let is_real = |id: u16| usize::from(id) < self.n_experts - self.n_null;
        // exp(-inf) is 0, so a null pick takes no part in the sum. Without a real pick there is nothing to sum.
        for (id, w) in ids.iter().zip(weights.iter_mut()) {
            if !is_real(*id) {
                *w = f32::NEG_INFINITY;
            }
        }
        if ids.iter().any(|&id| is_real(id)) {
            scores::softmax_in_place(weights);
        } else {
            weights.fill(0.0);
        }
    }
}

impl Policy for NullExperts {
    fn name(&self) -> &'static str {
        "null_experts"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn n_real_experts(&self) -> usize {
        self.n_experts - self.n_null
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
            self.finish(ids, weights);
        }
        Ok(())
    }
}

impl Stages for NullExperts {
    fn reach(&self) -> Reach {
        Reach::Fixed(self.top_k)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        self.finish(ids, weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(policy: &NullExperts, logits: &[f32]) -> Routing {
        let mut routing = Routing::new();
        policy.route(logits, &mut routing).unwrap();
        routing
    }

    #[test]
    fn real_picks_share_the_weight_and_null_picks_get_none() {
        let policy = NullExperts::new(4, 2, 3).unwrap();
        assert_eq!(policy.n_real_experts(), 2);
        let routing = route(&policy, &[0.0, 3f32.ln(), 5.0, -9.0]);
        assert_eq!(routing.experts(), [2, 1, 0]);
        assert!(
            (routing.weights()[1] - 0.75).abs() < 1e-6
                && (routing.weights()[2] - 0.25).abs() < 1e-6
        );
        assert_eq!(routing.weights()[0], 0.0);
    }

    #[test]
    fn only_null_picks_give_weight_0_and_dominant_null_logits_do_not_underflow() {
        let policy = NullExperts::new(4, 2, 2).unwrap();
        assert_eq!(route(&policy, &[0.0, 0.0, 1.0, 2.0]).weights(), [0.0, 0.0]);
        assert_eq!(
            route(&policy, &[0.0, -1.0, -500.0, 500.0]).token(0),
            (&[3, 0][..], &[0.0, 1.0][..])
        );
    }

    #[test]
    fn without_null_experts_it_is_renormalised_top_k() {
        let logits = [0.4, -1.0, 2.0, 0.1];
        let mut plain = Routing::new();
        crate::policies::TopK::new(4, 2, true)
            .unwrap()
            .route(&logits, &mut plain)
            .unwrap();
        assert_eq!(route(&NullExperts::new(4, 0, 2).unwrap(), &logits), plain);
    }
}
