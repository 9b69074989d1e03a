//! PR-MoE's residual: a dense feed-forward beside the routed experts, which correct it.
//!
//! Paper: DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training, Rajbhandari et al., 2022, arXiv 2201.05596.
//! Rule: `sum`: `y = MoE(x) + MLP(x)` (paper); `learned`: `c = softmax(Wc x + bc)`, `y = c_0 MoE(x) + c_1 MLP(x)`
//! (DeepSpeed's code).
//! Shapes: x and y [T, d], Wc `[2, d]`, bc `[2]`.
//! Differs from paper: the feed-forward and the experts start from different values.
//! Check: tests/layers.rs.

use super::mlp::Mlp;
use crate::architecture::Residual;
use crate::init::Init;
use crate::ops::{self, Numerics};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;

/// The feed-forward and how it joins the experts.
#[derive(Module, Debug)]
pub struct ResidualMlp {
    /// The dense feed-forward
    pub mlp: Mlp,
    /// Absent for a plain sum
    pub coefficient: Option<Coefficient>,
}

/// Learned shares of the two parts.
#[derive(Module, Debug)]
pub struct Coefficient {
    /// `[2, d_model]`, the experts' share first
    pub weight: Param<Tensor<2>>,
    /// `[2]`
    pub bias: Param<Tensor<1>>,
}

impl ResidualMlp {
    /// Random parameters of width `width`; `name` is the tensors' prefix.
    #[must_use]
    pub fn init(
        [d_model, width]: [usize; 2],
        kind: Residual,
        init: &Init,
        name: &str,
        residual_scale: f32,
    ) -> Self {
        let weight = || init.normal(&format!("{name}.coefficient"), [2, d_model], 1.0);
        Self {
            mlp: Mlp::init(d_model, width, init, &format!("{name}.mlp"), residual_scale),
            coefficient: (kind == Residual::Learned).then(|| Coefficient {
                weight: Param::from_tensor(weight()),
                bias: Param::from_tensor(Tensor::zeros([2], &init.device)),
            }),
        }
    }

    /// Joins the experts' output `[T, d_model]` with the feed-forward of `x [T, d_model]`.
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, experts: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let dense = self.mlp.forward(x.clone(), numerics);
        let Some(coefficient) = &self.coefficient else {
            return experts + dense;
        };
        let logits = ops::linear(x, coefficient.weight.val()) + coefficient.bias.val().unsqueeze();
        let shares = softmax(logits, 1);
        experts * shares.clone().narrow(1, 0, 1) + dense * shares.narrow(1, 1, 1)
    }
}
