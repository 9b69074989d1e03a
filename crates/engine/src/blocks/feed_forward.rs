//! The gated feed-forward `down(activation(gate x, up x))`: one of them, or a group of them over sorted rows.

use cadre_checkpoint::Activation;
use cadre_kernels::{Compute, Grouped, MatmulScratch, Matrix};

use super::{FactoredScratch, Linear, add_rows};

/// The three matrices of a feed-forward.
#[derive(Debug)]
pub(crate) struct FeedForward {
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
    pub(crate) activation: Activation,
}

/// Buffers for rows of the inner width.
#[derive(Debug)]
pub(crate) struct FeedForwardScratch {
    /// `[rows, d_ff]`.
    inner: Vec<f32>,
    /// Inputs in the forms that weights are multiplied by, where they are to outlive a call.
    inputs: MatmulScratch,
    /// Of experts in factors.
    pub(super) factored: FactoredScratch,
}

impl FeedForwardScratch {
    /// Room for `n_values` inner values.
    pub(crate) fn new(n_values: usize) -> Self {
        Self {
            inner: vec![0.0; n_values],
            inputs: MatmulScratch::default(),
            factored: FactoredScratch::default(),
        }
    }

    /// The inner values of the last call, of which there were `n`.
    pub(crate) fn inner(&self, n: usize) -> &[f32] {
        &self.inner[..n]
    }
}

impl FeedForward {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        for linear in [&self.gate_proj, &self.up_proj, &self.down_proj] {
            linear.matrices(all);
        }
    }

    /// Its inner width.
    pub(crate) fn width(&self) -> usize {
        self.gate_proj.n_out()
    }

    /// `out_td = self(x_td)`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        x_td: &[f32],
        out_td: &mut [f32],
        (scratch, matmul): (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let n_tokens = x_td.len() / self.gate_proj.weight.n_in();
        let rows = Grouped {
            offsets: &[0, n_tokens],
            x: x_td,
            index: None,
            is_same: false,
        };
        let scratch = (scratch, matmul, false);
        Self::forward_groups(compute, rows, &|_| self, out_td, scratch);
    }

    /// What `of(g)` makes of the rows of group `g`, into `out_pd`; all of one shape and kind. With `keeps_inputs`, a later
    /// call may say that it is about the same inputs.
    pub(crate) fn forward_groups<'w>(
        compute: &Compute,
        rows: Grouped<'_>,
        of: &(dyn Fn(usize) -> &'w Self + Sync),
        out_pd: &mut [f32],
        (scratch, matmul, keeps_inputs): (&mut FeedForwardScratch, &mut MatmulScratch, bool),
    ) {
        let offsets = rows.offsets;
        let n_rows = offsets[offsets.len() - 1];
        if n_rows == 0 {
            return;
        }
        let first = of(0);
        let n_inner = n_rows * first.gate_proj.n_out();
        if scratch.inner.len() < n_inner {
            // More picks per token than the model's own.
            scratch.inner.resize(n_inner, 0.0);
        }
        let inner = &mut scratch.inner[..n_inner];
        let activation = first.activation;
        let finish = |row: usize, from: usize, gate: &mut [f32], up: &mut [f32]| {
            let n = gate.len();
            if first.gate_proj.bias.is_some() || first.up_proj.bias.is_some() {
                let ffn = of(group_of(offsets, row));
                for (linear, values) in [(&ffn.gate_proj, &mut *gate), (&ffn.up_proj, &mut *up)] {
                    if let Some(bias) = &linear.bias {
                        compute.kernels().axpy(1.0, &bias[from..from + n], values);
                    }
                }
            }
            activate(compute, activation, gate, up);
        };
        let weights = |g: usize| -> [&'w Matrix; 2] {
            let ffn = of(g);
            [&ffn.gate_proj.weight, &ffn.up_proj.weight]
        };
        let inputs = match keeps_inputs {
            true => &mut scratch.inputs,
            false => &mut *matmul,
        };
        compute.grouped_gated(rows, &weights, &finish, inner, inputs);
        let rows = Grouped {
            offsets,
            x: inner,
            index: None,
            is_same: false,
        };
        compute.grouped_matmul(rows, &|g| &of(g).down_proj.weight, out_pd, matmul);
        for (g, rows) in offsets.windows(2).enumerate() {
            let linear = &of(g).down_proj;
            if let Some(bias) = &linear.bias {
                let n_out = linear.n_out();
                add_rows(compute, &mut out_pd[rows[0] * n_out..rows[1] * n_out], bias);
            }
        }
    }
}

/// The group that row `row` belongs to.
fn group_of(offsets: &[usize], row: usize) -> usize {
    offsets.partition_point(|offset| *offset <= row) - 1
}

/// `gate = activation(gate, up)`, in place.
pub(super) fn activate(compute: &Compute, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => compute.kernels().silu_mul(gate, up),
        Activation::GeluTanh => {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = gelu_tanh(*gate) * up;
            }
        }
        Activation::SwigluOai { alpha, limit } => {
            let (alpha, limit) = (alpha as f32, limit as f32);
            for (gate, up) in gate.iter_mut().zip(up) {
                // Not `min`, which would hide a NaN.
                let g = if *gate > limit { limit } else { *gate };
                let u = up.clamp(-limit, limit);
                *gate = g / (1.0 + (-alpha * g).exp()) * (u + 1.0);
            }
        }
    }
}

/// Hendrycks and Gimpel, 2016, arXiv 1606.08415, with the tanh approximation.
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)).tanh())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cadre_kernels::Kernels;

    #[test]
    fn activations_by_hand() {
        let compute = Compute::new(Kernels::detect(), 1);
        let run = |activation, mut gate: [f32; 1], up: f32| {
            activate(&compute, activation, &mut gate, &[up]);
            gate[0]
        };
        let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-5, "{a} {b}");
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        near(run(Activation::Silu, [1.0], 3.0), 3.0 * sigmoid(1.0));
        // gelu(1) = 0.841192 in the tanh form.
        near(run(Activation::GeluTanh, [1.0], 2.0), 1.682_384);
        let oai = Activation::SwigluOai {
            alpha: 1.5,
            limit: 2.0,
        };
        near(run(oai, [1.0], 0.5), sigmoid(1.5) * 1.5);
        near(run(oai, [9.0], -9.0), -2.0 * sigmoid(3.0));
        assert!(run(oai, [f32::NAN], 1.0).is_nan());
    }
}
