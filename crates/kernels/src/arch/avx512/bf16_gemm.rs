//! Products of bf16 with f32 sums: a tile is up to 12 rows by two vectors, whose sums stay in registers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

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
    let from = x.as_ptr();
    // SAFETY: there are 32 values, or masks keep to the length; a load without lanes reads nothing.
    let (low, high) = unsafe {
        match x.len() {
            LINE => (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(LANES))),
            n => (
                _mm512_maskz_loadu_ps(first(n), from),
                _mm512_maskz_loadu_ps(first(n.saturating_sub(LANES)), from.wrapping_add(LANES)),
            ),
        }
    };
    as_words(_mm512_cvtne2ps_pbh(high, low))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_row(x: &[f32], out: &mut [MaybeUninit<u32>]) {
    for (out, x) in out.chunks_mut(LANES).zip(x.chunks(2 * LANES)) {
        let (words, to) = (side_by_side(x), out.as_mut_ptr().cast::<i32>());
        // SAFETY: there are 16 words, or the mask keeps to the length.
        unsafe {
            match out.len() {
                LANES => _mm512_storeu_epi32(to, words),
                n => _mm512_mask_storeu_epi32(to, first(n), words),
            }
        };
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
fn pack_down(x: &View<'_>, n_rows: usize, from: usize, n: usize, out: &mut [MaybeUninit<Line>]) {
    match n {
        LINE => columns_down::<true>(x, n_rows, from, n, out),
        _ => columns_down::<false>(x, n_rows, from, n, out),
    }
}

/// 16 values, or those of `mask`.
///
/// # Safety
/// They can be read.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load<const FULL: bool>(from: *const f32, mask: __mmask16) -> __m512 {
    // SAFETY: the caller's contract.
    unsafe {
        match FULL {
            true => _mm512_loadu_ps(from),
            false => _mm512_maskz_loadu_ps(mask, from),
        }
    }
}

/// `FULL` says that there are as many columns as a line has.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn columns_down<const FULL: bool>(
    x: &View<'_>,
    n_rows: usize,
    from: usize,
    n: usize,
    out: &mut [MaybeUninit<Line>],
) {
    let masks = [first(n), first(n.saturating_sub(LANES))];
    for (p, line) in out.iter_mut().enumerate() {
        let upper = x.part(2 * p, from, n).as_ptr();
        let below = 2 * p + 1 < n_rows;
        let lower = match below {
            true => x.part(2 * p + 1, from, n).as_ptr(),
            false => upper,
        };
        for (half, mask) in masks.into_iter().enumerate() {
            let at = half * LANES;
            // SAFETY: there are 32 columns, or masks keep to `n`; a line is two vectors.
            unsafe {
                let upper = load::<FULL>(upper.wrapping_add(at), mask);
                let lower = match below {
                    true => load::<FULL>(lower.wrapping_add(at), mask),
                    false => _mm512_setzero_ps(),
                };
                let out = line.as_mut_ptr().cast::<u32>().add(at);
                _mm512_store_si512(out.cast(), stacked(upper, lower));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_across(x: &View<'_>, from: usize, n: usize, out: &mut [MaybeUninit<Line>]) {
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
                    let out = line.as_mut_ptr().cast::<u32>();
                    _mm512_store_si512(out.add(half * LANES).cast(), words);
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
