//! Random routing: THOR's stochastic experts, and the baseline without a learned router.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260.
//! Rule: k distinct experts with equal chances, weight 1 / k each (head D). In training `per = "pass"` (THOR) draws once
//! per layer and pass for the whole micro-batch, `per = "token"` for every token; in evaluation the draw follows from a
//! seed, the layer and the token's position, as in the engine.
//! Shapes: logits [T, E] (not looked at; layers have no router matrix), ids [T, k], weights [T k].
//! Aux: `losses.consistency` between two passes with draws of their own (THOR). Differs from paper: nothing.
//! Check: tests/routers.rs (causality), routers::uniform::tests.

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
    seed: u64,
}

impl Uniform {
    /// Draws `top_k` of `n_experts`; `seed` is that of evaluation.
    ///
    /// # Errors
    /// As [`policies::Uniform::new`].
    pub fn new(n_experts: usize, top_k: usize, per: Per, seed: u64) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::Uniform::new(n_experts, top_k)?,
            top_k,
            per,
            seed,
        })
    }

    /// The random numbers that the policy picks by: `[n_tokens, E]`.
    fn numbers(&self, n_tokens: usize, context: &RouteContext<'_>) -> Vec<f32> {
        let seq_len = context.seq_len.max(1);
        let seed = match context.training {
            true => context.stream("router.uniform").random(),
            false => self.seed,
        };
        let row = |t: usize| {
            let place = match (context.training, self.per) {
                (true, Per::Pass) => 0,
                (true, Per::Token) => t,
                (false, _) if context.seq_len == 0 => t,
                (false, _) => t % seq_len,
            };
            (0..self.n_experts())
                .map(move |expert| policies::Uniform::draw(seed, context.layer, place, expert))
        };
        (0..n_tokens).flat_map(row).collect()
    }
}

impl Route for Uniform {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn has_gate(&self) -> bool {
        false
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let mut routing = Routing::new();
        let numbers = self.numbers(logits.dims()[0], context);
        self.policy.route(&numbers, &mut routing)?;
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        let weight = 1.0 / self.top_k as f64;
        Ok(Routed {
            loads: counted(&routing, self.n_experts(), &values(&logits)?)?,
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
    use burn::tensor::Device;

    fn ids(per: Per, context: &RouteContext<'_>, n_tokens: usize) -> Vec<u16> {
        let router = Uniform::new(8, 1, per, 0).unwrap();
        let logits = Tensor::zeros([n_tokens, 8], &Device::flex());
        let routed = router.route(logits, context).unwrap();
        routed.routing.experts().to_vec()
    }

    #[test]
    fn a_pass_shares_a_draw_and_passes_differ() {
        let draw = |step: u64, layer: usize, pass: usize| {
            let context = RouteContext {
                seed: 1,
                step,
                layer,
                pass,
                training: true,
                ..RouteContext::default()
            };
            let ids = ids(Per::Pass, &context, 3);
            assert_eq!((ids[0], ids[1]), (ids[1], ids[2]));
            ids[0]
        };
        assert_eq!(
            draw(3, 1, 0),
            draw(3, 1, 0),
            "a recomputed pass sees the same"
        );
        let many: Vec<u16> = (0..60)
            .map(|i| draw(i / 4, i as usize % 2, i as usize / 2 % 2))
            .collect();
        assert!((0..8).all(|e| many.contains(&e)), "{many:?}");
    }

    #[test]
    fn evaluation_follows_from_the_position_in_the_sequence() {
        let context = RouteContext {
            layer: 2,
            seq_len: 5,
            ..RouteContext::default()
        };
        let ids = ids(Per::Pass, &context, 10);
        assert_eq!(ids[..5], ids[5..]);
        let draw = policies::Uniform::draw;
        let best = |position| {
            (0..8_u16)
                .max_by(|&a, &b| {
                    draw(0, 2, position, usize::from(a)).total_cmp(&draw(
                        0,
                        2,
                        position,
                        usize::from(b),
                    ))
                })
                .unwrap()
        };
        assert_eq!(ids[..5], [0, 1, 2, 3, 4].map(best));
    }
}
