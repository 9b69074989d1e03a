//! Packing: 16 bytes of each of 4 rows become four vectors whose lanes are the rows.
//!
//! Bits are unpacked after the transposition, so that it moves packed bytes.

pub(super) mod blocks;
pub(super) mod supers;

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::half_to_f32;
use crate::interleave::{InPlace, Interleaved, Layout, Source};
use crate::panel::{Lanes, PANEL_ROWS, PANEL_WORDS, Panel, Slab};

/// Rows of a vector, and vectors of a panel.
const ROWS: usize = 4;
const VECTORS: usize = PANEL_ROWS / ROWS;
/// Vectors of the rows that are interleaved with each other.
const HALF: usize = VECTORS / 2;
/// Words of 32 integers.
const WORDS_32: usize = 8;
/// The most blocks of 32 in a panel.
const MAX_BLOCKS: usize = PANEL_WORDS / WORDS_32;

/// How rows get into vectors.
pub(super) trait Wide: Source {
    /// The 16 bytes at `offset` of block `at` in each row of a vector, as four vectors: vector `j` has bytes
    /// `4j..4j + 4` of every row.
    ///
    /// # Safety
    /// As for [`Source::read`], and the CPU has NEON.
    unsafe fn words<B: Layout>(
        slab: &Slab,
        vector: usize,
        at: usize,
        offset: usize,
    ) -> [uint8x16_t; 4];

    /// What does not fill words, of all rows, for as many blocks from `from` on as `out` holds.
    ///
    /// # Safety
    /// As for [`Source::read`]; `T` has as many bytes.
    unsafe fn odd<B: Layout, T: Copy>(slab: &Slab, from: usize, out: &mut [Lanes<T>]);
}

impl Wide for InPlace {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn words<B: Layout>(
        slab: &Slab,
        vector: usize,
        at: usize,
        offset: usize,
    ) -> [uint8x16_t; 4] {
        let row = |i: usize| {
            // SAFETY: the caller's promise: 16 bytes.
            unsafe {
                let block = slab.block::<B>(vector * ROWS + i, at).cast::<u8>();
                vreinterpretq_u32_u8(vld1q_u8(block.add(offset)))
            }
        };
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let wide = |v: uint32x4_t| vreinterpretq_u64_u32(v);
        let (even_ab, odd_ab) = (wide(vtrn1q_u32(a, b)), wide(vtrn2q_u32(a, b)));
        let (even_cd, odd_cd) = (wide(vtrn1q_u32(c, d)), wide(vtrn2q_u32(c, d)));
        [
            vreinterpretq_u8_u64(vtrn1q_u64(even_ab, even_cd)),
            vreinterpretq_u8_u64(vtrn1q_u64(odd_ab, odd_cd)),
            vreinterpretq_u8_u64(vtrn2q_u64(even_ab, even_cd)),
            vreinterpretq_u8_u64(vtrn2q_u64(odd_ab, odd_cd)),
        ]
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
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn words<B: Layout>(
        slab: &Slab,
        vector: usize,
        at: usize,
        offset: usize,
    ) -> [uint8x16_t; 4] {
        let (half, vector) = (vector / HALF, vector % HALF);
        [0, 1, 2, 3].map(|i| {
            let from = B::place(half, B::word(offset) + i) + vector * 16;
            // SAFETY: the caller's promise: the words of four rows.
            unsafe { vld1q_u8(slab.interleaved::<B>(at).add(from)) }
        })
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

#[target_feature(enable = "neon")]
#[inline]
fn put<T>(row: &mut Lanes<T>, vector: usize, v: uint8x16_t) {
    const { assert!(size_of::<T>() == 4) };
    let four = &mut row.as_chunks_mut::<ROWS>().0[vector];
    // SAFETY: 4 values of 4 bytes.
    unsafe { vst1q_u8(four.as_mut_ptr().cast(), v) };
}

#[target_feature(enable = "neon")]
#[inline]
fn put_f32<T>(row: &mut Lanes<T>, vector: usize, v: float32x4_t) {
    put(row, vector, vreinterpretq_u8_f32(v));
}

#[target_feature(enable = "neon")]
#[inline]
fn put_u32<T>(row: &mut Lanes<T>, vector: usize, v: uint32x4_t) {
    put(row, vector, vreinterpretq_u8_u32(v));
}

/// The half-precision number in the lower half of every word, and the one in the upper half.
#[target_feature(enable = "neon")]
#[inline]
fn halves(words: uint8x16_t) -> [float32x4_t; 2] {
    let words = vreinterpretq_u32_u8(words);
    [
        half_to_f32(vmovn_u32(words)),
        half_to_f32(vshrn_n_u32::<16>(words)),
    ]
}

/// Fills the scales with the f16 that every block has beside its words.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn pack_scales<S: Wide, B: Layout>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let mut bits = [[0u16; PANEL_ROWS]; MAX_BLOCKS];
    // SAFETY: the contract.
    unsafe { S::odd::<B, u16>(slab, from, &mut bits[..n]) };
    for (bits, d) in bits[..n].iter().zip(&mut panel.d) {
        for (vector, bits) in bits.as_chunks::<ROWS>().0.iter().enumerate() {
            // SAFETY: four values.
            put_f32(d, vector, half_to_f32(unsafe { vld1_u16(bits.as_ptr()) }));
        }
    }
}

/// Four columns of f32 at a time.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn pack_f32<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let whole = n - n % 4;
    for at in (0..whole).step_by(4) {
        for vector in 0..VECTORS {
            // SAFETY: the contract: values from + at .. + 4.
            let v = unsafe { S::words::<f32>(slab, vector, from + at, 0) };
            for (word, v) in panel.words[at..].iter_mut().zip(v) {
                put(word, vector, v);
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
#[target_feature(enable = "neon")]
#[inline]
unsafe fn pack_half<S: Wide, B: Layout>(
    slab: &Slab,
    (from, n): (usize, usize),
    panel: &mut Panel,
    widen: impl Fn(uint8x16_t) -> [float32x4_t; 2],
    value: impl Fn(B) -> f32,
) {
    const { assert!(size_of::<B>() == 2) };
    let whole = n - n % 8;
    for at in (0..whole).step_by(8) {
        for vector in 0..VECTORS {
            // SAFETY: the contract: values from + at .. + 8.
            let v = unsafe { S::words::<B>(slab, vector, from + at, 0) };
            for (words, v) in panel.words[at..].as_chunks_mut::<2>().0.iter_mut().zip(v) {
                let [even, odd] = widen(v);
                put_f32(&mut words[0], vector, even);
                put_f32(&mut words[1], vector, odd);
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
#[target_feature(enable = "neon")]
pub(super) unsafe fn pack_bf16<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    let widen = |v| {
        let v = vreinterpretq_u32_u8(v);
        let odd = vandq_u32(v, vdupq_n_u32(0xffff_0000));
        [
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(v)),
            vreinterpretq_f32_u32(odd),
        ]
    };
    // SAFETY: the contract.
    unsafe { pack_half::<S, _>(slab, (from, n), panel, widen, bf16::to_f32) }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn pack_f16<S: Wide>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_half::<S, _>(slab, (from, n), panel, |v| halves(v), f16::to_f32) }
}
