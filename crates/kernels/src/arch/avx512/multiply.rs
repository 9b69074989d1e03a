//! Products with panels: two vectors of 16 rows, a few tokens at a time.
//!
//! Four tokens make eight sums that do not wait for each other, which the multipliers need to be busy. What a token has
//! added up waits in the first cache. A token's numbers are broadcast as they are loaded. Integers are exact and what
//! becomes of them is computed by the twin's operations in the twin's order, so the results of all block formats are
//! the twin's.

use std::arch::x86_64::*;

use half::bf16;

use super::source::each;
use crate::blocks::{ActQ8, ActQ8K};
use crate::panel::{Ahead, FLOAT_STEP, Lanes, PANEL_ROWS, Panel};

/// Words of 32 integers.
const WORDS_32: usize = 8;
/// Rows of a vector.
const HALF: usize = PANEL_ROWS / 2;

/// Both halves of a value per row.
type Pair<T> = [T; 2];

/// Calls `$kernel::<N, ..>(panel, units, xs, sums)` for tokens in fours, then ones.
macro_rules! by_tokens {
    ($kernel:ident $(::<$($generic:ident),*>)?, $panel:expr, $units:expr, $xs:expr, $sums:expr, $ahead:expr) => {{
        let (xs, rest_xs) = $xs.as_chunks::<4>();
        let (sums, rest_sums) = $sums.as_chunks_mut::<4>();
        // SAFETY: the caller's contract, for some of the tokens.
        unsafe {
            for (xs, sums) in xs.iter().zip(sums) {
                $ahead.step();
                $kernel::<4 $(, $($generic),*)?>($panel, $units, xs, sums);
            }
            let (xs, last_xs) = rest_xs.as_chunks::<2>();
            let (sums, last_sums) = rest_sums.as_chunks_mut::<2>();
            for (xs, sums) in xs.iter().zip(sums) {
                $kernel::<2 $(, $($generic),*)?>($panel, $units, xs, sums);
            }
            for (x, sum) in last_xs.iter().zip(last_sums) {
                $kernel::<1 $(, $($generic),*)?>($panel, $units, &[*x], std::array::from_mut(sum));
            }
        }
    }};
}

/// Fetches a share of the memory ahead with every four tokens. Asked for all at once, most of it would be forgotten.
struct Fetch {
    from: *const u8,
    end: *const u8,
    per_step: usize,
}

impl Fetch {
    /// For `n_blocks` passes over `n_tokens`.
    #[inline(always)]
    fn new(ahead: Ahead, n_blocks: usize, n_tokens: usize) -> Self {
        let n_steps = (n_blocks * (n_tokens / 4)).max(1);
        Self {
            from: ahead.from,
            end: ahead.from.wrapping_add(ahead.n_bytes),
            per_step: ahead.n_bytes.div_ceil(n_steps).next_multiple_of(64),
        }
    }

    #[inline(always)]
    fn step(&mut self) {
        let end = self.end.min(self.from.wrapping_add(self.per_step));
        while self.from < end {
            // SAFETY: fetching ahead is allowed at any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.from.cast()) };
            self.from = self.from.wrapping_add(64);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load_f32(row: &Lanes<f32>) -> Pair<__m512> {
    // SAFETY: 32 values.
    unsafe {
        [
            _mm512_loadu_ps(row.as_ptr()),
            _mm512_loadu_ps(row.as_ptr().add(HALF)),
        ]
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store_f32(row: &mut Lanes<f32>, v: Pair<__m512>) {
    // SAFETY: 32 values.
    unsafe {
        _mm512_storeu_ps(row.as_mut_ptr(), v[0]);
        _mm512_storeu_ps(row.as_mut_ptr().add(HALF), v[1]);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn load<T>(row: &Lanes<T>) -> Pair<__m512i> {
    const { assert!(size_of::<T>() == 4) };
    // SAFETY: 32 values of 4 bytes.
    unsafe {
        [
            _mm512_loadu_si512(row.as_ptr().cast()),
            _mm512_loadu_si512(row.as_ptr().add(HALF).cast()),
        ]
    }
}

/// Holds the compiler to the order in which the sums are written down. Left alone, it finishes one sum after the other,
/// which waits for each step, and puts the others into memory.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_order<T>(acc: &mut Pair<T>) {
    const { assert!(size_of::<T>() == 64) };
    let [a, b] = acc;
    // SAFETY: no instructions; registers of 64 bytes hold either type.
    unsafe {
        let (a, b) = (
            (a as *mut T).cast::<__m512i>(),
            (b as *mut T).cast::<__m512i>(),
        );
        std::arch::asm!(
            "/* {0} {1} */",
            inout(zmm_reg) * a,
            inout(zmm_reg) * b,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// The 4 bytes at `x`, for every row.
///
/// # Safety
/// There are 4 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn broadcast<T>(x: *const T) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// Pairs of bf16.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn as_bf16(v: __m512i) -> __m512bh {
    // SAFETY: registers of one size, any bits are a value.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}

/// `acc[t] + w . xs[t]` over words of four activations.
///
/// # Safety
/// `xs[t]` points to four activations per word.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
unsafe fn dots<const N: usize, const W: usize>(
    words: &[Lanes<u32>; W],
    xs: [*const i8; N],
    mut acc: [Pair<__m512i>; N],
) -> [Pair<__m512i>; N] {
    for i in 0..W {
        let w = load(&words[i]);
        for t in 0..N {
            // SAFETY: four activations.
            let x = unsafe { broadcast(xs[t].add(4 * i)) };
            acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], w[0], x);
            acc[t][1] = _mm512_dpbusd_epi32(acc[t][1], w[1], x);
            in_order(&mut acc[t]);
        }
    }
    acc
}

/// # Safety
/// See `MultiplyFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply_32<const HAS_MIN: bool>(
    panel: &Panel,
    n: usize,
    xs: &[*const ActQ8],
    sums: &mut [Lanes<f32>],
    ahead: Ahead,
) {
    let mut ahead = Fetch::new(ahead, n, xs.len());
    for at in 0..n {
        by_tokens!(block_32::<HAS_MIN>, panel, at, xs, sums, ahead);
    }
}

/// # Safety
/// See `MultiplyFn`, for block `at`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
unsafe fn block_32<const N: usize, const HAS_MIN: bool>(
    panel: &Panel,
    at: usize,
    xs: &[*const ActQ8; N],
    sums: &mut [Lanes<f32>; N],
) {
    // SAFETY: block `at` of every token.
    let xs = each(*xs, |x| unsafe { &*x.add(at) });
    let acc = each(xs, |x| {
        [_mm512_set1_epi32(if HAS_MIN { 0 } else { x.bias }); 2]
    });
    let words = &panel.words.as_chunks::<WORDS_32>().0[at];
    // SAFETY: 32 activations.
    let acc = unsafe { dots(words, each(xs, |x| x.qs.as_ptr()), acc) };
    let (d, m) = (load_f32(&panel.d[at]), load_f32(&panel.m[at]));
    for t in 0..N {
        let mut sum = load_f32(&sums[t]);
        for h in 0..2 {
            sum[h] = add_32(sum[h], acc[t][h], (d[h], HAS_MIN.then_some(m[h])), xs[t]);
        }
        store_f32(&mut sums[t], sum);
    }
}

/// Adds what a block of 32 is worth to the sums of 16 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn add_32(
    sum: __m512,
    dots: __m512i,
    (d, m): (__m512, Option<__m512>),
    x: &ActQ8,
) -> __m512 {
    let scale = _mm512_mul_ps(d, _mm512_set1_ps(x.d));
    let share = _mm512_mul_ps(_mm512_cvtepi32_ps(dots), scale);
    let sum = _mm512_add_ps(sum, share);
    match m {
        Some(m) => _mm512_add_ps(sum, _mm512_mul_ps(m, _mm512_set1_ps(x.sum))),
        None => sum,
    }
}

/// # Safety
/// See `MultiplyFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply_256<const SCALES: usize, const HAS_MIN: bool>(
    panel: &Panel,
    n: usize,
    xs: &[*const ActQ8K],
    sums: &mut [Lanes<f32>],
    ahead: Ahead,
) {
    let mut ahead = Fetch::new(ahead, n, xs.len());
    for at in 0..n {
        by_tokens!(block_256::<SCALES, HAS_MIN>, panel, at, xs, sums, ahead);
    }
}

/// # Safety
/// See `MultiplyFn`, for super-block `at`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
unsafe fn block_256<const N: usize, const SCALES: usize, const HAS_MIN: bool>(
    panel: &Panel,
    at: usize,
    xs: &[*const ActQ8K; N],
    sums: &mut [Lanes<f32>; N],
) {
    // SAFETY: super-block `at` of every token.
    let xs = each(*xs, |x| unsafe { &*x.add(at) });
    let zero = [[_mm512_setzero_si512(); 2]; N];
    let mut scaled = zero;
    for (j, scale) in panel.scales[at][..SCALES].iter().enumerate() {
        // SAFETY: the activations that share the scale.
        let acc = unsafe {
            let xs = each(xs, |x| x.qs.as_ptr().add(256 / SCALES * j));
            match SCALES {
                8 => dots(&panel.words.as_chunks::<8>().0[8 * at + j], xs, zero),
                _ => dots(&panel.words.as_chunks::<4>().0[16 * at + j], xs, zero),
            }
        };
        let scale = load(scale);
        for t in 0..N {
            for h in 0..2 {
                let product = _mm512_mullo_epi32(acc[t][h], scale[h]);
                scaled[t][h] = _mm512_add_epi32(scaled[t][h], product);
            }
        }
    }
    let mut rest = zero;
    for (j, pair) in panel.pairs[at].iter().enumerate() {
        let pair = load(pair);
        for t in 0..N {
            // SAFETY: two of the sixteen sums.
            let sums = unsafe { broadcast(xs[t].sums.as_ptr().add(2 * j)) };
            for h in 0..2 {
                rest[t][h] = _mm512_dpwssd_epi32(rest[t][h], pair[h], sums);
            }
        }
    }
    let (d, m) = (load_f32(&panel.d[at]), load_f32(&panel.m[at]));
    for t in 0..N {
        let mut sum = load_f32(&sums[t]);
        for h in 0..2 {
            let dots = (scaled[t][h], rest[t][h]);
            sum[h] = add_256(sum[h], dots, (d[h], HAS_MIN.then_some(m[h])), xs[t].d);
        }
        store_f32(&mut sums[t], sum);
    }
}

/// Adds what a super-block is worth to the sums of 16 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
pub(super) fn add_256(
    sum: __m512,
    (scaled, rest): (__m512i, __m512i),
    (d, m): (__m512, Option<__m512>),
    x_d: f32,
) -> __m512 {
    let x_d = _mm512_set1_ps(x_d);
    let scale = _mm512_mul_ps(d, x_d);
    let share = if let Some(m) = m {
        let mins = _mm512_mul_ps(_mm512_mul_ps(m, x_d), _mm512_cvtepi32_ps(rest));
        _mm512_sub_ps(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(scaled)), mins)
    } else {
        _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_add_epi32(scaled, rest)))
    };
    _mm512_add_ps(sum, share)
}

/// # Safety
/// See `MultiplyFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub(super) unsafe fn multiply_f32(
    panel: &Panel,
    n: usize,
    xs: &[*const f32],
    sums: &mut [Lanes<f32>],
    ahead: Ahead,
) {
    let mut ahead = Fetch::new(ahead, n.div_ceil(FLOAT_STEP), xs.len());
    for from in (0..n).step_by(FLOAT_STEP) {
        let words = (from, FLOAT_STEP.min(n - from));
        by_tokens!(step_f32, panel, words, xs, sums, ahead);
    }
}

/// # Safety
/// See `MultiplyFn`, for words `from..from + n`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
#[inline]
unsafe fn step_f32<const N: usize>(
    panel: &Panel,
    (from, n): (usize, usize),
    xs: &[*const f32; N],
    sums: &mut [Lanes<f32>; N],
) {
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    for (i, word) in panel.words[from..][..n].iter().enumerate() {
        let w = each(load(word), |v| _mm512_castsi512_ps(v));
        for t in 0..N {
            // SAFETY: value from + i of the token.
            let x = _mm512_set1_ps(unsafe { *xs[t].add(from + i) });
            for h in 0..2 {
                acc[t][h] = _mm512_fmadd_ps(w[h], x, acc[t][h]);
            }
            in_order(&mut acc[t]);
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        let sum = load_f32(sums);
        store_f32(
            sums,
            [_mm512_add_ps(sum[0], acc[0]), _mm512_add_ps(sum[1], acc[1])],
        );
    }
}

/// Products of bf16 with bf16, in pairs; `n` counts values, an odd last one is paired with zeros.
///
/// # Safety
/// See `MultiplyFn`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn multiply_bf16(
    panel: &Panel,
    n: usize,
    xs: &[*const bf16],
    sums: &mut [Lanes<f32>],
    ahead: Ahead,
) {
    let mut ahead = Fetch::new(ahead, n.div_ceil(FLOAT_STEP), xs.len());
    let n = n.div_ceil(2);
    for from in (0..n).step_by(FLOAT_STEP) {
        let words = (from, FLOAT_STEP.min(n - from));
        by_tokens!(step_bf16, panel, words, xs, sums, ahead);
    }
}

/// # Safety
/// See `MultiplyFn`, for words `from..from + n`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
#[inline]
unsafe fn step_bf16<const N: usize>(
    panel: &Panel,
    (from, n): (usize, usize),
    xs: &[*const bf16; N],
    sums: &mut [Lanes<f32>; N],
) {
    let mut acc = [[_mm512_setzero_ps(); 2]; N];
    for (i, word) in panel.words[from..][..n].iter().enumerate() {
        let w = each(load(word), |v| as_bf16(v));
        for t in 0..N {
            // SAFETY: pair from + i of the token.
            let x = as_bf16(unsafe { broadcast(xs[t].add(2 * (from + i))) });
            for h in 0..2 {
                acc[t][h] = _mm512_dpbf16_ps(acc[t][h], w[h], x);
            }
            in_order(&mut acc[t]);
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        let sum = load_f32(sums);
        store_f32(
            sums,
            [_mm512_add_ps(sum[0], acc[0]), _mm512_add_ps(sum[1], acc[1])],
        );
    }
}
