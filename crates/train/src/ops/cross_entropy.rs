//! Next-token cross-entropy fused with the unembedding, so that the `[T, V]` logits never exist at once.
//!
//! The gradient is made on the way: for a block of tokens, logits -> softmax -> `(p - onehot) / T`, which is
//! multiplied back at once. Recomputing the logits in a later backward pass would cost a third product.

use super::flex::{Dense, tensor};
use super::math::{exp_sum, max, vectorised};
use burn_flex::FlexTensor;
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};
use rayon::prelude::*;

/// Tokens per block: large enough for full-speed products, small enough to stay in the outer cache.
const BLOCK: usize = 256;
/// Rows per task inside a block.
const ROWS: usize = 16;

pub(super) fn loss(x: &Dense, w: &Dense, targets: &[u32]) -> FlexTensor {
    let total = run(x, w, targets, |_, _| {});
    tensor(vec![total], [1])
}

pub(super) fn with_gradients(x: &Dense, w: &Dense, targets: &[u32]) -> [FlexTensor; 3] {
    let ([rows, d], [vocab, _]) = (x.dims(), w.dims());
    let (xs, ws) = (x.values(), w.values());
    let threads = rayon::current_num_threads();
    let mut dx = vec![0.0; rows * d];
    let mut dw = vec![0.0; vocab * d];
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
