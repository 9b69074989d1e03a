//! Weights in float formats, made words of a panel 16 rows at a time: packing and products with few tokens share it.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::source::Wide;
use super::unpack_32::widen;
use crate::interleave::Layout;
use crate::panel::{Lanes, Slab};

/// See [`super::source::every_line`].
pub(super) const FLOATS_NUDGED: usize = 4;

/// What 16 bytes of a row become.
pub(super) trait Floats {
    /// What is stored.
    type Value: Layout + Default;
    type Words: IntoIterator<Item = __m512i>;
    /// Values in 16 bytes.
    const VALUES: usize = 16 / size_of::<Self::Value>();
    /// Words that they become.
    const WORDS: usize;

    /// The words of `VALUES` values of a half's rows from value `at` on.
    ///
    /// # Safety
    /// As for [`Wide::words`].
    unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize) -> Self::Words;

    /// A word of one row: of the first value, or of both.
    fn word(values: [Self::Value; 2]) -> u32;
}

/// f32 as it is.
pub(super) enum F32 {}
/// f16, made f32.
pub(super) enum F16 {}
/// bf16, made f32.
pub(super) enum Bf16 {}
/// Pairs of bf16 as they are.
pub(super) enum Pairs {}

/// Implements [`Floats`]: what becomes of four vectors of 16 bytes a row, and of values.
macro_rules! floats {
    ($name:ty, $value:ty, $n_words:literal, |$v:ident| $unpack:expr, |$values:ident| $word:expr) => {
        impl Floats for $name {
            type Value = $value;
            type Words = [__m512i; $n_words];
            const WORDS: usize = $n_words;

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
            #[inline]
            unsafe fn words<S: Wide>(slab: &Slab, half: usize, at: usize) -> Self::Words {
                // SAFETY: the contract.
                let $v = unsafe { S::words::<$value>(slab, half, at, 0) };
                $unpack
            }

            fn word($values: [$value; 2]) -> u32 {
                $word
            }
        }
    };
}

floats!(F32, f32, 4, |v| v, |values| values[0].to_bits());
floats!(F16, f16, 8, |v| f16_to_f32(v), |values| values[0]
    .to_f32()
    .to_bits());
floats!(Bf16, bf16, 8, |v| bf16_to_f32(v), |values| values[0]
    .to_f32()
    .to_bits());
floats!(Pairs, bf16, 4, |v| v, |values| {
    u32::from(values[0].to_bits()) | u32::from(values[1].to_bits()) << 16
});

/// The word of every row that begins with value `at`, where the row's `n` values end before 16 bytes do.
///
/// # Safety
/// As for `Source::read`.
#[inline(always)]
pub(super) unsafe fn last_word<S: Wide, F: Floats>(slab: &Slab, at: usize, n: usize) -> Lanes<u32> {
    std::array::from_fn(|row| {
        let mut values = [F::Value::default(); 2];
        let n_values = (F::VALUES / F::WORDS).min(n - at);
        for (i, value) in values[..n_values].iter_mut().enumerate() {
            // SAFETY: the contract.
            *value = unsafe { S::read::<F::Value>(slab, row, at + i) };
        }
        F::word(values)
    })
}

/// Pairs of f16, each made two words.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
fn f16_to_f32(v: [__m512i; 4]) -> [__m512i; 8] {
    let mut out = [_mm512_setzero_si512(); 8];
    for (i, v) in v.into_iter().enumerate() {
        out[2 * i] = _mm512_castps_si512(widen(v));
        out[2 * i + 1] = _mm512_castps_si512(widen(_mm512_srli_epi32::<16>(v)));
    }
    out
}

/// Pairs of bf16, each made two words.
#[target_feature(enable = "avx512f")]
#[inline]
fn bf16_to_f32(v: [__m512i; 4]) -> [__m512i; 8] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    let mut out = [_mm512_setzero_si512(); 8];
    for (i, v) in v.into_iter().enumerate() {
        out[2 * i] = _mm512_slli_epi32::<16>(v);
        out[2 * i + 1] = _mm512_and_si512(v, upper);
    }
    out
}
