//! The scalar twins: plain Rust for any CPU, and the meaning of every kernel.
//!
//! Sums run over eight independent lanes so that the compiler may vectorise them without reordering.

use half::bf16;

use super::{Rows, Table};
use crate::blocks::{ActQ8, BlockQ8_0, Q8_BLOCK};

pub(super) static TABLE: Table = Table {
    rows_f32,
    rows_bf16,
    rows_q8_0,
    add_weighted_rows,
    max,
    exp_sum,
    silu_mul,
    quantize_act,
};

const LANES: usize = 8;

fn sum_products(n: usize, product: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = n - n % LANES;
    for i in (0..whole).step_by(LANES) {
        for (lane, acc) in lanes.iter_mut().enumerate() {
            *acc += product(i + lane);
        }
    }
    let tail: f32 = (whole..n).map(&product).sum();
    lanes.iter().sum::<f32>() + tail
}

fn dot_f32(w: &[f32], x: &[f32]) -> f32 {
    sum_products(w.len(), |i| w[i] * x[i])
}

fn dot_bf16(w: &[bf16], x: &[f32]) -> f32 {
    sum_products(w.len(), |i| w[i].to_f32() * x[i])
}

fn dot_q8_0(w: &[BlockQ8_0], x: &[ActQ8]) -> f32 {
    let mut sum = 0.0;
    for (w, x) in w.iter().zip(x) {
        let products =
            w.qs.iter()
                .zip(&x.qs)
                .map(|(w, x)| i32::from(*w) * i32::from(*x));
        sum += products.sum::<i32>() as f32 * (w.d.to_f32() * x.d);
    }
    sum
}

/// # Safety
/// `args` as for `RowsFn`.
unsafe fn rows<W, X>(args: &Rows<W, X>, dot: impl Fn(&[W], &[X]) -> f32) {
    for r in 0..args.n_rows {
        for t in 0..args.n_tokens {
            // SAFETY: the contract of `RowsFn`: r and t are inside the operands and the destination.
            unsafe {
                let w = std::slice::from_raw_parts(args.w.add(r * args.n_units), args.n_units);
                let x = std::slice::from_raw_parts(args.x.add(t * args.n_units), args.n_units);
                *args.y.add(t * args.y_stride + r) = dot(w, x);
            }
        }
    }
}

/// # Safety
/// See `RowsFn`.
unsafe fn rows_f32(args: &Rows<f32, f32>) {
    // SAFETY: the same contract.
    unsafe { rows(args, dot_f32) }
}

/// # Safety
/// See `RowsFn`.
unsafe fn rows_bf16(args: &Rows<bf16, f32>) {
    // SAFETY: the same contract.
    unsafe { rows(args, dot_bf16) }
}

/// # Safety
/// See `RowsFn`.
unsafe fn rows_q8_0(args: &Rows<BlockQ8_0, ActQ8>) {
    // SAFETY: the same contract.
    unsafe { rows(args, dot_q8_0) }
}

fn add_weighted_rows(weights: &[f32], rows: &[f32], y: &mut [f32]) {
    for (weight, row) in weights.iter().zip(rows.chunks_exact(y.len().max(1))) {
        for (y, v) in y.iter_mut().zip(row) {
            *y += weight * v;
        }
    }
}

fn max(x: &[f32]) -> f32 {
    x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v))
}

fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut sum = 0.0;
    for v in x {
        *v = (*v - shift).exp();
        sum += *v;
    }
    sum
}

fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

fn quantize_act(x: &[f32], out: &mut [ActQ8]) {
    for (x, out) in x.chunks_exact(Q8_BLOCK).zip(out) {
        // As integers, the bits of NaN and infinity are above those of every finite value.
        let amax = x
            .iter()
            .map(|v| v.to_bits() & 0x7fff_ffff)
            .max()
            .unwrap_or(0);
        let scale = ActScale::of(f32::from_bits(amax));
        let mut sum = 0;
        for (q, v) in out.qs.iter_mut().zip(x) {
            *q = (v * scale.inverse).round_ties_even() as i8;
            sum += i32::from(*q);
        }
        out.d = scale.d;
        out.bias = -128 * sum;
    }
}

/// How to quantise a block of activations whose largest magnitude is known.
pub(super) struct ActScale {
    /// What a quant is worth.
    pub(super) d: f32,
    /// What a value is multiplied by before rounding.
    pub(super) inverse: f32,
}

impl ActScale {
    /// A block that is not finite gets a NaN scale; one too small for a normal scale becomes zeros.
    #[inline]
    pub(super) fn of(amax: f32) -> Self {
        let d = amax / 127.0;
        if !d.is_finite() {
            Self {
                d: f32::NAN,
                inverse: 0.0,
            }
        } else if d < f32::MIN_POSITIVE {
            Self {
                d: 0.0,
                inverse: 0.0,
            }
        } else {
            Self {
                d,
                inverse: 1.0 / d,
            }
        }
    }
}
