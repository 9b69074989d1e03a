//! `y = x w^T`, the weight stored `[out, in]` as checkpoints store it.

use super::Precision;
use super::flex::{Dense, tensor};
use burn_flex::FlexTensor;
use cadre_kernels::gemm::Mat;

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
    let x = Mat::new(x.values(), rows, n_in);
    let w = Mat::new(w.values(), n_out, n_in);
    let y = precision.product(x, w.t(), rayon::current_num_threads());
    tensor(y, [rows, n_out])
}

pub(super) fn backward(x: &Dense, w: &Dense, dy: &Dense, precision: Precision) -> [FlexTensor; 2] {
    let [rows, n_in, n_out] = shapes(x, w);
    let threads = rayon::current_num_threads();
    let dy = Mat::new(dy.values(), rows, n_out);
    let w = Mat::new(w.values(), n_out, n_in);
    let dx = precision.product(dy, w, threads);
    let x = Mat::new(x.values(), rows, n_in);
    let dw = precision.product(dy.t(), x, threads);
    [tensor(dx, [rows, n_in]), tensor(dw, [n_out, n_in])]
}
