//! Experts that evolve: one expert is trained first, and becomes many.
//!
//! Paper: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, Nie et al., 2021,
//! arXiv 2112.14397.
//! Rule: up to and including step `dense_steps` every token takes expert 0 with weight 1 (expert-diversify phase); then
//! every expert becomes a perturbed copy of it, and the recipe's router takes over, its schedules counting from there
//! (gate-sparsify phase; the paper's router is `dense_to_sparse`).
//! Recipe: `[evolve] dense_steps = N, spawn = { mask = 0.1 }` or `{ noise = 0.02 }`.
//! State: none; copies are made at the beginning of step `dense_steps + 1` from the parameters and a stream named by the
//! seed, so a run that is resumed there makes the same.
//! Differs from paper: the published code has no spawning; ours is `W_e = W mask_e` with each value kept with chance
//! `1 - mask`, or `W_e = W + noise std(W) N(0, 1)`. AdamW's moments are copied unperturbed. The balance loss and the
//! router wait for the second phase. Check: methods::evolve::tests, tests/methods.rs.

use crate::architecture::Architecture;
use crate::init::{normal_pair, stream};
use crate::lm::LanguageModel;
use crate::optimizer::Moments;
use crate::params;
use crate::routers::{Route, RouteContext, Routed};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use cadre_routing::{Loads, Policy, Routing, RoutingError};
use rand::Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;

/// `[evolve]` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evolve {
    /// Steps with one expert.
    pub dense_steps: u64,
    /// How copies are made different.
    #[serde(default = "mask_a_tenth")]
    pub spawn: Spawn,
}

/// How a copy of an expert differs from it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spawn {
    /// Each value is 0 with this chance.
    Mask(f32),
    /// Normal noise of this many standard deviations of the tensor.
    Noise(f32),
}

fn mask_a_tenth() -> Spawn {
    Spawn::Mask(0.1)
}

impl Evolve {
    /// Refuses phases that do not happen and perturbations that are none.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, steps: u64, architecture: &Architecture) -> Result<(), String> {
        if self.dense_steps == 0 || self.dense_steps >= steps {
            return Err(format!(
                "`evolve.dense_steps` = {}, expected 1 to less than `train.steps` = {steps}",
                self.dense_steps
            ));
        }
        let (key, value, most) = match self.spawn {
            Spawn::Mask(share) => ("mask", share, 1.0),
            Spawn::Noise(size) => ("noise", size, f32::MAX),
        };
        if !(0.0..most).contains(&value) {
            return Err(format!(
                "`evolve.spawn.{key}` = {value}, expected at least 0 and less than {most}"
            ));
        }
        if architecture.moe.is_empty() {
            return Err("[evolve] needs a model with experts".to_owned());
        }
        Ok(())
    }

    /// The architecture with both phases in every router.
    #[must_use]
    pub fn wrap(&self, mut architecture: Architecture) -> Architecture {
        let wrap = |layer: crate::architecture::MoeLayer| crate::architecture::MoeLayer {
            router: Box::new(Phased {
                dense_steps: self.dense_steps,
                after: layer.router,
            }),
            ..layer
        };
        architecture.moe = architecture.moe.into_iter().map(wrap).collect();
        architecture
    }

    /// Turns expert 0 of every layer into all of them, where `step` is the first of the second phase.
    #[must_use]
    pub fn spawn(
        &self,
        step: u64,
        seed: u64,
        model: LanguageModel,
        moments: &mut BTreeMap<String, Moments>,
    ) -> LanguageModel {
        if step != self.dense_steps + 1 {
            return model;
        }
        let values = params::collect(&model);
        for (path, moments) in moments.iter_mut() {
            if let Some((shape, _)) = values.get(path).filter(|_| is_experts(path)) {
                let size: usize = shape[1..].iter().product();
                repeat_first(&mut moments.first, size);
                repeat_first(&mut moments.second, size);
            }
        }
        let replaced = params::replace(model, |path, shape| {
            let values = values[path].1.clone();
            if !is_experts(path) {
                return Ok::<_, Infallible>(values);
            }
            let size = shape[1..].iter().product();
            let copies = (0..shape[0]).flat_map(|e| {
                let name = format!("spawn {path} {e}");
                self.copy(&values[..size], seed, &name)
            });
            Ok(copies.collect())
        });
        match replaced {
            Ok(model) => model,
            Err(never) => match never {},
        }
    }

    fn copy(&self, values: &[f32], seed: u64, name: &str) -> Vec<f32> {
        let mut rng = stream(seed, name);
        match self.spawn {
            Spawn::Mask(share) => values
                .iter()
                .map(|&x| if rng.random::<f32>() < share { 0.0 } else { x })
                .collect(),
            Spawn::Noise(size) => {
                let n = values.len() as f64;
                let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
                let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2));
                let scale = size * (variance.sum::<f64>() / n).sqrt() as f32;
                let noise = (0..values.len().div_ceil(2)).flat_map(|_| normal_pair(&mut rng));
                values
                    .iter()
                    .zip(noise)
                    .map(|(x, noise)| x + scale * noise)
                    .collect()
            }
        }
    }
}

/// Whether a parameter holds the routed experts of a layer, `[n_experts, ..]`.
fn is_experts(path: &str) -> bool {
    path.ends_with(".Moe.gate_up") || path.ends_with(".Moe.down")
}

fn repeat_first(values: &mut [f32], size: usize) {
    let (first, others) = values.split_at_mut(size);
    for other in others.chunks_exact_mut(size) {
        other.copy_from_slice(first);
    }
}

/// One expert for everybody, then the router.
#[derive(Debug)]
struct Phased {
    dense_steps: u64,
    after: Box<dyn Route>,
}

impl Phased {
    /// Step 0 is outside of a run.
    fn is_dense(&self, step: u64) -> bool {
        (1..=self.dense_steps).contains(&step)
    }
}

impl Route for Phased {
    fn policy(&self) -> &dyn Policy {
        self.after.policy()
    }

    fn has_gate(&self) -> bool {
        self.after.has_gate()
    }

    fn takes_bias(&self) -> bool {
        self.after.takes_bias()
    }

    fn groups(&self) -> [usize; 2] {
        self.after.groups()
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        if !self.is_dense(context.step) {
            let step = context.step.saturating_sub(self.dense_steps);
            return self.after.route(logits, &RouteContext { step, ..*context });
        }
        let [n_tokens, _] = logits.dims();
        let mut routing = Routing::new();
        for _ in 0..n_tokens {
            routing.push_token(&[0], &[1.0]);
        }
        let mut loads = Loads::new(self.n_experts());
        loads.add_routing(&routing)?;
        // No gradient: there is nothing to decide yet.
        let logits = logits.detach();
        let weights = Tensor::ones([n_tokens], &logits.device());
        Ok(Routed {
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
            weights,
            loads,
        })
    }

    fn unbiased(&self, routed: &Routed) -> Result<Routing, RoutingError> {
        self.after.unbiased(routed)
    }

    fn balance_loads(&self, routed: &Routed) -> Loads {
        self.after.balance_loads(routed)
    }

    fn balance(&self, routed: &Routed, loads: &Loads, legacy_scale: bool) -> Tensor<1> {
        self.after.balance(routed, loads, legacy_scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_masked_or_noisy_reproducible_and_different() {
        let values: Vec<f32> = (0..4000).map(|i| ((i % 7) as f32 - 3.0) * 0.1).collect();
        let evolve = |spawn| Evolve {
            dense_steps: 1,
            spawn,
        };
        let masked = evolve(Spawn::Mask(0.25)).copy(&values, 1, "a");
        assert_eq!(masked, evolve(Spawn::Mask(0.25)).copy(&values, 1, "a"));
        assert_ne!(masked, evolve(Spawn::Mask(0.25)).copy(&values, 1, "b"));
        let changed = masked.iter().zip(&values).filter(|(m, v)| m != v).count();
        // A seventh of the values is 0 already.
        let share = changed as f64 / (4000.0 * 6.0 / 7.0);
        assert!((share - 0.25).abs() < 0.03, "{share}");
        assert!(masked.iter().zip(&values).all(|(m, v)| m == v || *m == 0.0));

        let noisy = evolve(Spawn::Noise(0.02)).copy(&values, 1, "a");
        let square = noisy
            .iter()
            .zip(&values)
            .map(|(n, v)| f64::from(n - v).powi(2));
        let std = (square.sum::<f64>() / 4000.0).sqrt();
        // The values have a standard deviation of 0.2.
        assert!((std - 0.02 * 0.2).abs() < 3e-4, "{std}");
        assert_eq!(evolve(Spawn::Mask(0.0)).copy(&values, 1, "a"), values);
    }

    #[test]
    fn moments_of_the_first_expert_are_given_to_all() {
        let mut values = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        repeat_first(&mut values, 2);
        assert_eq!(values, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    }
}
