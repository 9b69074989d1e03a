//! Blocks of 32 weights, unpacked 16 rows at a time: packing and products with few tokens share it.

use std::arch::x86_64::*;

use super::source::{HALF, Wide, each};
use crate::blocks::{
    Block32, BlockIq4Nl, BlockMxfp4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0,
    IQ4_VALUES, MXFP4_VALUES, Q8_BLOCK,
};
use crate::interleave::Layout;
use crate::panel::Slab;

/// Words of a block.
pub(super) const WORDS: usize = 8;

/// A format whose blocks are unpacked in registers.
pub(super) trait Unpack32: Block32 + Layout {
    /// See [`super::source::every_line`]; integers that are stored as they are come by themselves for one token.
    const NUDGED: usize = if size_of::<Self>() > Q8_BLOCK { 1 } else { 0 };

    /// The integers of block `at` of a half's rows, without a sign: `q + 128` unless the format has a minimum.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize) -> [__m512i; WORDS];

    /// The scale, and what is added to every weight, if anything is.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn scales<S: Wide>(slab: &Slab, half: usize, at: usize) -> (__m512, __m512);
}

/// Implements [`Unpack32`] by what makes integers of a block, given what loads four words or one from an offset.
macro_rules! unpack_32 {
    ($block:ty, $scales:ident, |$words:ident, $word:ident| $integers:expr) => {
        impl Unpack32 for $block {
            #[inline(always)]
            unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize) -> [__m512i; WORDS] {
                // SAFETY: the contract; the offsets lie inside of the block.
                unsafe {
                    let $words = |offset| S::words::<Self>(slab, half, at, offset);
                    let $word = |offset| S::word::<Self>(slab, half, at, offset);
                    let _ = &$word;
                    $integers
                }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
            #[inline]
            unsafe fn scales<S: Wide>(slab: &Slab, half: usize, at: usize) -> (__m512, __m512) {
                // SAFETY: the contract.
                unsafe { $scales::<S, Self>(slab, half, at) }
            }
        }
    };
}

unpack_32!(BlockQ8_0, scale_f16, |words, word| {
    let flip = _mm512_set1_epi8(i8::MIN);
    each(join(words(2), words(18)), |v| _mm512_xor_si512(v, flip))
});
// 128 - 8 makes q - 8 unsigned.
unpack_32!(BlockQ4_0, scale_f16, |words, word| {
    each(nibbles(words(2)), |v| {
        _mm512_add_epi8(v, _mm512_set1_epi8(120))
    })
});
unpack_32!(BlockQ4_1, scale_and_min, |words, word| nibbles(words(4)));
// 128 - 16 makes q - 16 unsigned.
unpack_32!(BlockQ5_0, scale_f16, |words, word| {
    let v = with_fifth_bits(nibbles(words(6)), word(2));
    each(v, |v| _mm512_add_epi8(v, _mm512_set1_epi8(112)))
});
unpack_32!(BlockQ5_1, scale_and_min, |words, word| {
    with_fifth_bits(nibbles(words(8)), word(4))
});
unpack_32!(BlockIq4Nl, scale_f16, |words, word| {
    look_up(&IQ4, nibbles(words(2)))
});
unpack_32!(BlockMxfp4, scale_e8, |words, word| {
    look_up(&MXFP4, nibbles(words(1)))
});

/// The lower four bits of bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn low(v: __m512i) -> __m512i {
    _mm512_and_si512(v, _mm512_set1_epi8(15))
}

/// The upper four bits of bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn high(v: __m512i) -> __m512i {
    low(_mm512_srli_epi16::<4>(v))
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn join(a: [__m512i; 4], b: [__m512i; 4]) -> [__m512i; WORDS] {
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]
}

/// The lower halves of 16 bytes, then the upper halves.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn nibbles(v: [__m512i; 4]) -> [__m512i; WORDS] {
    join(each(v, |v| low(v)), each(v, |v| high(v)))
}

/// Puts bit `j` of a row's 32 at the fifth place of integer `j`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn with_fifth_bits(mut words: [__m512i; WORDS], bits: __m512i) -> [__m512i; WORDS] {
    // Four bits, spread over four bytes.
    const SPREAD: [u32; 16] = {
        let mut spread = [0; 16];
        let mut n = 0;
        while n < 16 {
            spread[n] = ((n & 1) | (n & 2) << 7 | (n & 4) << 14 | (n & 8) << 21) as u32 * 16;
            n += 1;
        }
        spread
    };
    // SAFETY: 16 words.
    let spread = unsafe { _mm512_loadu_si512(SPREAD.as_ptr().cast()) };
    for (i, word) in words.iter_mut().enumerate() {
        let shift = _mm_cvtsi32_si128(4 * i as i32);
        // The lowest four bits are the index.
        let bits = _mm512_permutexvar_epi32(_mm512_srl_epi32(bits, shift), spread);
        *word = _mm512_or_si512(*word, bits);
    }
    words
}

/// What 4-bit codes stand for, without a sign.
const fn biased(values: &[i8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut code = 0;
    while code < 16 {
        out[code] = (values[code] ^ i8::MIN).cast_unsigned();
        code += 1;
    }
    out
}

/// Values of [`IQ4_VALUES`], as they are looked up.
pub(super) const IQ4: [u8; 16] = biased(&IQ4_VALUES);
const MXFP4: [u8; 16] = biased(&MXFP4_VALUES);

/// Looks codes up.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) fn look_up(table: &[u8; 16], codes: [__m512i; WORDS]) -> [__m512i; WORDS] {
    // SAFETY: 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    each(codes, |v| _mm512_shuffle_epi8(table, v))
}

/// An f16 that does not fill a word.
///
/// # Safety
/// As for [`Wide::odd`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
pub(super) unsafe fn scale_f16<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
) -> (__m512, __m512) {
    // SAFETY: the contract.
    let bits = unsafe { S::odd::<B, u16>(slab, half, at) };
    // SAFETY: 16 values.
    let bits = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
    (_mm512_cvtph_ps(bits), _mm512_setzero_ps())
}

/// A scale and a minimum in the first word, both f16.
///
/// # Safety
/// As for [`Wide::word`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
pub(super) unsafe fn scale_and_min<S: Wide, B: Layout>(
    slab: &Slab,
    half: usize,
    at: usize,
) -> (__m512, __m512) {
    // SAFETY: the contract.
    let word = unsafe { S::word::<B>(slab, half, at, 0) };
    (widen(word), widen(_mm512_srli_epi32::<16>(word)))
}

/// f16 in the lower halves of words.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
pub(super) fn widen(words: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))
}

/// An exponent in a byte; see [`BlockMxfp4::scale_of`].
///
/// # Safety
/// As for [`Wide::odd`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn scale_e8<S: Wide, B: Layout>(slab: &Slab, half: usize, at: usize) -> (__m512, __m512) {
    const { assert!(HALF == 16) };
    // SAFETY: the contract.
    let e = unsafe { S::odd::<B, u8>(slab, half, at) };
    // SAFETY: 16 bytes.
    let e = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(e.as_ptr().cast()) });
    let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
    let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), e);
    let is_small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    let d = _mm512_mask_mov_epi32(normal, is_small, small);
    let is_nan = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(0xff));
    let nan = _mm512_set1_epi32(f32::NAN.to_bits().cast_signed());
    let d = _mm512_mask_mov_epi32(d, is_nan, nan);
    (_mm512_castsi512_ps(d), _mm512_setzero_ps())
}
