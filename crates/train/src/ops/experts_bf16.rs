//! SwiGLU experts with products of bf16: what `experts.rs` computes, from packed operands.
//!
//! An expert's weights are packed once per pass; its rows are gathered and rounded in blocks, whose activations stay in
//! the cache between the two products. A weight gradient adds up its blocks in order, so nothing depends on the number of
//! threads. A task per expert, and tasks inside of it, so that a popular expert does not keep one thread busy alone.

use super::Dispatch;
use super::experts::{Gradients, Sizes, activate};
use super::math::{dot, sigmoid, vectorised};
use cadre_kernels::bf16_gemm::{Bf16Gemm, Left, Panels, Rows};
use cadre_kernels::gemm::{Mat, MatMut, Write};
use cadre_kernels::{Piece, Room};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Rows of an expert that are computed together.
const ROWS: usize = 256;
/// Rows of a weight gradient per task.
const SLAB: usize = 128;

/// The inputs of the operation.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) x: &'a [f32],
    pub(super) gate_up: &'a [f32],
    pub(super) down: &'a [f32],
    pub(super) weights: &'a [f32],
    pub(super) sizes: Sizes,
    pub(super) dispatch: &'a Dispatch,
}

impl<'a> Inputs<'a> {
    /// `[2 I, D]` of expert `e`.
    pub(super) fn gate_up(&self, e: usize) -> Mat<'a> {
        let Sizes { d, width } = self.sizes;
        let n = 2 * width * d;
        Mat::new(&self.gate_up[e * n..(e + 1) * n], 2 * width, d)
    }

    /// `[D, I]` of expert `e`.
    pub(super) fn down(&self, e: usize) -> Mat<'a> {
        let Sizes { d, width } = self.sizes;
        Mat::new(&self.down[e * d * width..(e + 1) * d * width], d, width)
    }

    /// Rows `[T, D]`.
    fn tokens<'v>(&self, values: &'v [f32]) -> Mat<'v> {
        Mat::new(values, self.dispatch.n_tokens(), self.sizes.d)
    }
}

/// Memory that tasks of a pass use one after the other: taking it anew means clearing it anew.
struct Pool<T>(Mutex<Vec<T>>);

impl<T: Default> Pool<T> {
    fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn take(&self) -> T {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop().unwrap_or_default()
    }

    fn put(&self, used: T) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(used);
    }
}

/// Packed weights of an expert.
#[derive(Default)]
struct Weights {
    gate_up: Panels,
    down: Panels,
}

impl Weights {
    fn pack(&mut self, bf16: Bf16Gemm, [gate_up, down]: [Mat<'_>; 2]) {
        let threads = rayon::current_num_threads();
        bf16.panels(&mut self.gate_up, gate_up, None, threads);
        bf16.panels(&mut self.down, down, None, threads);
    }
}

/// What a block needs while it is computed.
#[derive(Default)]
struct Scratch {
    rows: Rows,
    act: Vec<f32>,
    dact: Vec<f32>,
    dgate_up: Vec<f32>,
}

/// Sorted positions of the blocks of `range`.
fn blocks(range: Range<usize>) -> impl IndexedParallelIterator<Item = Range<usize>> {
    let end = range.end;
    (0..range.len().div_ceil(ROWS))
        .into_par_iter()
        .map(move |i| range.start + i * ROWS..end.min(range.start + (i + 1) * ROWS))
}

/// The gate/up products `[pairs, 2 I]` and the expert outputs `[pairs, D]`, both in sorted order.
pub(super) fn forward(bf16: Bf16Gemm, inputs: Inputs<'_>) -> [Vec<f32>; 2] {
    let (Sizes { d, width }, dispatch) = (inputs.sizes, inputs.dispatch);
    let (weights, scratch) = (Pool::<Weights>::new(), Pool::<Scratch>::new());
    let n_pairs = dispatch.n_dispatched();
    let (mut all_gate_up, mut all_out) = (Room::new(n_pairs * 2 * width), Room::new(n_pairs * d));
    dispatch
        .pieces(all_gate_up.whole(), 2 * width)
        .into_par_iter()
        .zip(dispatch.pieces(all_out.whole(), d))
        .enumerate()
        .filter(|(_, (_, out))| !out.is_empty())
        .for_each(|(e, (gate_up, out))| {
            let mut w = weights.take();
            w.pack(bf16, [inputs.gate_up(e).t(), inputs.down(e).t()]);
            blocks(dispatch.range(e))
                .zip(gate_up.chunks(ROWS * 2 * width))
                .zip(out.chunks(ROWS * d))
                .for_each(|((at, gate_up), out)| {
                    let n = at.len();
                    let mut used = scratch.take();
                    let Scratch { rows, act, .. } = &mut used;
                    let index = &dispatch.tokens()[at];
                    bf16.rows(rows, inputs.tokens(inputs.x), Some(index), 1);
                    let gate_up = bf16.fill(gate_up, Left::rows(rows), &w.gate_up, 1);
                    act.resize(n * width, 0.0);
                    vectorised(
                        #[inline(always)]
                        || activate(act, gate_up, width),
                    );
                    bf16.rows(rows, Mat::new(act, n, width), None, 1);
                    bf16.fill(out, Left::rows(rows), &w.down, 1);
                    scratch.put(used);
                });
            weights.put(w);
        });
    [all_gate_up.finish(), all_out.finish()]
}

/// The gate/up products alone, with the same bits as [`forward`].
pub(super) fn gate_up(bf16: Bf16Gemm, inputs: Inputs<'_>) -> Vec<f32> {
    let (width, dispatch) = (inputs.sizes.width, inputs.dispatch);
    let (weights, scratch) = (Pool::<Panels>::new(), Pool::<Rows>::new());
    let mut all = Room::new(dispatch.n_dispatched() * 2 * width);
    dispatch
        .pieces(all.whole(), 2 * width)
        .into_par_iter()
        .enumerate()
        .filter(|(_, gate_up)| !gate_up.is_empty())
        .for_each(|(e, gate_up)| {
            let mut w = weights.take();
            let threads = rayon::current_num_threads();
            bf16.panels(&mut w, inputs.gate_up(e).t(), None, threads);
            blocks(dispatch.range(e))
                .zip(gate_up.chunks(ROWS * 2 * width))
                .for_each(|(at, gate_up)| {
                    let mut rows = scratch.take();
                    let index = &dispatch.tokens()[at];
                    bf16.rows(&mut rows, inputs.tokens(inputs.x), Some(index), 1);
                    bf16.fill(gate_up, Left::rows(&rows), &w, 1);
                    scratch.put(rows);
                });
            weights.put(w);
        });
    all.finish()
}

/// A block's operands of the weight gradients.
#[derive(Default)]
struct Block {
    dy: Panels,
    act: Panels,
    dgate_up: Panels,
    x: Panels,
}

/// The gradients; `saved` are the gate/up products.
pub(super) fn backward(bf16: Bf16Gemm, inputs: Inputs<'_>, saved: &[f32], dy: &[f32]) -> Gradients {
    let (Sizes { d, width }, dispatch) = (inputs.sizes, inputs.dispatch);
    let (weights, free) = (Pool::<Weights>::new(), Pool::<Block>::new());
    let scratch = Pool::<Scratch>::new();
    let n_pairs = dispatch.n_dispatched();
    let (mut all_gate_up, mut all_down) = (
        Room::new(inputs.gate_up.len()),
        Room::new(inputs.down.len()),
    );
    let mut x_rows = Room::new(n_pairs * d);
    let mut weights_sorted = vec![0.0; n_pairs];
    all_gate_up
        .whole()
        .chunks(2 * width * d)
        .into_par_iter()
        .zip(all_down.whole().chunks(d * width))
        .zip(dispatch.pieces(x_rows.whole(), d))
        .zip(dispatch.split(&mut weights_sorted, 1))
        .enumerate()
        .for_each(|(e, (((dw_gate_up, dw_down), dx), dweights))| {
            if dx.is_empty() {
                dw_gate_up.zeros();
                dw_down.zeros();
                return;
            }
            let mut w = weights.take();
            w.pack(bf16, [inputs.gate_up(e), inputs.down(e)]);
            let blocks: Vec<Block> = blocks(dispatch.range(e))
                .zip(dx.chunks(ROWS * d))
                .zip(dweights.par_chunks_mut(ROWS))
                .map(|((at, dx), dweights)| {
                    let saved = &saved[at.start * 2 * width..at.end * 2 * width];
                    let mut block = free.take();
                    let mut used = scratch.take();
                    let given = (at, saved, dy);
                    block.fill(bf16, (&inputs, &w), given, &mut used, (dx, dweights));
                    scratch.put(used);
                    block
                })
                .collect();
            weights.put(w);
            let slabs = |dw: Piece<'_>, n: usize, operands: Operands| {
                let slabs = dw.chunks(SLAB * n).into_par_iter().enumerate();
                slabs.for_each(|(i, dw)| add_up(bf16, dw, i, &blocks, operands));
            };
            slabs(dw_down, width, |b| (&b.dy, &b.act));
            slabs(dw_gate_up, d, |b| (&b.dgate_up, &b.x));
            blocks.into_iter().for_each(|block| free.put(block));
        });
    Gradients {
        gate_up: all_gate_up.finish(),
        down: all_down.finish(),
        x_rows: x_rows.finish(),
        weights_sorted,
    }
}

/// The two operands of a weight gradient.
type Operands = fn(&Block) -> (&Panels, &Panels);

/// Slab `i` of a weight gradient: the sum over the blocks, of which there are some, of left^T right.
fn add_up(bf16: Bf16Gemm, dw: Piece<'_>, i: usize, blocks: &[Block], operands: Operands) {
    let n = operands(&blocks[0]).1.dims()[1];
    let m = dw.len() / n;
    let part = |left| Left::transposed(left).part(i * SLAB..i * SLAB + m);
    let (left, right) = operands(&blocks[0]);
    let dw = bf16.fill(dw, part(left), right, 1);
    for block in &blocks[1..] {
        let (left, right) = operands(block);
        bf16.multiply(MatMut::new(dw, m, n), Write::Add, part(left), right, 1);
    }
}

impl Block {
    /// Fills the gradients of the block's rows and weights, and what the gradients of the matrices are made of.
    fn fill(
        &mut self,
        bf16: Bf16Gemm,
        (inputs, w): (&Inputs<'_>, &Weights),
        (at, gate_up, dy): (Range<usize>, &[f32], &[f32]),
        Scratch {
            rows,
            act,
            dact,
            dgate_up,
        }: &mut Scratch,
        (dx, dweights): (Piece<'_>, &mut [f32]),
    ) {
        let (width, n) = (inputs.sizes.width, at.len());
        let index = &inputs.dispatch.tokens()[at.clone()];
        let pair_weights = inputs.dispatch.pairs()[at]
            .iter()
            .map(|&pair| inputs.weights[pair as usize]);
        for (buffer, len) in [
            (&mut *act, n * width),
            (dact, n * width),
            (dgate_up, n * 2 * width),
        ] {
            buffer.resize(len, 0.0);
        }
        bf16.rows(rows, inputs.tokens(dy), Some(index), 1);
        let into = MatMut::new(dact, n, width);
        bf16.multiply(into, Write::Set, Left::rows(rows), &w.down, 1);
        vectorised(
            #[inline(always)]
            || {
                let rows = act.chunks_exact_mut(width).zip(dact.chunks_exact(width));
                let rows = rows.zip(gate_up.chunks_exact(2 * width));
                let rows = rows.zip(dgate_up.chunks_exact_mut(2 * width));
                let rows = rows.zip(pair_weights).zip(dweights.iter_mut());
                for (((((act, dact), gu), dgu), weight), dweight) in rows {
                    both_ways(act, dgu, gu, dact, weight);
                    *dweight = dot(act, dact);
                    act.iter_mut().for_each(|a| *a *= weight);
                }
            },
        );
        let dgate_up = Mat::new(dgate_up, n, 2 * width);
        bf16.rows(rows, dgate_up, None, 1);
        bf16.fill(dx, Left::rows(rows), &w.gate_up, 1);
        bf16.panels(&mut self.dy, inputs.tokens(dy), Some(index), 1);
        bf16.panels(&mut self.act, Mat::new(act, n, width), None, 1);
        bf16.panels(&mut self.dgate_up, dgate_up, None, 1);
        bf16.panels(&mut self.x, inputs.tokens(inputs.x), Some(index), 1);
    }
}

/// One row: `silu(g) u`, and from its gradient, `weight * dact`, to `[dg | du]`.
#[inline(always)]
fn both_ways(act: &mut [f32], dgate_up: &mut [f32], gate_up: &[f32], dact: &[f32], weight: f32) {
    let width = dact.len();
    let (gate, up) = gate_up.split_at(width);
    let (dgate, dup) = dgate_up.split_at_mut(width);
    let (act, dgate, dup) = (&mut act[..width], &mut dgate[..width], &mut dup[..width]);
    let (gate, up) = (&gate[..width], &up[..width]);
    for i in 0..width {
        let s = sigmoid(gate[i]);
        let silu = gate[i] * s;
        let da = dact[i] * weight;
        act[i] = silu * up[i];
        dgate[i] = da * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        dup[i] = da * silu;
    }
}
