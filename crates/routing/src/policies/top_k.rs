//! Softmax top-k routing.
//!
//! Paper: Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, Shazeer et al., 2017,
//! arXiv 1701.06538; the softmax form and the flag `norm_topk_prob` as in Mixtral, OLMoE and Qwen3-MoE checkpoints.
//! Rule: `p = softmax(l)`; take the k largest p; weights are p divided by their sum over the picks when
//! `norm_topk_prob` (head B), else the raw p (head A).
//! Shapes: logits [T, E], ids [T, k].
//! Aux: load balance and z-loss in training. Differs from paper: no noise; softmax before the selection.
//! Check: policies::top_k::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores::{Softmax, softmax_in_place};
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Softmax top-k. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopK {
    n_experts: usize,
    top_k: usize,
    norm_topk_prob: bool,
}

impl TopK {
    /// Picks `top_k` of `n_experts`; `norm_topk_prob` says whether the weights of a token are made to sum to 1.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] when `top_k > n_experts`, [`RoutingError::BadOption`] when either is 0 or there
    /// are more experts than ids.
    pub fn new(n_experts: usize, top_k: usize, norm_topk_prob: bool) -> Result<Self, RoutingError> {
        policy::check_sizes("top_k", n_experts, top_k)?;
        Ok(Self {
            n_experts,
            top_k,
            norm_topk_prob,
        })
    }

    /// Picks per token.
    #[must_use]
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Whether the weights of a token sum to 1.
    #[must_use]
    pub fn norm_topk_prob(&self) -> bool {
        self.norm_topk_prob
    }

    /// Turns the logits of a token's picks into their weights.
    fn finish(&self, row: &[f32], weights: &mut [f32]) {
        if self.norm_topk_prob {
            softmax_in_place(weights);
        } else {
            let softmax = Softmax::of(row);
            weights.iter_mut().for_each(|w| *w = softmax.p(*w));
        }
    }
}

impl Policy for TopK {
    fn name(&self) -> &'static str {
        "top_k"
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
            // Softmax keeps the order of the logits, so they are the sorting key and no probability is computed
            // that is not needed.
            select::top_k(select::numbered(row), ids, weights);
            self.finish(row, weights);
        }
        Ok(())
    }
}

impl Stages for TopK {
    fn reach(&self) -> Reach {
        Reach::Fixed(self.top_k)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        self.finish(logits, weights);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    // softmax(ln 1, ln 2, ln 4, ln 1) = 1/8, 2/8, 4/8, 1/8.
    const LOGITS: [f32; 4] = [
        0.0,
        std::f32::consts::LN_2,
        2.0 * std::f32::consts::LN_2,
        0.0,
    ];

    fn picks(policy: &TopK, logits: &[f32]) -> (Vec<u16>, Vec<f32>) {
        let mut routing = Routing::new();
        policy.route(logits, &mut routing).unwrap();
        let (ids, weights) = routing.token(0);
        (ids.to_vec(), weights.to_vec())
    }

    #[test]
    fn raw_weights_are_probabilities() {
        let (ids, weights) = picks(&TopK::new(4, 3, false).unwrap(), &LOGITS);
        assert_eq!(ids, [2, 1, 0]);
        for (w, expected) in weights.iter().zip([0.5, 0.25, 0.125]) {
            assert!((w - expected).abs() < 1e-6, "{w} is not {expected}");
        }
    }

    #[test]
    fn renormalised_weights_sum_to_one() {
        let (ids, weights) = picks(&TopK::new(4, 2, true).unwrap(), &LOGITS);
        assert_eq!(ids, [2, 1]);
        assert!((weights[0] - 2.0 / 3.0).abs() < 1e-6 && (weights[1] - 1.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_id_also_for_negative_zero() {
        assert_eq!(
            picks(&TopK::new(4, 4, true).unwrap(), &[0.0; 4]).0,
            [0, 1, 2, 3]
        );
        assert_eq!(
            picks(&TopK::new(2, 1, true).unwrap(), &[-0.0, 0.0]),
            (vec![0], vec![1.0])
        );
    }

    #[test]
    fn errors_name_the_token_and_leave_an_empty_routing() {
        let mut routing = Routing::new();
        let policy = TopK::new(2, 1, true).unwrap();
        let err = policy
            .route(&[0.0, 1.0, f32::NAN, 0.0], &mut routing)
            .unwrap_err();
        assert!(matches!(
            err,
            RoutingError::NonFinite {
                token: 1,
                expert: 0,
                ..
            }
        ));
        assert_eq!(routing.n_tokens(), 0);
        assert!(policy.route(&[0.0; 3], &mut routing).is_err());
        policy.route(&[], &mut routing).unwrap();
        assert_eq!(routing.n_tokens(), 0);
        assert_eq!(
            TopK::new(2, 3, true),
            Err(RoutingError::TopKTooLarge {
                top_k: 3,
                n_experts: 2
            })
        );
    }

    #[test]
    fn steady_state_does_not_grow() {
        let policy = TopK::new(4, 2, true).unwrap();
        let mut routing = Routing::new();
        policy.route(&LOGITS, &mut routing).unwrap();
        let before = routing.experts().as_ptr();
        policy.route(&LOGITS, &mut routing).unwrap();
        assert_eq!(before, routing.experts().as_ptr());
    }

    proptest! {
        #[test]
        fn a_token_is_routed_alone_as_in_a_batch(logits in prop::collection::vec(-4f32..4.0, 24), k in 1usize..=8) {
            let policy = TopK::new(8, k, k % 2 == 0).unwrap();
            let (mut batch, mut alone) = (Routing::new(), Routing::new());
            policy.route(&logits, &mut batch).unwrap();
            for (t, row) in logits.chunks_exact(8).enumerate() {
                policy.route(row, &mut alone).unwrap();
                prop_assert_eq!(alone.token(0), batch.token(t));
                let sum: f32 = batch.token(t).1.iter().sum();
                prop_assert!(sum <= 1.0 + 1e-5 && (k % 2 == 1 || sum > 1.0 - 1e-5));
            }
        }
    }
}
