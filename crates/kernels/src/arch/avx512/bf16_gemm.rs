//! Products of bf16 with f32 sums: a tile is up to 12 rows by two vectors, whose sums stay in registers.

use std::arch::x86_64::*;

use crate::arch::bf16_gemm::{Bf16, LINE, Line, Strip, View};

pub(super) static TABLE: Bf16 = Bf16 {
    native: true,
    pack_row,
    pack_down,
    pack_across,
    rows: multiply::<1>,
    panels: multiply::<LINE>,
};

const LANES: usize = 16;
/// Rows of a tile: 24 sums, two vectors of `b` and one of `a` fit the registers.
const TILE: usize = 12;

#[target_feature(enable = "avx512f")]
#[inline]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as __mmask16
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn as_bf16(words: __m512i) -> __m512bh {
    // SAFETY: registers of one size, any bits are values.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn as_words(values: __m512bh) -> __m512i {
    // SAFETY: registers of one size, any bits are values.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(values) }
}

/// 16 words from the first of `x`, at most 32 values side by side; zeros follow.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn side_by_side(x: &[f32]) -> __m512i {
    // SAFETY: the masks keep to the length; a load without lanes reads nothing.
    unsafe {
        let low = _mm512_maskz_loadu_ps(first(x.len()), x.as_ptr());
        let high = _mm512_maskz_loadu_ps(
            first(x.len().saturating_sub(LANES)),
            x.as_ptr().wrapping_add(LANES),
        );
        as_words(_mm512_cvtne2ps_pbh(high, low))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_row(x: &[f32], out: &mut [u32]) {
    for (out, x) in out.chunks_mut(LANES).zip(x.chunks(2 * LANES)) {
        let words = side_by_side(x);
        // SAFETY: the mask keeps to the length.
        unsafe { _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), first(out.len()), words) };
    }
}

/// Words of `upper[i]` and `lower[i]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn stacked(upper: __m512, lower: __m512) -> __m512i {
    #[rustfmt::skip]
    let alternate = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(alternate, as_words(_mm512_cvtne2ps_pbh(lower, upper)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_down(x: &View<'_>, n_rows: usize, from: usize, n: usize, out: &mut [Line]) {
    let masks = [first(n), first(n.saturating_sub(LANES))];
    for (p, line) in out.iter_mut().enumerate() {
        let upper = x.part(2 * p, from, n).as_ptr();
        let below = 2 * p + 1 < n_rows;
        let lower = if below {
            x.part(2 * p + 1, from, n).as_ptr()
        } else {
            upper
        };
        for (half, mask) in masks.into_iter().enumerate() {
            // SAFETY: the masks keep to `n` columns; a line is two vectors.
            unsafe {
                let upper = _mm512_maskz_loadu_ps(mask, upper.wrapping_add(half * LANES));
                let mask = if below { mask } else { 0 };
                let lower = _mm512_maskz_loadu_ps(mask, lower.wrapping_add(half * LANES));
                let out = line.0.as_mut_ptr().add(half * LANES);
                _mm512_store_si512(out.cast(), stacked(upper, lower));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_across(x: &View<'_>, from: usize, n: usize, out: &mut [Line]) {
    for (block, lines) in out.chunks_mut(LANES).enumerate() {
        let col = block * 2 * LANES;
        let n_cols = (x.cols - col).min(2 * LANES);
        for half in 0..2 {
            let mut words = [_mm512_setzero_si512(); LANES];
            let rows = n.saturating_sub(half * LANES).min(LANES);
            for (i, words) in words.iter_mut().enumerate().take(rows) {
                *words = side_by_side(x.part(from + half * LANES + i, col, n_cols));
            }
            let words = transpose(words);
            for (line, words) in lines.iter_mut().zip(words) {
                // SAFETY: a line is two vectors.
                unsafe {
                    _mm512_store_si512(line.0.as_mut_ptr().add(half * LANES).cast(), words);
                }
            }
        }
    }
}

/// Rows become columns: words, pairs of words, then quarters of registers change places.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // fours[4 q + c]: column c of every quarter, of rows 4 q .. 4 q + 4.
    let mut fours = pairs;
    for i in (0..16).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    let mut out = fours;
    for c in 0..4 {
        let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
        let (ab_low, ab_high) = (
            _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b),
        );
        let (de_low, de_high) = (
            _mm512_shuffle_i32x4::<0b01_00_01_00>(d, e),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(d, e),
        );
        out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_low, de_low);
        out[4 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_low, de_low);
        out[8 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_high, de_high);
        out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_high, de_high);
    }
    out
}

/// Tiles of nearly equal size, one below the other. `WORD` is how far apart the words of a row of `a` are.
///
/// # Safety
/// See [`Bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn multiply<const WORD: usize>(strip: &Strip) {
    let n_tiles = strip.n_rows.div_ceil(TILE);
    let a_row = if WORD == 1 { strip.a_row } else { 1 };
    let mut row = 0;
    for i in 0..n_tiles {
        let n = (strip.n_rows - row).div_ceil(n_tiles - i);
        // SAFETY: rows `row..row + n` of the strip.
        unsafe {
            let a = strip.a.add(row * a_row);
            let c = strip.c.add(row * strip.c_row);
            macro_rules! tiles {
                ($($n:literal)*) => {
                    match n {
                        $($n => tile::<$n, WORD>(strip, a, a_row, c),)*
                        _ => unreachable!("a tile has 1 to 12 rows"),
                    }
                };
            }
            tiles!(1 2 3 4 5 6 7 8 9 10 11 12);
        }
        row += n;
    }
}

/// # Safety
/// `a` and `c` are the strip's, from the first row of the tile on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn tile<const R: usize, const WORD: usize>(
    strip: &Strip,
    a: *const u32,
    a_row: usize,
    c: *mut f32,
) {
    let full = strip.n_cols == LINE;
    let masks = [
        first(strip.n_cols),
        first(strip.n_cols.saturating_sub(LANES)),
    ];
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: the caller's contract; masks keep to the columns that there are.
    unsafe {
        if strip.add {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    let c = c.add(r * strip.c_row).wrapping_add(half * LANES);
                    *sum = match full {
                        true => _mm512_loadu_ps(c),
                        false => _mm512_maskz_loadu_ps(masks[half], c),
                    };
                }
            }
        }
        let mut b = strip.b.cast::<u32>();
        let mut a = a;
        for _ in 0..strip.n_words {
            let b0 = as_bf16(_mm512_load_si512(b.cast()));
            let b1 = as_bf16(_mm512_load_si512(b.add(LANES).cast()));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = as_bf16(_mm512_set1_epi32(*a.add(r * a_row) as i32));
                sums[0] = _mm512_dpbf16_ps(sums[0], x, b0);
                sums[1] = _mm512_dpbf16_ps(sums[1], x, b1);
            }
            a = a.add(WORD);
            b = b.add(LINE);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                let c = c.add(r * strip.c_row).wrapping_add(half * LANES);
                match full {
                    true => _mm512_storeu_ps(c, *sum),
                    false => _mm512_mask_storeu_ps(c, masks[half], *sum),
                }
            }
        }
    }
}
