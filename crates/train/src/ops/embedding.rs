//! Rows of a matrix by token id.

use super::flex::{Dense, tensor};
use super::math::axpy;
use burn_flex::FlexTensor;
use cadre_kernels::zeros;

pub(super) fn forward(w: &Dense, ids: &[u32]) -> FlexTensor {
    let [_, d_model] = w.dims();
    let w = w.values();
    let mut y = Vec::with_capacity(ids.len() * d_model);
    for &id in ids {
        let start = id as usize * d_model;
        y.extend_from_slice(&w[start..start + d_model]);
    }
    tensor(y, [ids.len(), d_model])
}

pub(super) fn backward(dy: &Dense, ids: &[u32], [rows, d_model]: [usize; 2]) -> FlexTensor {
    let mut dw = zeros(rows * d_model);
    for (&id, dy) in ids.iter().zip(dy.values().chunks_exact(d_model)) {
        let start = id as usize * d_model;
        axpy(&mut dw[start..start + d_model], 1.0, dy);
    }
    tensor(dw, [rows, d_model])
}
