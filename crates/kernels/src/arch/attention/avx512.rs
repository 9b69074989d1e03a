//! Attention with AVX-512: a panel's step is one register.

use std::arch::x86_64::*;

use super::{
    AttentionTable, F16, F32, KEY_BLOCK, PANEL, PanelProduct, Panels, Q8Keys, Q8Values, SoftRow,
    Turn, products,
};
use crate::arch::avx512::exp;

pub(in crate::arch) static TABLE: AttentionTable = AttentionTable {
    product_f32: product::<F32>,
    product_f16: product::<F16>,
    product_q8_keys: product::<Q8Keys>,
    product_q8_values: product::<Q8Values>,
    turn_f32: turn::<F32>,
    turn_f16: turn::<F16>,
    turn_q8: turn::<Q8Values>,
    soften,
};

// As many sums as hide the latency of the additions and, with what they are made of, fit 32 registers.
products!(
    "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni",
    [4, 4, 4, 4, 4, 4, 2, 2]
);

/// How a step of a panel is read.
trait Load {
    /// Bytes of an element.
    const SIZE: usize;

    /// # Safety
    /// The CPU has AVX-512; panel and step are inside of `b`.
    unsafe fn load(b: &Panels, panel: usize, step: usize) -> __m512;
}

impl Load for F32 {
    const SIZE: usize = 4;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(b.step(panel, step)) }
    }
}

impl Load for F16 {
    const SIZE: usize = 2;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(b.step::<u16>(panel, step).cast())) }
    }
}

impl Load for Q8Keys {
    const SIZE: usize = 1;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = _mm512_cvtph_ps(_mm256_loadu_si256(b.key_scales(panel, step).cast()));
            _mm512_mul_ps(quants(b, panel, step), scales)
        }
    }
}

impl Load for Q8Values {
    const SIZE: usize = 1;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = _mm256_set1_epi16((*b.value_scale(panel, step)).cast_signed());
            _mm512_mul_ps(quants(b, panel, step), _mm512_cvtph_ps(scale))
        }
    }
}

/// # Safety
/// As for [`Load::load`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
unsafe fn quants(b: &Panels, panel: usize, step: usize) -> __m512 {
    // SAFETY: the caller's promise: sixteen quants.
    let quants = unsafe { _mm_loadu_si128(b.step::<i8>(panel, step).cast()) };
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quants))
}

/// # Safety
/// See `ProductFn`; `R` rows, and `V` panels from `panel`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
unsafe fn tile<L: Load, const R: usize, const V: usize>(args: &PanelProduct, panel: usize) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    let c = |r: usize, v: usize| args.c.wrapping_add(r * args.c_stride + (panel + v) * PANEL);
    if args.add {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the sums of a row and a panel.
                *sum = unsafe { _mm512_loadu_ps(c(r, v)) };
            }
        }
    }
    for step in args.steps.clone() {
        let mut b = [_mm512_setzero_ps(); V];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: a step of a panel.
            *b = unsafe { L::load(&args.b, panel + v, step) };
            // The panel that the next pass reads here: the one after those of this pass, or of the next block.
            let next = args.b.ahead(panel + v + V, step, L::SIZE);
            _mm_prefetch::<_MM_HINT_T1>(next);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: a step of a row.
            let a = _mm512_set1_ps(unsafe { *args.a.add(r * args.a_stride + step) });
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(c(r, v), *sum) };
        }
    }
}

/// # Safety
/// See `TurnFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
unsafe fn turn<L: Load>(args: &Turn) {
    for key_panel in args.key_panels.clone() {
        for panel in 0..args.n_dims.div_ceil(PANEL) {
            let mut rows = [_mm512_setzero_ps(); PANEL];
            for (lane, row) in rows.iter_mut().enumerate() {
                // SAFETY: one of 64 positions of one of the panels.
                *row = unsafe { L::load(&args.b, panel, key_panel * PANEL + lane) };
            }
            let dims = transpose(rows);
            let first = panel * PANEL;
            for (at, dim) in dims.iter().enumerate().take(args.n_dims - first) {
                let to = (key_panel * args.n_dims + first + at) * PANEL;
                // SAFETY: one of the dimensions of a key panel.
                unsafe { _mm512_storeu_ps(args.out.add(to), *dim) };
            }
        }
    }
}

/// Rows to columns, by pairs, quads, and twice by quarters of a register.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
#[inline]
fn transpose(rows: [__m512; PANEL]) -> [__m512; PANEL] {
    let zero = _mm512_setzero_ps();
    // quads[4 i + j] holds, in quarter q, column 4 q + j of rows 4 i to 4 i + 3.
    let mut quads = [zero; PANEL];
    for i in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|r| rows[4 * i + r]);
        let ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
        let cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
        quads[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        quads[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        let ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
        let cd = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
        quads[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        quads[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    }
    let mut columns = [zero; PANEL];
    for j in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| quads[4 * i + j]);
        let low_ab = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
        let high_ab = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
        let low_cd = _mm512_shuffle_f32x4::<0b01_00_01_00>(c, d);
        let high_cd = _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d);
        columns[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low_ab, low_cd);
        columns[4 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low_ab, low_cd);
        columns[8 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high_ab, high_cd);
        columns[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high_ab, high_cd);
    }
    columns
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni")]
fn soften(scores: &mut [[f32; KEY_BLOCK]], rows: &mut [SoftRow], scale: f32) {
    let scale = _mm512_set1_ps(scale);
    for (scores, row) in scores.iter_mut().zip(rows) {
        if row.from >= row.to {
            row.shrink = 1.0;
            continue;
        }
        let seen = (u64::MAX >> (KEY_BLOCK - (row.to - row.from))) << row.from;
        let mut values = [_mm512_setzero_ps(); KEY_BLOCK / PANEL];
        let mut highest = _mm512_set1_ps(f32::NEG_INFINITY);
        for (at, value) in values.iter_mut().enumerate() {
            let mask = (seen >> (at * PANEL)) as __mmask16;
            // SAFETY: 16 of the 64 scores.
            let score = unsafe { _mm512_loadu_ps(scores.as_ptr().add(at * PANEL)) };
            *value = _mm512_mul_ps(score, scale);
            highest = _mm512_mask_max_ps(highest, mask, highest, *value);
        }
        let shift = _mm512_set1_ps(row.rise(_mm512_reduce_max_ps(highest)));
        let mut sum = _mm512_setzero_ps();
        for (at, value) in values.iter().enumerate() {
            let mask = (seen >> (at * PANEL)) as __mmask16;
            let weight = _mm512_maskz_mov_ps(mask, exp(_mm512_sub_ps(*value, shift)));
            sum = _mm512_add_ps(sum, weight);
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(scores.as_mut_ptr().add(at * PANEL), weight) };
        }
        row.total = row.total * row.shrink + _mm512_reduce_add_ps(sum);
    }
}
