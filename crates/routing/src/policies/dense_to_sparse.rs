//! Dense-to-sparse gate: all experts at a high temperature, about one at a low temperature.
//!
//! Paper: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, Nie et al., 2021,
//! arXiv 2112.14397.
//! Rule: `y = softmax((l + G) / tau)` with Gumbel noise G in training and 0 in evaluation; soft stage: every expert with
//! `y > threshold` (the best one if there is none); hard stage: the best one. Weights are the raw y (head A with 1/tau).
//! Shapes: logits [T, E], noise [T, E], ids ragged (1 to E per token).
//! Aux: load balance on the masked gates. Differs from paper: the best expert is kept when no y passes the threshold.
//! Check: policies::dense_to_sparse::tests, tests/golden.rs with golden/routing/section.json.

use serde::{Deserialize, Serialize};

use crate::policy::{self, Policy};
use crate::scores::Softmax;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Which experts the gate lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Every expert above the threshold.
    Soft,
    /// The best expert.
    Hard,
}

/// The gate at one temperature; the schedule of the temperature belongs to the trainer.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseToSparse {
    n_experts: usize,
    temperature: f32,
    threshold: f32,
    stage: Stage,
}

impl DenseToSparse {
    /// A gate over `n_experts` at `temperature`; the paper's code uses a threshold of 0.001.
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] when the temperature is not positive, the threshold is outside 0 to 1, or the number
    /// of experts does not fit.
    pub fn new(
        n_experts: usize,
        temperature: f32,
        threshold: f32,
        stage: Stage,
    ) -> Result<Self, RoutingError> {
        const NAME: &str = "dense_to_sparse";
        policy::check_sizes(NAME, n_experts, 1)?;
        let valid = temperature.is_finite() && temperature > 0.0;
        policy::check_option(NAME, "temperature", temperature, valid, "more than 0")?;
        policy::check_option(
            NAME,
            "threshold",
            threshold,
            (0.0..1.0).contains(&threshold),
            "0 to 1",
        )?;
        Ok(Self {
            n_experts,
            temperature,
            threshold,
            stage,
        })
    }

    /// Routes as [`Policy::route`] does, with given Gumbel noise of the shape of `logits`. Passing the noise in, and
    /// not drawing it here, lets a recomputed forward pass see the same noise.
    ///
    /// # Errors
    /// As [`Policy::route`], for the sum of logits and noise; [`RoutingError::BadOption`] when the shapes differ.
    pub fn route_with_noise(
        &self,
        logits: &[f32],
        noise: &[f32],
        routing: &mut Routing,
    ) -> Result<(), RoutingError> {
        routing.clear();
        let same = noise.len() == logits.len();
        policy::check_option(
            "dense_to_sparse",
            "length of noise",
            noise.len(),
            same,
            "one value per logit",
        )?;
        let noisy: Vec<f32> = logits.iter().zip(noise).map(|(l, g)| l + g).collect();
        self.route(&noisy, routing)
    }
}

impl Policy for DenseToSparse {
    fn name(&self) -> &'static str {
        "dense_to_sparse"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        match self.stage {
            Stage::Soft => self.n_experts,
            Stage::Hard => 1,
        }
    }

    fn causal(&self) -> bool {
        true
    }

    fn batch_invariant(&self) -> bool {
        true
    }

    fn stages(&self) -> Option<&dyn Stages> {
        Some(self)
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        policy::begin(logits, self.n_experts, 0, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            let softmax = Softmax::with_temperature(row, self.temperature);
            let mut next = select::next_best(row, None);
            let mut n_picks = 0;
            while let Some((id, logit)) = next {
                let y = softmax.p(logit);
                if n_picks > 0 && (self.stage == Stage::Hard || y <= self.threshold) {
                    break;
                }
                routing.push_pair(id, y);
                n_picks += 1;
                next = select::next_best(row, next);
            }
            routing.end_token();
        }
        Ok(())
    }
}

impl Stages for DenseToSparse {
    fn reach(&self) -> Reach {
        match self.stage {
            Stage::Soft => Reach::Above(self.threshold),
            Stage::Hard => Reach::Fixed(1),
        }
    }

    fn shares(&self, logits: &[f32], shares: &mut [f32]) {
        let softmax = Softmax::with_temperature(logits, self.temperature);
        for (share, logit) in shares.iter_mut().zip(logits) {
            *share = softmax.p(*logit);
        }
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        let softmax = Softmax::with_temperature(logits, self.temperature);
        weights.iter_mut().for_each(|w| *w = softmax.p(*w));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picks(temperature: f32, threshold: f32, stage: Stage, logits: &[f32]) -> Routing {
        let mut routing = Routing::new();
        DenseToSparse::new(logits.len(), temperature, threshold, stage)
            .unwrap()
            .route(logits, &mut routing)
            .unwrap();
        routing
    }

    #[test]
    fn cooling_goes_from_all_experts_to_one() {
        // At temperature 1: softmax(0, ln 9) = 0.1, 0.9. At 0.5: 1/82, 81/82.
        let logits = [0.0, 9f32.ln()];
        let warm = picks(1.0, 0.05, Stage::Soft, &logits);
        assert_eq!(warm.experts(), [1, 0]);
        assert!((warm.weights()[1] - 0.1).abs() < 1e-6);
        let cool = picks(0.5, 0.05, Stage::Soft, &logits);
        assert_eq!(cool.experts(), [1]);
        assert!((cool.weights()[0] - 81.0 / 82.0).abs() < 1e-6);
        assert_eq!(picks(1.0, 0.0, Stage::Hard, &logits).experts(), [1]);
    }

    #[test]
    fn a_threshold_that_nobody_passes_keeps_the_best() {
        assert_eq!(
            picks(1.0, 0.6, Stage::Soft, &[1.0, 1.0]).token(0),
            (&[0][..], &[0.5][..])
        );
    }

    #[test]
    fn noise_must_have_the_shape_of_the_logits() {
        let policy = DenseToSparse::new(2, 1.0, 0.001, Stage::Soft).unwrap();
        let mut routing = Routing::new();
        assert!(
            policy
                .route_with_noise(&[0.0; 4], &[0.0; 2], &mut routing)
                .is_err()
        );
        policy
            .route_with_noise(&[0.0, 1.0], &[2.0, 0.0], &mut routing)
            .unwrap();
        assert_eq!(routing.experts(), [0, 1]);
    }
}
