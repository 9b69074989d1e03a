//! The gated feed-forward `down(activation(gate x, up x))`: one of them, or a group of them over sorted rows.

use cadre_checkpoint::Activation;
use cadre_kernels::{Compute, MatmulScratch};

use super::{Linear, add_rows};

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
        (scratch, matmul): (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let n_tokens = x_td.len() / self.gate_proj.weight.n_in();
        let groups = Groups {
            offsets: &[0, n_tokens],
            of: &|_| self,
        };
        groups.widen(compute, x_td, scratch, matmul);
        groups.narrow(compute, scratch, out_td, matmul);
    }

    /// Replaces rows `offsets[g]..offsets[g + 1]` of `rows_pd` by what `of(g)` makes of them; all of one shape and kind.
    pub(crate) fn forward_groups<'w>(
        compute: &Compute,
        offsets: &[usize],
        of: &(dyn Fn(usize) -> &'w Self + Sync),
        rows_pd: &mut [f32],
        (scratch, matmul): (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let groups = Groups { offsets, of };
        groups.widen(compute, rows_pd, scratch, matmul);
        groups.narrow(compute, scratch, rows_pd, matmul);
    }
}

/// Rows sorted by the feed-forward that they go through.
struct Groups<'a, 'w> {
    offsets: &'a [usize],
    of: &'a (dyn Fn(usize) -> &'w FeedForward + Sync),
}

impl Groups<'_, '_> {
    fn n_rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// From rows of the stream to inner rows, left in `scratch.gate`.
    fn widen(
        &self,
        compute: &Compute,
        x_pd: &[f32],
        scratch: &mut FeedForwardScratch,
        matmul: &mut MatmulScratch,
    ) {
        if self.n_rows() == 0 {
            return;
        }
        let first = (self.of)(0);
        let d_ff = first.gate_proj.n_out();
        let gate = &mut scratch.gate[..self.n_rows() * d_ff];
        let up = &mut scratch.up[..self.n_rows() * d_ff];
        self.product(compute, |ffn| &ffn.gate_proj, (x_pd, gate), matmul);
        self.product(compute, |ffn| &ffn.up_proj, (x_pd, up), matmul);
        let activation = first.activation;
        // An exponential and a division, about sixteen multiplications.
        compute.for_each_chunk(gate, d_ff, 16 * d_ff, |row, gate| {
            activate(compute, activation, gate, &up[row * d_ff..][..d_ff]);
        });
    }

    /// From the inner rows in `scratch.gate` back to rows of the stream.
    fn narrow(
        &self,
        compute: &Compute,
        scratch: &FeedForwardScratch,
        out_pd: &mut [f32],
        matmul: &mut MatmulScratch,
    ) {
        if self.n_rows() == 0 {
            return;
        }
        let d_ff = (self.of)(0).gate_proj.n_out();
        let inner = &scratch.gate[..self.n_rows() * d_ff];
        self.product(compute, |ffn| &ffn.down_proj, (inner, out_pd), matmul);
    }

    fn product(
        &self,
        compute: &Compute,
        part: Part,
        (x, y): (&[f32], &mut [f32]),
        matmul: &mut MatmulScratch,
    ) {
        let weight = |g: usize| &part((self.of)(g)).weight;
        compute.grouped_matmul(
            self.offsets.len() - 1,
            &weight,
            self.offsets,
            x,
            &mut *y,
            matmul,
        );
        for (g, rows) in self.offsets.windows(2).enumerate() {
            let linear = part((self.of)(g));
            if let Some(bias) = &linear.bias {
                let n_out = linear.n_out();
                add_rows(compute, &mut y[rows[0] * n_out..rows[1] * n_out], bias);
            }
        }
    }
}

type Part = for<'a> fn(&'a FeedForward) -> &'a Linear;

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
