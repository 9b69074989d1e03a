//! The MoE layer, cut at its four seams: router, dispatch, experts, combine; and what stands beside the experts.

use super::factored::Thin;
use super::mlp::Mlp;
use super::recurrent::RouterGru;
use super::residual::ResidualMlp;
use crate::architecture::{Architecture, MoeLayer};
use crate::init::Init;
use crate::ops::{self, Dispatch, Numerics};
use crate::routers::{Order, RouteContext, Routed};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_routing::filters::{self, Capacity};
use cadre_routing::{Routing, RoutingError};
use rand::Rng;
use std::sync::Arc;

/// Parameters; experts are stacked.
#[derive(Module, Debug)]
pub struct Moe {
    /// Router, `[n_experts, d_model]` or `[n_experts, p]`, null experts included; absent for rules without logits, and where
    /// a router before the layers makes them
    pub gate: Option<Param<Tensor<2>>>,
    /// `[n_stored, 2 I, d_model]`, gate rows first; absent for experts in factors. `n_stored` are the real experts, or those
    /// whose weights they share
    pub gate_up: Option<Param<Tensor<3>>>,
    /// `[n_stored, d_model, I]`; absent for experts in factors
    pub down: Option<Param<Tensor<3>>>,
    /// Experts in factors
    pub thin: Option<Thin>,
    /// `[p, d_model]`, what the recurrent router reads
    pub router_in: Option<Param<Tensor<2>>>,
    /// Experts that every token uses, as one
    pub shared: Option<Mlp>,
    /// A feed-forward beside the experts
    pub residual: Option<ResidualMlp>,
}

/// Where the router logits of a layer come from.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it lives for one call")]
pub enum Logits<'a> {
    /// The layer's own matrix, and zeros for rules that do not look at them.
    Gate,
    /// The recurrent router: its cell, and the state `[T, p]` of the tokens, which is moved on.
    Recurrent(&'a RouterGru, &'a mut Tensor<2>),
    /// `[T, n_experts]`, from a router that has run before the layers.
    Foretold(Tensor<2>),
}

impl Moe {
    /// Random parameters; `name` is the tensors' prefix, `residual_scale` shrinks what joins the residual stream.
    #[must_use]
    pub fn init(
        architecture: &Architecture,
        layer: &MoeLayer,
        init: &Init,
        name: &str,
        residual_scale: f32,
    ) -> Self {
        let (config, parts) = (&architecture.config, architecture.parts);
        let (d, width) = (config.hidden_size, config.moe.intermediate_size);
        let (n, n_real) = (layer.router.n_experts(), layer.router.n_real_experts());
        let named = |part: &str| format!("{name}.{part}");
        let matrix = |part: &str, shape| Param::from_tensor(init.normal(&named(part), shape, 1.0));
        let recurrent = parts.recurrent_router.filter(|_| layer.router.has_gate());
        let n_stored = match config.moe.shared_weights.is_empty() {
            true => n_real,
            false => config.n_stored_in(layer.layer),
        };
        let stack = |part: &str, shape, scale| {
            let whole = config.moe.factors.is_none();
            whole.then(|| Param::from_tensor(init.normal(&named(part), shape, scale)))
        };
        Self {
            gate: (layer.router.has_gate() && parts.decoupled.is_none())
                .then(|| matrix("gate", [n, recurrent.unwrap_or(d)])),
            gate_up: stack("gate_up", [n_stored, 2 * width, d], 1.0),
            down: stack("down", [n_stored, d, width], residual_scale),
            thin: config.moe.factors.as_ref().map(|factors| {
                let before = config.moe.layers.iter().take_while(|l| **l < layer.layer);
                let factors = (factors, before.count());
                Thin::init([n_stored, d, width], factors, init, (name, residual_scale))
            }),
            router_in: recurrent.map(|p| matrix("router_in", [p, d])),
            shared: parts
                .shared
                .map(|width| Mlp::init(d, width, init, &named("shared"), residual_scale)),
            residual: parts.residual.map(|(kind, width)| {
                ResidualMlp::init([d, width], kind, init, &named("residual"), residual_scale)
            }),
        }
    }

    /// `x [T, d_model]` -> `[T, d_model]` and what the router decided. The router is f32 whatever `numerics` says.
    ///
    /// # Errors
    /// Router logits that are not finite.
    pub fn forward(
        &self,
        x: Tensor<2>,
        layer: &MoeLayer,
        context: &RouteContext<'_>,
        from: Logits<'_>,
        numerics: Numerics,
    ) -> Result<(Tensor<2>, Routed), RoutingError> {
        let logits = self.logits(&x, layer, from);
        let mut routed = layer.router.route(logits, context)?;
        let [gate_up, down] = self.matrices();
        let n_stored = down.dims()[0];
        let dispatch = Arc::new(dispatch(&mut routed, layer, context, n_stored));
        let mut y = numerics.experts(x.clone(), gate_up, down, routed.weights.clone(), dispatch);
        if let Some(shared) = &self.shared {
            y = y + shared.forward(x.clone(), numerics);
        }
        if let Some(residual) = &self.residual {
            y = residual.forward(x, y, numerics);
        }
        Ok((y, routed))
    }

    /// `[n_stored, 2 I, d_model]`, gate rows first, and `[n_stored, d_model, I]`.
    fn matrices(&self) -> [Tensor<3>; 2] {
        match (&self.gate_up, &self.down, &self.thin) {
            (Some(gate_up), Some(down), _) => [gate_up.val(), down.val()],
            (.., Some(thin)) => thin.whole(),
            _ => unreachable!("experts are whole or in factors"),
        }
    }

    /// Router logits `[T, n_experts]`; zeros for rules that do not look at them.
    fn logits(&self, x: &Tensor<2>, layer: &MoeLayer, from: Logits<'_>) -> Tensor<2> {
        match (&self.gate, &self.router_in, from) {
            (_, _, Logits::Foretold(logits)) => logits,
            (Some(gate), Some(router_in), Logits::Recurrent(gru, state)) => {
                let u = ops::linear(x.clone(), router_in.val());
                *state = gru.forward(u, state.clone());
                ops::linear(state.clone(), gate.val())
            }
            (Some(gate), ..) => ops::linear(x.clone(), gate.val()),
            (None, ..) => Tensor::zeros([x.dims()[0], layer.router.n_experts()], &x.device()),
        }
    }
}

/// The dispatch of all pairs, or in training of those that the layer's capacity lets through; the others are counted.
fn dispatch(
    routed: &mut Routed,
    layer: &MoeLayer,
    context: &RouteContext<'_>,
    n_stored: usize,
) -> Dispatch {
    let n_real = layer.router.n_real_experts();
    let shared = layer.shared_weights.as_deref();
    // The weights of experts that share some come once, and every pick goes to them.
    let stored = shared.map(|map| with_weights_of(&routed.routing, map, n_stored));
    match layer.capacity {
        Some((capacity, order)) if context.training => {
            let seed = context.stream("capacity").random();
            let keep = within_capacity(&routed.routing, n_real, capacity, order, seed);
            let n_dropped = keep.iter().filter(|keep| !**keep).count();
            routed.loads.add_dropped(n_dropped as u64);
            Dispatch::kept(stored.as_ref().unwrap_or(&routed.routing), n_stored, &keep)
        }
        _ => Dispatch::of(stored.as_ref().unwrap_or(&routed.routing), n_stored),
    }
}

/// `routing` with the stored expert of each pick; null ones stay behind the last of these.
fn with_weights_of(routing: &Routing, map: &[u16], n_stored: usize) -> Routing {
    let mut stored = Routing::new();
    for (experts, weights) in routing.iter() {
        let of = |id: &u16| {
            map.get(usize::from(*id))
                .copied()
                .unwrap_or(n_stored as u16)
        };
        let experts: Vec<u16> = experts.iter().map(of).collect();
        stored.push_token(&experts, weights);
    }
    stored
}

/// One flag per pair. Null picks take no slot and do not raise the capacity.
fn within_capacity(
    routing: &Routing,
    n_real: usize,
    capacity: Capacity,
    order: Order,
    seed: u64,
) -> Vec<bool> {
    let real = routing.experts().iter();
    let n_pairs = real.filter(|&&id| usize::from(id) < n_real).count();
    let slots = vec![capacity.slots(n_pairs, n_real); n_real];
    filters::keep(routing, &slots, order.with_seed(seed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routers::{RouterOptions, RouterSizes};
    use burn::tensor::Device;
    use cadre_routing::filters::Rounding;

    /// The worked example of `golden/routing/section.json`: one slot per expert, by position; tokens 4 and 5 get nothing.
    #[test]
    fn capacity_drops_pairs_in_training_only() {
        let options = RouterOptions::named("switch");
        let sizes = RouterSizes {
            n_experts: 8,
            top_k: 1,
            norm_topk_prob: false,
        };
        let capacity = Capacity {
            factor: 1.0,
            min: 0,
            rounding: Rounding::Ceil,
        };
        let layer = MoeLayer {
            layer: 0,
            router: options.build(sizes).unwrap(),
            capacity: Some((capacity, Order::Position)),
            shared_weights: None,
        };
        // Best experts 3 4 0 1 3 3.
        let rows: Vec<f32> = [3, 4, 0, 1, 3, 3]
            .iter()
            .flat_map(|&best| (0..8).map(move |e| f32::from(u8::from(e == best))))
            .collect();
        let logits = Tensor::<1>::from_floats(rows.as_slice(), &Device::flex()).reshape([6, 8]);
        for (training, loads, dropped) in [
            (true, vec![1, 1, 0, 1, 1, 0, 0, 0], 2.0 / 6.0),
            (false, vec![1, 1, 0, 3, 1, 0, 0, 0], 0.0),
        ] {
            let context = RouteContext {
                training,
                ..RouteContext::default()
            };
            let mut routed = layer.router.route(logits.clone(), &context).unwrap();
            let dispatch = dispatch(&mut routed, &layer, &context, 8);
            assert_eq!(dispatch.loads(), loads);
            let summary = routed.loads.summary().unwrap();
            assert!((summary.dropped - dropped).abs() < 1e-12);
            assert_eq!(
                routed.loads.counts()[3],
                3,
                "balance counts before dropping"
            );
        }
    }
}
