//! Kernels for AVX2 with FMA and F16C.
//!
//! A dot product keeps one 8-lane accumulator per output element, reduces it by a fixed tree, then adds
//! the values that do not fill a step one by one.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and token, which unrolls into registers"
)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Products, Table, avx2_quants, rows_by_tiles};
use crate::blocks::{ActQ8, ActScale, Q8_BLOCK};
use crate::interleave::Shape;

pub(super) static TABLE: Table = Table {
    rows_f32,
    rows_f16,
    rows_bf16,
    products: Products::Rows(avx2_quants::QUANTS),
    // Never called: these products read rows where they lie.
    interleave: Shape::interleave,
    peak_int8: None,
    peak_bf16: None,
    bf16: &super::scalar_bf16::TABLE,
    attention: &super::attention::avx2::TABLE,
    add_weighted_rows,
    max,
    exp_sum,
    silu_mul,
    decode_f8: avx2_quants::decode_f8,
    quantize_act,
    quantize_act_k: avx2_quants::quantize_act_k,
};

rows_by_tiles!(rows_f32, tile_f32, f32, f32, "avx2,fma,f16c", 4 x 3, 8);
rows_by_tiles!(rows_f16, tile_half<f16>, f16, f32, "avx2,fma,f16c", 4 x 3, 8);
rows_by_tiles!(rows_bf16, tile_half<bf16>, bf16, f32, "avx2,fma,f16c", 4 x 3, 8);

const LANES: usize = 8;

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` values.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile_f32<const R: usize, const N: usize>(
    w: *const f32,
    x: *const f32,
    n: usize,
) -> [[f32; N]; R] {
    let mut acc = [[_mm256_setzero_ps(); N]; R];
    let mut i = 0;
    while i + LANES <= n {
        // The tokens stay in registers; each weight is used as it is loaded.
        let mut xs = [_mm256_setzero_ps(); N];
        for (t, xv) in xs.iter_mut().enumerate() {
            // SAFETY: eight values from i in row t.
            *xv = unsafe { _mm256_loadu_ps(x.add(t * n + i)) };
        }
        for r in 0..R {
            // SAFETY: eight values from i in row r.
            let wv = unsafe { _mm256_loadu_ps(w.add(r * n + i)) };
            for t in 0..N {
                acc[r][t] = _mm256_fmadd_ps(wv, xs[t], acc[r][t]);
            }
        }
        i += LANES;
    }
    let mut sums = reduce(acc);
    for i in i..n {
        for r in 0..R {
            for t in 0..N {
                // SAFETY: value i of rows r and t.
                let (w, x) = unsafe { (*w.add(r * n + i), *x.add(t * n + i)) };
                sums[r][t] = w.mul_add(x, sums[r][t]);
            }
        }
    }
    sums
}

/// Numbers of 16 bits.
trait Half: Copy {
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn widen(bits: __m128i) -> __m256;

    fn to_f32(self) -> f32;
}

impl Half for bf16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn widen(bits: __m128i) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }

    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

impl Half for f16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn widen(bits: __m128i) -> __m256 {
        _mm256_cvtph_ps(bits)
    }

    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` values.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile_half<H: Half, const R: usize, const N: usize>(
    w: *const H,
    x: *const f32,
    n: usize,
) -> [[f32; N]; R] {
    let mut acc = [[_mm256_setzero_ps(); N]; R];
    let mut i = 0;
    while i + LANES <= n {
        let mut xs = [_mm256_setzero_ps(); N];
        for (t, xv) in xs.iter_mut().enumerate() {
            // SAFETY: eight values from i in row t.
            *xv = unsafe { _mm256_loadu_ps(x.add(t * n + i)) };
        }
        for r in 0..R {
            // SAFETY: eight values from i in row r.
            let wv = unsafe { H::widen(_mm_loadu_si128(w.add(r * n + i).cast())) };
            for t in 0..N {
                acc[r][t] = _mm256_fmadd_ps(wv, xs[t], acc[r][t]);
            }
        }
        i += LANES;
    }
    let mut sums = reduce(acc);
    for i in i..n {
        for r in 0..R {
            for t in 0..N {
                // SAFETY: value i of rows r and t.
                let (w, x) = unsafe { ((*w.add(r * n + i)).to_f32(), *x.add(t * n + i)) };
                sums[r][t] = w.mul_add(x, sums[r][t]);
            }
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn reduce<const R: usize, const N: usize>(acc: [[__m256; N]; R]) -> [[f32; N]; R] {
    let mut sums = [[0.0; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t] = sum_lanes(acc[r][t]);
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn sum_lanes(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn add_weighted_rows(weights: &[f32], rows: &[f32], y: &mut [f32]) {
    let n = y.len();
    let mut i = 0;
    while i + LANES <= n {
        // SAFETY: eight values from i.
        let mut acc = unsafe { _mm256_loadu_ps(y.as_ptr().add(i)) };
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            // SAFETY: eight values from i; a row has n.
            let v = unsafe { _mm256_loadu_ps(row.as_ptr().add(i)) };
            acc = _mm256_fmadd_ps(_mm256_set1_ps(*weight), v, acc);
        }
        // SAFETY: eight values from i.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr().add(i), acc) };
        i += LANES;
    }
    for i in i..n {
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            y[i] = weight.mul_add(row[i], y[i]);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn max(x: &[f32]) -> f32 {
    let mut acc = _mm256_set1_ps(f32::NEG_INFINITY);
    let chunks = x.chunks_exact(LANES);
    let mut highest = chunks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    for chunk in chunks {
        // SAFETY: a chunk has eight values.
        acc = _mm256_max_ps(acc, unsafe { _mm256_loadu_ps(chunk.as_ptr()) });
    }
    let mut lanes = [0.0; LANES];
    // SAFETY: the array has eight values.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), acc) };
    for lane in lanes {
        highest = highest.max(lane);
    }
    highest
}

/// `exp(x)`; NaN stays NaN, overflow gives infinity, underflow gives 0.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn exp(x: __m256) -> __m256 {
    // Min and max return their second operand when either is NaN.
    let x = _mm256_max_ps(_mm256_set1_ps(-104.0), x);
    let x = _mm256_min_ps(_mm256_set1_ps(89.0), x);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    // ln 2 in two parts, so that n * ln 2 is exact to twice the precision.
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(super::LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(super::LN2_LOW), r);
    let mut p = _mm256_set1_ps(super::EXP_TAYLOR[0]);
    for c in &super::EXP_TAYLOR[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    // 2^n in two factors, since n may pass the exponents of normal numbers.
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let p = _mm256_mul_ps(p, power_of_two(half));
    _mm256_mul_ps(p, power_of_two(_mm256_sub_epi32(n, half)))
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn power_of_two(n: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
        n,
        _mm256_set1_epi32(127),
    )))
}

/// Runs `f` on the values of `x` in steps of eight; the last step is padded with `pad`.
macro_rules! for_steps {
    ($x:expr, |$v:ident, $i:ident, $n:ident| $body:block) => {{
        let len = $x.len();
        let mut $i = 0;
        while $i < len {
            let $n = LANES.min(len - $i);
            let mut lanes = [0.0f32; LANES];
            lanes[..$n].copy_from_slice(&$x[$i..$i + $n]);
            // SAFETY: the array has eight values.
            let $v = unsafe { _mm256_loadu_ps(lanes.as_ptr()) };
            let out: __m256 = $body;
            // SAFETY: the array has eight values.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), out) };
            $x[$i..$i + $n].copy_from_slice(&lanes[..$n]);
            $i += LANES;
        }
    }};
}

#[target_feature(enable = "avx2,fma,f16c")]
fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let shift = _mm256_set1_ps(shift);
    let mut acc = _mm256_setzero_ps();
    let mut tail = 0.0;
    for_steps!(x, |v, i, n| {
        let e = exp(_mm256_sub_ps(v, shift));
        if n == LANES {
            acc = _mm256_add_ps(acc, e);
        }
        e
    });
    for v in x.chunks_exact(LANES).remainder() {
        tail += v;
    }
    sum_lanes(acc) + tail
}

#[target_feature(enable = "avx2,fma,f16c")]
fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for_steps!(gate, |g, i, n| {
        let mut lanes = [0.0f32; LANES];
        lanes[..n].copy_from_slice(&up[i..i + n]);
        // SAFETY: the array has eight values.
        let u = unsafe { _mm256_loadu_ps(lanes.as_ptr()) };
        let e = exp(_mm256_sub_ps(_mm256_setzero_ps(), g));
        _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0), e)), u)
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_act(x: &[f32], out: &mut [ActQ8]) {
    for (x, out) in x.chunks_exact(Q8_BLOCK).zip(out) {
        let mut parts = [_mm256_setzero_ps(); 4];
        let mut bits = _mm256_setzero_si256();
        for (part, x) in parts.iter_mut().zip(x.chunks_exact(LANES)) {
            // SAFETY: a chunk has eight values.
            *part = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            let magnitude =
                _mm256_and_si256(_mm256_castps_si256(*part), _mm256_set1_epi32(0x7fff_ffff));
            // As integers, the bits of NaN and infinity are above those of every finite value.
            bits = _mm256_max_epi32(bits, magnitude);
        }
        let mut lanes = [0u32; LANES];
        // SAFETY: the array has eight values.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), bits) };
        let scale = ActScale::of(f32::from_bits(lanes.into_iter().fold(0, u32::max)));
        *out = ActQ8::ZERO;
        if scale.inverse == 0.0 {
            // Not a product: a NaN times zero converts to the lowest integer.
            scale.finish(0, out);
            continue;
        }
        let mut sum = 0;
        for (part, qs) in parts.iter().zip(out.qs.chunks_exact_mut(LANES)) {
            // The conversion rounds halves to even, the mode that Rust keeps the CPU in.
            let rounded = _mm256_cvtps_epi32(_mm256_mul_ps(*part, _mm256_set1_ps(scale.inverse)));
            let mut lanes = [0i32; LANES];
            // SAFETY: the array has eight values.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), rounded) };
            for (q, lane) in qs.iter_mut().zip(lanes) {
                *q = lane as i8;
                sum += lane;
            }
        }
        scale.finish(sum, out);
    }
}
