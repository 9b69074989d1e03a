//! The scalar twins of packing and of the products with panels: what they mean, for every format.

use half::{bf16, f16};

use super::{Kernel, PanelKernels};
use crate::blocks::{
    ActQ8, ActQ8K, Block32, Block256, BlockIq4Nl, BlockIq4Xs, BlockMxfp4, BlockQ2K, BlockQ3K,
    BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
    Q8_BLOCK, Quants256, SUPER_BLOCK,
};
use crate::format::Format;
use crate::interleave::{InPlace, Interleaved, Layout, Source};
use crate::panel::{Ahead, FLOAT_STEP, Lanes, PANEL_ROWS, PackFn, Panel, SIGNED_BIAS, Slab};

/// Words of a block of 32 integers, and of a super-block.
const WORDS_32: usize = Q8_BLOCK / 4;
const WORDS_256: usize = SUPER_BLOCK / 4;

/// The kernels of `format`; floats are multiplied in f32.
pub(super) fn panels(format: Format, interleaved: bool) -> PanelKernels {
    match interleaved {
        true => panels_of::<Interleaved>(format),
        false => panels_of::<InPlace>(format),
    }
}

fn panels_of<S: Source>(format: Format) -> PanelKernels {
    match format {
        Format::F32 => kernel_f32(pack_f32::<S>),
        Format::F16 => kernel_f32(pack_f16::<S>),
        Format::Bf16 => kernel_f32(pack_bf16::<S>),
        Format::Q8_0 => kernel_32::<S, BlockQ8_0>(),
        Format::Q4_0 => kernel_32::<S, BlockQ4_0>(),
        Format::Q4_1 => kernel_32::<S, BlockQ4_1>(),
        Format::Q5_0 => kernel_32::<S, BlockQ5_0>(),
        Format::Q5_1 => kernel_32::<S, BlockQ5_1>(),
        Format::Iq4Nl => kernel_32::<S, BlockIq4Nl>(),
        Format::Mxfp4 => kernel_32::<S, BlockMxfp4>(),
        Format::Q2K => kernel_256::<S, BlockQ2K, 16>(),
        Format::Q3K => kernel_256::<S, BlockQ3K, 16>(),
        Format::Q4K => kernel_256::<S, BlockQ4K, 8>(),
        Format::Q5K => kernel_256::<S, BlockQ5K, 8>(),
        Format::Q6K => kernel_256::<S, BlockQ6K, 16>(),
        Format::Q8K => kernel_256::<S, BlockQ8K, 8>(),
        Format::Iq4Xs => kernel_256::<S, BlockIq4Xs, 8>(),
        Format::F8E4M3 | Format::U8 => PanelKernels::Expand,
    }
}

fn kernel_f32(pack: PackFn) -> PanelKernels {
    PanelKernels::F32(Kernel {
        pack,
        multiply: multiply_f32,
        few: None,
    })
}

fn kernel_32<S: Source, B: Block32 + Layout>() -> PanelKernels {
    PanelKernels::Q8(Kernel {
        pack: pack_32::<S, B>,
        multiply: match B::HAS_MIN {
            true => multiply_32::<true>,
            false => multiply_32::<false>,
        },
        few: None,
    })
}

fn kernel_256<S: Source, B: Block256 + Layout, const SCALES: usize>() -> PanelKernels {
    PanelKernels::Q8K(Kernel {
        pack: pack_256::<S, B, SCALES>,
        multiply: match B::HAS_MIN {
            true => multiply_256::<SCALES, true>,
            false => multiply_256::<SCALES, false>,
        },
        few: None,
    })
}

/// # Safety
/// See `PackFn`.
#[inline(always)]
pub(super) unsafe fn pack_32<S: Source, B: Block32 + Layout>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let flip = if B::HAS_MIN { 0 } else { i8::MIN };
    for at in 0..n {
        for row in 0..PANEL_ROWS {
            // SAFETY: the contract.
            let block = unsafe { S::read::<B>(slab, row, from + at) }.unpack();
            panel.d[at][row] = block.d;
            panel.m[at][row] = block.m;
            put(&block.qs, flip, &mut panel.words[at * WORDS_32..], row);
        }
    }
}

/// # Safety
/// See `PackFn`.
#[inline(always)]
pub(super) unsafe fn pack_256<S: Source, B: Block256 + Layout, const SCALES: usize>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let (flip, offset) = match B::SIGNED {
        true => (i8::MIN, SIGNED_BIAS),
        false => (0, i32::from(B::OFFSET)),
    };
    let mut quants = Quants256::ZERO;
    for at in 0..n {
        for row in 0..PANEL_ROWS {
            // SAFETY: the contract.
            unsafe { S::read::<B>(slab, row, from + at) }.unpack(&mut quants);
            panel.d[at][row] = quants.d;
            panel.m[at][row] = quants.dmin;
            for (j, scale) in panel.scales[at][..SCALES].iter_mut().enumerate() {
                scale[row] = i32::from(quants.scales[j * 16 / SCALES]);
            }
            for (j, pair) in panel.pairs[at].iter_mut().enumerate() {
                let factor = |j: usize| match B::HAS_MIN {
                    true => u32::from(quants.mins[j] as u16),
                    false => (-offset * i32::from(quants.scales[j])) as u32 & 0xffff,
                };
                pair[row] = factor(2 * j) | factor(2 * j + 1) << 16;
            }
            put(&quants.qs, flip, &mut panel.words[at * WORDS_256..], row);
        }
    }
}

/// Writes a row's integers, four a word.
#[inline(always)]
fn put(qs: &[i8], flip: i8, words: &mut [Lanes<u32>], row: usize) {
    for (word, qs) in words.iter_mut().zip(qs.as_chunks::<4>().0) {
        word[row] = u32::from_le_bytes(qs.map(|q| (q ^ flip) as u8));
    }
}

/// # Safety
/// See `PackFn`.
pub(super) unsafe fn pack_f32<S: Source>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_values::<S, f32>(slab, from, n, panel, |v| v) }
}

/// # Safety
/// See `PackFn`.
pub(super) unsafe fn pack_f16<S: Source>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_values::<S, f16>(slab, from, n, panel, f16::to_f32) }
}

/// # Safety
/// See `PackFn`.
pub(super) unsafe fn pack_bf16<S: Source>(slab: &Slab, from: usize, n: usize, panel: &mut Panel) {
    // SAFETY: the contract.
    unsafe { pack_values::<S, bf16>(slab, from, n, panel, bf16::to_f32) }
}

/// # Safety
/// See `PackFn`.
#[inline(always)]
pub(super) unsafe fn pack_values<S: Source, B: Layout>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
    value: impl Fn(B) -> f32,
) {
    for row in 0..PANEL_ROWS {
        for (at, word) in panel.words[..n].iter_mut().enumerate() {
            // SAFETY: the contract.
            word[row] = value(unsafe { S::read::<B>(slab, row, from + at) }).to_bits();
        }
    }
}

/// Four products of 8-bit integers, the first ones unsigned.
#[inline(always)]
fn products(w: u32, x: &[i8; 4]) -> i32 {
    let w = w.to_le_bytes();
    (0..4).map(|i| i32::from(w[i]) * i32::from(x[i])).sum()
}

/// # Safety
/// See `MultiplyFn`.
unsafe fn multiply_32<const HAS_MIN: bool>(
    panel: &Panel,
    n: usize,
    xs: &[*const ActQ8],
    sums: &mut [Lanes<f32>],
    _ahead: Ahead,
) {
    for (x, sums) in xs.iter().zip(sums) {
        // SAFETY: the contract.
        let x = unsafe { std::slice::from_raw_parts(*x, n) };
        for (at, x) in x.iter().enumerate() {
            let mut dots = [if HAS_MIN { 0 } else { x.bias }; PANEL_ROWS];
            let words = &panel.words[at * WORDS_32..][..WORDS_32];
            for (words, x) in words.iter().zip(x.qs.as_chunks::<4>().0) {
                for (dot, word) in dots.iter_mut().zip(words) {
                    *dot += products(*word, x);
                }
            }
            for row in 0..PANEL_ROWS {
                sums[row] += dots[row] as f32 * (panel.d[at][row] * x.d);
                if HAS_MIN {
                    sums[row] += panel.m[at][row] * x.sum;
                }
            }
        }
    }
}

/// # Safety
/// See `MultiplyFn`.
unsafe fn multiply_256<const SCALES: usize, const HAS_MIN: bool>(
    panel: &Panel,
    n: usize,
    xs: &[*const ActQ8K],
    sums: &mut [Lanes<f32>],
    _ahead: Ahead,
) {
    for (x, sums) in xs.iter().zip(sums) {
        // SAFETY: the contract.
        let x = unsafe { std::slice::from_raw_parts(*x, n) };
        for (at, x) in x.iter().enumerate() {
            let (mut scaled, mut rest) = ([0; PANEL_ROWS], [0; PANEL_ROWS]);
            let words = &panel.words[at * WORDS_256..][..WORDS_256];
            for (j, (words, x)) in words.iter().zip(x.qs.as_chunks::<4>().0).enumerate() {
                let scales = &panel.scales[at][j * SCALES / WORDS_256];
                for row in 0..PANEL_ROWS {
                    scaled[row] += scales[row] * products(words[row], x);
                }
            }
            for (pairs, [a, b]) in panel.pairs[at].iter().zip(x.sums.as_chunks::<2>().0) {
                for (rest, pair) in rest.iter_mut().zip(pairs) {
                    let (low, high) = (*pair as i16, (*pair >> 16) as i16);
                    *rest += i32::from(low) * i32::from(*a) + i32::from(high) * i32::from(*b);
                }
            }
            for row in 0..PANEL_ROWS {
                let d = panel.d[at][row] * x.d;
                sums[row] += match HAS_MIN {
                    true => {
                        let m = panel.m[at][row] * x.d;
                        d * scaled[row] as f32 - m * rest[row] as f32
                    }
                    false => d * (scaled[row] + rest[row]) as f32,
                };
            }
        }
    }
}

/// # Safety
/// See `MultiplyFn`.
unsafe fn multiply_f32(
    panel: &Panel,
    n: usize,
    xs: &[*const f32],
    sums: &mut [Lanes<f32>],
    _ahead: Ahead,
) {
    for (x, sums) in xs.iter().zip(sums) {
        // SAFETY: the contract.
        let x = unsafe { std::slice::from_raw_parts(*x, n) };
        let steps = x.chunks(FLOAT_STEP).zip(panel.words.chunks(FLOAT_STEP));
        for (x, words) in steps {
            let mut share = [0.0; PANEL_ROWS];
            for (x, words) in x.iter().zip(words) {
                for (share, word) in share.iter_mut().zip(words) {
                    *share += f32::from_bits(*word) * x;
                }
            }
            for (sum, share) in sums.iter_mut().zip(share) {
                *sum += share;
            }
        }
    }
}
