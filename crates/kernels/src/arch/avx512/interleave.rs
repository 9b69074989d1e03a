//! Interleaving with AVX-512: four words of 16 rows are four lines.

use std::arch::x86_64::*;

use super::super::interleave::{self, Words};
use super::source::{LINE, transposed};
use crate::interleave::{HALF, Shape};

struct Lines;

impl Words for Lines {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn step(rows: &[*const u8; HALF], from: usize, out: *mut u8, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let lines = transposed(rows, from);
            // Not by an iterator: what it calls stays apart, and vectors would pass through memory.
            for word in 0..lines.len() {
                _mm512_storeu_si512(out.add(word * apart).cast(), lines[word]);
            }
        }
    }

    #[inline(always)]
    fn fetch(from: *const u8, n_bytes: usize) {
        for offset in (0..n_bytes).step_by(LINE) {
            // SAFETY: fetching ahead is allowed at any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(offset).cast()) };
        }
    }
}

/// # Safety
/// As for `Table::interleave`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn interleave(shape: &Shape, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
    // SAFETY: the same contract.
    unsafe { interleave::interleave::<Lines>(shape, rows, row_bytes, out) }
}
