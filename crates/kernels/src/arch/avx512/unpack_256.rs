//! Super-blocks of 256 weights, unpacked 16 rows at a time: packing and products with few tokens share it.

use std::arch::x86_64::*;

use super::source::{Wide, each, put, put_f32};
use super::unpack_32::{IQ4, WORDS, high, join, look_up, low, nibbles, scale_f16, widen};
use crate::blocks::{
    Block256, BlockIq4Xs, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K,
};
use crate::interleave::Layout;
use crate::panel::{Panel, SIGNED_BIAS, Slab};

/// Parts that a super-block's integers come in: two blocks of 32.
pub(super) const PARTS: usize = 4;

/// The words of two blocks of 32.
pub(super) type Part = [[__m512i; WORDS]; 2];

/// A format whose super-blocks are unpacked in registers.
pub(super) trait Unpack256: Block256 + Layout {
    /// Integer scales of a super-block, 8 or 16.
    const SCALES: usize;
    /// Up to how many tokens unpacking again for every few pays.
    const FEW: usize;

    /// Part `part` of the integers of super-block `at` of a half's rows, without a sign: `q + 128` where they have one.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize, part: usize) -> Part;

    /// Puts a half's scales into super-block `slot` of the panel: `d`, `m`, `scales` and `pairs`.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn scales<S: Wide>(slab: &Slab, half: usize, at: usize, panel: &mut Panel, slot: usize);
}

/// Implements [`Unpack256`]: what makes the integers of a part, given what loads 32 bytes from an offset; and what puts
/// the scales.
macro_rules! unpack_256 {
    ($block:ty, $n_scales:literal, $few:literal, $scales:ident, |$load:ident, $part:ident| $integers:expr) => {
        impl Unpack256 for $block {
            const SCALES: usize = $n_scales;
            const FEW: usize = $few;

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
            #[inline]
            unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize, $part: usize) -> Part {
                // SAFETY: the contract; the offsets lie inside of the block.
                let $load = |offset| unsafe {
                    join(
                        S::words::<Self>(slab, half, at, offset),
                        S::words::<Self>(slab, half, at, offset + 16),
                    )
                };
                $integers
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
            #[inline]
            unsafe fn scales<S: Wide>(
                slab: &Slab,
                half: usize,
                at: usize,
                panel: &mut Panel,
                slot: usize,
            ) {
                // SAFETY: the contract.
                unsafe { $scales::<S, Self>(slab, half, at, (panel, slot)) }
            }
        }
    };
}

unpack_256!(BlockQ2K, 16, 8, scales_q2_k, |load, part| {
    let v = shift_right(load(16 + 32 * (part / 2)), 4 * (part % 2));
    let mask = _mm512_set1_epi8(3);
    each([v, shift_right(v, 2)], |v| {
        each(v, |v| _mm512_and_si512(v, mask))
    })
});
unpack_256!(BlockQ3K, 16, 8, scales_q3_k, |load, part| {
    let v = shift_right(load(32 + 32 * (part / 2)), 4 * (part % 2));
    // Bits 2 part and 2 part + 1 of every byte are the third ones.
    let bits = shift_right(load(0), 2 * part);
    let (lower, upper) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
    [
        insert(v, lower, each(bits, |v| _mm512_slli_epi16::<2>(v)), upper),
        insert(
            shift_right(v, 2),
            lower,
            each(bits, |v| _mm512_slli_epi16::<1>(v)),
            upper,
        ),
    ]
});
unpack_256!(BlockQ4K, 8, 32, scales_six_bits, |load, part| {
    let v = load(16 + 32 * part);
    [each(v, |v| low(v)), each(v, |v| high(v))]
});
unpack_256!(BlockQ5K, 8, 8, scales_six_bits, |load, part| {
    let v = load(48 + 32 * part);
    // Bits 2 part and 2 part + 1 of every byte are the fifth ones.
    let bits = shift_right(load(16), 2 * part);
    let (lower, upper) = (_mm512_set1_epi8(15), _mm512_set1_epi8(16));
    [
        insert(v, lower, each(bits, |v| _mm512_slli_epi16::<4>(v)), upper),
        insert(
            each(v, |v| _mm512_srli_epi16::<4>(v)),
            lower,
            each(bits, |v| _mm512_slli_epi16::<3>(v)),
            upper,
        ),
    ]
});
unpack_256!(BlockQ6K, 16, 8, scales_q6_k, |load, part| {
    let (half, pair) = (part / 2, part % 2);
    let bits = shift_right(load(128 + 32 * half), 4 * pair);
    let (lower, upper) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let lower_of = |at: usize| shift_right(load(64 * half + 32 * at), 4 * pair);
    [
        insert(
            lower_of(0),
            lower,
            each(bits, |v| _mm512_slli_epi16::<4>(v)),
            upper,
        ),
        insert(
            lower_of(1),
            lower,
            each(bits, |v| _mm512_slli_epi16::<2>(v)),
            upper,
        ),
    ]
});
unpack_256!(BlockQ8K, 8, 32, scales_q8_k, |load, part| {
    let flip = _mm512_set1_epi8(i8::MIN);
    let v = [load(4 + 64 * part), load(36 + 64 * part)];
    each(v, |v| each(v, |v| _mm512_xor_si512(v, flip)))
});
unpack_256!(BlockIq4Xs, 8, 8, scales_iq4_xs, |load, part| {
    let [a, b, c, d, e, f, g, h] = load(8 + 32 * part);
    let look_up = |v| look_up(&IQ4, nibbles(v));
    [look_up([a, b, c, d]), look_up([e, f, g, h])]
});

/// Bits of bytes moved right; those that come from the neighbour are for the caller to mask.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn shift_right(v: [__m512i; WORDS], n: usize) -> [__m512i; WORDS] {
    let n = _mm_cvtsi32_si128(n as i32);
    each(v, |v| _mm512_srl_epi16(v, n))
}

/// `a & a_mask | b & b_mask`.
#[target_feature(enable = "avx512f")]
#[inline]
fn insert(
    mut a: [__m512i; WORDS],
    a_mask: __m512i,
    b: [__m512i; WORDS],
    b_mask: __m512i,
) -> [__m512i; WORDS] {
    for (a, b) in a.iter_mut().zip(b) {
        let b = _mm512_and_si512(b, b_mask);
        *a = _mm512_or_si512(_mm512_and_si512(*a, a_mask), b);
    }
    a
}

/// Four bits each of 16 scales and minima, and what they are worth in the last word.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_q2_k<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    let lower = _mm512_set1_epi32(0x0f0f_0f0f);
    // SAFETY: the contract.
    let (v, d) = unsafe {
        (
            S::words::<B>(slab, half, at, 0),
            S::word::<B>(slab, half, at, 80),
        )
    };
    put_f32(&mut panel.d[slot], half, widen(d));
    put_f32(&mut panel.m[slot], half, widen(_mm512_srli_epi32::<16>(d)));
    for (i, v) in v.into_iter().enumerate() {
        let (scales, mins) = (_mm512_and_si512(v, lower), _mm512_srli_epi32::<4>(v));
        let mins = bytes(_mm512_and_si512(mins, lower));
        for (j, scale) in bytes(scales).into_iter().enumerate() {
            put(&mut panel.scales[slot][4 * i + j], half, scale);
        }
        for j in 0..2 {
            put(
                &mut panel.pairs[slot][2 * i + j],
                half,
                pair(mins[2 * j], mins[2 * j + 1]),
            );
        }
    }
}

/// Six bits each of 16 scales; see `BlockQ3K` for the layout.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_q3_k<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    let (lower, upper) = (
        _mm512_set1_epi32(0x0f0f_0f0f),
        _mm512_set1_epi32(0x3030_3030),
    );
    // SAFETY: the contract.
    let (a, b, c) = unsafe {
        let word = |offset| S::word::<B>(slab, half, at, offset);
        (word(96), word(100), word(104))
    };
    // SAFETY: the contract; the scale comes last.
    let (d, _) = unsafe { scale_f16::<S, B>(slab, half, at) };
    put_f32(&mut panel.d[slot], half, d);
    let join = |low, high| {
        let high = _mm512_and_si512(high, upper);
        _mm512_or_si512(_mm512_and_si512(low, lower), high)
    };
    let words = [
        join(a, _mm512_slli_epi32::<4>(c)),
        join(b, _mm512_slli_epi32::<2>(c)),
        join(_mm512_srli_epi32::<4>(a), c),
        join(_mm512_srli_epi32::<4>(b), _mm512_srli_epi32::<2>(c)),
    ];
    for (i, v) in words.into_iter().enumerate() {
        let scales = each(bytes(v), |v| _mm512_sub_epi32(v, _mm512_set1_epi32(32)));
        put_four(scales, i, i32::from(BlockQ3K::OFFSET), half, (panel, slot));
    }
}

/// Eight 6-bit scales and minima, and what they are worth; see `scale_and_min_of` for the layout.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_six_bits<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    let low_4 = _mm512_set1_epi32(0x0f0f_0f0f);
    let low_6 = _mm512_set1_epi32(0x3f3f_3f3f);
    // SAFETY: the contract; the block begins with its scales.
    let [d, a, b, c] = unsafe { S::words::<B>(slab, half, at, 0) };
    put_f32(&mut panel.d[slot], half, widen(d));
    put_f32(&mut panel.m[slot], half, widen(_mm512_srli_epi32::<16>(d)));
    // The upper two bits of the last four.
    let top = |v| _mm512_andnot_si512(low_4, _mm512_and_si512(_mm512_srli_epi32::<2>(v), low_6));
    let c_high = _mm512_srli_epi32::<4>(c);
    let scales = [
        _mm512_and_si512(a, low_6),
        _mm512_or_si512(_mm512_and_si512(c, low_4), top(a)),
    ];
    let mins = [
        _mm512_and_si512(b, low_6),
        _mm512_or_si512(_mm512_and_si512(c_high, low_4), top(b)),
    ];
    for i in 0..2 {
        let (scales, mins) = (bytes(scales[i]), bytes(mins[i]));
        for j in 0..4 {
            put(&mut panel.scales[slot][4 * i + j], half, scales[j]);
            // One minimum for both sums of 16.
            put(
                &mut panel.pairs[slot][4 * i + j],
                half,
                pair(mins[j], mins[j]),
            );
        }
    }
}

/// 16 scales of 8 bits.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_q6_k<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    const { assert!(std::mem::offset_of!(BlockQ6K, scales) == 192) };
    // SAFETY: the contract; the scale of the scales comes last.
    let ((d, _), scales) = unsafe {
        let d = scale_f16::<S, B>(slab, half, at);
        (d, S::words::<B>(slab, half, at, 192))
    };
    put_f32(&mut panel.d[slot], half, d);
    for (i, v) in scales.into_iter().enumerate() {
        let scales = [
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(v)),
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(v)),
            _mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(v)),
            _mm512_srai_epi32::<24>(v),
        ];
        put_four(scales, i, i32::from(BlockQ6K::OFFSET), half, (panel, slot));
    }
}

/// One scale, in f32.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_q8_k<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    // SAFETY: the contract; the block begins with its scale.
    let d = unsafe { S::word::<B>(slab, half, at, 0) };
    put(&mut panel.d[slot], half, d);
    for j in 0..8 {
        put_signed(_mm512_set1_epi32(1), j, half, (panel, slot));
    }
}

/// Eight scales: four bits in one place, two in another.
///
/// # Safety
/// As for [`Unpack256::scales`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scales_iq4_xs<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
    (panel, slot): (&mut Panel, usize),
) {
    // SAFETY: the contract; the block begins with its scales.
    let (d, lower) = unsafe {
        (
            S::word::<B>(slab, half, at, 0),
            S::word::<B>(slab, half, at, 4),
        )
    };
    put_f32(&mut panel.d[slot], half, widen(d));
    let upper = _mm512_srli_epi32::<16>(d);
    for j in 0..8 {
        let (by_4, by_2) = (_mm_cvtsi32_si128(4 * j), _mm_cvtsi32_si128(2 * j));
        let low = _mm512_and_si512(_mm512_srl_epi32(lower, by_4), _mm512_set1_epi32(15));
        let high = _mm512_and_si512(_mm512_srl_epi32(upper, by_2), _mm512_set1_epi32(3));
        let scale = _mm512_or_si512(low, _mm512_slli_epi32::<4>(high));
        let scale = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
        put_signed(scale, j as usize, half, (panel, slot));
    }
}

/// The bytes of words.
#[target_feature(enable = "avx512f")]
#[inline]
fn bytes(v: __m512i) -> [__m512i; 4] {
    let byte = _mm512_set1_epi32(0xff);
    [
        _mm512_and_si512(v, byte),
        _mm512_and_si512(_mm512_srli_epi32::<8>(v), byte),
        _mm512_and_si512(_mm512_srli_epi32::<16>(v), byte),
        _mm512_srli_epi32::<24>(v),
    ]
}

/// The lower halves of two words in one.
#[target_feature(enable = "avx512f")]
#[inline]
fn pair(low: __m512i, high: __m512i) -> __m512i {
    let low = _mm512_and_si512(low, _mm512_set1_epi32(0xffff));
    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
}

/// `-n * v`.
#[target_feature(enable = "avx512f")]
#[inline]
fn minus_times(n: i32, v: __m512i) -> __m512i {
    _mm512_mullo_epi32(_mm512_set1_epi32(-n), v)
}

/// Puts scales `4i..4i + 4` of 16, and what the offset of the integers takes away.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
fn put_four(
    scales: [__m512i; 4],
    i: usize,
    offset: i32,
    half: usize,
    (panel, slot): (&mut Panel, usize),
) {
    for (j, scale) in scales.into_iter().enumerate() {
        put(&mut panel.scales[slot][4 * i + j], half, scale);
    }
    let rest = each(scales, |v| minus_times(offset, v));
    for j in 0..2 {
        put(
            &mut panel.pairs[slot][2 * i + j],
            half,
            pair(rest[2 * j], rest[2 * j + 1]),
        );
    }
}

/// Puts scale `j` of eight of a format with signed integers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
fn put_signed(scale: __m512i, j: usize, half: usize, (panel, slot): (&mut Panel, usize)) {
    put(&mut panel.scales[slot][j], half, scale);
    let rest = minus_times(SIGNED_BIAS, scale);
    put(&mut panel.pairs[slot][j], half, pair(rest, rest));
}
