//! Experts in factors: every matrix is a product of two thin ones plus a few rows of its own.
//!
//! Paper: Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, Li et al., 2023, arXiv
//! 2310.01334: `y = outer (inner x) + rows x`. The rows are stored behind those of `inner`, so that one product makes both.

use cadre_checkpoint::Activation;
use cadre_kernels::{Compute, MatmulScratch, Matrix};

use super::experts::ExpertRows;
use super::feed_forward::activate;
use crate::error::{EngineError, Result};

/// `[n_out, n_in]`.
#[derive(Debug)]
pub(crate) struct Factored {
    /// `[rank + rows, n_in]`.
    pub(crate) inner: Matrix,
    /// `[n_out, rank]`.
    pub(crate) outer: Matrix,
    /// The outputs that the rows behind the first `rank` are added to; below `n_out`.
    pub(crate) rows: Vec<u32>,
}

/// A gated feed-forward of such matrices.
#[derive(Debug)]
pub(crate) struct FactoredExpert {
    pub(crate) gate_proj: Factored,
    pub(crate) up_proj: Factored,
    pub(crate) down_proj: Factored,
    pub(crate) activation: Activation,
}

/// Buffers; they grow to what is asked for.
#[derive(Debug, Default)]
pub(crate) struct FactoredScratch {
    /// Inputs of an expert, `[rows, d]`.
    x: Vec<f32>,
    /// `[rows, rank + rows of a matrix]`, and its first `rank` columns.
    inner: Vec<f32>,
    thin: Vec<f32>,
    /// `[rows, f]`.
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// The rows that tensor `name` of a `model_type` model holds.
///
/// # Errors
/// Numbers that are no rows below `n_out`.
pub(crate) fn factored_rows(
    model_type: &str,
    name: &str,
    rows: Vec<f32>,
    n_out: usize,
) -> Result<Vec<u32>> {
    let is_row = |row: &f32| *row >= 0.0 && row.fract() == 0.0 && (*row as usize) < n_out;
    if let Some(at) = rows.iter().position(|row| !is_row(row)) {
        return Err(EngineError::Configuration {
            model_type: model_type.to_owned(),
            problem: format!(
                "tensor `{name}` holds {} at {at}, expected rows below {n_out}",
                rows[at]
            ),
        });
    }
    Ok(rows.into_iter().map(|row| row as u32).collect())
}

impl Factored {
    /// Adds its matrices to `all`.
    fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        all.extend([&self.inner, &self.outer]);
    }

    /// `y = self(x)`, both row by row.
    fn forward(
        &self,
        compute: &Compute,
        (x, y): (&[f32], &mut [f32]),
        (inner, thin): (&mut Vec<f32>, &mut Vec<f32>),
        matmul: &mut MatmulScratch,
    ) {
        let (n_inner, rank, n_out) = (self.inner.n_out(), self.outer.n_in(), self.outer.n_out());
        let n = x.len() / self.inner.n_in().max(1);
        inner.resize(n * n_inner, 0.0);
        compute.matmul(&self.inner, x, inner, matmul);
        thin.clear();
        for row in inner.chunks_exact(n_inner) {
            thin.extend_from_slice(&row[..rank]);
        }
        compute.matmul(&self.outer, thin, y, matmul);
        for (y, inner) in y.chunks_exact_mut(n_out).zip(inner.chunks_exact(n_inner)) {
            for (row, value) in self.rows.iter().zip(&inner[rank..]) {
                y[*row as usize] += value;
            }
        }
    }
}

impl FactoredExpert {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        for part in [&self.gate_proj, &self.up_proj, &self.down_proj] {
            part.matrices(all);
        }
    }

    /// Computes every row of `rows` by its expert, `of(i)` being the `i`-th of their order, from the tokens' `x_td` into
    /// `y_pd`.
    pub(crate) fn forward_groups<'w>(
        compute: &Compute,
        rows: ExpertRows<'_>,
        of: &dyn Fn(usize) -> &'w Self,
        (x_td, y_pd): (&[f32], &mut [f32]),
        (scratch, matmul): (&mut FactoredScratch, &mut MatmulScratch),
    ) {
        let d = y_pd.len() / rows.token_of_row.len().max(1);
        let FactoredScratch {
            x,
            inner,
            thin,
            gate,
            up,
        } = scratch;
        for (g, range) in rows.offsets.windows(2).enumerate() {
            let (expert, range) = (of(g), range[0]..range[1]);
            x.clear();
            for token in &rows.token_of_row[range.clone()] {
                x.extend_from_slice(&x_td[*token as usize * d..][..d]);
            }
            let n_inner = range.len() * expert.gate_proj.outer.n_out();
            gate.resize(n_inner, 0.0);
            up.resize(n_inner, 0.0);
            for (part, out) in [(&expert.gate_proj, &mut *gate), (&expert.up_proj, &mut *up)] {
                let buffers = (&mut *inner, &mut *thin);
                part.forward(compute, (&x[..], &mut out[..]), buffers, matmul);
            }
            activate(compute, expert.activation, gate, up);
            let y = &mut y_pd[range.start * d..range.end * d];
            let buffers = (&mut *inner, &mut *thin);
            expert
                .down_proj
                .forward(compute, (&gate[..], y), buffers, matmul);
        }
    }
}
