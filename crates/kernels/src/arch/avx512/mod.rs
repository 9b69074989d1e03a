//! Kernels for AVX-512 F, BW, DQ, VL with VNNI.
//!
//! A dot product keeps one 16-lane accumulator per output element, ends with a masked step and reduces by
//! a fixed tree. `exp` is a degree-7 polynomial; its error against the twin is bounded in `table.rs`.

#![expect(
    clippy::needless_range_loop,
    reason = "tiles are indexed by row and token, which unrolls into registers"
)]

mod bf16_gemm;
mod few;
mod floats;
mod interleave;
mod multiply;
mod pack;
mod peak;
mod source;
mod unpack_256;
mod unpack_32;

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::bf16_gemm::Bf16;
use super::{Few, Kernel, PanelKernels, Products, Table, avx2_quants, rows_by_tiles};
use crate::blocks::{
    ActQ8, ActScale, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1,
    BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K, Q8_BLOCK,
};
use crate::format::Format;
use crate::interleave::{InPlace, Interleaved};
use few::{few, few_32, few_256, few_bf16, few_f32};
use floats::Floats;
use source::Wide;
use unpack_32::Unpack32;
use unpack_256::Unpack256;

pub(super) static TABLE: Table = table(panels, None, &super::scalar_bf16::TABLE);
pub(super) static TABLE_BF16: Table = table(panels_bf16, Some(peak::bf16), &bf16_gemm::TABLE);

const fn table(
    panels: fn(Format, bool) -> PanelKernels,
    peak_bf16: Option<unsafe fn(u64) -> u64>,
    bf16: &'static Bf16,
) -> Table {
    Table {
        rows_f32,
        rows_f16,
        rows_bf16,
        products: Products::Panels(panels),
        interleave: interleave::interleave,
        peak_int8: Some(peak::int8),
        peak_bf16,
        bf16,
        attention: &super::attention::avx512::TABLE,
        add_weighted_rows,
        max,
        exp_sum,
        silu_mul,
        decode_f8: avx2_quants::decode_f8,
        quantize_act,
        quantize_act_k: avx2_quants::quantize_act_k,
    }
}

rows_by_tiles!(rows_f32, tile_f32, f32, f32, "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni", 4 x 4, 8);
rows_by_tiles!(rows_f16, tile_half<f16>, f16, f32, "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni", 4 x 4, 8);
rows_by_tiles!(rows_bf16, tile_half<bf16>, bf16, f32, "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni", 4 x 4, 8);

/// The panels of `format`.
fn panels(format: Format, interleaved: bool) -> PanelKernels {
    match interleaved {
        true => panels_of::<Interleaved>(format),
        false => panels_of::<InPlace>(format),
    }
}

fn panels_of<S: Wide>(format: Format) -> PanelKernels {
    match format {
        Format::F32 => PanelKernels::F32(kernel_f32::<S, floats::F32>()),
        Format::F16 => PanelKernels::F32(kernel_f32::<S, floats::F16>()),
        Format::Bf16 => PanelKernels::F32(kernel_f32::<S, floats::Bf16>()),
        Format::Q8_0 => kernel_32::<S, BlockQ8_0>(),
        Format::Q4_0 => kernel_32::<S, BlockQ4_0>(),
        Format::Q4_1 => kernel_32::<S, BlockQ4_1>(),
        Format::Q5_0 => kernel_32::<S, BlockQ5_0>(),
        Format::Q5_1 => kernel_32::<S, BlockQ5_1>(),
        Format::Iq4Nl => kernel_32::<S, BlockIq4Nl>(),
        Format::Mxfp4 => kernel_32::<S, BlockMxfp4>(),
        Format::Q2K => kernel_256::<S, BlockQ2K>(),
        Format::Q3K => kernel_256::<S, BlockQ3K>(),
        Format::Q4K => kernel_256::<S, BlockQ4K>(),
        Format::Q5K => kernel_256::<S, BlockQ5K>(),
        Format::Q6K => kernel_256::<S, BlockQ6K>(),
        Format::Q8K => kernel_256::<S, BlockQ8K>(),
        Format::Iq4Xs => kernel_256::<S, BlockIq4Xs>(),
        Format::F8E4M3 | Format::U8 => PanelKernels::Expand,
    }
}

/// Unpacking blocks of 32 and floats costs so little that panels pay only for many tokens.
const FEW_32: usize = 64;

fn kernel_32<S: Wide, B: Unpack32>() -> PanelKernels {
    PanelKernels::Q8(Kernel {
        pack: pack::pack_32::<S, B>,
        multiply: match B::HAS_MIN {
            true => multiply::multiply_32::<true>,
            false => multiply::multiply_32::<false>,
        },
        few: few!(few_32::<S, B>, FEW_32),
    })
}

fn kernel_256<S: Wide, B: Unpack256>() -> PanelKernels {
    PanelKernels::Q8K(Kernel {
        pack: pack::pack_256::<S, B>,
        multiply: match (B::SCALES, B::HAS_MIN) {
            (16, true) => multiply::multiply_256::<16, true>,
            (16, false) => multiply::multiply_256::<16, false>,
            (_, true) => multiply::multiply_256::<8, true>,
            (_, false) => multiply::multiply_256::<8, false>,
        },
        few: few!(few_256::<S, B>, B::FEW),
    })
}

fn kernel_f32<S: Wide, F: Floats>() -> Kernel<f32> {
    Kernel {
        pack: pack::pack_floats::<S, F>,
        multiply: multiply::multiply_f32,
        few: few!(few_f32::<S, F>, FEW_32),
    }
}

fn kernel_bf16<S: Wide>() -> Kernel<bf16> {
    Kernel {
        pack: pack::pack_floats::<S, floats::Pairs>,
        multiply: multiply::multiply_bf16,
        few: few!(few_bf16::<S>, FEW_32),
    }
}

/// The panels of `format` on CPUs that multiply bf16.
fn panels_bf16(format: Format, interleaved: bool) -> PanelKernels {
    match (panels(format, interleaved), format, interleaved) {
        (PanelKernels::F32(float), Format::Bf16, true) => {
            PanelKernels::Bf16(float, kernel_bf16::<Interleaved>())
        }
        (PanelKernels::F32(float), Format::Bf16, false) => {
            PanelKernels::Bf16(float, kernel_bf16::<InPlace>())
        }
        (kernels, ..) => kernels,
    }
}

const LANES: usize = 16;

/// The first `n` of 16 lanes.
#[inline]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
unsafe fn tile_f32<const R: usize, const N: usize>(
    w: *const f32,
    x: *const f32,
    n: usize,
) -> [[f32; N]; R] {
    let mut acc = [[_mm512_setzero_ps(); N]; R];
    let mut i = 0;
    while i < n {
        // A whole step when the mask is full: the same operation, so the tail needs no second sequence.
        let mask = first(n - i);
        // The tokens stay in registers; each weight is used as it is loaded.
        let mut xs = [_mm512_setzero_ps(); N];
        for (t, xv) in xs.iter_mut().enumerate() {
            // SAFETY: the mask keeps lanes i.. below n, inside row t.
            *xv = unsafe { _mm512_maskz_loadu_ps(mask, x.add(t * n + i)) };
        }
        for r in 0..R {
            // SAFETY: as above, inside row r.
            let wv = unsafe { _mm512_maskz_loadu_ps(mask, w.add(r * n + i)) };
            for t in 0..N {
                acc[r][t] = _mm512_fmadd_ps(wv, xs[t], acc[r][t]);
            }
        }
        i += LANES;
    }
    reduce(acc)
}

/// Numbers of 16 bits.
trait Half: Copy {
    /// # Safety
    /// The CPU has AVX-512 F and BW.
    unsafe fn widen(bits: __m256i) -> __m512;
}

impl Half for bf16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn widen(bits: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }
}

impl Half for f16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn widen(bits: __m256i) -> __m512 {
        _mm512_cvtph_ps(bits)
    }
}

/// # Safety
/// `w` and `x` hold `R` and `N` rows of `n` values.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
unsafe fn tile_half<H: Half, const R: usize, const N: usize>(
    w: *const H,
    x: *const f32,
    n: usize,
) -> [[f32; N]; R] {
    let mut acc = [[_mm512_setzero_ps(); N]; R];
    let mut i = 0;
    while i < n {
        let mask = first(n - i);
        let mut xs = [_mm512_setzero_ps(); N];
        for (t, xv) in xs.iter_mut().enumerate() {
            // SAFETY: the mask keeps lanes i.. below n, inside row t.
            *xv = unsafe { _mm512_maskz_loadu_ps(mask, x.add(t * n + i)) };
        }
        for r in 0..R {
            // SAFETY: as above, inside row r.
            let wv = unsafe { H::widen(_mm256_maskz_loadu_epi16(mask, w.add(r * n + i).cast())) };
            for t in 0..N {
                acc[r][t] = _mm512_fmadd_ps(wv, xs[t], acc[r][t]);
            }
        }
        i += LANES;
    }
    reduce(acc)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
fn reduce<const R: usize, const N: usize>(acc: [[__m512; N]; R]) -> [[f32; N]; R] {
    let mut sums = [[0.0; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t] = _mm512_reduce_add_ps(acc[r][t]);
        }
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn add_weighted_rows(weights: &[f32], rows: &[f32], y: &mut [f32]) {
    let n = y.len();
    let mut i = 0;
    while i < n {
        let mask = first(n - i);
        // SAFETY: the mask keeps lanes i.. below n.
        let mut acc = unsafe { _mm512_maskz_loadu_ps(mask, y.as_ptr().add(i)) };
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            // SAFETY: as above; a row has n values.
            let v = unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().add(i)) };
            acc = _mm512_fmadd_ps(_mm512_set1_ps(*weight), v, acc);
        }
        // SAFETY: as above.
        unsafe { _mm512_mask_storeu_ps(y.as_mut_ptr().add(i), mask, acc) };
        i += LANES;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn max(x: &[f32]) -> f32 {
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut acc = lowest;
    let mut i = 0;
    while i < x.len() {
        // SAFETY: the mask keeps lanes i.. below the length.
        let v = unsafe { _mm512_mask_loadu_ps(lowest, first(x.len() - i), x.as_ptr().add(i)) };
        acc = _mm512_max_ps(acc, v);
        i += LANES;
    }
    _mm512_reduce_max_ps(acc)
}

/// `exp(x)`; NaN stays NaN, overflow gives infinity, underflow gives 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
pub(super) fn exp(x: __m512) -> __m512 {
    // Min and max return their second operand when either is NaN.
    let x = _mm512_max_ps(_mm512_set1_ps(-104.0), x);
    let x = _mm512_min_ps(_mm512_set1_ps(89.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
        _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)),
    );
    // ln 2 in two parts, so that n * ln 2 is exact to twice the precision.
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(super::LN2_HIGH), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(super::LN2_LOW), r);
    let mut p = _mm512_set1_ps(super::EXP_TAYLOR[0]);
    for c in &super::EXP_TAYLOR[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    _mm512_scalef_ps(p, n)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let shift = _mm512_set1_ps(shift);
    let mut sum = _mm512_setzero_ps();
    let mut i = 0;
    while i < x.len() {
        let mask = first(x.len() - i);
        // SAFETY: the mask keeps lanes i.. below the length.
        unsafe {
            let v = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(i));
            let e = exp(_mm512_sub_ps(v, shift));
            _mm512_mask_storeu_ps(x.as_mut_ptr().add(i), mask, e);
            sum = _mm512_mask_add_ps(sum, mask, sum, e);
        }
        i += LANES;
    }
    _mm512_reduce_add_ps(sum)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn silu_mul(gate: &mut [f32], up: &[f32]) {
    let n = gate.len().min(up.len());
    let mut i = 0;
    while i < n {
        let mask = first(n - i);
        // SAFETY: the mask keeps lanes i.. below n, inside both slices.
        unsafe {
            let g = _mm512_maskz_loadu_ps(mask, gate.as_ptr().add(i));
            let u = _mm512_maskz_loadu_ps(mask, up.as_ptr().add(i));
            let e = exp(_mm512_sub_ps(_mm512_setzero_ps(), g));
            let silu = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0), e));
            _mm512_mask_storeu_ps(gate.as_mut_ptr().add(i), mask, _mm512_mul_ps(silu, u));
        }
        i += LANES;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn quantize_act(x: &[f32], out: &mut [ActQ8]) {
    for (x, out) in x.chunks_exact(Q8_BLOCK).zip(out) {
        // SAFETY: a chunk has 32 values.
        let (a, b) = unsafe {
            (
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x.as_ptr().add(LANES)),
            )
        };
        // As integers, the bits of NaN and infinity are above those of every finite value.
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let bits = _mm512_max_epi32(
            _mm512_and_si512(_mm512_castps_si512(a), magnitude),
            _mm512_and_si512(_mm512_castps_si512(b), magnitude),
        );
        let scale = ActScale::of(f32::from_bits(_mm512_reduce_max_epi32(bits) as u32));
        if scale.inverse == 0.0 {
            // Not a product: a NaN times zero converts to the lowest integer.
            out.qs = [0; Q8_BLOCK];
            scale.finish(0, out);
            continue;
        }
        let inverse = _mm512_set1_ps(scale.inverse);
        // The conversion rounds halves to even, the mode that Rust keeps the CPU in.
        let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
        let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        scale.finish(_mm512_reduce_add_epi32(_mm512_add_epi32(a, b)), out);
        // SAFETY: the two halves of the 32 quants.
        unsafe {
            _mm_storeu_si128(out.qs.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(
                out.qs.as_mut_ptr().add(LANES).cast(),
                _mm512_cvtepi32_epi8(b),
            );
        }
    }
}
