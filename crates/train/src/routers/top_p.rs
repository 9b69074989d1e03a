//! Dynamic top-p routing.
//!
//! Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv 2403.07652.
//! Rule: the shortest prefix of the sorted `p = softmax(l)` whose sum is strictly more than `top_p`; weights are the raw
//! p (head A). The threshold is a constant.
//! Shapes: logits [T, E], ids ragged (1 to E per token), weights [pairs].
//! Aux: load balance 1e-2 and entropy 1e-4 (`losses.entropy`), which keeps the number of experts small.
//! Differs from paper: nothing.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, routed};
use crate::weight_heads;
use burn::tensor::Tensor;
use cadre_routing::{Policy, RoutingError, policies};

/// As many experts as it takes to collect the probability mass.
#[derive(Clone, Debug)]
pub struct TopP {
    policy: policies::TopP,
}

impl TopP {
    /// Collects more than `top_p` of the probability of `n_experts`.
    ///
    /// # Errors
    /// As [`policies::TopP::new`].
    pub fn new(n_experts: usize, top_p: f32) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::TopP::new(n_experts, top_p)?,
        })
    }
}

impl Route for TopP {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        routed(&self.policy, logits, weight_heads::raw_softmax)
    }
}
