//! The recurrent router: a GRU along depth, shared by all layers, whose state for each token makes the router logits.
//!
//! Paper: Layerwise Recurrent Router for Mixture-of-Experts (RMoE), Qiu et al., 2024, arXiv 2408.06793.
//! Rule: `u = W1 x` (per layer), `h' = GRU(u, h)` (shared; h starts at 0 for every token), `l = W2 h'` (per layer); dense
//! layers pass h on untouched. Gradient flows through h, from a layer's routing into the layers before it.
//! Shapes: x [T, d], u and h [T, p], logits [T, E].
//! Recipe: `model.recurrent_router = p`; with `model.recurrent_restarts` h is 0 in every layer (the paper's Table 4).
//! Differs from paper: no output bias, no mixed-in shared expert.
//! Check: layers::recurrent::tests (torch.nn.GRUCell), tests/layers.rs.

use crate::init::Init;
use crate::ops;
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, tanh};

/// Parameters in the layout of `torch.nn.GRUCell`: rows of r, z and n.
#[derive(Module, Debug)]
pub struct RouterGru {
    /// `[3 p, p]`, of the input
    pub weight_ih: Param<Tensor<2>>,
    /// `[3 p, p]`, of the state
    pub weight_hh: Param<Tensor<2>>,
    /// `[3 p]`
    pub bias_ih: Param<Tensor<1>>,
    /// `[3 p]`
    pub bias_hh: Param<Tensor<1>>,
}

impl RouterGru {
    /// Random weights and zero biases for a state of `width`; `name` is the tensors' prefix.
    #[must_use]
    pub fn init(width: usize, init: &Init, name: &str) -> Self {
        let matrix = |part: &str| {
            Param::from_tensor(init.normal(&format!("{name}.{part}"), [3 * width, width], 1.0))
        };
        let bias = || Param::from_tensor(Tensor::zeros([3 * width], &init.device));
        Self {
            weight_ih: matrix("weight_ih"),
            weight_hh: matrix("weight_hh"),
            bias_ih: bias(),
            bias_hh: bias(),
        }
    }

    /// The state before the first layer: zeros `[T, p]`.
    #[must_use]
    pub fn start(&self, n_tokens: usize) -> Tensor<2> {
        let [_, width] = self.weight_hh.val().dims();
        Tensor::zeros([n_tokens, width], &self.weight_hh.val().device())
    }

    /// `r = s(W_ir u + b_ir + W_hr h + b_hr)`, `z` alike, `n = tanh(W_in u + b_in + r (W_hn h + b_hn))`,
    /// `h' = (1 - z) n + z h`; u and h are `[T, p]`.
    #[must_use]
    pub fn forward(&self, u: Tensor<2>, h: Tensor<2>) -> Tensor<2> {
        let [_, p] = h.dims();
        let of_u = ops::linear(u, self.weight_ih.val()) + self.bias_ih.val().unsqueeze();
        let of_h = ops::linear(h.clone(), self.weight_hh.val()) + self.bias_hh.val().unsqueeze();
        let part = |x: &Tensor<2>, i: usize| x.clone().narrow(1, i * p, p);
        let r = sigmoid(part(&of_u, 0) + part(&of_h, 0));
        let z = sigmoid(part(&of_u, 1) + part(&of_h, 1));
        let n = tanh(part(&of_u, 2) + r * part(&of_h, 2));
        n.clone() + z * (h - n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Golden {
        width: usize,
        coefficients: Vec<f32>,
        values: BTreeMap<String, Vec<f32>>,
        output: Vec<f32>,
        gradients: BTreeMap<String, Vec<f32>>,
    }

    /// Values and all gradients of one step against `torch.nn.GRUCell` (`golden/make/router_gru.py`).
    #[test]
    fn a_step_equals_torch() {
        let golden: Golden =
            serde_json::from_str(include_str!("../../../../golden/routing/gru.json")).unwrap();
        let (p, device) = (golden.width, Device::flex().autodiff());
        let leaf = |name: &str, shape: [usize; 2]| {
            let data = TensorData::new(golden.values[name].clone(), shape);
            Tensor::<2>::from_data(data, &device).require_grad()
        };
        let bias = |name: &str| {
            let values = golden.values[name].as_slice();
            Param::from_tensor(Tensor::<1>::from_floats(values, &device).require_grad())
        };
        let n_tokens = golden.output.len() / p;
        let (u, h) = (leaf("input", [n_tokens, p]), leaf("state", [n_tokens, p]));
        let gru = RouterGru {
            weight_ih: Param::from_tensor(leaf("weight_ih", [3 * p, p])),
            weight_hh: Param::from_tensor(leaf("weight_hh", [3 * p, p])),
            bias_ih: bias("bias_ih"),
            bias_hh: bias("bias_hh"),
        };
        let out = gru.forward(u.clone(), h.clone());
        let close = |what: &str, got: Vec<f32>, want: &[f32]| {
            assert_eq!(got.len(), want.len(), "{what}");
            for (a, b) in got.iter().zip(want) {
                assert!((a - b).abs() < 2e-6, "{what}: {a} is not {b}");
            }
        };
        close(
            "output",
            out.clone().try_into_vec_as().unwrap(),
            &golden.output,
        );
        let data = TensorData::new(golden.coefficients.clone(), [n_tokens, p]);
        let gradients = (out * Tensor::from_data(data, &device)).sum().backward();
        let two = |t: Tensor<2>| {
            t.grad(&gradients)
                .unwrap()
                .try_into_vec_as::<f32>()
                .unwrap()
        };
        let one = |t: Tensor<1>| {
            t.grad(&gradients)
                .unwrap()
                .try_into_vec_as::<f32>()
                .unwrap()
        };
        for (name, got) in [
            ("input", two(u)),
            ("state", two(h)),
            ("weight_ih", two(gru.weight_ih.val())),
            ("weight_hh", two(gru.weight_hh.val())),
            ("bias_ih", one(gru.bias_ih.val())),
            ("bias_hh", one(gru.bias_hh.val())),
        ] {
            close(name, got, &golden.gradients[name]);
        }
    }
}
