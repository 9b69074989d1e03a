//! Packing of super-blocks.

use std::arch::aarch64::*;

use super::blocks::{high, look_up, low, put_scale_and_min};
use super::{VECTORS, WORDS_32, Wide, halves, pack_scales, put, put_f32, put_u32};
use crate::arch::scalar_panel;
use crate::blocks::{Block256, BlockIq4Xs, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K, IQ4_VALUES};
use crate::interleave::{Layout, Source};
use crate::panel::{Lanes, Panel, Slab};

/// Words of super-block `at`, by blocks of 32.
#[inline(always)]
fn sub_blocks(panel: &mut Panel, at: usize) -> &mut [[Lanes<u32>; WORDS_32]; 8] {
    let blocks = panel.words.as_chunks_mut::<WORDS_32>().0;
    blocks[8 * at..]
        .first_chunk_mut()
        .expect("a super-block lies inside of the panel")
}

/// Byte `j` of every word.
#[target_feature(enable = "neon")]
#[inline]
fn byte(words: uint32x4_t, j: usize) -> uint32x4_t {
    let right = vdupq_n_s32(-8 * j as i32);
    vandq_u32(vshlq_u32(words, right), vdupq_n_u32(0xff))
}

/// Scales and minima of Q4_K and Q5_K, and what they are worth; see `scale_and_min_of` for the layout.
///
/// # Safety
/// See `PackFn`; `at` is the super-block of the panel.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn pack_six_bits<S: Wide, B: Layout>(
    slab: &Slab,
    from: usize,
    at: usize,
    panel: &mut Panel,
) {
    let low_4 = vdupq_n_u32(0x0f0f_0f0f);
    let low_6 = vdupq_n_u32(0x3f3f_3f3f);
    for vector in 0..VECTORS {
        // SAFETY: the contract; the block begins with its scales.
        let [d, a, b, c] = unsafe { S::words::<B>(slab, vector, from + at, 0) };
        put_scale_and_min(d, vector, at, panel);
        let [a, b, c] = [a, b, c].map(|v| vreinterpretq_u32_u8(v));
        // The upper two bits of the last four.
        let top = |v| vbicq_u32(vandq_u32(vshrq_n_u32::<2>(v), low_6), low_4);
        let c_high = vandq_u32(vshrq_n_u32::<4>(c), low_4);
        let scales = [vandq_u32(a, low_6), vorrq_u32(vandq_u32(c, low_4), top(a))];
        let mins = [vandq_u32(b, low_6), vorrq_u32(c_high, top(b))];
        for j in 0..8 {
            put_u32(&mut panel.scales[at][j], vector, byte(scales[j / 4], j % 4));
            // One minimum for both sums of 16.
            let min = byte(mins[j / 4], j % 4);
            let twice = vorrq_u32(min, vshlq_n_u32::<16>(min));
            put_u32(&mut panel.pairs[at][j], vector, twice);
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q4_k<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        // SAFETY: the contract.
        unsafe { pack_six_bits::<S, BlockQ4K>(slab, from, at, panel) };
        let blocks = sub_blocks(panel, at);
        for (part, blocks) in blocks.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for quarter in 0..2 {
                let offset = 16 + 32 * part + 16 * quarter;
                for vector in 0..VECTORS {
                    // SAFETY: the contract; the nibbles follow the scales.
                    let v = unsafe { S::words::<BlockQ4K>(slab, vector, from + at, offset) };
                    for (i, v) in v.into_iter().enumerate() {
                        put(&mut blocks[0][4 * quarter + i], vector, low(v));
                        put(&mut blocks[1][4 * quarter + i], vector, high(v));
                    }
                }
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q5_k<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let fifth = vdupq_n_u8(16);
    for at in 0..n {
        // SAFETY: the contract.
        unsafe { pack_six_bits::<S, BlockQ5K>(slab, from, at, panel) };
        let blocks = sub_blocks(panel, at);
        for (quarter, vector) in (0..2).flat_map(|q| (0..VECTORS).map(move |v| (q, v))) {
            // SAFETY: the contract; the fifth bits follow the scales.
            let mut bits =
                unsafe { S::words::<BlockQ5K>(slab, vector, from + at, 16 + 16 * quarter) };
            for (part, blocks) in blocks.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let offset = 48 + 32 * part + 16 * quarter;
                // SAFETY: the contract; the nibbles follow them.
                let v = unsafe { S::words::<BlockQ5K>(slab, vector, from + at, offset) };
                for (i, v) in v.into_iter().enumerate() {
                    // The next two bits of every byte, brought to the fifth place.
                    let first = vandq_u8(vshlq_n_u8::<4>(bits[i]), fifth);
                    let second = vandq_u8(vshlq_n_u8::<3>(bits[i]), fifth);
                    bits[i] = vshrq_n_u8::<2>(bits[i]);
                    let word = 4 * quarter + i;
                    put(&mut blocks[0][word], vector, vorrq_u8(low(v), first));
                    put(&mut blocks[1][word], vector, vorrq_u8(high(v), second));
                }
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q6_k<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    const { assert!(std::mem::offset_of!(BlockQ6K, scales) == 192) };
    // SAFETY: the contract; the scale comes last.
    unsafe { pack_scales::<S, BlockQ6K>(slab, from, n, panel) };
    for at in 0..n {
        for vector in 0..VECTORS {
            // SAFETY: the contract.
            let scales = unsafe { S::words::<BlockQ6K>(slab, vector, from + at, 192) };
            put_scales_q6_k(scales, vector, at, panel);
        }
        let blocks = sub_blocks(panel, at);
        for (part, blocks) in blocks.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (quarter, vector) in (0..2).flat_map(|q| (0..VECTORS).map(move |v| (q, v))) {
                // SAFETY: the contract: per 128 weights 64 bytes of lower and 32 of upper bits.
                let (first, second, upper) = unsafe {
                    let get = |offset| S::words::<BlockQ6K>(slab, vector, from + at, offset);
                    (
                        get(64 * part + 16 * quarter),
                        get(64 * part + 32 + 16 * quarter),
                        get(128 + 32 * part + 16 * quarter),
                    )
                };
                for i in 0..4 {
                    let words = unpack_q6_k(first[i], second[i], upper[i]);
                    for (block, v) in blocks.iter_mut().zip(words) {
                        put(&mut block[4 * quarter + i], vector, v);
                    }
                }
            }
        }
    }
}

/// Four words of Q6_K, one in each block of 32 of 128 weights.
#[target_feature(enable = "neon")]
#[inline]
fn unpack_q6_k(first: uint8x16_t, second: uint8x16_t, upper: uint8x16_t) -> [uint8x16_t; 4] {
    let mask = vdupq_n_u8(0x30);
    let join = |lower, upper| vorrq_u8(lower, vandq_u8(upper, mask));
    [
        join(low(first), vshlq_n_u8::<4>(upper)),
        join(low(second), vshlq_n_u8::<2>(upper)),
        join(high(first), upper),
        join(high(second), vshrq_n_u8::<2>(upper)),
    ]
}

/// The 8-bit scales of Q6_K, and minus 32 times each.
#[target_feature(enable = "neon")]
#[inline]
fn put_scales_q6_k(scales: [uint8x16_t; 4], vector: usize, at: usize, panel: &mut Panel) {
    let worth = |v| vreinterpretq_u32_s32(vmulq_n_s32(v, -32));
    for (i, v) in scales.into_iter().enumerate() {
        let v = vreinterpretq_s32_u8(v);
        let four = [
            vshrq_n_s32::<24>(vshlq_n_s32::<24>(v)),
            vshrq_n_s32::<24>(vshlq_n_s32::<16>(v)),
            vshrq_n_s32::<24>(vshlq_n_s32::<8>(v)),
            vshrq_n_s32::<24>(v),
        ];
        for (j, scale) in four.into_iter().enumerate() {
            let scale = vreinterpretq_u32_s32(scale);
            put_u32(&mut panel.scales[at][4 * i + j], vector, scale);
        }
        for j in 0..2 {
            // The second one into the upper half of the first.
            let pair = vsliq_n_u32::<16>(worth(four[2 * j]), worth(four[2 * j + 1]));
            put_u32(&mut panel.pairs[at][2 * i + j], vector, pair);
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_q8_k<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        panel.scales[at].as_flattened_mut().fill(1);
        for (part, vector) in (0..16).flat_map(|p| (0..VECTORS).map(move |v| (p, v))) {
            // SAFETY: the contract: the scale, then quants.
            let v = unsafe { S::words::<BlockQ8K>(slab, vector, from + at, 4 + 16 * part) };
            let blocks = sub_blocks(panel, at);
            for (word, v) in blocks.as_flattened_mut()[4 * part..].iter_mut().zip(v) {
                put(word, vector, v);
            }
        }
        for vector in 0..VECTORS {
            // SAFETY: as above.
            let [d, ..] = unsafe { S::words::<BlockQ8K>(slab, vector, from + at, 0) };
            put(&mut panel.d[at], vector, d);
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_iq4_xs<S: Wide>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        for vector in 0..VECTORS {
            // SAFETY: the contract; the block begins with its scales.
            let [d, lower, ..] = unsafe { S::words::<BlockIq4Xs>(slab, vector, from + at, 0) };
            put_f32(&mut panel.d[at], vector, halves(d)[0]);
            let upper = vshrq_n_u32::<16>(vreinterpretq_u32_u8(d));
            put_scales_iq4_xs(
                vreinterpretq_u32_u8(lower),
                upper,
                vector,
                &mut panel.scales[at],
            );
        }
        let blocks = sub_blocks(panel, at);
        for (group, words) in blocks.iter_mut().enumerate() {
            for vector in 0..VECTORS {
                let offset = 8 + 16 * group;
                // SAFETY: the contract; the codes follow the scales.
                let v = unsafe { S::words::<BlockIq4Xs>(slab, vector, from + at, offset) };
                for (i, v) in v.into_iter().enumerate() {
                    put(&mut words[i], vector, look_up(&IQ4_VALUES, low(v)));
                    put(&mut words[i + 4], vector, look_up(&IQ4_VALUES, high(v)));
                }
            }
        }
    }
}

/// The 6-bit scales of IQ4_XS: four lower and two upper bits of each, minus 32.
#[target_feature(enable = "neon")]
#[inline]
fn put_scales_iq4_xs(
    mut lower: uint32x4_t,
    mut upper: uint32x4_t,
    vector: usize,
    scales: &mut [Lanes<i32>; 16],
) {
    for scale in &mut scales[..8] {
        let low = vandq_u32(lower, vdupq_n_u32(15));
        let high = vandq_u32(upper, vdupq_n_u32(3));
        let six = vorrq_u32(low, vshlq_n_u32::<4>(high));
        put_u32(scale, vector, vsubq_u32(six, vdupq_n_u32(32)));
        lower = vshrq_n_u32::<4>(lower);
        upper = vshrq_n_u32::<2>(upper);
    }
}

/// The twin's packing of unsigned super-blocks with a scale per 16, vectorised by the compiler.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "neon")]
pub(in crate::arch::neon) unsafe fn pack_by_twin<S: Source, B: Block256 + Layout>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    const { assert!(!B::SIGNED) };
    // SAFETY: the contract.
    unsafe { scalar_panel::pack_256::<S, B, 16>(slab, from, n, panel) }
}
