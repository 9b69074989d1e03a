//! `y = x / sqrt(mean(x^2) + eps) * w` over the last axis.

use super::flex::{Dense, tensor};
use super::math::{dot, sum_in_order, vectorised};
use burn_flex::FlexTensor;
use cadre_kernels::Room;
use rayon::prelude::*;

/// Rows per task: enough work to be worth handing to another thread.
const ROWS: usize = 64;

/// One row; returns `1 / rms(x)`.
#[inline(always)]
pub(super) fn row(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) -> f32 {
    let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * inverse * w;
    }
    inverse
}

/// One row of the gradient; adds to `dw`.
///
/// With `n = x inverse` and `g = dy w`: `dx = inverse (g - n mean(g n))`, `dw += dy n`.
#[inline(always)]
pub(super) fn row_backward(dx: &mut [f32], dw: &mut [f32], [x, w, dy]: [&[f32]; 3], inverse: f32) {
    let mut lanes = [0.0_f32; 16];
    let [(x16, x_rest), (w16, w_rest), (dy16, dy_rest)] =
        [x, w, dy].map(|values| values.as_chunks::<16>());
    for ((x, w), dy) in x16.iter().zip(w16).zip(dy16) {
        for i in 0..16 {
            lanes[i] += dy[i] * w[i] * x[i] * inverse;
        }
    }
    let rest = x_rest.iter().zip(w_rest).zip(dy_rest);
    for (lane, ((x, w), dy)) in lanes.iter_mut().zip(rest) {
        *lane += dy * w * x * inverse;
    }
    let mean = lanes.iter().sum::<f32>() / x.len() as f32;
    let inputs = x.iter().zip(w).zip(dy);
    for (((x, w), dy), (dx, dw)) in inputs.zip(dx.iter_mut().zip(dw)) {
        let n = x * inverse;
        *dx = inverse * (dy * w - n * mean);
        *dw += dy * n;
    }
}

pub(super) fn forward(x: &Dense, w: &Dense, eps: f32) -> FlexTensor {
    let [rows, d] = x.dims();
    let (x, w) = (x.values(), w.values());
    let mut y = Room::new(rows * d);
    let pieces = y.whole().chunks(ROWS * d).into_par_iter();
    pieces.zip(x.par_chunks(ROWS * d)).for_each(|(y, x)| {
        let y = y.zeros();
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    row(y, x, w, eps);
                }
            },
        );
    });
    tensor(y.finish(), [rows, d])
}

pub(super) fn backward(x: &Dense, w: &Dense, eps: f32, dy: &Dense) -> [FlexTensor; 2] {
    let [rows, d] = x.dims();
    let (x, w, dy) = (x.values(), w.values(), dy.values());
    let mut dx = Room::new(rows * d);
    let pieces = dx.whole().chunks(ROWS * d).into_par_iter();
    let parts: Vec<Vec<f32>> = pieces
        .zip(x.par_chunks(ROWS * d))
        .zip(dy.par_chunks(ROWS * d))
        .map(|((dx, x), dy)| {
            let (dx, mut dw) = (dx.zeros(), vec![0.0; d]);
            vectorised(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d));
                    for ((dx, x), dy) in rows.zip(dy.chunks_exact(d)) {
                        let inverse = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
                        row_backward(dx, &mut dw, [x, w, dy], inverse);
                    }
                },
            );
            dw
        })
        .collect();
    [
        tensor(dx.finish(), [rows, d]),
        tensor(sum_in_order(parts, d), [d]),
    ]
}
