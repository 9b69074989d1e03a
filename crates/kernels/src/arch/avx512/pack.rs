//! Packing: what is unpacked in registers becomes a panel.

use super::floats::{FLOATS_NUDGED, Floats, last_word};
use super::source::{Wide, every_line, put, put_f32};
use super::unpack_32::{Unpack32, WORDS};
use super::unpack_256::{PARTS, Unpack256};
use crate::panel::{Lanes, Panel, Slab};

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_32<S: Wide, B: Unpack32>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let blocks = panel.words.as_chunks_mut::<WORDS>().0[..n].iter_mut();
    for (at, words) in blocks.enumerate() {
        for half in 0..2 {
            S::fetch::<B>(slab, from + at, (half, 2), every_line(B::NUDGED, 1));
            // SAFETY: the contract.
            let (v, (d, m)) = unsafe {
                let scales = B::scales::<S>(slab, half, from + at);
                (B::words::<S>(slab, half, from + at), scales)
            };
            for (word, v) in words.iter_mut().zip(v) {
                put(word, half, v);
            }
            put_f32(&mut panel.d[at], half, d);
            if B::HAS_MIN {
                put_f32(&mut panel.m[at], half, m);
            }
        }
    }
}

/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_256<S: Wide, B: Unpack256>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    for at in 0..n {
        for half in 0..2 {
            // SAFETY: the contract.
            unsafe { B::scales::<S>(slab, half, from + at, panel, at) };
        }
        let words = panel.words.as_chunks_mut::<{ 2 * WORDS }>().0;
        let words = &mut words[PARTS * at..][..PARTS];
        // SAFETY: as above.
        unsafe {
            if B::BY_PAIRS {
                for part in (0..PARTS).step_by(2) {
                    pack_part::<S, B, false>(slab, (from + at, part), words);
                    pack_part::<S, B, true>(slab, (from + at, part + 1), words);
                }
            } else {
                for part in 0..PARTS {
                    pack_part::<S, B, false>(slab, (from + at, part), words);
                }
            }
        }
    }
}

/// # Safety
/// See `PackFn`, for super-block `at`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
#[inline]
unsafe fn pack_part<S: Wide, B: Unpack256, const ODD: bool>(
    slab: &Slab,
    (at, part): (usize, usize),
    words: &mut [[Lanes<u32>; 2 * WORDS]],
) {
    for half in 0..2 {
        S::fetch::<B>(slab, at, (2 * part + half, 2 * PARTS), 1);
        // SAFETY: the contract.
        let v = unsafe { B::words::<S, ODD>(slab, half, at, part) };
        for (word, v) in words[part].iter_mut().zip(v.as_flattened()) {
            put(word, half, *v);
        }
    }
}

/// `n` counts values; what does not fill a word at a row's end is padded with zero.
///
/// # Safety
/// See `PackFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
pub(super) unsafe fn pack_floats<S: Wide, F: Floats>(
    slab: &Slab,
    from: usize,
    n: usize,
    panel: &mut Panel,
) {
    let per_word = F::VALUES / F::WORDS;
    let whole = n - n % F::VALUES;
    for at in (0..whole).step_by(F::VALUES) {
        for half in 0..2 {
            S::fetch::<[u8; 16]>(
                slab,
                (from + at) / F::VALUES,
                (half, 2),
                every_line(FLOATS_NUDGED, 1),
            );
            // SAFETY: the contract: 16 bytes of values.
            let v = unsafe { F::words::<S>(slab, half, from + at) };
            for (word, v) in panel.words[at / per_word..].iter_mut().zip(v) {
                put(word, half, v);
            }
        }
    }
    for at in (whole..n).step_by(per_word) {
        // SAFETY: the contract.
        panel.words[at / per_word] = unsafe { last_word::<S, F>(slab, from + at, from + n) };
    }
}
