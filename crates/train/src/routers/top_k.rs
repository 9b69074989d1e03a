//! Softmax top-k routing.
//!
//! Paper: Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, Shazeer et al., 2017,
//! arXiv 1701.06538; the softmax form and the flag `norm_topk_prob` as in Mixtral, OLMoE and Qwen3-MoE checkpoints.
//! Rule: `p = softmax(l)`; take the k largest p; weights are p divided by their sum over the picks when
//! `norm_topk_prob` (head B), else the raw p (head A).
//! Shapes: logits [T, E], ids [T, k], weights [T k].
//! Aux: load balance 1e-2 and z-loss 1e-3, added by the trainer. Differs from paper: no noise; softmax before the
//! selection.
//! Check: routers::top_k::tests, tests/routing_golden.rs (parity), tests/routing_gradients.rs (heads).

use super::{Route, RouteContext, Routed, routed};
use crate::weight_heads;
use burn::tensor::Tensor;
use cadre_routing::{Policy, RoutingError, policies};

/// Softmax top-k with differentiable weights.
#[derive(Clone, Debug)]
pub struct TopK {
    /// Makes the picks: selection is one rule with one implementation, ties included.
    policy: policies::TopK,
}

impl TopK {
    /// Picks `top_k` of `n_experts`; `norm_topk_prob` says whether the weights of a token are made to sum to 1.
    ///
    /// # Errors
    /// As [`policies::TopK::new`], and [`RoutingError::BadOption`] for renormalised top-1, whose weight is always 1 and
    /// gives the router no gradient.
    pub fn new(n_experts: usize, top_k: usize, norm_topk_prob: bool) -> Result<Self, RoutingError> {
        if norm_topk_prob && top_k == 1 && n_experts > 1 {
            return Err(RoutingError::BadOption {
                policy: "top_k",
                option: "norm_topk_prob",
                value: "true with top_k = 1".to_owned(),
                expected: "false, because a renormalised single weight is always 1 and the router would not learn",
            });
        }
        Self::taught(n_experts, top_k, norm_topk_prob)
    }

    /// As [`TopK::new`], also renormalised top-1: for a router that learns from something else than its weights.
    ///
    /// # Errors
    /// As [`policies::TopK::new`].
    pub fn taught(
        n_experts: usize,
        top_k: usize,
        norm_topk_prob: bool,
    ) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::TopK::new(n_experts, top_k, norm_topk_prob)?,
        })
    }
}

impl Route for TopK {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let head = if self.policy.norm_topk_prob() {
            weight_heads::renormalised
        } else {
            weight_heads::raw_softmax
        };
        routed(&self.policy, logits, head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn picks_weights_and_loads_of_two_tokens() {
        let (ln2, ln3) = (2f32.ln(), 3f32.ln());
        let logits = Tensor::from_floats([[0.0, ln3, 0.0], [ln2, ln2, 0.0]], &Device::flex());
        let routed = TopK::new(3, 2, true)
            .unwrap()
            .route(logits, &RouteContext::default())
            .unwrap();
        assert_eq!(routed.routing.experts(), [1, 0, 0, 1]);
        let weights: Vec<f32> = routed.weights.try_to_vec_as().unwrap();
        for (w, expected) in weights.iter().zip([0.75, 0.25, 0.5, 0.5]) {
            assert!((w - expected).abs() < 1e-6);
        }
        assert_eq!(routed.loads.counts(), [2, 2, 0]);
        assert!(routed.loads.summary().unwrap().mean_entropy.is_some());
    }

    #[test]
    fn non_finite_logits_and_dead_options_are_refused() {
        let router = TopK::new(2, 1, false).unwrap();
        let logits = Tensor::from_floats([[0.0, 1.0], [0.0, f32::INFINITY]], &Device::flex());
        assert!(matches!(
            router.route(logits, &RouteContext::default()),
            Err(RoutingError::NonFinite {
                token: 1,
                expert: 1,
                ..
            })
        ));
        assert!(
            TopK::new(2, 1, true)
                .unwrap_err()
                .to_string()
                .contains("would not learn")
        );
        assert!(TopK::new(2, 3, true).is_err());
    }
}
