//! Sparse upcycling: every expert is a copy of the dense feed-forward (Komatsuzaki et al., 2023, arXiv 2212.05055), or a copy
//! of which a share of the neurons begins anew (Drop-Upcycling, Nakamura et al., 2025, arXiv 2502.19261).
//!
//! Rule of the latter, `r` being the share: for every expert draw `floor(r f)` of the `f` neurons; their rows of `gate_proj` and
//! `up_proj` and their columns of `down_proj` become draws from `N(mu, sigma^2)`, with mean and standard deviation of the
//! values that they replace, for each matrix by itself. The neurons are the same in all three matrices, as in the paper's
//! section 3 (its code draws them for each matrix, and shuffles the neurons of experts first, which changes no result).
//!
//! Copies compute what the dense model does whatever the router picks, since the weights of a token's experts sum to 1.

use std::sync::Arc;

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Mixer, MoeConfig, NewFeedForwards, RouterConfig,
};

use super::draws::Draws;
use super::feed_forward::values;
use super::{FromDense, check, routers};
use crate::error::{ReshapeError, Result};

/// How a feed-forward becomes experts.
#[derive(Debug, Clone, Copy)]
pub struct UpcycleOptions {
    /// Experts of every layer.
    pub n_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// The share of an expert's neurons that begin anew, 0 to 1; the paper's best is 0.5.
    pub drop: f64,
    /// Of routers and of new neurons.
    pub seed: u64,
}

/// Experts for the dense model `source` that are copies of its feed-forwards, in all layers, with random routers.
///
/// # Errors
/// A model with experts, counts that no router can work with, and a share outside of 0 to 1.
pub fn upcycle(source: &Checkpoint, options: &UpcycleOptions) -> Result<FromDense> {
    let UpcycleOptions {
        n_experts,
        top_k,
        drop,
        seed,
    } = *options;
    check(source, n_experts, top_k)?;
    if !(0.0..=1.0).contains(&drop) {
        return Err(ReshapeError::Option {
            name: "drop",
            problem: format!("is {drop}, expected 0 to 1"),
        });
    }
    let config = source.config();
    let draws = Draws::new(seed);
    let routers = (0..config.n_layers).map(|layer| {
        let draws = draws.of(layer as u64).of(u64::MAX);
        routers::random(draws, n_experts, config.hidden_size)
    });
    let new = NewFeedForwards {
        moe: MoeConfig {
            layers: (0..config.n_layers).collect(),
            n_experts,
            top_k,
            intermediate_size: config.intermediate_size,
            router: RouterConfig::TopK { norm: true },
            ..MoeConfig::default()
        },
        routers: routers.collect(),
        shared_gates: Vec::new(),
        mixer: Arc::new(Copies {
            width: config.intermediate_size,
            n_new: (drop * config.intermediate_size as f64) as usize,
            draws,
        }),
    };
    let settings = format!("upcycle {n_experts} {top_k} {drop} {seed}");
    Ok(FromDense { new, settings })
}

/// Copies of a feed-forward, some of whose neurons are new.
#[derive(Debug)]
struct Copies {
    width: usize,
    /// New neurons of every expert.
    n_new: usize,
    draws: Draws,
}

impl Mixer for Copies {
    fn mix(
        &self,
        source: &Checkpoint,
        layer: usize,
        at: usize,
        part: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let mut all = values(source, layer, part)?;
        if self.n_new > 0 {
            let own = self.draws.of(layer as u64).of(at as u64);
            let neurons = own.shuffled(self.width);
            let draws = own.named(part);
            renew(part, &mut all, (self.width, &neurons[..self.n_new]), draws);
        }
        Ok(all)
    }
}

/// Replaces the rows (of `down_proj` the columns) of `neurons`.
fn renew(part: &str, values: &mut [f32], (width, neurons): (usize, &[usize]), draws: Draws) {
    let places = places(part, values.len(), width, neurons);
    let n = places.len() as f64;
    let mean = places.iter().map(|at| f64::from(values[*at])).sum::<f64>() / n;
    let squares = places
        .iter()
        .map(|at| (f64::from(values[*at]) - mean).powi(2));
    let deviation = (squares.sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    for (i, at) in places.into_iter().enumerate() {
        values[at] = (mean + deviation * draws.normal(i)) as f32;
    }
}

/// Indices of the values that belong to `neurons`.
fn places(part: &str, n: usize, width: usize, neurons: &[usize]) -> Vec<usize> {
    let d = n / width;
    match part == "down_proj.weight" {
        true => (0..d)
            .flat_map(|row| neurons.iter().map(move |neuron| row * width + neuron))
            .collect(),
        false => neurons
            .iter()
            .flat_map(|neuron| neuron * d..(neuron + 1) * d)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_neurons_have_the_moments_of_those_that_they_replace() {
        let (width, d) = (40, 50);
        let before: Vec<f32> = (0..width * d)
            .map(|i| (3.0 + 0.5 * Draws::new(1).normal(i)) as f32)
            .collect();
        let neurons: Vec<usize> = (0..20).map(|i| 2 * i).collect();
        for part in ["gate_proj.weight", "down_proj.weight"] {
            let mut after = before.clone();
            renew(part, &mut after, (width, &neurons), Draws::new(2));
            let places = places(part, before.len(), width, &neurons);
            let mut n_same = 0;
            for (at, (a, b)) in after.iter().zip(&before).enumerate() {
                let is_new = match part {
                    "down_proj.weight" => (at % width).is_multiple_of(2),
                    _ => (at / d).is_multiple_of(2),
                };
                assert!(is_new || a == b, "{part} {at}");
                n_same += usize::from(is_new && a == b);
            }
            assert_eq!(n_same, 0);
            let moments = |values: &[f32]| {
                let n = places.len() as f64;
                let mean = places.iter().map(|at| f64::from(values[*at])).sum::<f64>() / n;
                let square = places
                    .iter()
                    .map(|at| (f64::from(values[*at]) - mean).powi(2));
                (mean, (square.sum::<f64>() / n).sqrt())
            };
            let ((m0, s0), (m1, s1)) = (moments(&before), moments(&after));
            assert!(
                (m0 - m1).abs() < 0.06 && (s0 - s1).abs() < 0.04,
                "{m0} {m1} {s0} {s1}"
            );
        }
    }
}
