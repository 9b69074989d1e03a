//! Rows of floats, element-wise functions, and the rounding of activations to 8 bits.
//!
//! A dot product keeps one 4-lane accumulator per output element, reduces it by a fixed tree, then adds the values that
//! do not fill a step one by one. `exp` is a degree-7 polynomial; its error against the twin is bounded in `table.rs`.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::rows_by_tiles;
use crate::arch::{EXP_TAYLOR, LN2_HIGH, LN2_LOW};
use crate::blocks::{ActQ8, ActScale, Q8_BLOCK};

rows_by_tiles!(rows_f32, tile<f32>, f32, f32, "neon", 4 x 4, 8);
rows_by_tiles!(rows_f16, tile<f16>, f16, f32, "neon", 4 x 4, 8);
rows_by_tiles!(rows_bf16, tile<bf16>, bf16, f32, "neon", 4 x 4, 8);

const LANES: usize = 4;

/// Numbers that become f32.
trait Float: Copy {
    /// # Safety
    /// The CPU has NEON, and there are four numbers.
    unsafe fn load(from: *const Self) -> float32x4_t;

    fn widen(self) -> f32;
}

impl Float for f32 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(from) }
    }

    fn widen(self) -> f32 {
        self
    }
}

impl Float for f16 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise.
        half_to_f32(unsafe { vld1_u16(from.cast()) })
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Float for bf16 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(from: *const Self) -> float32x4_t {
        // SAFETY: the caller's promise.
        vreinterpretq_f32_u32(vshll_n_u16::<16>(unsafe { vld1_u16(from.cast()) }))
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Half-precision numbers to f32.
#[target_feature(enable = "neon")]
#[inline]
pub(in crate::arch) fn half_to_f32(bits: uint16x4_t) -> float32x4_t {
    vcvt_f32_f16(vreinterpret_f16_u16(bits))
}

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` values.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn tile<W: Float, const R: usize, const N: usize>(
    w: *const W,
    x: *const f32,
    n: usize,
) -> [[f32; N]; R] {
    let mut acc = [[vdupq_n_f32(0.0); N]; R];
    let mut i = 0;
    while i + LANES <= n {
        // The tokens stay in registers; each weight is used as it is loaded.
        let mut xs = [vdupq_n_f32(0.0); N];
        for (t, xv) in xs.iter_mut().enumerate() {
            // SAFETY: four values from i in row t.
            *xv = unsafe { vld1q_f32(x.add(t * n + i)) };
        }
        for r in 0..R {
            // SAFETY: four values from i in row r.
            let wv = unsafe { W::load(w.add(r * n + i)) };
            for t in 0..N {
                acc[r][t] = vfmaq_f32(acc[r][t], wv, xs[t]);
            }
        }
        i += LANES;
    }
    let mut sums = [[0.0; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t] = sum_lanes(acc[r][t]);
        }
    }
    for i in i..n {
        for r in 0..R {
            for t in 0..N {
                // SAFETY: value i of rows r and t.
                let (w, x) = unsafe { ((*w.add(r * n + i)).widen(), *x.add(t * n + i)) };
                sums[r][t] = w.mul_add(x, sums[r][t]);
            }
        }
    }
    sums
}

#[target_feature(enable = "neon")]
#[inline]
pub(in crate::arch) fn sum_lanes(v: float32x4_t) -> f32 {
    let pairs = vpaddq_f32(v, v);
    vpadds_f32(vget_low_f32(pairs))
}

#[target_feature(enable = "neon")]
pub(super) fn add_weighted_rows(weights: &[f32], rows: &[f32], y: &mut [f32]) {
    let n = y.len();
    let mut i = 0;
    while i + LANES <= n {
        // SAFETY: four values from i.
        let mut acc = unsafe { vld1q_f32(y.as_ptr().add(i)) };
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            // SAFETY: four values from i; a row has n.
            let v = unsafe { vld1q_f32(row.as_ptr().add(i)) };
            acc = vfmaq_n_f32(acc, v, *weight);
        }
        // SAFETY: four values from i.
        unsafe { vst1q_f32(y.as_mut_ptr().add(i), acc) };
        i += LANES;
    }
    for i in i..n {
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            y[i] = weight.mul_add(row[i], y[i]);
        }
    }
}

#[target_feature(enable = "neon")]
pub(super) fn max(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut acc = vdupq_n_f32(f32::NEG_INFINITY);
    for chunk in chunks {
        // SAFETY: a chunk has four values.
        acc = vmaxnmq_f32(acc, unsafe { vld1q_f32(chunk.as_ptr()) });
    }
    rest.iter().fold(vmaxnmvq_f32(acc), |m, v| m.max(*v))
}

/// `exp(x)`; NaN stays NaN, overflow gives infinity, underflow gives 0.
#[target_feature(enable = "neon")]
#[inline]
pub(in crate::arch) fn exp(x: float32x4_t) -> float32x4_t {
    // These return NaN when either operand is.
    let x = vmaxq_f32(vdupq_n_f32(-104.0), x);
    let x = vminq_f32(vdupq_n_f32(89.0), x);
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    // ln 2 in two parts, so that n * ln 2 is exact to twice the precision.
    let r = vfmsq_n_f32(x, n, LN2_HIGH);
    let r = vfmsq_n_f32(r, n, LN2_LOW);
    let mut p = vdupq_n_f32(EXP_TAYLOR[0]);
    for c in &EXP_TAYLOR[1..] {
        p = vfmaq_f32(vdupq_n_f32(*c), p, r);
    }
    // 2^n in two factors, since n may pass the exponents of normal numbers.
    let n = vcvtq_s32_f32(n);
    let half = vshrq_n_s32::<1>(n);
    let p = vmulq_f32(p, power_of_two(half));
    vmulq_f32(p, power_of_two(vsubq_s32(n, half)))
}

#[target_feature(enable = "neon")]
#[inline]
fn power_of_two(n: int32x4_t) -> float32x4_t {
    vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))))
}

#[target_feature(enable = "neon")]
pub(super) fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let shift = vdupq_n_f32(shift);
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let mut acc = vdupq_n_f32(0.0);
    for chunk in chunks {
        // SAFETY: a chunk has four values.
        unsafe {
            let e = exp(vsubq_f32(vld1q_f32(chunk.as_ptr()), shift));
            acc = vaddq_f32(acc, e);
            vst1q_f32(chunk.as_mut_ptr(), e);
        }
    }
    let mut sum = sum_lanes(acc);
    for v in rest {
        *v = vgetq_lane_f32::<0>(exp(vsubq_f32(vdupq_n_f32(*v), shift)));
        sum += *v;
    }
    sum
}

/// `gate * sigmoid(gate) * up`.
#[target_feature(enable = "neon")]
#[inline]
fn gated(gate: float32x4_t, up: float32x4_t) -> float32x4_t {
    let below = vaddq_f32(vdupq_n_f32(1.0), exp(vnegq_f32(gate)));
    vmulq_f32(vdivq_f32(gate, below), up)
}

#[target_feature(enable = "neon")]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    let (gates, rest) = gate.as_chunks_mut::<LANES>();
    let (ups, rest_ups) = up.as_chunks::<LANES>();
    for (gate, up) in gates.iter_mut().zip(ups) {
        // SAFETY: chunks have four values.
        unsafe {
            let out = gated(vld1q_f32(gate.as_ptr()), vld1q_f32(up.as_ptr()));
            vst1q_f32(gate.as_mut_ptr(), out);
        }
    }
    for (gate, up) in rest.iter_mut().zip(rest_ups) {
        *gate = vgetq_lane_f32::<0>(gated(vdupq_n_f32(*gate), vdupq_n_f32(*up)));
    }
}

#[target_feature(enable = "neon")]
pub(super) fn quantize_act(x: &[f32], out: &mut [ActQ8]) {
    for (x, out) in x.as_chunks::<Q8_BLOCK>().0.iter().zip(out) {
        let mut parts = [vdupq_n_f32(0.0); Q8_BLOCK / LANES];
        let mut bits = vdupq_n_u32(0);
        for (part, x) in parts.iter_mut().zip(x.as_chunks::<LANES>().0) {
            // SAFETY: a chunk has four values.
            *part = unsafe { vld1q_f32(x.as_ptr()) };
            // As integers, the bits of NaN and infinity are above those of every finite value.
            bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(*part)));
        }
        let scale = ActScale::of(f32::from_bits(vmaxvq_u32(bits)));
        let mut sum = vdupq_n_s32(0);
        for (four, qs) in parts
            .as_chunks::<4>()
            .0
            .iter()
            .zip(out.qs.as_chunks_mut::<16>().0)
        {
            // The conversion rounds halves to even, and makes zero of NaN, which is what zero times it is.
            let [a, b, c, d] = four.map(|v| vcvtnq_s32_f32(vmulq_n_f32(v, scale.inverse)));
            sum = vaddq_s32(sum, vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
            let low = vcombine_s16(vmovn_s32(a), vmovn_s32(b));
            let high = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
            // SAFETY: 16 quants.
            unsafe {
                vst1q_s8(
                    qs.as_mut_ptr(),
                    vcombine_s8(vmovn_s16(low), vmovn_s16(high)),
                )
            };
        }
        scale.finish(vaddvq_s32(sum), out);
    }
}
