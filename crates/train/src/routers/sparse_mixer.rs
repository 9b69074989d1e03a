//! SparseMixer of PhiMoE: two experts, one after the other, each weighed against those nearly as good.
//!
//! Paper: GRIN: GRadient-INformed MoE, Liu et al., 2024, arXiv 2409.12136.
//! Rule: the expert of the largest logit m, its weight the softmax over the logits near m at it; without it, the same
//! again. Near is `(m - l_i) / max(|l_i|, m) <= 2 eps`; the near set is a constant for the gradient.
//! Shapes: logits [T, E], ids [T, 2], weights [T 2].
//! Aux: load balance 1e-2. Differs from paper: no sampling and none of the paper's estimator for its gradient: the
//! derivative is that of the weights as they are used at inference.
//! Check: tests/routers.rs (parity, gradients, causality).

use super::{Route, RouteContext, Routed, picked, values};
use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor, TensorData};
use cadre_routing::{Policy, RoutingError, policies};

/// Far below any logit, and finite.
const NEVER: f32 = -1e30;

/// Two thresholded softmaxes.
#[derive(Clone, Debug)]
pub struct SparseMixer {
    policy: policies::SparseMixer,
}

impl SparseMixer {
    /// Picks two of `n_experts`; `eps` is half the relative width of the threshold.
    ///
    /// # Errors
    /// As [`policies::SparseMixer::new`].
    pub fn new(n_experts: usize, eps: f32) -> Result<Self, RoutingError> {
        Ok(Self {
            policy: policies::SparseMixer::new(n_experts, eps)?,
        })
    }

    /// For the best expert (`slot` 0) or the one after it: its ids `[T, 1]`, and its probability among those near it.
    fn weight(&self, logits: &Tensor<2>, rows: &[f32], ids: &[u16], slot: usize) -> Tensor<2> {
        let n = self.n_experts();
        let mut mask = vec![0.0; rows.len()];
        for ((mask, row), ids) in mask
            .chunks_exact_mut(n)
            .zip(rows.chunks_exact(n))
            .zip(ids.chunks_exact(2))
        {
            let best = row[usize::from(ids[slot])];
            for (e, (mask, l)) in mask.iter_mut().zip(row).enumerate() {
                let taken = slot == 1 && e == usize::from(ids[0]);
                if taken || !self.policy.is_near(best, *l) {
                    *mask = NEVER;
                }
            }
        }
        let (device, dims) = (logits.device(), logits.dims());
        let mask = Tensor::from_data(TensorData::new(mask, dims), (&device, logits.dtype()));
        let picks: Vec<i64> = ids
            .iter()
            .skip(slot)
            .step_by(2)
            .map(|&id| i64::from(id))
            .collect();
        let picks: Tensor<2, Int> =
            Tensor::from_data(TensorData::new(picks, [dims[0], 1]), &device);
        softmax(logits.clone() + mask, 1).gather(1, picks)
    }
}

impl Route for SparseMixer {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, _: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let (routing, loads) = picked(&self.policy, &logits)?;
        let rows = values(&logits)?;
        let weight = |slot| self.weight(&logits, &rows, routing.experts(), slot);
        let weights = Tensor::cat(vec![weight(0), weight(1)], 1).flatten(0, 1);
        Ok(Routed {
            weights,
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
            loads,
        })
    }
}
