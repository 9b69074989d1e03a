//! The gated feed-forward `down(silu(gate x) * up x)`: one of them, or a group of them over sorted rows.

use cadre_kernels::{Compute, MatmulScratch, Matrix};

/// The three matrices of a feed-forward.
#[derive(Debug)]
pub(crate) struct SwiGlu {
    pub(crate) gate_proj: Matrix,
    pub(crate) up_proj: Matrix,
    pub(crate) down_proj: Matrix,
}

/// Buffers for rows of the inner width.
#[derive(Debug)]
pub(crate) struct SwiGluScratch {
    /// `[rows, d_ff]`.
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl SwiGluScratch {
    /// Room for `n_values` inner values.
    pub(crate) fn new(n_values: usize) -> Self {
        Self {
            gate: vec![0.0; n_values],
            up: vec![0.0; n_values],
        }
    }
}

impl SwiGlu {
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
        scratch: (&mut SwiGluScratch, &mut MatmulScratch),
    ) {
        let n_tokens = x_td.len() / self.gate_proj.n_in();
        Self::forward_groups(compute, &[0, n_tokens], &|_| self, (x_td, out_td), scratch);
    }

    /// Rows `offsets[g]..offsets[g + 1]` of `x_pd` through `of(g)`; all of one shape.
    pub(crate) fn forward_groups<'w>(
        compute: &Compute,
        offsets: &[usize],
        of: &(dyn Fn(usize) -> &'w SwiGlu + Sync),
        (x_pd, out_pd): (&[f32], &mut [f32]),
        (scratch, matmul): (&mut SwiGluScratch, &mut MatmulScratch),
    ) {
        let n_groups = offsets.len() - 1;
        let n_rows = offsets[n_groups];
        if n_rows == 0 {
            return;
        }
        let d_ff = of(0).gate_proj.n_out();
        let gate = &mut scratch.gate[..n_rows * d_ff];
        let up = &mut scratch.up[..n_rows * d_ff];
        compute.grouped_matmul(n_groups, &|g| &of(g).gate_proj, offsets, x_pd, gate, matmul);
        compute.grouped_matmul(n_groups, &|g| &of(g).up_proj, offsets, x_pd, up, matmul);
        let kernels = compute.kernels();
        // An exponential and a division, about sixteen multiplications.
        compute.for_each_chunk(gate, d_ff, 16 * d_ff, |row, gate| {
            kernels.silu_mul(gate, &up[row * d_ff..][..d_ff]);
        });
        compute.grouped_matmul(
            n_groups,
            &|g| &of(g).down_proj,
            offsets,
            gate,
            out_pd,
            matmul,
        );
    }
}
