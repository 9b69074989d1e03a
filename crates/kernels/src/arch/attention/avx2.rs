//! Attention with AVX2: a panel's step is two registers.

use std::arch::x86_64::*;

use super::{
    AttentionTable, F16, F32, KEY_BLOCK, PANEL, PanelProduct, Panels, Q8Keys, Q8Values, SoftRow,
    Turn, products,
};
use crate::arch::avx2::{exp, sum_lanes};

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

// Eight sums hide the latency of the additions; with what they are made of, they fit 16 registers.
products!("avx2,fma,f16c", [4, 2, 1, 1, 1, 1, 1, 1]);

const LANES: usize = 8;

/// How half a step of a panel is read.
trait Load {
    /// Bytes of an element.
    const SIZE: usize;

    /// # Safety
    /// The CPU has AVX2; panel and step are inside of `b`, `half` is 0 or 1.
    unsafe fn load(b: &Panels, panel: usize, step: usize, half: usize) -> __m256;
}

impl Load for F32 {
    const SIZE: usize = 4;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(b.step::<f32>(panel, step).add(half * LANES)) }
    }
}

impl Load for F16 {
    const SIZE: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { widen(b.step::<u16>(panel, step).add(half * LANES)) }
    }
}

impl Load for Q8Keys {
    const SIZE: usize = 1;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = widen(b.key_scales(panel, step).add(half * LANES));
            _mm256_mul_ps(quants(b, panel, step, half), scales)
        }
    }
}

impl Load for Q8Values {
    const SIZE: usize = 1;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(b: &Panels, panel: usize, step: usize, half: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = _mm_set1_epi16((*b.value_scale(panel, step)).cast_signed());
            _mm256_mul_ps(quants(b, panel, step, half), _mm256_cvtph_ps(scale))
        }
    }
}

/// # Safety
/// Eight numbers from `bits`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn widen(bits: *const u16) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bits.cast()) })
}

/// # Safety
/// As for [`Load::load`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn quants(b: &Panels, panel: usize, step: usize, half: usize) -> __m256 {
    // SAFETY: the caller's promise: eight quants.
    let quants = unsafe { _mm_loadl_epi64(b.step::<i8>(panel, step).add(half * LANES).cast()) };
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quants))
}

/// Rows of one pass over a panel: the sums of more would not fit the registers.
const PASS: usize = 4;

/// # Safety
/// See `ProductFn`; `R` rows, and `V` panels from `panel`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn tile<L: Load, const R: usize, const V: usize>(args: &PanelProduct, panel: usize) {
    // SAFETY: the passes cover the rows.
    unsafe {
        match R {
            1 => pass::<L, 1, V>(args, panel, 0),
            2 => pass::<L, 2, V>(args, panel, 0),
            3 => pass::<L, 3, V>(args, panel, 0),
            _ => pass::<L, PASS, V>(args, panel, 0),
        }
        match R {
            5 => pass::<L, 1, V>(args, panel, PASS),
            6 => pass::<L, 2, V>(args, panel, PASS),
            7 => pass::<L, 3, V>(args, panel, PASS),
            8 => pass::<L, 4, V>(args, panel, PASS),
            _ => {}
        }
    }
}

/// # Safety
/// As for [`tile`], with `R` rows from `first`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn pass<L: Load, const R: usize, const V: usize>(
    args: &PanelProduct,
    panel: usize,
    first: usize,
) {
    let mut sums = [[[_mm256_setzero_ps(); 2]; V]; R];
    let c = |r: usize, v: usize, half: usize| {
        let row = (first + r) * args.c_stride;
        let panel = (panel + v) * PANEL;
        args.c.wrapping_add(row + panel + half * LANES)
    };
    if args.add {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the sums of a row and a panel.
                *sums = unsafe { [_mm256_loadu_ps(c(r, v, 0)), _mm256_loadu_ps(c(r, v, 1))] };
            }
        }
    }
    for step in args.steps.clone() {
        let mut b = [[_mm256_setzero_ps(); 2]; V];
        for (v, b) in b.iter_mut().enumerate() {
            let panel = panel + v;
            // SAFETY: a step of a panel.
            *b = unsafe {
                [
                    L::load(&args.b, panel, step, 0),
                    L::load(&args.b, panel, step, 1),
                ]
            };
            // The panel that the next pass reads here: the one after those of this pass, or of the next block.
            let next = args.b.ahead(panel + V, step, L::SIZE);
            _mm_prefetch::<_MM_HINT_T1>(next);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: a step of a row.
            let a = unsafe { *args.a.add((first + r) * args.a_stride + step) };
            let a = _mm256_set1_ps(a);
            for (sums, b) in sums.iter_mut().zip(&b) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm256_fmadd_ps(a, *b, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (v, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(c(r, v, half), *sum) };
            }
        }
    }
}

/// # Safety
/// See `TurnFn`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn turn<L: Load>(args: &Turn) {
    for first_lane in (args.key_panels.start * PANEL..args.key_panels.end * PANEL).step_by(LANES) {
        let (key_panel, lane) = (first_lane / PANEL, first_lane % PANEL);
        for first_dim in (0..args.n_dims).step_by(LANES) {
            let (panel, half) = (first_dim / PANEL, first_dim % PANEL / LANES);
            let mut rows = [_mm256_setzero_ps(); LANES];
            for (at, row) in rows.iter_mut().enumerate() {
                // SAFETY: one of 64 positions of one of the panels.
                *row = unsafe { L::load(&args.b, panel, first_lane + at, half) };
            }
            let dims = transpose(rows);
            for (at, dim) in dims.iter().enumerate().take(args.n_dims - first_dim) {
                let to = (key_panel * args.n_dims + first_dim + at) * PANEL + lane;
                // SAFETY: eight positions of one of the dimensions of a key panel.
                unsafe { _mm256_storeu_ps(args.out.add(to), *dim) };
            }
        }
    }
}

/// Rows to columns, by pairs, quads and halves of a register.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn transpose(rows: [__m256; LANES]) -> [__m256; LANES] {
    // quads[4 i + j] holds, in half h, column 4 h + j of rows 4 i to 4 i + 3.
    let mut quads = [_mm256_setzero_ps(); LANES];
    for i in 0..2 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|r| rows[4 * i + r]);
        let ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
        let cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
        quads[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        quads[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
        let ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
        let cd = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
        quads[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        quads[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    }
    let mut columns = [_mm256_setzero_ps(); LANES];
    for j in 0..4 {
        columns[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[4 + j]);
        columns[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[4 + j]);
    }
    columns
}

#[target_feature(enable = "avx2,fma,f16c")]
fn soften(scores: &mut [[f32; KEY_BLOCK]], rows: &mut [SoftRow], scale: f32) {
    const N: usize = KEY_BLOCK / LANES;
    let scale = _mm256_set1_ps(scale);
    let lowest = _mm256_set1_ps(f32::NEG_INFINITY);
    for (scores, row) in scores.iter_mut().zip(rows) {
        if row.from >= row.to {
            row.shrink = 1.0;
            continue;
        }
        let mut values = [_mm256_setzero_ps(); N];
        let mut masks = [_mm256_setzero_ps(); N];
        let mut highest = lowest;
        for at in 0..N {
            masks[at] = seen(row, at * LANES);
            // SAFETY: eight of the 64 scores.
            let score = unsafe { _mm256_loadu_ps(scores.as_ptr().add(at * LANES)) };
            values[at] = _mm256_mul_ps(score, scale);
            // The maximum is its second operand when either is NaN.
            let candidate = _mm256_blendv_ps(lowest, values[at], masks[at]);
            highest = _mm256_max_ps(highest, candidate);
        }
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array has eight values.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), highest) };
        let highest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let shift = _mm256_set1_ps(row.rise(highest));
        let mut sum = _mm256_setzero_ps();
        for at in 0..N {
            let weight = exp(_mm256_sub_ps(values[at], shift));
            let weight = _mm256_and_ps(weight, masks[at]);
            sum = _mm256_add_ps(sum, weight);
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(scores.as_mut_ptr().add(at * LANES), weight) };
        }
        row.total = row.total * row.shrink + sum_lanes(sum);
    }
}

/// All bits of the lanes, of eight positions from `first`, that the row sees.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn seen(row: &SoftRow, first: usize) -> __m256 {
    let position = _mm256_add_epi32(
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
        _mm256_set1_epi32(first as i32),
    );
    let from = _mm256_set1_epi32(row.from as i32 - 1);
    let to = _mm256_set1_epi32(row.to as i32);
    _mm256_castsi256_ps(_mm256_and_si256(
        _mm256_cmpgt_epi32(position, from),
        _mm256_cmpgt_epi32(to, position),
    ))
}
