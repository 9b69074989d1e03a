//! The gated feed-forward `down(activation(gate x, up x))`: one of them, or a group of them over sorted rows.

use cadre_checkpoint::Activation;
use cadre_kernels::{Compute, MatmulScratch, Matrix};

use super::Linear;
use super::linear::add_rows;

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
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl FeedForwardScratch {
    /// Room for `n_values` inner values.
    pub(crate) fn new(n_values: usize) -> Self {
        Self {
            gate: vec![0.0; n_values],
            up: vec![0.0; n_values],
        }
    }
}

impl FeedForward {
    /// Bytes of the weights.
    pub(crate) fn n_bytes(&self) -> usize {
        self.gate_proj.n_bytes() + self.up_proj.n_bytes() + self.down_proj.n_bytes()
    }

    /// `out_td = self(x_td)`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        x_td: &[f32],
        out_td: &mut [f32],
        scratch: (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let n_tokens = x_td.len() / self.gate_proj.weight.n_in();
        Self::forward_groups(compute, &[0, n_tokens], &|_| self, (x_td, out_td), scratch);
    }

    /// Rows `offsets[g]..offsets[g + 1]` of `x_pd` through `of(g)`; all of one shape and kind.
    pub(crate) fn forward_groups<'w>(
        compute: &Compute,
        offsets: &[usize],
        of: &(dyn Fn(usize) -> &'w FeedForward + Sync),
        (x_pd, out_pd): (&[f32], &mut [f32]),
        (scratch, matmul): (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let n_rows = offsets[offsets.len() - 1];
        if n_rows == 0 {
            return;
        }
        let d_ff = of(0).gate_proj.n_out();
        let gate = &mut scratch.gate[..n_rows * d_ff];
        let up = &mut scratch.up[..n_rows * d_ff];
        let product = |part: Part, x: &[f32], y: &mut [f32], matmul: &mut MatmulScratch| {
            let weight = |g: usize| &part(of(g)).weight;
            grouped(compute, offsets, &weight, (x, &mut *y), matmul);
            for (g, rows) in offsets.windows(2).enumerate() {
                let linear = part(of(g));
                if let Some(bias) = &linear.bias {
                    let n_out = linear.n_out();
                    add_rows(&mut y[rows[0] * n_out..rows[1] * n_out], bias);
                }
            }
        };
        product(|ffn| &ffn.gate_proj, x_pd, gate, matmul);
        product(|ffn| &ffn.up_proj, x_pd, up, matmul);
        let activation = of(0).activation;
        // An exponential and a division, about sixteen multiplications.
        compute.for_each_chunk(gate, d_ff, 16 * d_ff, |row, gate| {
            activate(compute, activation, gate, &up[row * d_ff..][..d_ff]);
        });
        product(|ffn| &ffn.down_proj, gate, out_pd, matmul);
    }
}

type Part = for<'a> fn(&'a FeedForward) -> &'a Linear;

fn grouped<'w>(
    compute: &Compute,
    offsets: &[usize],
    weight: &(dyn Fn(usize) -> &'w Matrix + Sync),
    (x, y): (&[f32], &mut [f32]),
    matmul: &mut MatmulScratch,
) {
    compute.grouped_matmul(offsets.len() - 1, weight, offsets, x, y, matmul);
}

/// `gate = activation(gate, up)`, in place.
fn activate(compute: &Compute, activation: Activation, gate: &mut [f32], up: &[f32]) {
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
