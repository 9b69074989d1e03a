//! Dynamic top-p routing.
//!
//! Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv 2403.07652.
//! Rule: the shortest prefix of the sorted `p = softmax(l)` whose sum is strictly more than `top_p`; weights are the raw
//! p (head A). The threshold is a constant.
//! Shapes: logits [T, E], ids ragged (1 to E per token), weights [pairs].
//! Aux: load balance 1e-2 and entropy 1e-4 (`losses.entropy`), which keeps the number of experts small.
//! Differs from paper: nothing.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, picked};
use crate::weight_heads::{self, Picks};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
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
    fn name(&self) -> &'static str {
        "top_p"
    }

    fn n_experts(&self) -> usize {
        self.policy.n_experts()
    }

    fn causal(&self) -> bool {
        self.policy.causal()
    }

    fn batch_invariant(&self) -> bool {
        self.policy.batch_invariant()
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let (routing, loads) = picked(&self.policy, &logits)?;
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        Ok(Routed {
            weights: weight_heads::raw_softmax(logits.clone(), &picks, 1.0),
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
            loads,
        })
    }
}
