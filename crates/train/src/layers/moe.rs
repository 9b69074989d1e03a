//! The MoE layer, cut at its four seams: router, dispatch, experts, combine.

use crate::architecture::MoeLayer;
use crate::init::Init;
use crate::ops::{self, Dispatch};
use crate::routers::{RouteContext, Routed};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_routing::RoutingError;
use std::sync::Arc;

/// Parameters; experts are stacked.
#[derive(Module, Debug)]
pub struct Moe {
    /// Router, `[n_experts, d_model]`, null experts included
    pub gate: Param<Tensor<2>>,
    /// `[n_real_experts, 2 I, d_model]`, gate rows first
    pub gate_up: Param<Tensor<3>>,
    /// `[n_real_experts, d_model, I]`
    pub down: Param<Tensor<3>>,
}

/// Width of the model and of one expert.
#[derive(Clone, Copy, Debug)]
pub struct MoeWidths {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of one expert.
    pub expert: usize,
}

impl Moe {
    /// Random parameters; `name` is the tensors' prefix, `residual_scale` shrinks the experts' output.
    #[must_use]
    pub fn init(
        widths: MoeWidths,
        layer: &MoeLayer,
        init: &Init,
        name: &str,
        residual_scale: f32,
    ) -> Self {
        let (d, width) = (widths.d_model, widths.expert);
        let (n, n_real) = (layer.router.n_experts(), layer.router.n_real_experts());
        let named = |part: &str| format!("{name}.{part}");
        Self {
            gate: Param::from_tensor(init.normal(&named("gate"), [n, d], 1.0)),
            gate_up: Param::from_tensor(init.normal(
                &named("gate_up"),
                [n_real, 2 * width, d],
                1.0,
            )),
            down: Param::from_tensor(init.normal(
                &named("down"),
                [n_real, d, width],
                residual_scale,
            )),
        }
    }

    /// `x [T, d_model]` -> `[T, d_model]` and what the router decided.
    ///
    /// # Errors
    /// Router logits that are not finite.
    pub fn forward(
        &self,
        x: Tensor<2>,
        layer: &MoeLayer,
        context: &RouteContext<'_>,
    ) -> Result<(Tensor<2>, Routed), RoutingError> {
        let logits = ops::linear(x.clone(), self.gate.val());
        let routed = layer.router.route(logits, context)?;
        let n_real = layer.router.n_real_experts();
        let dispatch = Arc::new(Dispatch::of(&routed.routing, n_real));
        let (gate_up, down) = (self.gate_up.val(), self.down.val());
        let y = ops::experts(x, gate_up, down, routed.weights.clone(), dispatch);
        Ok((y, routed))
    }
}
