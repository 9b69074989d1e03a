//! Dense-to-sparse gate: all experts at a high temperature, about one at a low temperature, then exactly one.
//!
//! Paper: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, Nie et al., 2021,
//! arXiv 2112.14397.
//! Rule: `y = softmax((l + G) / tau)`, G Gumbel noise; soft stage: every expert with `y > threshold`; from `hard_from` on
//! the best one; weights are y (head A with 1/tau). tau falls from `temperature` to `min_temperature` over `decay_steps`.
//! Evaluation: the best expert with its `softmax(l)` (Switch's rule), or the gate without noise (`dense_eval`).
//! Shapes: logits [T, E], noise [T, E], ids ragged (1 to E per token), weights [pairs].
//! Aux: `E sum_e mean(y_e chosen_e) mean(chosen_e)`, which is E when all are chosen and 1 at one even expert: it pushes
//! towards few. Differs from paper: the best expert stays when no y passes the threshold.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, counted, gumbel, picked, values};
use crate::losses;
use crate::weight_heads::{self, Picks};
use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, TensorData};
use cadre_routing::policies::{self, Stage};
use cadre_routing::{Loads, Policy, Routing, RoutingError};
use serde::{Deserialize, Serialize};

/// How the temperature falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// By a constant factor per step.
    Exponential,
    /// By a constant amount per step.
    Linear,
}

/// Options of [`DenseToSparse`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DenseToSparseOptions {
    /// Temperature of the first step.
    pub temperature: f32,
    /// Temperature from step `decay_steps` on.
    pub min_temperature: f32,
    /// Steps between the two; 0 keeps the first.
    pub decay_steps: u64,
    /// The way between the two.
    pub decay: Decay,
    /// Smallest gate value that the soft stage lets through.
    pub threshold: f32,
    /// First step of the hard stage; `None` for never.
    pub hard_from: Option<u64>,
    /// Whether Gumbel noise is added in training.
    pub noise: bool,
    /// Whether evaluation uses the gate of the current step, and not the best expert alone.
    pub dense_eval: bool,
}

impl DenseToSparseOptions {
    /// Temperature and stage of step `step` (from 1).
    #[must_use]
    pub fn at(&self, step: u64) -> (f32, Stage) {
        let stage = match self.hard_from {
            Some(from) if step >= from => Stage::Hard,
            _ => Stage::Soft,
        };
        if self.decay_steps == 0 {
            return (self.temperature, stage);
        }
        let done = step.saturating_sub(1) as f32 / self.decay_steps as f32;
        let now = match self.decay {
            Decay::Exponential => {
                self.temperature * (self.min_temperature / self.temperature).powf(done)
            }
            Decay::Linear => self.temperature - done * (self.temperature - self.min_temperature),
        };
        (now.max(self.min_temperature), stage)
    }
}

/// The gate and its schedule.
#[derive(Clone, Debug)]
pub struct DenseToSparse {
    /// The gate at the end of its schedule.
    policy: policies::DenseToSparse,
    options: DenseToSparseOptions,
}

impl DenseToSparse {
    /// A gate over `n_experts`.
    ///
    /// # Errors
    /// As [`policies::DenseToSparse::new`], for both temperatures, and a lowest temperature above the first.
    pub fn new(n_experts: usize, options: DenseToSparseOptions) -> Result<Self, RoutingError> {
        let gate = |temperature, stage| {
            policies::DenseToSparse::new(n_experts, temperature, options.threshold, stage)
        };
        gate(options.temperature, Stage::Soft)?;
        let policy = gate(options.min_temperature, Stage::Hard)?;
        if options.min_temperature > options.temperature {
            return Err(RoutingError::BadOption {
                policy: policy.name(),
                option: "min_temperature",
                value: options.min_temperature.to_string(),
                expected: "at most temperature",
            });
        }
        Ok(Self { policy, options })
    }
}

impl Route for DenseToSparse {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let gate = context.training || self.options.dense_eval;
        let (tau, stage) = if gate {
            self.options.at(context.step)
        } else {
            (1.0, Stage::Hard)
        };
        let policy =
            policies::DenseToSparse::new(self.n_experts(), tau, self.options.threshold, stage)?;
        let noisy = context.training && self.options.noise;
        let (routing, loads, keys) = if noisy {
            let values = values(&logits)?;
            let noise = gumbel(&mut context.stream("router.gumbel"), values.len());
            let mut routing = Routing::new();
            policy.route_with_noise(&values, &noise, &mut routing)?;
            let loads = counted(&routing, self.n_experts(), &values)?;
            let noise = TensorData::new(noise, logits.dims());
            let noise = Tensor::from_data(noise, (&logits.device(), logits.dtype()));
            (routing, loads, logits.clone() + noise)
        } else {
            let (routing, loads) = picked(&policy, &logits)?;
            (routing, loads, logits.clone())
        };
        let keys = keys.div_scalar(tau);
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        Ok(Routed {
            weights: weight_heads::raw_softmax(keys.clone(), &picks, 1.0),
            probs: softmax(keys, 1),
            logits,
            routing,
            loads,
        })
    }

    /// The gate's own scale in either case: counts over tokens, so that fewer picks cost less.
    fn balance(&self, routed: &Routed, loads: &Loads, _: bool) -> Tensor<1> {
        let dims = routed.probs.dims();
        let mut chosen = vec![0_f32; dims[0] * dims[1]];
        for (t, (ids, _)) in routed.routing.iter().enumerate() {
            for &id in ids {
                chosen[t * dims[1] + usize::from(id)] = 1.0;
            }
        }
        let place = (&routed.probs.device(), routed.probs.dtype());
        let chosen = Tensor::from_data(TensorData::new(chosen, dims), place);
        losses::load_balance(routed.probs.clone() * chosen, loads, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DenseToSparseOptions {
        DenseToSparseOptions {
            temperature: 2.0,
            min_temperature: 0.5,
            decay_steps: 100,
            decay: Decay::Exponential,
            threshold: 1e-3,
            hard_from: Some(60),
            noise: true,
            dense_eval: false,
        }
    }

    #[test]
    fn the_temperature_falls_and_stays() {
        let exponential = options();
        assert_eq!(exponential.at(1).0, 2.0);
        assert!(
            (exponential.at(51).0 - 1.0).abs() < 1e-6,
            "half way: the geometric mean"
        );
        assert_eq!(exponential.at(500).0, 0.5);
        let decay = Decay::Linear;
        let linear = DenseToSparseOptions { decay, ..options() };
        assert!((linear.at(51).0 - 1.25).abs() < 1e-6, "half way: the mean");
        assert_eq!(
            (linear.at(59).1, linear.at(60).1),
            (Stage::Soft, Stage::Hard)
        );
    }

    #[test]
    fn options_are_checked() {
        let rising = DenseToSparseOptions {
            min_temperature: 3.0,
            ..options()
        };
        let text = DenseToSparse::new(4, rising).unwrap_err().to_string();
        assert!(text.contains("min_temperature = 3"), "{text}");
        let frozen = DenseToSparseOptions {
            min_temperature: 0.0,
            ..options()
        };
        assert!(DenseToSparse::new(4, frozen).is_err());
    }
}
