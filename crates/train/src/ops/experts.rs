//! SwiGLU experts over grouped tokens: gather by expert, two products per expert, combine with weights.
//!
//! No expert sees a token that did not pick it, and no masked dense work is done. One task per expert; an
//! expert's rows, products and gradients are touched by that task alone.

use super::flex::{Dense, tensor};
use super::math::{axpy, dot, sigmoid, vectorised};
use burn_flex::FlexTensor;
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use rayon::prelude::*;

/// Tokens per task when rows are combined.
const ROWS: usize = 64;

/// Which token goes to which expert: the picks of a batch, sorted by expert.
#[derive(Clone, Debug)]
pub struct Dispatch {
    top_k: usize,
    /// Sorted pairs of expert `e` are `starts[e]..starts[e + 1]`.
    starts: Vec<usize>,
    /// Pair `t * top_k + slot` of each sorted position.
    pairs: Vec<u32>,
    /// Sorted position of each pair.
    positions: Vec<u32>,
}

impl Dispatch {
    /// Sorts picks (`[T, top_k]` expert ids, row by row) by expert, keeping token order within an expert.
    ///
    /// # Panics
    /// If an id is not below `n_experts`, or the picks are not whole rows.
    #[must_use]
    pub fn new(ids: &[u16], top_k: usize, n_experts: usize) -> Self {
        assert!(
            top_k > 0 && ids.len().is_multiple_of(top_k),
            "whole rows of picks"
        );
        let mut starts = vec![0; n_experts + 1];
        for &id in ids {
            starts[usize::from(id) + 1] += 1;
        }
        for e in 0..n_experts {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let mut pairs = vec![0; ids.len()];
        let mut positions = vec![0; ids.len()];
        for (pair, &id) in ids.iter().enumerate() {
            let position = next[usize::from(id)];
            next[usize::from(id)] += 1;
            pairs[position] = pair as u32;
            positions[pair] = position as u32;
        }
        Self {
            top_k,
            starts,
            pairs,
            positions,
        }
    }

    /// Every token to the one expert there is: a dense MLP.
    #[must_use]
    pub fn dense(n_tokens: usize) -> Self {
        Self::new(&vec![0; n_tokens], 1, 1)
    }

    /// Number of picks of each expert.
    #[must_use]
    pub fn loads(&self) -> Vec<usize> {
        self.starts.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Cuts `buffer`, `width` values per sorted pair, into one piece per expert.
    fn split<'a>(&self, mut buffer: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        self.loads()
            .into_iter()
            .map(|n| {
                let (piece, rest) = std::mem::take(&mut buffer).split_at_mut(n * width);
                buffer = rest;
                piece
            })
            .collect()
    }

    /// Rows of `x` for the pairs of expert `e`, in order.
    fn gather(&self, x: &[f32], d: usize, e: usize) -> Vec<f32> {
        let pairs = &self.pairs[self.starts[e]..self.starts[e + 1]];
        let mut rows = Vec::with_capacity(pairs.len() * d);
        for &pair in pairs {
            let t = pair as usize / self.top_k;
            rows.extend_from_slice(&x[t * d..(t + 1) * d]);
        }
        rows
    }

    /// `y[t] = sum over slots of weight * rows[position]`; without weights, the plain sum.
    fn combine(&self, rows: &[f32], weights: Option<&[f32]>, d: usize) -> Vec<f32> {
        let mut y = vec![0.0; self.pairs.len() / self.top_k * d];
        y.par_chunks_mut(ROWS * d)
            .enumerate()
            .for_each(|(task, y)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for (row, y) in y.chunks_exact_mut(d).enumerate() {
                            let first = (task * ROWS + row) * self.top_k;
                            for pair in first..first + self.top_k {
                                let from = self.positions[pair] as usize * d;
                                axpy(y, weights.map_or(1.0, |w| w[pair]), &rows[from..from + d]);
                            }
                        }
                    },
                );
            });
        y
    }
}

/// `n` rows of `[gate | up]` become `n` rows of `silu(gate) * up`.
#[inline(always)]
fn activate(act: &mut [f32], gate_up: &[f32], width: usize) {
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

struct Sizes {
    d: usize,
    width: usize,
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
    assert_eq!(weights.dims(), [n_tokens, dispatch.top_k], "weights [T, K]");
    assert_eq!(dispatch.starts.len(), n_experts + 1, "one group per expert");
    assert_eq!(dispatch.pairs.len(), n_tokens * dispatch.top_k);
    Sizes { d, width }
}

/// Returns the combined output `[T, D]` and the gate/up products `[pairs, 2 I]` in sorted order.
pub(super) fn forward(inputs: &[Dense; 4], dispatch: &Dispatch) -> [FlexTensor; 2] {
    let Sizes { d, width } = sizes(inputs, dispatch);
    let [x, w_gate_up, w_down, weights] = inputs.each_ref().map(Dense::values);
    let n_pairs = dispatch.pairs.len();
    let mut gate_up = vec![0.0; n_pairs * 2 * width];
    let mut out = vec![0.0; n_pairs * d];
    dispatch
        .split(&mut gate_up, 2 * width)
        .into_par_iter()
        .zip(dispatch.split(&mut out, d))
        .enumerate()
        .for_each(|(e, (gate_up, out))| {
            let n = out.len() / d;
            let rows = dispatch.gather(x, d, e);
            let w = Mat::new(
                &w_gate_up[e * 2 * width * d..(e + 1) * 2 * width * d],
                2 * width,
                d,
            );
            let into = MatMut::new(gate_up, n, 2 * width);
            gemm(into, Write::Set, 1.0, Mat::new(&rows, n, d), w.t(), 1);
            let mut act = vec![0.0; n * width];
            vectorised(
                #[inline(always)]
                || activate(&mut act, gate_up, width),
            );
            let w = Mat::new(&w_down[e * d * width..(e + 1) * d * width], d, width);
            gemm(
                MatMut::new(out, n, d),
                Write::Set,
                1.0,
                Mat::new(&act, n, width),
                w.t(),
                1,
            );
        });
    let y = dispatch.combine(&out, Some(weights), d);
    let n_tokens = n_pairs / dispatch.top_k;
    [
        tensor(y, [n_tokens, d]),
        tensor(gate_up, [n_pairs, 2 * width]),
    ]
}

/// Gradients with respect to x, gate_up, down and weights.
///
/// With `h = silu(g) * u` and `r = down^T dy`: `dweight = <r, h>`, so expert outputs need not be kept.
pub(super) fn backward(
    inputs: &[Dense; 4],
    saved: &Dense,
    dispatch: &Dispatch,
    dy: &Dense,
) -> [FlexTensor; 4] {
    let Sizes { d, width } = sizes(inputs, dispatch);
    let [x, w_gate_up, w_down, weights] = inputs.each_ref().map(Dense::values);
    let (saved, dy) = (saved.values(), dy.values());
    let n_pairs = dispatch.pairs.len();
    let mut dw_gate_up = vec![0.0; w_gate_up.len()];
    let mut dw_down = vec![0.0; w_down.len()];
    let mut dx_rows = vec![0.0; n_pairs * d];
    let mut dweights_sorted = vec![0.0; n_pairs];
    dw_gate_up
        .par_chunks_mut(2 * width * d)
        .zip(dw_down.par_chunks_mut(d * width))
        .zip(dispatch.split(&mut dx_rows, d))
        .zip(dispatch.split(&mut dweights_sorted, 1))
        .enumerate()
        .for_each(|(e, (((dw_gate_up, dw_down), dx), dweights))| {
            let (from, to) = (dispatch.starts[e], dispatch.starts[e + 1]);
            let n = to - from;
            let gate_up = &saved[from * 2 * width..to * 2 * width];
            let dy_rows = dispatch.gather(dy, d, e);
            let dy_rows = Mat::new(&dy_rows, n, d);
            let w = Mat::new(&w_down[e * d * width..(e + 1) * d * width], d, width);
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
            let pair_weights = dispatch.pairs[from..to]
                .iter()
                .map(|&p| weights[p as usize]);
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
            let rows = dispatch.gather(x, d, e);
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
            let w = Mat::new(
                &w_gate_up[e * 2 * width * d..(e + 1) * 2 * width * d],
                2 * width,
                d,
            );
            gemm(MatMut::new(dx, n, d), Write::Set, 1.0, dgate_up, w, 1);
        });
    let dx = dispatch.combine(&dx_rows, None, d);
    let dweights = dispatch
        .positions
        .iter()
        .map(|&p| dweights_sorted[p as usize])
        .collect();
    let ([n_experts, ..], n_tokens) = (inputs[2].dims::<3>(), n_pairs / dispatch.top_k);
    [
        tensor(dx, [n_tokens, d]),
        tensor(dw_gate_up, [n_experts, 2 * width, d]),
        tensor(dw_down, [n_experts, d, width]),
        tensor(dweights, [n_tokens, dispatch.top_k]),
    ]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dispatch_sorts_by_expert_and_keeps_token_order() {
        let d = Dispatch::new(&[2, 0, 0, 1, 2, 1], 2, 4);
        assert_eq!(d.loads(), [2, 2, 2, 0]);
        assert_eq!(d.pairs, [1, 2, 3, 5, 0, 4]);
        for (pair, &position) in d.positions.iter().enumerate() {
            assert_eq!(d.pairs[position as usize] as usize, pair);
        }
    }

    #[test]
    fn gather_then_combine_without_weights_counts_the_picks() {
        let d = Dispatch::new(&[2, 0, 0, 1], 2, 3);
        let x = [1.0, 2.0, 10.0, 20.0];
        let rows: Vec<f32> = (0..3).flat_map(|e| d.gather(&x, 2, e)).collect();
        assert_eq!(d.combine(&rows, None, 2), [2.0, 4.0, 20.0, 40.0]);
    }
}
