//! Interleaving with NEON: squares of four words by four rows.

use std::arch::aarch64::*;

use super::super::interleave::{self, Words};
use crate::interleave::{HALF, Shape};

struct Squares;

impl Words for Squares {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn step(rows: &[*const u8; HALF], from: usize, out: *mut u8, apart: usize) {
        for (square, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
            // SAFETY: the caller's promise: 16 bytes of each row.
            let row = |row: usize| unsafe { vreinterpretq_u32_u8(vld1q_u8(rows[row].add(from))) };
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let wide = |v| vreinterpretq_u64_u32(v);
            let (ab, cd) = (wide(vtrn1q_u32(a, b)), wide(vtrn1q_u32(c, d)));
            let (ab_odd, cd_odd) = (wide(vtrn2q_u32(a, b)), wide(vtrn2q_u32(c, d)));
            let words = [
                vtrn1q_u64(ab, cd),
                vtrn1q_u64(ab_odd, cd_odd),
                vtrn2q_u64(ab, cd),
                vtrn2q_u64(ab_odd, cd_odd),
            ];
            for (word, v) in words.into_iter().enumerate() {
                // SAFETY: the caller's promise: a quarter of the word's 64 bytes.
                unsafe { vst1q_u8(out.add(word * apart + square * 16), vreinterpretq_u8_u64(v)) };
            }
        }
    }

    #[inline(always)]
    fn fetch(_from: *const u8, _n_bytes: usize) {}
}

/// # Safety
/// As for `Table::interleave`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn interleave(shape: &Shape, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
    // SAFETY: the same contract.
    unsafe { interleave::interleave::<Squares>(shape, rows, row_bytes, out) }
}
