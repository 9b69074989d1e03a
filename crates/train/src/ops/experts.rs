//! SwiGLU experts over grouped tokens: gather by expert, two products per expert, combine with weights.
//!
//! No expert sees a token that did not pick it, and no masked dense work is done. One task per expert; an
//! expert's rows, products and gradients are touched by that task alone.

use super::Dispatch;
use super::experts_bf16::{self, Inputs};
use super::flex::{Dense, tensor};
use super::math::{dot, sigmoid, vectorised};
use super::{Numerics, Precision, Recompute};
use burn_flex::FlexTensor;
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use cadre_kernels::zeros;
use rayon::prelude::*;

/// `n` rows of `[gate | up]` become `n` rows of `silu(gate) * up`.
#[inline(always)]
pub(super) fn activate(act: &mut [f32], gate_up: &[f32], width: usize) {
    for (act, gu) in act
        .chunks_exact_mut(width)
        .zip(gate_up.chunks_exact(2 * width))
    {
        let (gate, up) = gu.split_at(width);
        for ((a, g), u) in act.iter_mut().zip(gate).zip(up) {
            *a = g * sigmoid(*g) * u;
        }
    }
}

/// Widths of the model and of an expert.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) d: usize,
    pub(super) width: usize,
}

/// Gradients of the matrices, and of rows and weights in sorted order.
pub(super) struct Gradients {
    pub(super) gate_up: Vec<f32>,
    pub(super) down: Vec<f32>,
    pub(super) x_rows: Vec<f32>,
    pub(super) weights_sorted: Vec<f32>,
}

fn inputs_of<'a>(inputs: &'a [Dense; 4], dispatch: &'a Dispatch) -> Inputs<'a> {
    let [x, gate_up, down, weights] = inputs.each_ref().map(Dense::values);
    Inputs {
        x,
        gate_up,
        down,
        weights,
        sizes: sizes(inputs, dispatch),
        dispatch,
    }
}

fn sizes([x, gate_up, down, weights]: &[Dense; 4], dispatch: &Dispatch) -> Sizes {
    let [n_tokens, d] = x.dims();
    let [n_experts, d_out, width] = down.dims();
    assert_eq!(
        gate_up.dims(),
        [n_experts, 2 * width, d],
        "gate_up [E, 2 I, D]"
    );
    assert_eq!(d_out, d, "down [E, D, I]");
    assert_eq!(weights.dims(), [dispatch.n_pairs()], "weights [pairs]");
    assert_eq!(dispatch.n_experts(), n_experts, "one group per expert");
    assert_eq!(dispatch.n_tokens(), n_tokens, "one row per token");
    Sizes { d, width }
}

/// Returns the combined output `[T, D]` and the gate/up products `[pairs, 2 I]` in sorted order; of them nothing when
/// they are to be computed again.
pub(super) fn forward(
    inputs: &[Dense; 4],
    dispatch: &Dispatch,
    numerics: Numerics,
) -> [FlexTensor; 2] {
    let all = inputs_of(inputs, dispatch);
    let Sizes { d, width } = all.sizes;
    let n_pairs = dispatch.n_dispatched();
    let [gate_up, out] = match numerics.precision.bf16() {
        None => forward_f32(all),
        Some(bf16) => experts_bf16::forward(bf16, all),
    };
    let y = dispatch.combine(&out, Some(all.weights), d);
    let saved = match numerics.recompute {
        Recompute::None | Recompute::Layer => tensor(gate_up, [n_pairs, 2 * width]),
        Recompute::Experts => tensor(Vec::new(), [0, 2 * width]),
    };
    [tensor(y, [dispatch.n_tokens(), d]), saved]
}

/// The gate/up products alone, as [`forward`] makes them.
fn gate_up_again(inputs: Inputs<'_>, precision: Precision) -> Vec<f32> {
    let (Sizes { d, width }, dispatch) = (inputs.sizes, inputs.dispatch);
    if let Some(bf16) = precision.bf16() {
        return experts_bf16::gate_up(bf16, inputs);
    }
    let mut gate_up = zeros(dispatch.n_dispatched() * 2 * width);
    let experts = dispatch.split(&mut gate_up, 2 * width).into_par_iter();
    experts.enumerate().for_each(|(e, gate_up)| {
        let rows = dispatch.gather(inputs.x, d, e);
        let n = rows.len() / d;
        let into = MatMut::new(gate_up, n, 2 * width);
        let w = inputs.gate_up(e).t();
        gemm(into, Write::Set, 1.0, Mat::new(&rows, n, d), w, 1);
    });
    gate_up
}

/// The gate/up products `[pairs, 2 I]` and the expert outputs `[pairs, D]`, both in sorted order.
fn forward_f32(inputs: Inputs<'_>) -> [Vec<f32>; 2] {
    let (Sizes { d, width }, dispatch) = (inputs.sizes, inputs.dispatch);
    let n_pairs = dispatch.n_dispatched();
    let (mut all_gate_up, mut all_out) = (zeros(n_pairs * 2 * width), zeros(n_pairs * d));
    dispatch
        .split(&mut all_gate_up, 2 * width)
        .into_par_iter()
        .zip(dispatch.split(&mut all_out, d))
        .enumerate()
        .for_each(|(e, (gate_up, out))| {
            let n = out.len() / d;
            let rows = dispatch.gather(inputs.x, d, e);
            let w = inputs.gate_up(e);
            let into = MatMut::new(gate_up, n, 2 * width);
            gemm(into, Write::Set, 1.0, Mat::new(&rows, n, d), w.t(), 1);
            let mut act = vec![0.0; n * width];
            vectorised(
                #[inline(always)]
                || activate(&mut act, gate_up, width),
            );
            let w = inputs.down(e);
            gemm(
                MatMut::new(out, n, d),
                Write::Set,
                1.0,
                Mat::new(&act, n, width),
                w.t(),
                1,
            );
        });
    [all_gate_up, all_out]
}

/// Gradients with respect to x, gate_up, down and weights.
///
/// With `h = silu(g) * u` and `r = down^T dy`: `dweight = <r, h>`, so expert outputs need not be kept.
pub(super) fn backward(
    inputs: &[Dense; 4],
    saved: &Dense,
    (dispatch, numerics): (&Dispatch, Numerics),
    dy: &Dense,
) -> [FlexTensor; 4] {
    let all = inputs_of(inputs, dispatch);
    let Sizes { d, width } = all.sizes;
    let again = match numerics.recompute {
        Recompute::None | Recompute::Layer => Vec::new(),
        Recompute::Experts => gate_up_again(all, numerics.precision),
    };
    let saved = match numerics.recompute {
        Recompute::None | Recompute::Layer => saved.values(),
        Recompute::Experts => &again,
    };
    let dy = dy.values();
    let Gradients {
        gate_up: dw_gate_up,
        down: dw_down,
        x_rows: dx_rows,
        weights_sorted,
    } = match numerics.precision.bf16() {
        None => backward_f32(all, saved, dy),
        Some(bf16) => experts_bf16::backward(bf16, all, saved, dy),
    };
    let dx = dispatch.combine(&dx_rows, None, d);
    let [n_experts, ..] = inputs[2].dims::<3>();
    [
        tensor(dx, [dispatch.n_tokens(), d]),
        tensor(dw_gate_up, [n_experts, 2 * width, d]),
        tensor(dw_down, [n_experts, d, width]),
        tensor(dispatch.by_pair(&weights_sorted), [dispatch.n_pairs()]),
    ]
}

fn backward_f32(inputs: Inputs<'_>, saved: &[f32], dy: &[f32]) -> Gradients {
    let (Sizes { d, width }, dispatch) = (inputs.sizes, inputs.dispatch);
    let n_pairs = dispatch.n_dispatched();
    let mut all = Gradients {
        gate_up: zeros(inputs.gate_up.len()),
        down: zeros(inputs.down.len()),
        x_rows: zeros(n_pairs * d),
        weights_sorted: vec![0.0; n_pairs],
    };
    all.gate_up
        .par_chunks_mut(2 * width * d)
        .zip(all.down.par_chunks_mut(d * width))
        .zip(dispatch.split(&mut all.x_rows, d))
        .zip(dispatch.split(&mut all.weights_sorted, 1))
        .enumerate()
        .for_each(|(e, (((dw_gate_up, dw_down), dx), dweights))| {
            let positions = dispatch.range(e);
            let n = positions.len();
            let gate_up = &saved[positions.start * 2 * width..positions.end * 2 * width];
            let dy_rows = dispatch.gather(dy, d, e);
            let dy_rows = Mat::new(&dy_rows, n, d);
            let w = inputs.down(e);
            let mut dact = vec![0.0; n * width];
            gemm(
                MatMut::new(&mut dact, n, width),
                Write::Set,
                1.0,
                dy_rows,
                w,
                1,
            );

            let mut act = vec![0.0; n * width];
            let mut dgate_up = vec![0.0; n * 2 * width];
            let pair_weights = dispatch.pairs()[positions]
                .iter()
                .map(|&p| inputs.weights[p as usize]);
            vectorised(
                #[inline(always)]
                || {
                    activate(&mut act, gate_up, width);
                    let rows = act.chunks_exact_mut(width).zip(dact.chunks_exact(width));
                    let rows = rows.zip(gate_up.chunks_exact(2 * width));
                    let rows = rows.zip(dgate_up.chunks_exact_mut(2 * width));
                    let rows = rows.zip(pair_weights).zip(dweights.iter_mut());
                    for (((((act, dact), gu), dgu), weight), dweight) in rows {
                        *dweight = dot(act, dact);
                        activate_backward(dgu, gu, dact, weight);
                        act.iter_mut().for_each(|a| *a *= weight);
                    }
                },
            );

            let act = Mat::new(&act, n, width);
            gemm(
                MatMut::new(dw_down, d, width),
                Write::Set,
                1.0,
                dy_rows.t(),
                act,
                1,
            );
            let rows = dispatch.gather(inputs.x, d, e);
            let dgate_up = Mat::new(&dgate_up, n, 2 * width);
            let into = MatMut::new(dw_gate_up, 2 * width, d);
            gemm(
                into,
                Write::Set,
                1.0,
                dgate_up.t(),
                Mat::new(&rows, n, d),
                1,
            );
            let w = inputs.gate_up(e);
            gemm(MatMut::new(dx, n, d), Write::Set, 1.0, dgate_up, w, 1);
        });
    all
}

/// One row: from `d(silu(g) u)` to `[dg | du]`, times the combine weight.
#[inline(always)]
fn activate_backward(dgate_up: &mut [f32], gate_up: &[f32], dact: &[f32], weight: f32) {
    let width = dact.len();
    let (gate, up) = gate_up.split_at(width);
    let (dgate, dup) = dgate_up.split_at_mut(width);
    for i in 0..width {
        let s = sigmoid(gate[i]);
        let da = dact[i] * weight;
        dgate[i] = da * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        dup[i] = da * gate[i] * s;
    }
}
