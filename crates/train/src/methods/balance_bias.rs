//! Balance without a loss: a bias per expert on the selection, moved against the load after every step.
//!
//! Paper: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024, arXiv 2408.15664; as
//! used by DeepSeek-V3, 2024, arXiv 2412.19437.
//! Rule: after an optimizer step, `b_e += rate * sign(mean(c) - c_e)` with `c` the picks of the whole global batch before
//! any dropping; the new bias takes part in selection from the next step on. Weights come from the unbiased scores, and
//! the bias gets no gradient, no weight decay and no momentum.
//! Recipe: `[balance_bias] rate = 0.001`, and `until_step` after which the bias stays (V3 trains its last part so).
//! State: the biases, in snapshots as `b.LAYER`; exported with the router.
//! Differs from paper: nothing. Check: methods::balance_bias::tests, tests/methods.rs.

use crate::architecture::Architecture;
use cadre_routing::{Loads, policies};
use serde::{Deserialize, Serialize};

/// `[balance_bias]` of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceBias {
    /// Step of the bias.
    pub rate: f32,
    /// The last step that moves it; without one, every step does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_step: Option<u64>,
}

impl BalanceBias {
    /// Refuses a rate that is not a rate, and routers that have no bias.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self, architecture: &Architecture) -> Result<(), String> {
        if !(self.rate > 0.0 && self.rate.is_finite()) {
            return Err(format!(
                "`balance_bias.rate` = {}, expected more than 0",
                self.rate
            ));
        }
        match architecture.moe.iter().find(|m| !m.router.takes_bias()) {
            Some(layer) => Err(format!(
                "[balance_bias] needs a router that selects by biased scores, `router.name` = {:?} does not; \
                 `group_limited` does",
                layer.router.name()
            )),
            None => Ok(()),
        }
    }

    /// Moves the biases (one `[n_experts]` per MoE layer) after `step`, by the loads of its global batch.
    pub fn update(&self, step: u64, biases: &mut [Vec<f32>], loads: &[Loads]) {
        if self.until_step.is_some_and(|last| step > last) {
            return;
        }
        for (bias, loads) in biases.iter_mut().zip(loads) {
            policies::update_bias(bias, loads.counts(), self.rate);
        }
    }
}

/// The biases of a run that begins: zero for every expert.
#[must_use]
pub fn zeros(architecture: &Architecture) -> Vec<Vec<f32>> {
    let experts = architecture.moe.iter().map(|m| m.router.n_experts());
    experts.map(|n| vec![0.0; n]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_update_and_the_end_of_updates() {
        // Counts and biases of the golden vectors: DeepSeek-V3 on six tokens and eight experts.
        let counts = [0u16, 1, 0, 2, 1, 2, 4, 2];
        let mut loads = Loads::new(8);
        for (expert, &n) in (0..).zip(&counts) {
            for _ in 0..n {
                loads.add_ids(&[expert], 1).unwrap();
            }
        }
        let mut biases = vec![vec![0.05, -0.10, 0.0, -0.20, 0.0, 0.10, 0.15, 0.0]];
        let rule = BalanceBias {
            rate: 0.001,
            until_step: Some(7),
        };
        rule.update(7, &mut biases, std::slice::from_ref(&loads));
        let expected = [0.051, -0.099, 0.001, -0.201, 0.001, 0.099, 0.149, -0.001];
        for (b, e) in biases[0].iter().zip(expected) {
            assert!((b - e).abs() < 1e-7, "{b} {e}");
        }
        let before = biases.clone();
        rule.update(8, &mut biases, &[loads]);
        assert_eq!(biases, before);
    }
}
