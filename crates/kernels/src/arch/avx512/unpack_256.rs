//! Super-blocks of 256 weights, unpacked 16 rows at a time: packing and products with few tokens share it.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::source::{Wide, each, put, put_f32};
use super::unpack_32::{IQ4, WORDS, join, look_up, nibbles, scale_f16, widen};
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

    /// Whether the bits of even and odd parts lie at different places, which then are compiled apart.
    const BY_PAIRS: bool;

    /// Part `part` of the integers of super-block `at` of a half's rows, without a sign: `q + 128` where they have one.
    /// `ODD` says whether the part is odd, in formats [by pairs](Self::BY_PAIRS).
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn words<S: Wide, const ODD: bool>(
        slab: &Slab,
        half: usize,
        at: usize,
        part: usize,
    ) -> Part;

    /// Puts a half's scales into super-block `slot` of the panel: `d`, `m`, `scales` and `pairs`.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn scales<S: Wide>(slab: &Slab, half: usize, at: usize, panel: &mut Panel, slot: usize);
}

/// Implements [`Unpack256`]: what makes the integers of a part, given what loads 32 bytes from an offset; and what puts
/// the scales.
macro_rules! unpack_256 {
    ($block:ty, $n_scales:literal, $few:literal, $by_pairs:literal, $scales:ident, |$load:ident, $part:pat_param| $integers:expr) => {
        impl Unpack256 for $block {
            const SCALES: usize = $n_scales;
            const FEW: usize = $few;
            const BY_PAIRS: bool = $by_pairs;

            #[inline(always)]
            unsafe fn words<S: Wide, const ODD: bool>(
                slab: &Slab,
                half: usize,
                at: usize,
                part: usize,
            ) -> Part {
                let $part = (part, i32::from(ODD));
                // SAFETY: the contract; the offsets lie inside of the block.
                unsafe {
                    let $load = Loader::<S, Self>::new(slab, half, at);
                    $integers
                }
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

unpack_256!(BlockQ2K, 16, 8, true, scales_q2_k, |load, (part, odd)| {
    let (of, by) = (load.from(16 + 32 * (part / 2)), -4 * odd);
    [
        only(Bits { of, by, mask: 3 }),
        only(Bits {
            of,
            by: by - 2,
            mask: 3,
        }),
    ]
});
unpack_256!(BlockQ3K, 16, 8, true, scales_q3_k, |load, (part, odd)| {
    let (of, by) = (load.from(32 + 32 * (part / 2)), -4 * odd);
    // The lowest two bits of every byte are the third ones.
    let third = shift_right(load.from(0), 2 * part);
    [
        merge(
            Bits { of, by, mask: 3 },
            Bits {
                of: third,
                by: 2,
                mask: 4,
            },
        ),
        merge(
            Bits {
                of,
                by: by - 2,
                mask: 3,
            },
            Bits {
                of: third,
                by: 1,
                mask: 4,
            },
        ),
    ]
});
unpack_256!(
    BlockQ4K,
    8,
    32,
    false,
    scales_six_bits,
    |load, (part, _)| {
        let of = load.from(16 + 32 * part);
        [
            only(Bits {
                of,
                by: 0,
                mask: 15,
            }),
            only(Bits {
                of,
                by: -4,
                mask: 15,
            }),
        ]
    }
);
unpack_256!(BlockQ5K, 8, 8, false, scales_six_bits, |load, (part, _)| {
    let of = load.from(48 + 32 * part);
    // The lowest two bits of every byte are the fifth ones.
    let fifth = shift_right(load.from(16), 2 * part);
    [
        merge(
            Bits {
                of,
                by: 0,
                mask: 15,
            },
            Bits {
                of: fifth,
                by: 4,
                mask: 16,
            },
        ),
        merge(
            Bits {
                of,
                by: -4,
                mask: 15,
            },
            Bits {
                of: fifth,
                by: 3,
                mask: 16,
            },
        ),
    ]
});
unpack_256!(BlockQ6K, 16, 8, true, scales_q6_k, |load, (part, odd)| {
    let by = -4 * odd;
    let from = 64 * (part / 2);
    let (first, second) = (load.from(from), load.from(from + 32));
    let upper = load.from(128 + from / 2);
    [
        merge(
            Bits {
                of: first,
                by,
                mask: 15,
            },
            Bits {
                of: upper,
                by: 4 + by,
                mask: 0x30,
            },
        ),
        merge(
            Bits {
                of: second,
                by,
                mask: 15,
            },
            Bits {
                of: upper,
                by: 2 + by,
                mask: 0x30,
            },
        ),
    ]
});
unpack_256!(BlockQ8K, 8, 32, false, scales_q8_k, |load, (part, _)| {
    let (flip, from) = (_mm512_set1_epi8(i8::MIN), 4 + 64 * part);
    let mut v = [load.from(from), load.from(from + 32)];
    for v in v.as_flattened_mut() {
        *v = _mm512_xor_si512(*v, flip);
    }
    v
});
unpack_256!(BlockIq4Xs, 8, 8, false, scales_iq4_xs, |load, (part, _)| {
    let [a, b, c, d, e, f, g, h] = load.from(8 + 32 * part);
    [
        look_up(&IQ4, nibbles([a, b, c, d])),
        look_up(&IQ4, nibbles([e, f, g, h])),
    ]
});

/// Bits of bytes moved right; those that come from the neighbour are for the caller to mask.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn shift_right(mut v: [__m512i; WORDS], n: usize) -> [__m512i; WORDS] {
    for v in &mut v {
        // SAFETY: the caller's promise.
        *v = unsafe { _mm512_srl_epi16(*v, _mm_cvtsi32_si128(n as i32)) };
    }
    v
}

/// What loads a block. These are functions, not closures, because closures that are called twice stay apart.
struct Loader<'a, S, B> {
    slab: &'a Slab,
    half: usize,
    at: usize,
    what: PhantomData<(S, B)>,
}

impl<'a, S: Wide, B: Layout> Loader<'a, S, B> {
    /// # Safety
    /// As for [`Wide::words`], for all that is loaded.
    #[inline(always)]
    unsafe fn new(slab: &'a Slab, half: usize, at: usize) -> Self {
        Self {
            slab,
            half,
            at,
            what: PhantomData,
        }
    }

    /// 32 bytes of each row.
    #[inline(always)]
    fn from(&self, offset: usize) -> [__m512i; WORDS] {
        // SAFETY: the loader was made by that promise.
        unsafe {
            join(
                S::words::<B>(self.slab, self.half, self.at, offset),
                S::words::<B>(self.slab, self.half, self.at, offset + 16),
            )
        }
    }
}

/// Bits of bytes moved left, or right by a negative number; those that come from the neighbour are for the caller to
/// mask.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn shift(v: __m512i, by: i32) -> __m512i {
    // SAFETY: the caller's promise. Once inlined, these are shifts by constants.
    unsafe {
        match by {
            0 => v,
            1.. => _mm512_sll_epi16(v, _mm_cvtsi32_si128(by)),
            _ => _mm512_srl_epi16(v, _mm_cvtsi32_si128(-by)),
        }
    }
}

/// Some bits of bytes.
#[derive(Clone, Copy)]
struct Bits {
    of: [__m512i; WORDS],
    /// How far they are moved to the left.
    by: i32,
    /// Which ones they are, once moved.
    mask: i8,
}

/// Bits of `a`, and others of `b`.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn merge(a: Bits, b: Bits) -> [__m512i; WORDS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = only(a);
        for (out, b) in out.iter_mut().zip(only(b)) {
            *out = _mm512_or_si512(*out, b);
        }
        out
    }
}

/// The bits alone.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn only(bits: Bits) -> [__m512i; WORDS] {
    let mut out = bits.of;
    for v in &mut out {
        // SAFETY: the caller's promise.
        *v = unsafe { _mm512_and_si512(shift(*v, bits.by), _mm512_set1_epi8(bits.mask)) };
    }
    out
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
