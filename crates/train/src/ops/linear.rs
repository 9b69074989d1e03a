//! `y = x w^T`, the weight stored `[out, in]` as checkpoints store it.

use super::Precision;
use super::flex::{Dense, tensor};
use burn_flex::FlexTensor;
use cadre_kernels::gemm::{Mat, MatMut, Write};
use cadre_kernels::zeros;

fn shapes(x: &Dense, w: &Dense) -> [usize; 3] {
    let [rows, n_in] = x.dims();
    let [n_out, w_in] = w.dims();
    assert_eq!(
        n_in, w_in,
        "linear: x [{rows}, {n_in}] with w [{n_out}, {w_in}]"
    );
    [rows, n_in, n_out]
}

pub(super) fn forward(x: &Dense, w: &Dense, precision: Precision) -> FlexTensor {
    let [rows, n_in, n_out] = shapes(x, w);
    let mut y = zeros(rows * n_out);
    precision.product(
        MatMut::new(&mut y, rows, n_out),
        Write::Set,
        Mat::new(x.values(), rows, n_in),
        Mat::new(w.values(), n_out, n_in).t(),
        rayon::current_num_threads(),
    );
    tensor(y, [rows, n_out])
}

pub(super) fn backward(x: &Dense, w: &Dense, dy: &Dense, precision: Precision) -> [FlexTensor; 2] {
    let [rows, n_in, n_out] = shapes(x, w);
    let threads = rayon::current_num_threads();
    let dy = Mat::new(dy.values(), rows, n_out);
    let mut dx = zeros(rows * n_in);
    let w = Mat::new(w.values(), n_out, n_in);
    precision.product(MatMut::new(&mut dx, rows, n_in), Write::Set, dy, w, threads);
    let mut dw = zeros(n_out * n_in);
    let x = Mat::new(x.values(), rows, n_in);
    precision.product(
        MatMut::new(&mut dw, n_out, n_in),
        Write::Set,
        dy.t(),
        x,
        threads,
    );
    [tensor(dx, [rows, n_in]), tensor(dw, [n_out, n_in])]
}
