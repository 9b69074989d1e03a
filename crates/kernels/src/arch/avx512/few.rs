//! Products with few tokens: rows are unpacked in registers and multiplied at once, without a panel, so that memory never
//! waits. The operations and their order are those of packing and multiplying.

use std::arch::x86_64::*;

use half::bf16;

use super::floats::{FLOATS_NUDGED, Floats, Pairs, last_word};
use super::multiply::{add_32, add_256, as_bf16, broadcast};
use super::source::{HALF, Wide, each, every_line};
use super::unpack_32::{Unpack32, WORDS};
use super::unpack_256::{PARTS, Unpack256};
use crate::blocks::{ActQ8, ActQ8K};
use crate::panel::{FLOAT_STEP, Lanes, Panel, Slab};

/// One for each number of tokens.
macro_rules! few {
    ($kernel:ident :: <$($generic:ident),*>, $up_to:expr) => {
        Some(Few {
            of: [
                $kernel::<$($generic,)* 1>,
                $kernel::<$($generic,)* 2>,
                $kernel::<$($generic,)* 4>,
                $kernel::<$($generic,)* 8>,
            ],
            up_to: S::FEW.min($up_to),
        })
    };
}
pub(super) use few;

/// What `N` tokens have added up for 32 rows, in registers.
type Sums<const N: usize> = [[__m512; N]; 2];

#[target_feature(enable = "avx512f")]
#[inline]
fn load<const N: usize>(sums: &[Lanes<f32>]) -> Sums<N> {
    let mut out = [[_mm512_setzero_ps(); N]; 2];
    for (half, out) in out.iter_mut().enumerate() {
        for (out, sums) in out.iter_mut().zip(sums) {
            // SAFETY: half of 32 values.
            *out = unsafe { _mm512_loadu_ps(sums[half * HALF..][..HALF].as_ptr()) };
        }
    }
    out
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store<const N: usize>(sums: &mut [Lanes<f32>], v: Sums<N>) {
    for (half, v) in v.iter().enumerate() {
        for (v, sums) in v.iter().zip(&mut *sums) {
            // SAFETY: half of 32 values.
            unsafe { _mm512_storeu_ps(sums[half * HALF..][..HALF].as_mut_ptr(), *v) };
        }
    }
}

/// # Safety
/// See `FewFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
pub(super) unsafe fn few_32<S: Wide, B: Unpack32, const N: usize>(
    slab: &Slab,
    n: usize,
    xs: &[*const ActQ8],
    out: &mut [Lanes<f32>],
    _panel: &mut Panel,
) {
    let xs: &[_; N] = xs.first_chunk().expect("one for each of the tokens");
    let mut sums = load::<N>(out);
    for at in 0..n {
        for half in 0..2 {
            S::fetch::<B>(slab, at, (half, 2), every_line(B::NUDGED, N));
            // SAFETY: the contract.
            let (words, (d, m)) = unsafe {
                let scales = B::scales::<S>(slab, half, at);
                (B::words::<S>(slab, half, at), scales)
            };
            for t in 0..N {
                // SAFETY: block `at` of the token.
                let x = unsafe { &*xs[t].add(at) };
                let mut dots = _mm512_set1_epi32(if B::HAS_MIN { 0 } else { x.bias });
                for i in 0..WORDS {
                    // SAFETY: four of 32 activations.
                    let x = unsafe { broadcast(x.qs.as_ptr().add(4 * i)) };
                    dots = _mm512_dpbusd_epi32(dots, words[i], x);
                }
                let scales = (d, B::HAS_MIN.then_some(m));
                sums[half][t] = add_32(sums[half][t], dots, scales, x);
            }
        }
    }
    store(out, sums);
}

/// # Safety
/// See `FewFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
pub(super) unsafe fn few_256<S: Wide, B: Unpack256, const N: usize>(
    slab: &Slab,
    n: usize,
    xs: &[*const ActQ8K],
    out: &mut [Lanes<f32>],
    panel: &mut Panel,
) {
    let xs: &[_; N] = xs.first_chunk().expect("one for each of the tokens");
    let mut sums = load::<N>(out);
    for at in 0..n {
        // SAFETY: super-block `at` of every token.
        let xs = each(*xs, |x| unsafe { &*x.add(at) });
        for half in 0..2 {
            // SAFETY: the contract.
            unsafe {
                B::scales::<S>(slab, half, at, panel, 0);
                let dots = dots_256::<S, B, N>(slab, (half, at), xs, panel);
                let d = load_half(&panel.d[0], half);
                let m = B::HAS_MIN.then(|| load_half(&panel.m[0], half));
                for t in 0..N {
                    let sum = sums[half][t];
                    let (d, m) = (_mm512_castsi512_ps(d), m.map(|m| _mm512_castsi512_ps(m)));
                    sums[half][t] = add_256(sum, dots[t], (d, m), xs[t].d);
                }
            }
        }
    }
    store(out, sums);
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_half<T>(row: &Lanes<T>, half: usize) -> __m512i {
    const { assert!(size_of::<T>() == 4) };
    // SAFETY: half of 32 values of 4 bytes.
    unsafe { _mm512_loadu_si512(row[half * HALF..][..HALF].as_ptr().cast()) }
}

/// The dot products of a super-block, and what minima or offsets are multiplied by; the panel has its scales.
///
/// # Safety
/// See `FewFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")]
#[inline]
unsafe fn dots_256<S: Wide, B: Unpack256, const N: usize>(
    slab: &Slab,
    place: (usize, usize),
    xs: [&ActQ8K; N],
    panel: &Panel,
) -> [(__m512i, __m512i); N] {
    let zero = _mm512_setzero_si512();
    let mut out = [(zero, zero); N];
    // SAFETY: the contract.
    unsafe {
        if B::BY_PAIRS {
            for part in (0..PARTS).step_by(2) {
                dots_part::<S, B, N, false>(slab, (place, part), xs, panel, &mut out);
                dots_part::<S, B, N, true>(slab, (place, part + 1), xs, panel, &mut out);
            }
        } else {
            for part in 0..PARTS {
                dots_part::<S, B, N, false>(slab, (place, part), xs, panel, &mut out);
            }
        }
    }
    for (j, pair) in panel.pairs[0].iter().enumerate() {
        let pair = load_half(pair, place.0);
        for t in 0..N {
            // SAFETY: two of the sixteen sums.
            let sums = unsafe { broadcast(xs[t].sums.as_ptr().add(2 * j)) };
            out[t].1 = _mm512_dpwssd_epi32(out[t].1, pair, sums);
        }
    }
    out
}

/// # Safety
/// See `FewFn`; inlined where the CPU is known to have the instruction set.
#[inline(always)]
unsafe fn dots_part<S: Wide, B: Unpack256, const N: usize, const ODD: bool>(
    slab: &Slab,
    ((half, at), part): ((usize, usize), usize),
    xs: [&ActQ8K; N],
    panel: &Panel,
    out: &mut [(__m512i, __m512i); N],
) {
    S::fetch::<B>(slab, at, (PARTS * half + part, 2 * PARTS), 1);
    // SAFETY: the contract.
    let words = unsafe { B::words::<S, ODD>(slab, half, at, part) };
    // Words that share a scale.
    let run = 64 / B::SCALES;
    for (i, words) in words.as_flattened().chunks_exact(run).enumerate() {
        let scale = part * (2 * WORDS / run) + i;
        // SAFETY: the contract; activations of the words' columns.
        unsafe {
            let scale_of = load_half(&panel.scales[0][scale], half);
            for t in 0..N {
                let mut dots = _mm512_setzero_si512();
                for (j, word) in words.iter().enumerate() {
                    let x = broadcast(xs[t].qs.as_ptr().add(4 * (run * scale + j)));
                    dots = _mm512_dpbusd_epi32(dots, *word, x);
                }
                let share = _mm512_mullo_epi32(dots, scale_of);
                out[t].0 = _mm512_add_epi32(out[t].0, share);
            }
        }
    }
}

/// # Safety
/// See `FewFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")]
pub(super) unsafe fn few_f32<S: Wide, F: Floats, const N: usize>(
    slab: &Slab,
    n: usize,
    xs: &[*const f32],
    out: &mut [Lanes<f32>],
    _panel: &mut Panel,
) {
    let add = |sum, w, x| _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
    // SAFETY: the contract.
    unsafe { few_floats::<S, F, f32, N>(slab, n, xs, out, add) }
}

/// # Safety
/// See `FewFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,avx512bf16")]
pub(super) unsafe fn few_bf16<S: Wide, const N: usize>(
    slab: &Slab,
    n: usize,
    xs: &[*const bf16],
    out: &mut [Lanes<f32>],
    _panel: &mut Panel,
) {
    let add = |sum, w, x| _mm512_dpbf16_ps(sum, as_bf16(w), as_bf16(x));
    // SAFETY: the contract.
    unsafe { few_floats::<S, Pairs, bf16, N>(slab, n, xs, out, add) }
}

/// Inlined where the CPU is known to have what `add` needs.
///
/// # Safety
/// See [`few_f32`].
#[inline(always)]
unsafe fn few_floats<S: Wide, F: Floats, X, const N: usize>(
    slab: &Slab,
    n: usize,
    xs: &[*const X],
    out: &mut [Lanes<f32>],
    add: impl Fn(__m512, __m512i, __m512i) -> __m512,
) {
    let xs: &[_; N] = xs.first_chunk().expect("one for each of the tokens");
    let per_word = F::VALUES / F::WORDS;
    // SAFETY: the caller's instruction set; values `at..` of rows and tokens.
    unsafe {
        let mut sums = load::<N>(out);
        for from in (0..n).step_by(FLOAT_STEP * per_word) {
            let n_values = (n - from).min(FLOAT_STEP * per_word);
            let whole = from + n_values - n_values % F::VALUES;
            let mut shares = [[_mm512_setzero_ps(); N]; 2];
            let mut multiply = |half: usize, w, at| {
                for t in 0..N {
                    let x = broadcast(xs[t].add(at));
                    shares[half][t] = add(shares[half][t], w, x);
                }
            };
            for at in (from..whole).step_by(F::VALUES) {
                for half in 0..2 {
                    S::fetch::<[u8; 16]>(
                        slab,
                        at / F::VALUES,
                        (half, 2),
                        every_line(FLOATS_NUDGED, N),
                    );
                    let words = F::words::<S>(slab, half, at);
                    for (i, w) in words.into_iter().enumerate() {
                        multiply(half, w, at + i * per_word);
                    }
                }
            }
            for at in (whole..from + n_values).step_by(per_word) {
                let word = last_word::<S, F>(slab, at, n);
                for half in 0..2 {
                    multiply(half, load_half(&word, half), at);
                }
            }
            for (sums, shares) in sums
                .as_flattened_mut()
                .iter_mut()
                .zip(shares.as_flattened())
            {
                *sums = _mm512_add_ps(*sums, *shares);
            }
        }
        store(out, sums);
    }
}
