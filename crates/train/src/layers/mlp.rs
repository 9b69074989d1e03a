//! The dense SwiGLU feed-forward: one expert that every token uses.

use crate::init::Init;
use crate::ops::{self, Dispatch, Numerics};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::silu;
use std::sync::Arc;

/// Parameters of a dense layer, stacked as one expert.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[1, 2 I, d_model]`, gate rows first
    pub gate_up: Param<Tensor<3>>,
    /// `[1, d_model, I]`
    pub down: Param<Tensor<3>>,
}

impl Mlp {
    /// Random parameters of width `width`.
    #[must_use]
    pub fn init(
        d_model: usize,
        width: usize,
        init: &Init,
        name: &str,
        residual_scale: f32,
    ) -> Self {
        let matrix = |part: &str, shape, scale| {
            Param::from_tensor(init.normal(&format!("{name}.{part}"), shape, scale))
        };
        Self {
            gate_up: matrix("gate_up", [1, 2 * width, d_model], 1.0),
            down: matrix("down", [1, d_model, width], residual_scale),
        }
    }

    /// `x [T, d_model]` -> `[T, d_model]`.
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let [n_tokens, _] = x.dims();
        let weights = Tensor::ones([n_tokens], &x.device());
        let dispatch = Arc::new(Dispatch::dense(n_tokens));
        numerics.experts(x, self.gate_up.val(), self.down.val(), weights, dispatch)
    }

    /// What [`Self::forward`] multiplies by its last matrix: `silu(gate x) * up x`, `[T, I]`, in f32.
    #[must_use]
    pub fn inner(&self, x: Tensor<2>) -> Tensor<2> {
        let gate_up = self.gate_up.val();
        let [_, rows, d_model] = gate_up.dims();
        let both = ops::linear(x, gate_up.reshape([rows, d_model]));
        let width = rows / 2;
        silu(both.clone().narrow(1, 0, width)) * both.narrow(1, width, width)
    }
}
