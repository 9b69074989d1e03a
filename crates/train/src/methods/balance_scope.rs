//! Over which tokens the balance loss counts loads: the micro-batch, the global batch, or what was seen of it so far.
//!
//! Paper: Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models,
//! Qiu et al., 2025, arXiv 2501.11873.
//! Rule: the loss of micro-batch j is `E sum_i f_i P_i^j` with its own probabilities P; `micro`: f of micro-batch j;
//! `buffer`: f of the micro-batches of this step up to j; `global`: f of all of them. Because f is a constant for the
//! gradient, the mean over micro-batches is with `global` exactly the loss and the gradient of the whole batch.
//! Recipe: `losses.scope = "micro" | "global" | "buffer"`.
//! State: none outlives a step. Cost: `global` first runs every micro-batch forward without gradient, with the same
//! random draws. With one micro-batch per step all three are the same, and nothing is run twice.
//! Differs from paper: the exact form is had by the extra forward pass, which one machine can afford, in the place of
//! counts exchanged between workers. Check: methods::balance_scope::tests, tests/methods.rs.

use cadre_routing::{Loads, RoutingError};
use serde::{Deserialize, Serialize};

/// `losses.scope` of a recipe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The micro-batch at hand.
    #[default]
    Micro,
    /// All micro-batches of the optimizer step.
    Global,
    /// The micro-batches of the optimizer step so far.
    Buffer,
}

/// The loads of one optimizer step, by MoE layer.
#[derive(Debug)]
pub struct ScopedLoads {
    scope: Scope,
    counted: Vec<Loads>,
}

impl ScopedLoads {
    /// Nothing counted yet.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        Self {
            scope,
            counted: Vec::new(),
        }
    }

    /// Adds the loads of one micro-batch.
    ///
    /// # Errors
    /// Layers with other numbers of experts than before.
    pub fn count(&mut self, loads: &[Loads]) -> Result<(), RoutingError> {
        merge(&mut self.counted, loads.iter())
    }

    /// The loads that the balance loss of a micro-batch with loads of its `own` uses, layer by layer.
    ///
    /// # Errors
    /// As [`ScopedLoads::count`].
    pub fn of(&mut self, own: Vec<Loads>) -> Result<Vec<Loads>, RoutingError> {
        if self.scope == Scope::Buffer {
            self.count(&own)?;
        }
        Ok(match self.scope {
            Scope::Micro => own,
            Scope::Global | Scope::Buffer => self.counted.clone(),
        })
    }
}

/// Adds loads layer by layer; an empty sum takes them over.
pub(crate) fn merge<'a>(
    sum: &mut Vec<Loads>,
    loads: impl Iterator<Item = &'a Loads>,
) -> Result<(), RoutingError> {
    if sum.is_empty() {
        sum.extend(loads.cloned());
        return Ok(());
    }
    sum.iter_mut()
        .zip(loads)
        .try_for_each(|(sum, loads)| sum.merge(loads))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routers::{RouteContext, Routed, RouterOptions, RouterSizes};
    use burn::tensor::{Device, Tensor};

    /// The logits of the golden vectors.
    const LOGITS: [[f32; 8]; 6] = [
        [1.2, -0.3, 0.7, 2.1, -1.0, 0.4, 0.0, 1.6],
        [0.1, 0.9, -0.5, 1.1, 2.3, -0.7, 1.4, 0.2],
        [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3],
        [-1.2, 3.5, 0.3, -0.4, 0.6, 0.2, -2.0, 0.9],
        [0.5, 0.4, -0.1, 2.6, 0.3, 1.0, 0.8, 2.4],
        [1.1, -0.8, 0.6, 1.9, 0.7, -0.2, 1.3, -0.6],
    ];

    /// Mean over two micro-batches of three tokens of the balance loss with top-1 loads.
    fn value(scope: Scope) -> f64 {
        let sizes = RouterSizes {
            n_experts: 8,
            top_k: 1,
            norm_topk_prob: false,
        };
        let router = RouterOptions::default().build(sizes).unwrap();
        let routed: Vec<Routed> = LOGITS
            .chunks(3)
            .map(|rows| {
                let data: [[f32; 8]; 3] = rows.try_into().unwrap();
                let logits = Tensor::from_floats(data, &Device::flex());
                router.route(logits, &RouteContext::default()).unwrap()
            })
            .collect();
        let mut loads = ScopedLoads::new(scope);
        if scope == Scope::Global {
            for routed in &routed {
                loads.count(&[router.balance_loads(routed)]).unwrap();
            }
        }
        let values = routed.iter().map(|routed| {
            let loads = loads.of(vec![router.balance_loads(routed)]).unwrap();
            let balance = router.balance(routed, &loads[0], false);
            f64::from(balance.into_scalar::<f32>())
        });
        values.sum::<f64>() / 2.0
    }

    #[test]
    fn golden_values_of_each_scope() {
        for (scope, expected) in [
            (Scope::Micro, 1.755_748),
            (Scope::Global, 1.480_607),
            (Scope::Buffer, 1.483_405),
        ] {
            let value = value(scope);
            assert!((value - expected).abs() < 2e-6, "{scope:?}: {value}");
        }
    }
}
