//! GShard's top-2: the best expert, and a second one that may be drawn.
//!
//! Paper: GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, Lepikhin et al., 2020, arXiv
//! 2006.16668; `second = "gumbel"` as in DeepSpeed, `"random"` as in the paper.
//! Rule: the best expert, and the best of the rest: of `l` (`plain`), of `l` with Gumbel noise (`gumbel`), or of `l`, kept
//! only when `2 w2 > u` (`random`); weights are p over the sum of the two (head B), made before a second is dropped.
//! Shapes: logits [T, E], ids [T, 1 or 2], weights [pairs].
//! Aux: load balance 1e-2 with the shares of the FIRST picks. Differs from paper: no groups of tokens; noise and dropping
//! in training only.
//! Check: tests/routers.rs (parity, gradients, causality), tests/routing_golden.rs.

use super::{Route, RouteContext, Routed, counted, gumbel, values};
use crate::weight_heads::{self, Picks};
use burn::tensor::activation::softmax;
use burn::tensor::{Tensor, TensorData};
use cadre_routing::policies::{self, keep_seconds};
use cadre_routing::{Loads, Policy, Routing, RoutingError};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// How the second expert is chosen in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Second {
    /// The best of the rest.
    Plain,
    /// The best of the rest after adding Gumbel noise.
    Gumbel,
    /// The best of the rest, kept with twice its weight as chance.
    Random,
}

/// The two best experts, renormalised.
#[derive(Clone, Debug)]
pub struct Top2 {
    policy: policies::Top2,
    second: Second,
}

impl Top2 {
    /// Picks two of `n_experts`.
    ///
    /// # Errors
    /// As [`policies::Top2::new`].
    pub fn new(n_experts: usize, second: Second) -> Result<Self, RoutingError> {
        let policy = policies::Top2::new(n_experts)?;
        Ok(Self { policy, second })
    }
}

impl Route for Top2 {
    fn policy(&self) -> &dyn Policy {
        &self.policy
    }

    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError> {
        let values = values(&logits)?;
        let mut routing = Routing::new();
        let noisy = context.training && self.second == Second::Gumbel;
        if noisy {
            let noise = gumbel(&mut context.stream("router.second"), values.len());
            self.policy
                .route_with_noise(&values, &noise, &mut routing)?;
        } else {
            self.policy.route(&values, &mut routing)?;
        }
        let picks = Picks::of(&routing, self.n_experts(), &logits);
        let mut weights = weight_heads::renormalised(logits.clone(), &picks, 1.0);
        if context.training && self.second == Second::Random {
            let mut rng = context.stream("router.second");
            let uniform: Vec<f32> = (0..routing.n_tokens()).map(|_| rng.random()).collect();
            let keep = keep_seconds(&routing, &uniform);
            weights = select(weights, &keep);
            routing = routing.kept(&keep);
        }
        Ok(Routed {
            loads: counted(&routing, self.n_experts(), &values)?,
            weights,
            probs: softmax(logits.clone(), 1),
            logits,
            routing,
        })
    }

    fn balance_loads(&self, routed: &Routed) -> Loads {
        let mut loads = Loads::new(self.n_experts());
        let first: Vec<u16> = routed.routing.iter().map(|(ids, _)| ids[0]).collect();
        loads
            .add_ids(&first, 1)
            .expect("the policy picks existing experts");
        loads
    }
}

/// The weights whose flag is set.
fn select(weights: Tensor<1>, keep: &[bool]) -> Tensor<1> {
    let kept: Vec<i64> = (0..)
        .zip(keep)
        .filter_map(|(pair, keep)| keep.then_some(pair))
        .collect();
    let n = kept.len();
    let device = weights.device();
    weights.select(0, Tensor::from_data(TensorData::new(kept, [n]), &device))
}
