//! How the bytes of 16 rows get into vectors whose lanes are the rows.

use std::arch::x86_64::*;

use crate::interleave::{InPlace, Interleaved, Layout, Source};
use crate::panel::{Lanes, PANEL_ROWS, Slab};

/// Rows of a vector.
pub(super) const HALF: usize = PANEL_ROWS / 2;
/// Bytes that one fetch brings.
pub(super) const LINE: usize = 64;
/// Bytes between what is read and what is fetched, where rows are interleaved.
const DISTANCE: usize = 8192;

/// Rows that can be read 16 at a time.
pub(super) trait Wide: Source {
    /// Up to how many tokens unpacking the rows again for every few may pay.
    const FEW: usize;

    /// The 4 bytes at `offset` of block `at` in each row of a half.
    ///
    /// # Safety
    /// As for [`Source::read`], and the CPU has AVX-512.
    unsafe fn word<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> __m512i;

    /// The 16 bytes at `offset`, as four vectors: vector `j` has bytes `4j..4j + 4` of every row.
    ///
    /// # Safety
    /// As for [`Wide::word`].
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4];

    /// What does not fill words.
    ///
    /// # Safety
    /// As for [`Source::read`]; `T` has as many bytes.
    unsafe fn odd<B: Layout, T: Copy + Default>(slab: &Slab, half: usize, at: usize) -> [T; HALF];

    /// Fetches the `step`-th of `n_steps` parts of what is needed as far ahead of block `at` as pays, in sequence:
    /// memory likes it more than the order in which bits are unpacked. Where rows are interleaved, every so many lines, as
    /// [`every_line`] says.
    fn fetch<B>(slab: &Slab, at: usize, step: (usize, usize), every: usize);
}

/// How many lines apart to fetch for `n_tokens`. Words that are multiplied as they are come by themselves, but for a nudge,
/// as long as little is computed between them: for up to `nudged` tokens. More would get in the way.
#[inline(always)]
pub(super) fn every_line(nudged: usize, n_tokens: usize) -> usize {
    if n_tokens <= nudged { 2 } else { 1 }
}

/// The `step`-th of `n_steps` parts of `n_bytes`, one of so many bytes.
#[inline(always)]
fn fetch_part(from: *const u8, n_bytes: usize, (step, n_steps): (usize, usize), every: usize) {
    let mut offset = n_bytes * step / n_steps / every * every;
    while offset < n_bytes * (step + 1) / n_steps {
        // SAFETY: fetching ahead is allowed at any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(offset).cast()) };
        offset += every;
    }
}

impl Wide for InPlace {
    const FEW: usize = 4;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    #[inline]
    unsafe fn word<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> __m512i {
        let words: [u32; HALF] = std::array::from_fn(|r| {
            // SAFETY: the caller's promise.
            let block = unsafe { slab.block::<B>(half * HALF + r, at).cast::<u8>() };
            // SAFETY: as above.
            unsafe { block.add(offset).cast::<u32>().read_unaligned() }
        });
        // SAFETY: 16 words.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    #[inline]
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4] {
        // SAFETY: the caller's promise.
        unsafe { transposed(slab.half(half), at * size_of::<B>() + offset) }
    }

    #[inline(always)]
    unsafe fn odd<B: Layout, T: Copy + Default>(slab: &Slab, half: usize, at: usize) -> [T; HALF] {
        const { assert!(size_of::<T>() == B::N_ODD) };
        std::array::from_fn(|r| {
            // SAFETY: the contract.
            let block = unsafe { slab.block::<B>(half * HALF + r, at).cast::<u8>() };
            // SAFETY: as above.
            unsafe { block.add(B::ODD).cast::<T>().read_unaligned() }
        })
    }

    #[inline(always)]
    fn fetch<B>(slab: &Slab, at: usize, step: (usize, usize), _every: usize) {
        if !slab.next.is_null() {
            let n_bytes = PANEL_ROWS * size_of::<B>();
            fetch_part(slab.next.wrapping_add(at * n_bytes), n_bytes, step, LINE);
        }
    }
}

impl Wide for Interleaved {
    const FEW: usize = usize::MAX;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    #[inline]
    unsafe fn word<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> __m512i {
        let from = B::place(half, B::word(offset));
        // SAFETY: the caller's promise: the words of 16 rows.
        unsafe { _mm512_loadu_si512(slab.interleaved::<B>(at).add(from).cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    #[inline]
    unsafe fn words<B: Layout>(slab: &Slab, half: usize, at: usize, offset: usize) -> [__m512i; 4] {
        let mut out = [_mm512_setzero_si512(); 4];
        for (i, out) in out.iter_mut().enumerate() {
            let from = B::place(half, B::word(offset) + i);
            // SAFETY: the caller's promise: the words of 16 rows.
            *out = unsafe { _mm512_loadu_si512(slab.interleaved::<B>(at).add(from).cast()) };
        }
        out
    }

    #[inline(always)]
    unsafe fn odd<B: Layout, T: Copy + Default>(slab: &Slab, half: usize, at: usize) -> [T; HALF] {
        const { assert!(size_of::<T>() == B::N_ODD) };
        // SAFETY: the contract; the odd bytes of all rows come first.
        unsafe {
            let odd = slab.interleaved::<B>(at).cast::<[T; HALF]>();
            odd.add(half).read_unaligned()
        }
    }

    #[inline(always)]
    fn fetch<B>(slab: &Slab, at: usize, step: (usize, usize), every: usize) {
        let n_bytes = PANEL_ROWS * size_of::<B>();
        let from = slab.start().wrapping_add(at * n_bytes + DISTANCE);
        fetch_part(from, n_bytes, step, every * LINE);
    }
}

/// The 16 bytes at `offset` of each row, as four vectors: vector `j` has bytes `4j..4j + 4` of every row.
///
/// # Safety
/// The bytes lie inside of the rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(super) unsafe fn transposed(rows: &[*const u8; HALF], offset: usize) -> [__m512i; 4] {
    // A row's 16 bytes in every quarter.
    // SAFETY: the caller's promise.
    let row = |row: usize| unsafe { _mm_loadu_si128(rows[row].add(offset).cast()) };
    // Quarter q of vector i is row 4q + i.
    let mut a = [_mm512_setzero_si512(); 4];
    for (i, a) in a.iter_mut().enumerate() {
        let mut v = _mm512_broadcast_i32x4(row(i));
        v = _mm512_mask_broadcast_i32x4(v, 0x00f0, row(4 + i));
        v = _mm512_mask_broadcast_i32x4(v, 0x0f00, row(8 + i));
        *a = _mm512_mask_broadcast_i32x4(v, 0xf000, row(12 + i));
    }
    let low = [
        _mm512_unpacklo_epi32(a[0], a[1]),
        _mm512_unpacklo_epi32(a[2], a[3]),
    ];
    let high = [
        _mm512_unpackhi_epi32(a[0], a[1]),
        _mm512_unpackhi_epi32(a[2], a[3]),
    ];
    [
        _mm512_unpacklo_epi64(low[0], low[1]),
        _mm512_unpackhi_epi64(low[0], low[1]),
        _mm512_unpacklo_epi64(high[0], high[1]),
        _mm512_unpackhi_epi64(high[0], high[1]),
    ]
}

/// Writes 16 values of 4 bytes into a half of a row.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn put<T>(row: &mut Lanes<T>, half: usize, v: __m512i) {
    const { assert!(size_of::<T>() == 4) };
    // SAFETY: 16 values of 4 bytes.
    unsafe { _mm512_storeu_si512(row[half * HALF..][..HALF].as_mut_ptr().cast(), v) };
}

/// [`put`], of floats.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn put_f32(row: &mut Lanes<f32>, half: usize, v: __m512) {
    put(row, half, _mm512_castps_si512(v));
}

/// `f` of each. `array::map` and what it calls stay apart where instruction sets are enabled by function.
#[inline(always)]
pub(super) fn each<T: Copy, U: Copy, const N: usize>(v: [T; N], f: impl Fn(T) -> U) -> [U; N] {
    let mut out = [f(v[0]); N];
    for i in 1..N {
        out[i] = f(v[i]);
    }
    out
}
