//! The scalar twins: plain Rust for any CPU, and the meaning of every kernel.
//!
//! Sums run over eight independent lanes so that the compiler may vectorise them without reordering.

use half::{bf16, f16};

use super::{Products, Rows, Table, scalar_panel};
use crate::blocks::{ActQ8, ActQ8K, ActScale, Block256, Q8_BLOCK, Quants256, SUPER_BLOCK};
use crate::format::decode_f8;
use crate::interleave::Shape;

pub(super) static TABLE: Table = Table {
    rows_f32,
    rows_f16,
    rows_bf16,
    products: Products::Panels(scalar_panel::panels),
    interleave: Shape::interleave,
    peak_int8: None,
    peak_bf16: None,
    bf16: &super::scalar_bf16::TABLE,
    attention: &super::attention::scalar::TABLE,
    add_weighted_rows,
    max,
    exp_sum,
    silu_mul,
    decode_f8,
    quantize_act,
    quantize_act_k,
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

fn dot_f16(w: &[f16], x: &[f32]) -> f32 {
    sum_products(w.len(), |i| w[i].to_f32() * x[i])
}

/// What a super-block adds to a dot product, from its sums in integers.
#[inline(always)]
#[allow(
    dead_code,
    reason = "the vector kernels over rows use it, and not every CPU has them"
)]
pub(super) fn share<B: Block256>(w: &Quants256, d: f32, scaled: i32, mins: i32) -> f32 {
    let scaled = w.d * d * scaled as f32;
    if B::HAS_MIN {
        scaled - w.dmin * d * mins as f32
    } else {
        scaled
    }
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
unsafe fn rows_f16(args: &Rows<f16, f32>) {
    // SAFETY: the same contract.
    unsafe { rows(args, dot_f16) }
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
        scale.finish(sum, out);
    }
}

fn quantize_act_k(x: &[f32], out: &mut [ActQ8K]) {
    for (x, out) in x.as_chunks::<SUPER_BLOCK>().0.iter().zip(out) {
        *out = ActQ8K::quantize(x);
    }
}
