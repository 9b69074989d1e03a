//! The MoE layer, cut at its four seams: router, dispatch, experts, combine.

use crate::init::Init;
use crate::losses;
use crate::ops::{self, Dispatch};
use crate::routers::Route;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_checkpoint::ModelConfig;
use cadre_routing::{Loads, RoutingError};
use std::sync::Arc;

/// Parameters; experts are stacked.
#[derive(Module, Debug)]
pub struct Moe {
    /// Router, `[n_experts, d_model]`
    pub gate: Param<Tensor<2>>,
    /// `[n_experts, 2 I, d_model]`, gate rows first
    pub gate_up: Param<Tensor<3>>,
    /// `[n_experts, d_model, I]`
    pub down: Param<Tensor<3>>,
}

/// What the layer's routing did and what it costs.
#[derive(Debug)]
pub struct RoutingReport {
    /// Load-balance loss, 1 when perfectly even.
    pub balance: Tensor<1>,
    /// Mean squared log-sum-exp of the router logits.
    pub z: Tensor<1>,
    /// Picks per expert and routing entropy.
    pub loads: Loads,
}

impl Moe {
    /// Random parameters.
    #[must_use]
    pub fn init(config: &ModelConfig, init: &Init, name: &str, residual_scale: f32) -> Self {
        let (d, n, width) = (
            config.hidden_size,
            config.moe.n_experts,
            config.moe.intermediate_size,
        );
        let named = |part: &str| format!("{name}.{part}");
        Self {
            gate: Param::from_tensor(init.normal(&named("gate"), [n, d], 1.0)),
            gate_up: Param::from_tensor(init.normal(&named("gate_up"), [n, 2 * width, d], 1.0)),
            down: Param::from_tensor(init.normal(&named("down"), [n, d, width], residual_scale)),
        }
    }

    /// `x [T, d_model]` -> `[T, d_model]` and the routing's report.
    ///
    /// # Errors
    /// Router logits that are not finite.
    pub fn forward(
        &self,
        x: Tensor<2>,
        router: &dyn Route,
    ) -> Result<(Tensor<2>, RoutingReport), RoutingError> {
        let logits = ops::linear(x.clone(), self.gate.val());
        let routed = router.route(logits)?;
        let dispatch = Arc::new(Dispatch::new(
            &routed.ids,
            router.top_k(),
            router.n_experts(),
        ));
        let (gate_up, down) = (self.gate_up.val(), self.down.val());
        let y = ops::experts(x, gate_up, down, routed.weights, dispatch);
        let report = RoutingReport {
            balance: losses::load_balance(routed.probs, &routed.loads, false),
            z: losses::z_loss(routed.logits),
            loads: routed.loads,
        };
        Ok((y, report))
    }
}
