//! Next-token cross-entropy fused with the unembedding, so that the `[T, V]` logits never exist at once.
//!
//! The gradient is made on the way: for a block of tokens, logits -> softmax -> `(p - onehot) / T`, which is
//! multiplied back at once. With products of bf16 a thread keeps the logits of a few tokens only. Recomputing the logits in a later backward pass would cost a third product.

use super::Precision;
use super::flex::{Dense, tensor};
use super::math::{exp_sum, max, vectorised};
use burn_flex::FlexTensor;
use cadre_kernels::bf16_gemm::{Bf16Gemm, Left, Panels, Rows};
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use cadre_kernels::{Piece, Room, zeros};
use rayon::prelude::*;

/// Tokens per block: large enough for full-speed products, small enough to stay in the outer cache.
const BLOCK: usize = 256;
/// Rows per task inside a block.
const ROWS: usize = 16;
/// Tokens whose bf16 logit gradients are kept until they are added to the weight's.
const BLOCK_BF16: usize = 512;
/// Tokens per task with products of bf16.
const ROWS_BF16: usize = 64;
/// Rows of the weight gradient per task.
const SLAB: usize = 128;

pub(super) fn loss(x: &Dense, w: &Dense, targets: &[u32], precision: Precision) -> FlexTensor {
    if let Some(bf16) = precision.bf16() {
        let total = Bf16Head::new(bf16, x, w, targets).loss();
        return tensor(vec![total], [1]);
    }
    let total = run(x, w, targets, |_, _| {});
    tensor(vec![total], [1])
}

pub(super) fn with_gradients(
    x: &Dense,
    w: &Dense,
    targets: &[u32],
    precision: Precision,
) -> [FlexTensor; 3] {
    let ([rows, d], [vocab, _]) = (x.dims(), w.dims());
    if let Some(bf16) = precision.bf16() {
        let (total, dx, dw) = Bf16Head::new(bf16, x, w, targets).with_gradients();
        return [
            tensor(vec![total], [1]),
            tensor(dx, [rows, d]),
            tensor(dw, [vocab, d]),
        ];
    }
    let (xs, ws) = (x.values(), w.values());
    let threads = rayon::current_num_threads();
    let mut dx = zeros(rows * d);
    let mut dw = zeros(vocab * d);
    let total = run(x, w, targets, |start, dlogits| {
        let n = dlogits.len() / vocab;
        let (from, to) = (start * d, (start + n) * d);
        let dlogits = Mat::new(dlogits, n, vocab);
        let w = Mat::new(ws, vocab, d);
        gemm(
            MatMut::new(&mut dx[from..to], n, d),
            Write::Set,
            1.0,
            dlogits,
            w,
            threads,
        );
        let x = Mat::new(&xs[from..to], n, d);
        gemm(
            MatMut::new(&mut dw, vocab, d),
            Write::Add,
            1.0,
            dlogits.t(),
            x,
            threads,
        );
    });
    [
        tensor(vec![total], [1]),
        tensor(dx, [rows, d]),
        tensor(dw, [vocab, d]),
    ]
}

/// Walks the blocks; `each` gets the first row of a block and its logit gradients. Returns the mean loss.
fn run(x: &Dense, w: &Dense, targets: &[u32], mut each: impl FnMut(usize, &[f32])) -> f32 {
    let ([rows, d], [vocab, _]) = (x.dims(), w.dims());
    assert_eq!(targets.len(), rows, "one target per row");
    let threads = rayon::current_num_threads();
    let scale = 1.0 / rows as f32;
    let mut buffer = vec![0.0; BLOCK.min(rows) * vocab];
    let mut total = 0.0_f64;
    for start in (0..rows).step_by(BLOCK) {
        let n = BLOCK.min(rows - start);
        let logits = &mut buffer[..n * vocab];
        let x = Mat::new(&x.values()[start * d..(start + n) * d], n, d);
        let w = Mat::new(w.values(), vocab, d).t();
        gemm(
            MatMut::new(logits, n, vocab),
            Write::Set,
            1.0,
            x,
            w,
            threads,
        );
        let losses: Vec<f64> = logits
            .par_chunks_mut(ROWS * vocab)
            .zip(targets[start..start + n].par_chunks(ROWS))
            .map(|(logits, targets)| {
                vectorised(
                    #[inline(always)]
                    || {
                        let mut total = 0.0;
                        for (row, &target) in logits.chunks_exact_mut(vocab).zip(targets) {
                            total += to_gradient(row, target as usize, scale);
                        }
                        total
                    },
                )
            })
            .collect();
        total += losses.iter().sum::<f64>();
        each(start, logits);
    }
    (total / rows as f64) as f32
}

/// The same with products of bf16.
struct Bf16Head<'a> {
    bf16: Bf16Gemm,
    x: &'a [f32],
    w: Mat<'a>,
    targets: &'a [u32],
    /// `w^T`.
    across: Panels,
    rows: usize,
    d: usize,
    vocab: usize,
}

/// What some tokens add to the weight gradient: `dlogits^T x`.
struct Part {
    loss: f64,
    dlogits: Panels,
    x: Panels,
}

impl<'a> Bf16Head<'a> {
    fn new(bf16: Bf16Gemm, x: &'a Dense, w: &'a Dense, targets: &'a [u32]) -> Self {
        let ([rows, d], [vocab, _]) = (x.dims(), w.dims());
        assert_eq!(targets.len(), rows, "one target per row");
        let w = Mat::new(w.values(), vocab, d);
        let mut across = Panels::default();
        bf16.panels(&mut across, w.t(), None, rayon::current_num_threads());
        let x = x.values();
        Self {
            bf16,
            x,
            w,
            targets,
            across,
            rows,
            d,
            vocab,
        }
    }

    /// Tokens from `from` on, as many as `ROWS_BF16` allows: their rows of `x`.
    fn tokens(&self, from: usize) -> Mat<'a> {
        let to = self.rows.min(from + ROWS_BF16);
        Mat::new(&self.x[from * self.d..to * self.d], to - from, self.d)
    }

    /// Leaves the logit gradients of `x`, the tokens from `from` on, in `logits`; returns the sum of their losses.
    fn gradient(&self, logits: &mut Vec<f32>, x: Mat<'_>, from: usize) -> f64 {
        let [n, _] = x.dims();
        logits.resize(n * self.vocab, 0.0);
        let mut rows = Rows::default();
        self.bf16.rows(&mut rows, x, None, 1);
        let into = MatMut::new(logits, n, self.vocab);
        self.bf16
            .multiply(into, Write::Set, Left::rows(&rows), &self.across, 1);
        let (scale, targets) = (1.0 / self.rows as f32, &self.targets[from..from + n]);
        vectorised(
            #[inline(always)]
            || {
                let rows = logits.chunks_exact_mut(self.vocab).zip(targets);
                let mut total = 0.0;
                for (row, &target) in rows {
                    total += to_gradient(row, target as usize, scale);
                }
                total
            },
        )
    }

    fn loss(&self) -> f32 {
        let losses: Vec<f64> = (0..self.rows.div_ceil(ROWS_BF16))
            .into_par_iter()
            .map_init(Vec::new, |logits, i| {
                self.gradient(logits, self.tokens(i * ROWS_BF16), i * ROWS_BF16)
            })
            .collect();
        (losses.iter().sum::<f64>() / self.rows as f64) as f32
    }

    fn with_gradients(&self) -> (f32, Vec<f32>, Vec<f32>) {
        let (d, bf16) = (self.d, self.bf16);
        let mut down = Panels::default();
        bf16.panels(&mut down, self.w, None, rayon::current_num_threads());
        let (mut dx, mut dw) = (Room::new(self.rows * d), Room::new(self.vocab * d));
        let mut blocks = dx.whole().chunks(BLOCK_BF16 * d).into_iter().enumerate();
        let mut block = || {
            let (block, dx) = blocks.next()?;
            Some(self.block(&down, block * BLOCK_BF16, dx))
        };
        let mut total = 0.0;
        let loss = |parts: &[Part]| parts.iter().map(|part| part.loss).sum::<f64>();
        // The first block writes the slabs of the weight's gradient, the others add to them.
        let parts = block().unwrap_or_default();
        total += loss(&parts);
        let slabs = dw.whole().chunks(SLAB * d).into_par_iter().enumerate();
        let mut slabs: Vec<&mut [f32]> = slabs
            .map(|(i, dw)| {
                let Some((first, rest)) = parts.split_first() else {
                    return dw.zeros();
                };
                let rows = i * SLAB..i * SLAB + dw.len() / d;
                let left = Left::transposed(&first.dlogits).part(rows);
                let dw = bf16.fill(dw, left, &first.x, 1);
                self.add(i, dw, rest);
                dw
            })
            .collect();
        while let Some(parts) = block() {
            total += loss(&parts);
            let slabs = slabs.par_iter_mut().enumerate();
            slabs.for_each(|(i, dw)| self.add(i, dw, &parts));
        }
        let (dx, dw) = (dx.finish(), dw.finish());
        ((total / self.rows as f64) as f32, dx, dw)
    }

    /// Fills the gradients `dx` of the tokens from `from` on; returns what the weight's gradient is made of.
    fn block(&self, down: &Panels, from: usize, dx: Piece<'_>) -> Vec<Part> {
        let (d, bf16) = (self.d, self.bf16);
        let pieces = dx.chunks(ROWS_BF16 * d).into_par_iter().enumerate();
        pieces
            .map_init(Vec::new, |logits, (i, dx)| {
                let from = from + i * ROWS_BF16;
                let x = self.tokens(from);
                let loss = self.gradient(logits, x, from);
                let dlogits = Mat::new(logits, dx.len() / d, self.vocab);
                let mut rows = Rows::default();
                bf16.rows(&mut rows, dlogits, None, 1);
                bf16.fill(dx, Left::rows(&rows), down, 1);
                let mut part = Part {
                    loss,
                    dlogits: Panels::default(),
                    x: Panels::default(),
                };
                bf16.panels(&mut part.dlogits, dlogits, None, 1);
                bf16.panels(&mut part.x, x, None, 1);
                part
            })
            .collect()
    }

    /// Adds what `parts` make of slab `i` of the weight's gradient.
    fn add(&self, i: usize, dw: &mut [f32], parts: &[Part]) {
        let m = dw.len() / self.d;
        for part in parts {
            let left = Left::transposed(&part.dlogits).part(i * SLAB..i * SLAB + m);
            let into = MatMut::new(dw, m, self.d);
            self.bf16.multiply(into, Write::Add, left, &part.x, 1);
        }
    }
}

/// Turns one row of logits into the gradient of `scale * loss`, and returns the loss.
#[inline(always)]
fn to_gradient(row: &mut [f32], target: usize, scale: f32) -> f64 {
    let top = max(row);
    let chosen = row[target];
    let sum = exp_sum(row, top);
    let factor = scale / sum;
    for p in row.iter_mut() {
        *p *= factor;
    }
    row[target] -= scale;
    f64::from(top - chosen) + f64::from(sum).ln()
}
