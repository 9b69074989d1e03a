//! A linear map with an optional bias.

use cadre_kernels::{Compute, MatmulScratch, Matrix};

/// `y = x w^T + bias`.
#[derive(Debug)]
pub(crate) struct Linear {
    /// `[n_out, n_in]`.
    pub(crate) weight: Matrix,
    /// `[n_out]`.
    pub(crate) bias: Option<Vec<f32>>,
}

impl Linear {
    pub(crate) fn n_out(&self) -> usize {
        self.weight.n_out()
    }

    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        all.push(&self.weight);
    }

    /// `y_to = self(x_ti)`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        x_ti: &[f32],
        y_to: &mut [f32],
        matmul: &mut MatmulScratch,
    ) {
        compute.matmul(&self.weight, x_ti, y_to, matmul);
        self.add_bias(compute, y_to);
    }

    /// Adds the bias, if there is one, to every row of a product.
    pub(crate) fn add_bias(&self, compute: &Compute, y_to: &mut [f32]) {
        if let Some(bias) = &self.bias {
            add_rows(compute, y_to, bias);
        }
    }
}

/// Adds `bias` to every row of `rows`.
pub(crate) fn add_rows(compute: &Compute, rows: &mut [f32], bias: &[f32]) {
    compute.for_each_chunk(rows, bias.len(), bias.len(), |_, row| {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    });
}
