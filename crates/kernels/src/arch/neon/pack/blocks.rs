//! Packing of blocks of 32.

use std::arch::aarch64::*;

use super::{MAX_BLOCKS, VECTORS, WORDS_32, Wide, halves, pack_scales, put, put_f32};
use crate::blocks::{
    BlockIq4Nl, BlockMxfp4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, IQ4_VALUES,
    MXFP4_VALUES,
};
use crate::interleave::Layout;
use crate::panel::{Lanes, PANEL_ROWS, Panel, Slab};

/// Words of block `at` of a panel.
#[inline(always)]
fn words_of(panel: &mut Panel, at: usize) -> &mut [Lanes<u32>; WORDS_32] {
    &mut panel.words.as_chunks_mut::<WORDS_32>().0[at]
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn low(v: uint8x16_t) -> uint8x16_t {
    vandq_u8(v, vdupq_n_u8(15))
}

#[target_feature(enable = "neon")]
#[inline]
pub(super) fn high(v: uint8x16_t) -> uint8x16_t {
    vshrq_n_u8::<4>(v)
}

/// `table[code]` in every lane; codes are below 16.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn look_up(table: &[i8; 16], codes: uint8x16_t) -> uint8x16_t {
    // SAFETY: 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    vreinterpretq_u8_s8(vqtbl1q_s8(table, codes))
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q8_0<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    // SAFETY: the contract.
    unsafe { pack_scales::<S, BlockQ8_0>(slab, from, n, panel) };
    for at in 0..n {
        let words = words_of(panel, at);
        for part in 0..2 {
            for vector in 0..VECTORS {
                // SAFETY: the contract; quants begin after the scale.
                let v = unsafe { S::words::<BlockQ8_0>(slab, vector, from + at, 2 + 16 * part) };
                for (word, v) in words[4 * part..].iter_mut().zip(v) {
                    put(word, vector, v);
                }
            }
        }
    }
}

/// Blocks of a scale and 16 bytes of nibbles.
pub(in crate::arch::neon) trait Nibbles: Layout {
    /// # Safety
    /// See `PackFn`.
    unsafe fn scales<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel);

    /// What nibbles stand for.
    ///
    /// # Safety
    /// The CPU has NEON.
    unsafe fn values(nibbles: uint8x16_t) -> uint8x16_t;
}

impl Nibbles for BlockQ4_0 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn scales<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
        // SAFETY: the contract.
        unsafe { pack_scales::<S, Self>(slab, from, n, panel) };
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn values(nibbles: uint8x16_t) -> uint8x16_t {
        vsubq_u8(nibbles, vdupq_n_u8(8))
    }
}

impl Nibbles for BlockIq4Nl {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn scales<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
        // SAFETY: the contract.
        unsafe { pack_scales::<S, Self>(slab, from, n, panel) };
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn values(nibbles: uint8x16_t) -> uint8x16_t {
        look_up(&IQ4_VALUES, nibbles)
    }
}

impl Nibbles for BlockMxfp4 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn scales<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
        let mut exponents = [[0u8; PANEL_ROWS]; MAX_BLOCKS];
        // SAFETY: the contract.
        unsafe { S::odd::<Self, u8>(slab, from, &mut exponents[..n]) };
        for (d, exponents) in panel.d.iter_mut().zip(&exponents[..n]) {
            for (d, e) in d.iter_mut().zip(exponents) {
                *d = Self::scale_of(*e);
            }
        }
    }

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn values(nibbles: uint8x16_t) -> uint8x16_t {
        look_up(&MXFP4_VALUES, nibbles)
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_nibbles<S: Wide, B: Nibbles>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    // SAFETY: the contract.
    unsafe { B::scales::<S>(slab, from, n, panel) };
    for at in 0..n {
        let words = words_of(panel, at);
        for vector in 0..VECTORS {
            // SAFETY: the contract; nibbles follow the scale.
            let v = unsafe { S::words::<B>(slab, vector, from + at, B::N_ODD) };
            for (i, v) in v.into_iter().enumerate() {
                // SAFETY: the instruction set is this function's.
                let (low, high) = unsafe { (B::values(low(v)), B::values(high(v))) };
                put(&mut words[i], vector, low);
                put(&mut words[i + 4], vector, high);
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q4_1<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        for vector in 0..VECTORS {
            // SAFETY: the contract: scale and minimum, then nibbles.
            let (head, nibbles) = unsafe {
                (
                    S::words::<BlockQ4_1>(slab, vector, from + at, 0),
                    S::words::<BlockQ4_1>(slab, vector, from + at, 4),
                )
            };
            put_scale_and_min(head[0], vector, at, panel);
            let words = words_of(panel, at);
            for (i, v) in nibbles.into_iter().enumerate() {
                put(&mut words[i], vector, low(v));
                put(&mut words[i + 4], vector, high(v));
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q5_0<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let offset = vdupq_n_u8(16);
    // SAFETY: the contract.
    unsafe { pack_scales::<S, BlockQ5_0>(slab, from, n, panel) };
    for at in 0..n {
        for vector in 0..VECTORS {
            // SAFETY: the contract: a scale, the fifth bits, then nibbles.
            let (head, nibbles) = unsafe {
                (
                    S::words::<BlockQ5_0>(slab, vector, from + at, 2),
                    S::words::<BlockQ5_0>(slab, vector, from + at, 6),
                )
            };
            let words = words_of(panel, at);
            let put = |word: &mut _, v| put(word, vector, vsubq_u8(v, offset));
            put_five_bits(nibbles, head[0], words, put);
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q5_1<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        for vector in 0..VECTORS {
            // SAFETY: the contract: scale and minimum, the fifth bits, then nibbles.
            let (head, nibbles) = unsafe {
                (
                    S::words::<BlockQ5_1>(slab, vector, from + at, 0),
                    S::words::<BlockQ5_1>(slab, vector, from + at, 8),
                )
            };
            put_scale_and_min(head[0], vector, at, panel);
            let words = words_of(panel, at);
            put_five_bits(nibbles, head[1], words, |word, v| put(word, vector, v));
        }
    }
}

/// The scale in the lower half of a word, the minimum in the upper.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn put_scale_and_min(head: uint8x16_t, vector: usize, at: usize, panel: &mut Panel) {
    let [d, m] = halves(head);
    put_f32(&mut panel.d[at], vector, d);
    put_f32(&mut panel.m[at], vector, m);
}

/// Nibbles and fifth bits, of which bit `j` belongs to integer `j`.
#[target_feature(enable = "neon")]
#[inline]
fn put_five_bits(
    nibbles: [uint8x16_t; 4],
    fifth: uint8x16_t,
    words: &mut [Lanes<u32>; WORDS_32],
    put: impl Fn(&mut Lanes<u32>, uint8x16_t),
) {
    // The next four bits, each to the fifth place of a byte of its own: the factor puts copies of them 7 bits apart, so
    // that bit j of copy j is the lowest of byte j.
    let spread = |bits: uint32x4_t| {
        let four = vandq_u32(bits, vdupq_n_u32(15));
        let spread = vandq_u32(vmulq_n_u32(four, 0x0020_4081), vdupq_n_u32(0x0101_0101));
        vreinterpretq_u8_u32(vshlq_n_u32::<4>(spread))
    };
    let mut lower = vreinterpretq_u32_u8(fifth);
    let mut upper = vshrq_n_u32::<16>(lower);
    for (i, v) in nibbles.into_iter().enumerate() {
        put(&mut words[i], vorrq_u8(low(v), spread(lower)));
        put(&mut words[i + 4], vorrq_u8(high(v), spread(upper)));
        lower = vshrq_n_u32::<4>(lower);
        upper = vshrq_n_u32::<4>(upper);
    }
}
