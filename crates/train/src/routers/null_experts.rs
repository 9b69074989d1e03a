//! Null experts: top-k over real and zero-cost experts, so that each token gets its own number of real ones.
//!
//! Paper: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, Zeng et al., 2024,
//! arXiv 2406.13233.
//! Rule: the k largest of `p = softmax(l)` over n real and m null experts; weights are p over the sum of the REAL picks
//! (head B over the real picks), 0 for null picks. A token with null picks only gets output 0.
//! Shapes: logits [T, n + m], ids [T, k] (from n on null), weights [T k].
//! Aux: load balance in which all null experts share their mean load; the even load of a token is `k n / (n + m)` real
//! experts. Differs from paper: nothing; `losses.legacy_scale` gives the paper's scale (k at even loads).
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, routed};
use crate::losses;
use crate::weight_heads;
use burn::tensor::Tensor;
use cadre_routing::{Loads, Policy, RoutingError, policies};

/// Top-k over real and null experts.
#[derive(Clone, Debug)]
pub struct NullExperts {
    policy: policies::NullExperts,
}

impl NullExperts {
    /// Picks `top_k` of `n_real + n_null`.
    ///
    /// # Errors
    /// As [`policies::NullExperts::new`].
    pub fn new(n_real: usize, n_null: usize, top_k: usize) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::NullExperts::new(n_real + n_null, n_null, top_k)?,
        })
    }
}

impl Route for NullExperts {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        routed(&self.policy, logits, weight_heads::renormalised)
    }

    fn balance(&self, routed: &Routed, loads: &Loads, legacy_scale: bool) -> Tensor<1> {
        let n_real = self.n_real_experts();
        losses::null_load_balance(routed.probs.clone(), loads, n_real, legacy_scale)
    }
}
