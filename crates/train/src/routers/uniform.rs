//! Random routing: THOR's stochastic experts, and the baseline without a learned router.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260.
//! Rule: k distinct experts with equal chances, weight 1 / k each (head D). In training `per = "pass"` (THOR) draws once
//! per layer and pass for the whole micro-batch, `per = "token"` for every token; in evaluation every token has its own.
//! Shapes: logits [T, E] (their values seed the draw, their gradient is 0), ids [T, k], weights [T k].
//! Aux: `losses.consistency` between two passes with draws of their own (THOR). Differs from paper: in evaluation the
//! expert follows from the token's state and a seed, not from a random stream.
//! Check: tests/routers.rs (parity, causality), routers::uniform::tests.

use super::{Route, RouteContext, Routed, counted, values};
use crate::weight_heads::{self, Picks};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use cadre_routing::{Loads, Policy, Routing, RoutingError, policies};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// What shares a draw in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// All tokens of a pass.
    Pass,
    /// Each token by itself.
    Token,
}

/// Experts at random.
#[derive(Clone, Debug)]
pub struct Uniform {
    policy: policies::Uniform,
    top_k: usize,
    per: Per,
}

impl Uniform {
    /// Draws `top_k` of `n_experts`; `seed` is that of evaluation.
    ///
    /// # Errors
    /// As [`policies::Uniform::new`].
    pub fn new(n_experts: usize, top_k: usize, per: Per, seed: u64) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::Uniform::new(n_experts, top_k, seed)?,
            top_k,
            per,
        })
    }
}

impl Route for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
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

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let values = values(&logits);
        let mut routing = Routing::new();
        // Routing first in any case: it refuses logits that are not finite.
        if context.training {
            let seed = context.stream("router.uniform").random();
            let drawn = policies::Uniform::new(self.n_experts(), self.top_k, seed)?;
            drawn.route(&values, &mut routing)?;
            if self.per == Per::Pass {
                drawn.fixed(routing.n_tokens(), &mut routing);
            }
        } else {
            self.policy.route(&values, &mut routing)?;
        }
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        let weight = f64::from(self.policy.weight());
        Ok(Routed {
            loads: counted(&routing, self.n_experts(), &values)?,
            weights: weight_heads::constant(&logits, &picks, weight),
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
        })
    }

    /// A constant 1: nothing learns from it.
    fn balance(&self, routed: &Routed, _: &Loads, _: bool) -> Tensor<1> {
        Tensor::ones([1], (&routed.probs.device(), routed.probs.dtype()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn a_pass_shares_a_draw_and_passes_differ() {
        let router = Uniform::new(8, 1, Per::Pass, 0).unwrap();
        let draw = |step: u64, layer: usize, pass: usize| {
            let context = RouteContext {
                seed: 1,
                step,
                layer,
                pass,
                training: true,
                ..RouteContext::default()
            };
            let logits =
                Tensor::from_data(TensorData::new(vec![0.5_f32; 24], [3, 8]), &Device::flex());
            let ids = router
                .route(logits, &context)
                .unwrap()
                .routing
                .experts()
                .to_vec();
            assert_eq!((ids[0], ids[1]), (ids[1], ids[2]));
            ids[0]
        };
        assert_eq!(
            draw(3, 1, 0),
            draw(3, 1, 0),
            "a recomputed pass sees the same"
        );
        let many: Vec<u16> = (0..40)
            .map(|i| draw(i / 4, i as usize % 2, i as usize / 2 % 2))
            .collect();
        assert!((0..8).all(|e| many.contains(&e)), "{many:?}");
    }
}
