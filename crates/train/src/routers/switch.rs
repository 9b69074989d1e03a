//! Switch routing: one expert per token.
//!
//! Paper: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, Fedus, Zoph
//! and Shazeer, 2021, arXiv 2101.03961.
//! Rule: the expert with the largest `p = softmax(l)`; its weight is the raw p (head A).
//! Shapes: logits [T, E], ids [T, 1], weights [T].
//! Aux: load balance 1e-2. Differs from paper: capacity is off unless the recipe sets it (`router.capacity`); no jitter.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, routed};
use crate::weight_heads;
use burn::tensor::Tensor;
use cadre_routing::{Policy, RoutingError, policies};

/// Top-1 with its raw probability.
#[derive(Clone, Debug)]
pub struct Switch {
    policy: policies::Switch,
}

impl Switch {
    /// Picks one of `n_experts`.
    ///
    /// # Errors
    /// As [`policies::Switch::new`].
    pub fn new(n_experts: usize) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::Switch::new(n_experts)?,
        })
    }
}

impl Route for Switch {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        routed(&self.policy, logits, weight_heads::raw_softmax)
    }
}
