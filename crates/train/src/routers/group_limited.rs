//! Group-limited top-k of DeepSeek, and plain sigmoid routing with a selection-only bias.
//!
//! Paper: DeepSeekMoE, Dai et al., 2024, arXiv 2401.06066; DeepSeek-V2, 2024, arXiv 2405.04434; DeepSeek-V3 Technical
//! Report, 2024, arXiv 2412.19437; Auxiliary-Loss-Free Load Balancing, Wang et al., 2024, arXiv 2408.15664.
//! Rule: `a = softmax(l)` (V1, V2) or `sigmoid(l)` (V3); the k largest of `a + b` within the best groups; weights come
//! from a: raw (head A) or divided by their sum (heads B and C), times `scale`. The bias b is given by the context and
//! gets no gradient.
//! Shapes: logits [T, E], bias [E], ids [T, k], weights [T k].
//! Aux: load balance on the scores (divided by their sum for sigmoid); V2: `losses.sequence`, `losses.device` and
//! `losses.communication`, a group being a device; V3: `losses.sequence` and `[balance_bias]`.
//! Differs from paper: no tokens are dropped by device.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, picked};
use crate::weight_heads::{self, Picks};
use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, softmax};
use cadre_routing::policies::{self, GroupLimitedOptions, ScoreFn};
use cadre_routing::{Policy, Routing, RoutingError};

/// Top-k within the best groups.
#[derive(Clone, Debug)]
pub struct GroupLimited {
    options: GroupLimitedOptions,
    /// Without a bias.
    policy: policies::GroupLimited,
}

impl GroupLimited {
    /// The rule with these options.
    ///
    /// # Errors
    /// As [`policies::GroupLimited::new`], and [`RoutingError::BadOption`] for a renormalised single pick, which gives
    /// the router no gradient.
    pub fn new(options: GroupLimitedOptions) -> Result<Self, RoutingError> {
        if options.norm_topk_prob && options.top_k == 1 && options.n_experts > 1 {
            return Err(RoutingError::BadOption {
                policy: "group_limited",
                option: "norm_topk_prob",
                value: "true with top_k = 1".to_owned(),
                expected: "false, because a renormalised single weight is always 1 and the router would not learn",
            });
        }
        Ok(Self {
            policy: policies::GroupLimited::new(options.clone(), None)?,
            options,
        })
    }
}

impl Route for GroupLimited {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn takes_bias(&self) -> bool {
        true
    }

    fn groups(&self) -> [usize; 2] {
        [self.options.n_groups, self.options.keep_groups]
    }

    fn unbiased(&self, routed: &Routed) -> Result<Routing, RoutingError> {
        Ok(picked(&self.policy, &routed.logits)?.0)
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let (routing, loads) = match context.bias {
            None => picked(&self.policy, &logits)?,
            Some(bias) => {
                let policy =
                    policies::GroupLimited::new(self.options.clone(), Some(bias.to_vec()))?;
                picked(&policy, &logits)?
            }
        };
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        let head = match (self.options.score, self.options.norm_topk_prob) {
            (ScoreFn::Softmax, false) => weight_heads::raw_softmax,
            (ScoreFn::Softmax, true) => weight_heads::renormalised,
            (ScoreFn::Sigmoid, false) => weight_heads::raw_sigmoid,
            (ScoreFn::Sigmoid, true) => weight_heads::sigmoid_renormalised,
        };
        let probs = match self.options.score {
            ScoreFn::Softmax => softmax(logits.clone(), 1),
            ScoreFn::Sigmoid => {
                let s_te = sigmoid(logits.clone());
                s_te.clone() / s_te.sum_dim(1).add_scalar(1e-20)
            }
        };
        Ok(Routed {
            weights: head(logits.clone(), &picks, f64::from(self.options.scale)),
            probs,
            logits,
            routing,
            loads,
        })
    }
}
