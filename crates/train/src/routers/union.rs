//! Union of experts: slices of one feed-forward, chosen by tokens and then by themselves, summed and not averaged.
//!
//! Paper: Union of Experts (UoE), Yang, Lian and Li, 2025, arXiv 2503.02495; the multi-layer perceptron part.
//! Rule: each token takes its k best experts by `p = softmax(l)`; of the tokens of a sequence that took it, each expert
//! keeps the share `keep` with the largest p. The outputs are summed with one scalar per token (head E):
//! `M / (M + eps)`, M the sum of its picks' p.
//! Shapes: logits [T, E], ids ragged (0 to k per token), weights [pairs].
//! Aux: none. Differs from paper: the gate learns through the scalar everywhere (the released language model's gate has
//! no gradient); an expert never takes a token that did not take it. Not causal unless `keep` is 1.
//! Check: tests/routers.rs (parity, gradients, causality), tests/layers.rs (the union of all slices is the whole).

use super::{Route, RouteContext, Routed, counted, values};
use crate::weight_heads::{self, Picks};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use cadre_routing::{Policy, Routing, RoutingError, policies};

/// Top-k of the tokens, then the best tokens of the experts.
#[derive(Clone, Debug)]
pub struct Union {
    policy: policies::Union,
    eps: f32,
}

impl Union {
    /// Picks `top_k` of `n_experts`, each of which keeps the share `keep` of a sequence's tokens.
    ///
    /// # Errors
    /// As [`policies::Union::new`].
    pub fn new(n_experts: usize, top_k: usize, keep: f32, eps: f32) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::Union::new(n_experts, top_k, keep, eps)?,
            eps,
        })
    }

    /// The picks, sequence by sequence.
    fn picks(&self, rows: &[f32], seq_len: usize) -> Result<Routing, RoutingError> {
        let n = self.n_experts();
        let length = if seq_len == 0 {
            rows.len()
        } else {
            seq_len * n
        };
        let (mut all, mut one) = (Routing::new(), Routing::new());
        for (i, sequence) in rows.chunks(length.max(n)).enumerate() {
            self.policy.route(sequence, &mut one).map_err(|e| match e {
                RoutingError::NonFinite {
                    token,
                    expert,
                    value,
                } => RoutingError::NonFinite {
                    token: token + i * seq_len,
                    expert,
                    value,
                },
                other => other,
            })?;
            one.iter()
                .for_each(|(ids, weights)| all.push_token(ids, weights));
        }
        Ok(all)
    }
}

impl Route for Union {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    /// A sequence is routed by itself.
    fn batch_invariant(&self) -> bool {
        true
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let values = values(&logits)?;
        let routing = self.picks(&values, context.seq_len)?;
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        Ok(Routed {
            loads: counted(&routing, self.n_experts(), &values)?,
            weights: weight_heads::token_scalar(logits.clone(), &picks, f64::from(self.eps)),
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
        })
    }
}
