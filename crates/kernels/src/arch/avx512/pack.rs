//! Packing: 16 bytes of each of 16 rows become four vectors whose lanes are the rows.
//!
//! Bits are unpacked after the transposition, so that it moves packed bytes. What the formats store per block (scales)
//! is gathered by loads and stores of single numbers first, which cost the vector units nothing.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::arch::scalar_panel;
use crate::blocks::{
    Block32, Block256, BlockMxfp4, BlockQ4_0, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_0, MXFP4_VALUES,
};
use crate::interleave::{InPlace, Interleaved, Layout, Source};
use crate::panel::{Lanes, PANEL_ROWS, PANEL_WORDS, Panel, Slab};

/// Rows of a vector.
const HALF: usize = PANEL_ROWS / 2;
/// Words of 32 integers.
const WORDS_32: usize = 8;
/// The most blocks of 32 in a panel.
const MAX_BLOCKS: usize = PANEL_WORDS / WORDS_32;
/// Bytes that one fetch brings.
const LINE: usize = 64;

/// Bytes between what is read and what is fetched, where rows are interleaved.
const DISTANCE: usize = 8192;

/// How rows get into vectors.
pub(super) trait Wide: Source {
    /// The 16 bytes at `offset` of block `at` in each row of a half, as four vectors: vector `j` has bytes
    /// `4j..4j + 4` of every row.
    ///
    /// # Safety
    /// As for [`Source::read`], and the CPU has AVX-512.
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4];

    /// Fetches the `step`-th of `n_steps` parts of what is needed as far ahead of block `at` as pays, in sequence:
    /// memory likes it more than the order in which bits are unpacked.
    fn fetch<B>(slab: &Slab, at: usize, step: usize, n_steps: usize);

    /// What does not fill words, of all rows, for as many blocks from `from` on as `out` holds.
    ///
    /// # Safety
    /// As for [`Source::read`]; `T` has as many bytes.
    unsafe fn odd<B: Layout, T: Copy>(slab: &Slab, from: usize, out: &mut [Lanes<T>]);
}

/// The `step`-th of `n_steps` parts of `n_bytes`.
#[inline(always)]
fn fetch_part(from: *const u8, n_bytes: usize, step: usize, n_steps: usize) {
    let mut offset = n_bytes * step / n_steps / LINE * LINE;
    while offset < n_bytes * (step + 1) / n_steps {
        // SAFETY: fetching ahead is allowed at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(offset).cast()) };
        offset += LINE;
    }
}

impl Wide for InPlace {
    #[inline(always)]
    fn fetch<B>(slab: &Slab, at: usize, step: usize, n_steps: usize) {
        if !slab.next.is_null() {
            let n_bytes = PANEL_ROWS * size_of::<B>();
            fetch_part(slab.next.wrapping_add(at * n_bytes), n_bytes, step, n_steps);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4] {
        // SAFETY: the caller's promise.
        unsafe { transposed::<B>(slab, half, at, offset) }
    }

    #[inline(always)]
    unsafe fn odd<B: Layout, T: Copy>(slab: &Slab, from: usize, out: &mut [Lanes<T>]) {
        const { assert!(size_of::<T>() == B::N_ODD) };
        for row in 0..PANEL_ROWS {
            for (at, out) in out.iter_mut().enumerate() {
                // SAFETY: the contract.
                let block = unsafe { slab.block::<B>(row, from + at).cast::<u8>() };
                // SAFETY: as above.
                out[row] = unsafe { block.add(B::ODD).cast::<T>().read_unaligned() };
            }
        }
    }
}

impl Wide for Interleaved {
    #[inline(always)]
    fn fetch<B>(slab: &Slab, at: usize, step: usize, n_steps: usize) {
        let n_bytes = PANEL_ROWS * size_of::<B>();
        let from = slab.start().wrapping_add(at * n_bytes + DISTANCE);
        fetch_part(from, n_bytes, step, n_steps);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4] {
        let word = B::word(offset);
        let from = B::N_ODD * PANEL_ROWS + word * PANEL_ROWS * 4 + half * HALF * 4;
        // SAFETY: the caller's promise.
        let from = unsafe { slab.interleaved::<B>(at).add(from) };
        let mut out = [_mm512_setzero_si512(); 4];
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: the words of 16 rows.
            *out = unsafe { _mm512_loadu_si512(from.add(i * PANEL_ROWS * 4).cast()) };
        }
        out
    }

    #[inline(always)]
    unsafe fn odd<B: Layout, T: Copy>(slab: &Slab, from: usize, out: &mut [Lanes<T>]) {
        const { assert!(size_of::<T>() == B::N_ODD) };
        for (at, out) in out.iter_mut().enumerate() {
            // SAFETY: the contract; the odd bytes come first.
            let odd = unsafe { slab.interleaved::<B>(from + at).cast::<Lanes<T>>() };
            // SAFETY: as above.
            *out = unsafe { odd.read_unaligned() };
        }
    }
}

/// See [`Wide::words`].
///
/// # Safety
/// The bytes lie inside of the slab's rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn transposed<B>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4] {
    // A row's 16 bytes in every quarter.
    let row = |r: usize| {
        // SAFETY: the caller's promise.
        let bytes = unsafe {
            slab.block::<B>(half * HALF + r, at)
                .cast::<u8>()
                .add(offset)
        };
        // SAFETY: 16 bytes.
        unsafe { _mm_loadu_si128(bytes.cast()) }
    };
    // Quarter q of vector i is row 4q + i.
    let mut a = [_mm512_setzero_si512(); 4];
    for (i, a) in a.iter_mut().enumerate() {
        let mut v = _mm512_broadcast_i32x4(row(i));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, row(4 + i));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, row(8 + i));
        *a = _mm512_mask_broadcast_i32x4(v, 0xf000, row(12 + i));
    }
    let low = [
        _mm512_unpacklo_epi32(a[0], a[1]),
        _mm512_unpacklo_epi32(a[2], a[3]),
    ];
    let high = [
        _mm512_unpackhi_epi32(a[0], a[1]),
        _mm512_unpackhi_epi32(a[2], a[3]),
    ];
    [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn put<T>(row: &mut Lanes<T>, half: usize, v: __m512i) {
    const { assert!(size_of::<T>() == 4) };
    // SAFETY: 16 values of 4 bytes.
    unsafe { _mm512_storeu_si512(row[half * HALF..][..HALF].as_mut_ptr().cast(), v) };
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn put_f32(row: &mut Lanes<f32>, half: usize, v: __m512) {
    put(row, half, _mm512_castps_si512(v));
}

/// Half-precision numbers in the low halves of 16 words, as f32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn widen(words: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))
}

/// Fills the scales with the f16 that every block has beside its words.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn pack_scales<S: Wide, B: Layout>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let mut bits = [[0u16; PANEL_ROWS]; MAX_BLOCKS];
    // SAFETY: the contract.
    unsafe { S::odd::<B, u16>(slab, from, &mut bits[..n]) };
    for (bits, d) in bits[..n].iter().zip(&mut panel.d) {
        for (bits, d) in bits
            .as_chunks::<HALF>()
            .0
            .iter()
            .zip(d.as_chunks_mut::<HALF>().0)
        {
            // SAFETY: 16 values each.
            unsafe {
                let v = _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast()));
                _mm512_storeu_ps(d.as_mut_ptr(), v);
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_q8_0<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_scales::<S, BlockQ8_0>(slab, from, n, panel) };
    let flip = _mm512_set1_epi8(i8::MIN);
    for (at, words) in panel.words.as_chunks_mut::<WORDS_32>().0[..n]
        .iter_mut()
        .enumerate()
    {
        for part in 0..2 {
            for half in 0..2 {
                S::fetch::<BlockQ8_0>(slab, from + at, 2 * part + half, 4);
                // SAFETY: the contract; quants begin after the scale.
                let v = unsafe { S::words::<BlockQ8_0>(slab, half, from + at, 2 + 16 * part) };
                for (word, v) in words[4 * part..].iter_mut().zip(v) {
                    put(word, half, _mm512_xor_si512(v, flip));
                }
            }
        }
    }
}

/// The blocks of 32 that are 16 bytes of nibbles, of which `value` makes integers.
///
/// # Safety
/// See `PackFn`; the nibbles are at `offset`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn pack_nibbles<S: Wide, B: Layout>(
    slab: &Slab,
    (from, n): (usize, usize),
    offset: usize,
    panel: &mut Panel,
    value: impl Fn(__m512i) -> __m512i,
) {
    for (at, words) in panel.words.as_chunks_mut::<WORDS_32>().0[..n]
        .iter_mut()
        .enumerate()
    {
        for half in 0..2 {
            S::fetch::<B>(slab, from + at, half, 2);
            // SAFETY: the contract.
            let v = unsafe { S::words::<B>(slab, half, from + at, offset) };
            for (i, v) in v.into_iter().enumerate() {
                put(&mut words[i], half, value(low(v)));
                put(&mut words[i + 4], half, value(high(v)));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn low(v: __m512i) -> __m512i {
    _mm512_and_si512(v, _mm512_set1_epi8(15))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn high(v: __m512i) -> __m512i {
    low(_mm512_srli_epi16::<4>(v))
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_q4_0<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_scales::<S, BlockQ4_0>(slab, from, n, panel) };
    let offset = _mm512_set1_epi8(120);
    // SAFETY: the contract. 128 - 8 makes q - 8 unsigned.
    unsafe {
        pack_nibbles::<S, BlockQ4_0>(slab, (from, n), 2, panel, |q| _mm512_add_epi8(q, offset));
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_mxfp4<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let mut exponents = [[0u8; PANEL_ROWS]; MAX_BLOCKS];
    // SAFETY: the contract.
    unsafe { S::odd::<BlockMxfp4, u8>(slab, from, &mut exponents[..n]) };
    for (d, exponents) in panel.d.iter_mut().zip(&exponents[..n]) {
        for (d, e) in d.iter_mut().zip(exponents) {
            *d = BlockMxfp4::scale_of(*e);
        }
    }
    let table = MXFP4_VALUES.map(|v| (v ^ i8::MIN).cast_unsigned());
    let table = u128::from_le_bytes(table);
    let (low, high) = (table as i64, (table >> 64) as i64);
    let table = _mm512_set_epi64(high, low, high, low, high, low, high, low);
    // SAFETY: the contract.
    unsafe {
        pack_nibbles::<S, BlockMxfp4>(slab, (from, n), 1, panel, |q| _mm512_shuffle_epi8(table, q));
    }
}

/// Scales and minima of Q4_K and Q5_K, and what they are worth; see `scale_and_min_of` for the layout.
///
/// # Safety
/// See `PackFn`; `at` is the super-block of the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn pack_six_bits<S: Wide, B: Layout>(
    slab: &Slab,
    from: usize,
    at: usize,
    panel: &mut Panel,
) {
    let low_4 = _mm512_set1_epi32(0x0f0f_0f0f);
    let low_6 = _mm512_set1_epi32(0x3f3f_3f3f);
    let byte = _mm512_set1_epi32(0xff);
    for half in 0..2 {
        // SAFETY: the contract; the block begins with its scales.
        let [d, a, b, c] = unsafe { S::words::<B>(slab, half, from + at, 0) };
        put_f32(&mut panel.d[at], half, widen(d));
        put_f32(&mut panel.m[at], half, widen(_mm512_srli_epi32::<16>(d)));
        // The upper two bits of the last four.
        let top =
            |v| _mm512_andnot_si512(low_4, _mm512_and_si512(_mm512_srli_epi32::<2>(v), low_6));
        let c_high = _mm512_srli_epi32::<4>(c);
        let scales = [
            _mm512_and_si512(a, low_6),
            _mm512_or_si512(_mm512_and_si512(c, low_4), top(a)),
        ];
        let mins = [
            _mm512_and_si512(b, low_6),
            _mm512_or_si512(_mm512_and_si512(c_high, low_4), top(b)),
        ];
        for j in 0..8 {
            let shift = _mm_cvtsi32_si128(8 * (j as i32 % 4));
            let scale = _mm512_and_si512(_mm512_srl_epi32(scales[j / 4], shift), byte);
            put(&mut panel.scales[at][j], half, scale);
            // One minimum for both sums of 16.
            let min = _mm512_and_si512(_mm512_srl_epi32(mins[j / 4], shift), byte);
            let twice = _mm512_or_si512(min, _mm512_slli_epi32::<16>(min));
            put(&mut panel.pairs[at][j], half, twice);
        }
    }
}

/// Words of super-block `at`, by blocks of 32.
fn sub_blocks(panel: &mut Panel, at: usize) -> &mut [[Lanes<u32>; WORDS_32]; 8] {
    let blocks = panel.words.as_chunks_mut::<WORDS_32>().0;
    blocks[8 * at..]
        .first_chunk_mut()
        .expect("a super-block lies inside of the panel")
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_q4_k<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    for at in 0..n {
        // SAFETY: the contract.
        unsafe { pack_six_bits::<S, BlockQ4K>(slab, from, at, panel) };
        let blocks = sub_blocks(panel, at);
        for (part, blocks) in blocks.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for (quarter, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let offset = 16 + 32 * part + 16 * quarter;
                S::fetch::<BlockQ4K>(slab, from + at, 4 * part + 2 * quarter + half, 16);
                // SAFETY: the contract; the nibbles follow the scales.
                let v = unsafe { S::words::<BlockQ4K>(slab, half, from + at, offset) };
                for (i, v) in v.into_iter().enumerate() {
                    put(&mut blocks[0][4 * quarter + i], half, low(v));
                    put(&mut blocks[1][4 * quarter + i], half, high(v));
                }
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_q5_k<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let fifth = _mm512_set1_epi8(16);
    for at in 0..n {
        // SAFETY: the contract.
        unsafe { pack_six_bits::<S, BlockQ5K>(slab, from, at, panel) };
        let blocks = sub_blocks(panel, at);
        for (quarter, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            // SAFETY: the contract; the fifth bits follow the scales.
            let mut bits =
                unsafe { S::words::<BlockQ5K>(slab, half, from + at, 16 + 16 * quarter) };
            for (part, blocks) in blocks.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let offset = 48 + 32 * part + 16 * quarter;
                let step = 8 * quarter + 4 * half + part;
                S::fetch::<BlockQ5K>(slab, from + at, step, 16);
                // SAFETY: the contract; the nibbles follow them.
                let v = unsafe { S::words::<BlockQ5K>(slab, half, from + at, offset) };
                for (i, v) in v.into_iter().enumerate() {
                    // The next two bits of every byte, brought to the fifth place.
                    let first = _mm512_and_si512(_mm512_slli_epi16::<4>(bits[i]), fifth);
                    let second = _mm512_and_si512(_mm512_slli_epi16::<3>(bits[i]), fifth);
                    bits[i] = _mm512_srli_epi16::<2>(bits[i]);
                    let word = 4 * quarter + i;
                    put(&mut blocks[0][word], half, _mm512_or_si512(low(v), first));
                    put(&mut blocks[1][word], half, _mm512_or_si512(high(v), second));
                }
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_q6_k<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    const { assert!(std::mem::offset_of!(BlockQ6K, scales) == 192) };
    // SAFETY: the contract; the scale comes last.
    unsafe { pack_scales::<S, BlockQ6K>(slab, from, n, panel) };
    for at in 0..n {
        for half in 0..2 {
            // SAFETY: the contract.
            let scales = unsafe { S::words::<BlockQ6K>(slab, half, from + at, 192) };
            pack_scales_q6_k(scales, half, at, panel);
        }
        let blocks = sub_blocks(panel, at);
        for (part, blocks) in blocks.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (quarter, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let step = 4 * part + 2 * quarter + half;
                S::fetch::<BlockQ6K>(slab, from + at, step, 8);
                // SAFETY: the contract: per 128 weights 64 bytes of lower and 32 of upper bits.
                let (first, second, upper) = unsafe {
                    let get = |offset| S::words::<BlockQ6K>(slab, half, from + at, offset);
                    (
                        get(64 * part + 16 * quarter),
                        get(64 * part + 32 + 16 * quarter),
                        get(128 + 32 * part + 16 * quarter),
                    )
                };
                for i in 0..4 {
                    let words = blocks.each_mut().map(|block| &mut block[4 * quarter + i]);
                    unpack_q6_k(first[i], second[i], upper[i], half, words);
                }
            }
        }
    }
}

/// Four words of Q6_K, one in each block of 32 of 128 weights.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn unpack_q6_k(
    first: __m512i,
    second: __m512i,
    upper: __m512i,
    half: usize,
    words: [&mut Lanes<u32>; 4],
) {
    let mask = _mm512_set1_epi8(0x30);
    let shifted = [
        _mm512_slli_epi16::<4>(upper),
        _mm512_slli_epi16::<2>(upper),
        upper,
        _mm512_srli_epi16::<2>(upper),
    ];
    let lower = [low(first), low(second), high(first), high(second)];
    for ((word, lower), upper) in words.into_iter().zip(lower).zip(shifted) {
        put(
            word,
            half,
            _mm512_or_si512(lower, _mm512_and_si512(upper, mask)),
        );
    }
}

/// The 8-bit scales of Q6_K, and minus 32 times each.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn pack_scales_q6_k(scales: [__m512i; 4], half: usize, at: usize, panel: &mut Panel) {
    let low_half = _mm512_set1_epi32(0xffff);
    let four = |v: __m512i| {
        [
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(v)),
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(v)),
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(v)),
            _mm512_srai_epi32::<24>(v),
        ]
    };
    let minus_32 = |v| _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<5>(v));
    for (i, v) in scales.into_iter().enumerate() {
        let four = four(v);
        for (j, scale) in four.into_iter().enumerate() {
            put(&mut panel.scales[at][4 * i + j], half, scale);
        }
        for j in 0..2 {
            let low = _mm512_and_si512(minus_32(four[2 * j]), low_half);
            let high = _mm512_slli_epi32::<16>(minus_32(four[2 * j + 1]));
            put(
                &mut panel.pairs[at][2 * i + j],
                half,
                _mm512_or_si512(low, high),
            );
        }
    }
}

/// The twin's packing of blocks of 32, vectorised by the compiler.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_32<S: Source, B: Block32 + Layout>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    // SAFETY: the contract.
    unsafe { scalar_panel::pack_32::<S, B>(slab, from, n, panel) }
}

/// The twin's packing of super-blocks, vectorised by the compiler.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_256<S: Source, B: Block256 + Layout, const SCALES: usize>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    // SAFETY: the contract.
    unsafe { scalar_panel::pack_256::<S, B, SCALES>(slab, from, n, panel) }
}

/// Four columns of f32 at a time.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_f32<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let whole = n - n % 4;
    for at in (0..whole).step_by(4) {
        for half in 0..2 {
            S::fetch::<[f32; 4]>(slab, (from + at) / 4, half, 2);
            // SAFETY: the contract: values from + at .. + 4.
            let v = unsafe { S::words::<f32>(slab, half, from + at, 0) };
            for (word, v) in panel.words[at..].iter_mut().zip(v) {
                put(word, half, v);
            }
        }
    }
    for row in 0..PANEL_ROWS {
        for at in whole..n {
            // SAFETY: the contract.
            panel.words[at][row] = unsafe { S::read::<f32>(slab, row, from + at) }.to_bits();
        }
    }
}

/// Eight columns of half the size at a time, made f32.
///
/// # Safety
/// See `PackFn`; `B` has 2 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn pack_half<S: Wide, B: Layout>(
    slab: &Slab,
    (from, n): (usize, usize),
    panel: &mut Panel,
    widen: impl Fn(__m512i) -> [__m512i; 2],
    value: impl Fn(B) -> f32,
) {
    const { assert!(size_of::<B>() == 2) };
    let whole = n - n % 8;
    for at in (0..whole).step_by(8) {
        for half in 0..2 {
            S::fetch::<[bf16; 8]>(slab, (from + at) / 8, half, 2);
            // SAFETY: the contract: values from + at .. + 8.
            let v = unsafe { S::words::<B>(slab, half, from + at, 0) };
            for (words, v) in panel.words[at..].as_chunks_mut::<2>().0.iter_mut().zip(v) {
                let [even, odd] = widen(v);
                put(&mut words[0], half, even);
                put(&mut words[1], half, odd);
            }
        }
    }
    for row in 0..PANEL_ROWS {
        for at in whole..n {
            // SAFETY: the contract.
            let bits = value(unsafe { S::read::<B>(slab, row, from + at) });
            panel.words[at][row] = bits.to_bits();
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_bf16<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    let widen = |v| [_mm512_slli_epi32::<16>(v), _mm512_and_si512(v, upper)];
    // SAFETY: the contract.
    unsafe { pack_half::<S, _>(slab, (from, n), panel, widen, bf16::to_f32) }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_f16<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let widen = |v| {
        let odd = self::widen(_mm512_srli_epi32::<16>(v));
        [
            _mm512_castps_si512(self::widen(v)),
            _mm512_castps_si512(odd),
        ]
    };
    // SAFETY: the contract.
    unsafe { pack_half::<S, _>(slab, (from, n), panel, widen, f16::to_f32) }
}

/// Pairs of bf16 as they are; `n` counts values, and an odd one at a row's end is paired with zero.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn pack_bf16_pairs<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let whole = n - n % 8;
    for at in (0..whole).step_by(8) {
        for half in 0..2 {
            S::fetch::<[bf16; 8]>(slab, (from + at) / 8, half, 2);
            // SAFETY: the contract: values from + at .. + 8.
            let v = unsafe { S::words::<bf16>(slab, half, from + at, 0) };
            for (word, v) in panel.words[at / 2..].iter_mut().zip(v) {
                put(word, half, v);
            }
        }
    }
    for row in 0..PANEL_ROWS {
        for at in (whole..n).step_by(2) {
            // SAFETY: the contract.
            let value = |at: usize| unsafe { S::read::<bf16>(slab, row, from + at) };
            let value = |at: usize| u32::from(value(at).to_bits());
            let odd = if at + 1 < n { value(at + 1) } else { 0 };
            panel.words[at / 2][row] = value(at) | odd << 16;
        }
    }
}
