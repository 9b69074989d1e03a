//! Expert choice routing: experts pick tokens.
//!
//! Paper: Mixture-of-Experts with Expert Choice Routing, Zhou et al., 2022, arXiv 2202.09368.
//! Rule: each expert takes the `floor(T c / E)` tokens of the micro-batch (at least one) that give it the largest
//! `p = softmax(l)`; weights are the raw p (head A). A token may get no expert or all of them.
//! Shapes: logits [T, E], ids ragged (0 to E per token), weights [pairs].
//! Aux: none needed: loads are even, so the gradient of the balance loss is 0. Differs from paper: no cap on the experts
//! of a token. Neither causal nor batch-invariant: the picks of a token tell of later ones.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, routed};
use crate::weight_heads;
use burn::tensor::Tensor;
use cadre_routing::{Policy, RoutingError, policies};

/// Every expert picks the same number of tokens.
#[derive(Clone, Debug)]
pub struct ExpertChoice {
    policy: policies::ExpertChoice,
}

impl ExpertChoice {
    /// `capacity_factor` is the mean number of experts per token.
    ///
    /// # Errors
    /// As [`policies::ExpertChoice::new`].
    pub fn new(n_experts: usize, capacity_factor: f32) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::ExpertChoice::new(n_experts, capacity_factor)?,
        })
    }
}

impl Route for ExpertChoice {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        routed(&self.policy, logits, weight_heads::raw_softmax)
    }
}
