//! Products with panels: a few vectors of 4 rows, a few tokens at a time.
//!
//! As many sums as keep the multipliers busy without leaving the registers: more rows for one token, fewer for four. A
//! token's numbers are multiplied out of the lanes that they are loaded into. Integers are exact and what becomes of
//! them is computed by the twin's operations in the twin's order, so the results of all block formats are the twin's.

use std::arch::aarch64::*;

use crate::blocks::{ActQ8, ActQ8K};
use crate::panel::{Ahead, FLOAT_STEP, Lanes, PANEL_ROWS, Panel};

/// Words of 16 activations, which fill a register.
const WORDS: usize = 4;
/// Words of 32 and of 256 integers.
const WORDS_32: usize = 8;
const WORDS_256: usize = 64;
/// Rows of a vector, and vectors of a panel.
const ROWS: usize = 4;
const VECTORS: usize = PANEL_ROWS / ROWS;

/// Calls `$kernel::<TOKENS, VECTORS, ..>(panel, units, first vector, xs, sums)` for tokens in fours, twos and ones and
/// all vectors; `$four`, `$two` and `$one` are how many of these it takes.
macro_rules! by_tokens {
    ($kernel:ident $(::<$($generic:ident),*>)?, [$four:literal, $two:literal, $one:literal], $panel:expr, $units:expr, $xs:expr, $sums:expr) => {{
        let (xs, rest_xs) = $xs.as_chunks::<4>();
        let (sums, rest_sums) = $sums.as_chunks_mut::<4>();
        // SAFETY: the caller's contract, for some of the tokens and rows.
        unsafe {
            for (xs, sums) in xs.iter().zip(sums) {
                for first in (0..VECTORS).step_by($four) {
                    $kernel::<4, $four $(, $($generic),*)?>($panel, $units, first, xs, sums);
                }
            }
            let (xs, last_xs) = rest_xs.as_chunks::<2>();
            let (sums, last_sums) = rest_sums.as_chunks_mut::<2>();
            for (xs, sums) in xs.iter().zip(sums) {
                for first in (0..VECTORS).step_by($two) {
                    $kernel::<2, $two $(, $($generic),*)?>($panel, $units, first, xs, sums);
                }
            }
            for (x, sum) in last_xs.iter().zip(last_sums) {
                let (xs, sums) = (&[*x], std::array::from_mut(sum));
                for first in (0..VECTORS).step_by($one) {
                    $kernel::<1, $one $(, $($generic),*)?>($panel, $units, first, xs, sums);
                }
            }
        }
    }};
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f32<const V: usize>(row: &Lanes<f32>, first: usize) -> [float32x4_t; V] {
    let four = row.as_chunks::<ROWS>().0;
    // SAFETY: four values.
    std::array::from_fn(|v| unsafe { vld1q_f32(four[first + v].as_ptr()) })
}

#[target_feature(enable = "neon")]
#[inline]
fn store_f32<const V: usize>(row: &mut Lanes<f32>, first: usize, v: [float32x4_t; V]) {
    let four = row.as_chunks_mut::<ROWS>().0;
    for (four, v) in four[first..].iter_mut().zip(v) {
        // SAFETY: four values.
        unsafe { vst1q_f32(four.as_mut_ptr(), v) };
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn load<T, const V: usize>(row: &Lanes<T>, first: usize) -> [int32x4_t; V] {
    const { assert!(size_of::<T>() == 4) };
    let four = row.as_chunks::<ROWS>().0;
    // SAFETY: four values of 4 bytes.
    std::array::from_fn(|v| unsafe { vld1q_s32(four[first + v].as_ptr().cast()) })
}

/// Defines the products of integers by way of `dot` of the module that it is in.
macro_rules! integer_products {
    ($features:literal) => {
        /// `acc[t] + w . xs[t]` over `GROUPS` times 16 activations, for `V` vectors of rows.
        ///
        /// # Safety
        /// `xs[t]` points to the activations.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn dots<const N: usize, const V: usize, const GROUPS: usize>(
            words: &[[Lanes<u32>; WORDS]],
            first: usize,
            xs: [*const i8; N],
            mut acc: [[int32x4_t; V]; N],
        ) -> [[int32x4_t; V]; N] {
            for (group, words) in words[..GROUPS].iter().enumerate() {
                // SAFETY: 16 activations.
                let xs = xs.map(|x| unsafe { vld1q_s8(x.add(16 * group)) });
                macro_rules! word {
                    ($lane:literal) => {{
                        let w: [int32x4_t; V] = load(&words[$lane], first);
                        for v in 0..V {
                            let w = vreinterpretq_s8_s32(w[v]);
                            for t in 0..N {
                                acc[t][v] = dot::<$lane>(acc[t][v], w, xs[t]);
                            }
                        }
                    }};
                }
                word!(0);
                word!(1);
                word!(2);
                word!(3);
            }
            acc
        }

        /// # Safety
        /// See `MultiplyFn`.
        #[target_feature(enable = $features)]
        pub(in crate::arch::neon) unsafe fn multiply_32<const HAS_MIN: bool>(
            panel: &Panel,
            n: usize,
            xs: &[*const ActQ8],
            sums: &mut [Lanes<f32>],
            _ahead: Ahead,
        ) {
            for at in 0..n {
                by_tokens!(block_32::<HAS_MIN>, [4, 8, 8], panel, at, xs, sums);
            }
        }

        /// # Safety
        /// See `MultiplyFn`, for block `at` and `V` vectors of rows.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn block_32<const N: usize, const V: usize, const HAS_MIN: bool>(
            panel: &Panel,
            at: usize,
            first: usize,
            xs: &[*const ActQ8; N],
            sums: &mut [Lanes<f32>; N],
        ) {
            // SAFETY: block `at` of every token.
            let xs = xs.map(|x| unsafe { &*x.add(at) });
            let words = &panel.words.as_chunks::<WORDS>().0[at * WORDS_32 / WORDS..];
            let zero = [[vdupq_n_s32(0); V]; N];
            // SAFETY: 32 activations.
            let acc = unsafe { dots::<N, V, 2>(words, first, xs.map(|x| x.qs.as_ptr()), zero) };
            let d: [float32x4_t; V] = load_f32(&panel.d[at], first);
            let m: [float32x4_t; V] = load_f32(&panel.m[at], first);
            for t in 0..N {
                let mut sum: [float32x4_t; V] = load_f32(&sums[t], first);
                for v in 0..V {
                    let scale = vmulq_n_f32(d[v], xs[t].d);
                    let share = vmulq_f32(vcvtq_f32_s32(acc[t][v]), scale);
                    sum[v] = vaddq_f32(sum[v], share);
                    if HAS_MIN {
                        sum[v] = vaddq_f32(sum[v], vmulq_n_f32(m[v], xs[t].sum));
                    }
                }
                store_f32(&mut sums[t], first, sum);
            }
        }

        /// # Safety
        /// See `MultiplyFn`. `PAIRS` says whether the panel's pairs count, `HAS_MIN` that they are minima.
        #[target_feature(enable = $features)]
        pub(in crate::arch::neon) unsafe fn multiply_256<
            const SCALES: usize,
            const PAIRS: bool,
            const HAS_MIN: bool,
        >(
            panel: &Panel,
            n: usize,
            xs: &[*const ActQ8K],
            sums: &mut [Lanes<f32>],
            _ahead: Ahead,
        ) {
            for at in 0..n {
                by_tokens!(
                    block_256::<SCALES, PAIRS, HAS_MIN>,
                    [2, 4, 8],
                    panel,
                    at,
                    xs,
                    sums
                );
            }
        }

        /// # Safety
        /// See `MultiplyFn`, for super-block `at` and `V` vectors of rows.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn block_256<
            const N: usize,
            const V: usize,
            const SCALES: usize,
            const PAIRS: bool,
            const HAS_MIN: bool,
        >(
            panel: &Panel,
            at: usize,
            first: usize,
            xs: &[*const ActQ8K; N],
            sums: &mut [Lanes<f32>; N],
        ) {
            // SAFETY: super-block `at` of every token.
            let xs = xs.map(|x| unsafe { &*x.add(at) });
            let words = &panel.words.as_chunks::<WORDS>().0[at * WORDS_256 / WORDS..];
            let zero = [[vdupq_n_s32(0); V]; N];
            let mut scaled = zero;
            for (j, scale) in panel.scales[at][..SCALES].iter().enumerate() {
                let words = &words[j * (16 / SCALES)..];
                let qs = xs.map(|x| x.qs[256 / SCALES * j..].as_ptr());
                // SAFETY: the activations that share the scale.
                let acc = unsafe {
                    match SCALES {
                        8 => dots::<N, V, 2>(words, first, qs, zero),
                        _ => dots::<N, V, 1>(words, first, qs, zero),
                    }
                };
                let scale: [int32x4_t; V] = load(scale, first);
                for t in 0..N {
                    for v in 0..V {
                        scaled[t][v] = vmlaq_s32(scaled[t][v], acc[t][v], scale[v]);
                    }
                }
            }
            let mut rest = zero;
            if PAIRS {
                rest = pairs(&panel.pairs[at], first, xs, rest);
            }
            let d: [float32x4_t; V] = load_f32(&panel.d[at], first);
            let m: [float32x4_t; V] = load_f32(&panel.m[at], first);
            for t in 0..N {
                let mut sum: [float32x4_t; V] = load_f32(&sums[t], first);
                for v in 0..V {
                    let scale = vmulq_n_f32(d[v], xs[t].d);
                    let share = if HAS_MIN {
                        let min = vmulq_n_f32(m[v], xs[t].d);
                        let mins = vmulq_f32(min, vcvtq_f32_s32(rest[t][v]));
                        vsubq_f32(vmulq_f32(scale, vcvtq_f32_s32(scaled[t][v])), mins)
                    } else {
                        let all = vaddq_s32(scaled[t][v], rest[t][v]);
                        vmulq_f32(scale, vcvtq_f32_s32(all))
                    };
                    sum[v] = vaddq_f32(sum[v], share);
                }
                store_f32(&mut sums[t], first, sum);
            }
        }
    };
}
/// Products of bytes and their sums by fours, without an instruction for it: a pair of products stays below 2^15, since
/// weights are at least -128 and activations within 127.
pub(super) mod plain {
    use super::*;

    #[target_feature(enable = "neon")]
    #[inline]
    pub(in crate::arch::neon) fn dot<const LANE: i32>(
        acc: int32x4_t,
        w: int8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        let x = vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(x));
        let x = vreinterpretq_s8_s32(x);
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        vpadalq_s16(acc, vpaddq_s16(low, vmull_high_s8(w, x)))
    }

    integer_products!("neon");
}

/// Products of bytes and their sums by fours as one instruction.
pub(super) mod dotprod {
    use super::*;

    // The intrinsic for it is not stable yet.
    #[target_feature(enable = "neon,dotprod")]
    #[inline]
    pub(in crate::arch::neon) fn dot<const LANE: i32>(
        acc: int32x4_t,
        w: int8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        let mut sum = acc;
        // SAFETY: one instruction, which the CPU has, on registers.
        unsafe {
            std::arch::asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
                sum = inout(vreg) sum,
                w = in(vreg) w,
                x = in(vreg) x,
                lane = const LANE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    integer_products!("neon,dotprod");
}

/// `rest[t]` and the products of a panel's pairs with the sums of a token.
#[target_feature(enable = "neon")]
#[inline]
fn pairs<const N: usize, const V: usize>(
    pairs: &[Lanes<u32>; 8],
    first: usize,
    xs: [&ActQ8K; N],
    mut rest: [[int32x4_t; V]; N],
) -> [[int32x4_t; V]; N] {
    for (j, pair) in pairs.iter().enumerate() {
        let pair: [int32x4_t; V] = load(pair, first);
        for v in 0..V {
            let (low, high) = (vmovn_s32(pair[v]), vshrn_n_s32::<16>(pair[v]));
            for t in 0..N {
                let [a, b] = xs[t].sums.as_chunks::<2>().0[j];
                rest[t][v] = vmlal_n_s16(rest[t][v], low, a);
                rest[t][v] = vmlal_n_s16(rest[t][v], high, b);
            }
        }
    }
    rest
}

/// # Safety
/// See `MultiplyFn`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn multiply_f32(
    panel: &Panel,
    n: usize,
    xs: &[*const f32],
    sums: &mut [Lanes<f32>],
    _ahead: Ahead,
) {
    for from in (0..n).step_by(FLOAT_STEP) {
        let words = (from, FLOAT_STEP.min(n - from));
        by_tokens!(step_f32, [4, 8, 8], panel, words, xs, sums);
    }
}

/// # Safety
/// See `MultiplyFn`, for words `from..from + n` and `V` vectors of rows.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn step_f32<const N: usize, const V: usize>(
    panel: &Panel,
    (from, n): (usize, usize),
    first: usize,
    xs: &[*const f32; N],
    sums: &mut [Lanes<f32>; N],
) {
    let mut acc = [[vdupq_n_f32(0.0); V]; N];
    for (i, word) in panel.words[from..][..n].iter().enumerate() {
        let w: [int32x4_t; V] = load(word, first);
        for t in 0..N {
            // SAFETY: value from + i of the token.
            let x = unsafe { *xs[t].add(from + i) };
            for v in 0..V {
                acc[t][v] = vfmaq_n_f32(acc[t][v], vreinterpretq_f32_s32(w[v]), x);
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        let mut sum: [float32x4_t; V] = load_f32(sums, first);
        for (sum, acc) in sum.iter_mut().zip(acc) {
            *sum = vaddq_f32(*sum, acc);
        }
        store_f32(sums, first, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn the_largest_products_are_summed_exactly() {
        for (w, x) in [(-128, 127), (-128, -127), (127, 127), (-1, 1)] {
            let expected = [7 + 4 * i32::from(w) * i32::from(x); 4];
            let mut got = [[0; 4]; 2];
            // SAFETY: the arrays have four values; the instructions are asked for.
            unsafe {
                let (acc, w, x) = (vdupq_n_s32(7), vdupq_n_s8(w), vdupq_n_s8(x));
                vst1q_s32(got[0].as_mut_ptr(), plain::dot::<3>(acc, w, x));
                got[1] = got[0];
                if Isa::NeonDotprod.is_available() {
                    vst1q_s32(got[1].as_mut_ptr(), dotprod::dot::<3>(acc, w, x));
                }
            }
            assert_eq!(got, [expected; 2]);
        }
    }
}
