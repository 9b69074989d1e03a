//! Interleaving rows four words at a time: the walk over a slab that the vector instruction sets share.
//!
//! The meaning is [`Shape::interleave`], the twin.

use crate::interleave::{HALF, HALF_BYTES, Shape, WORD};
use crate::panel::PANEL_ROWS;

/// Words that a row is read by at a time. No block has fewer, and a row of floats is a multiple of them.
const STEP: usize = 4;
/// Bytes of a row of floats between a step of the first rows and the same step of the others.
const FLOATS: usize = 64;

/// How an instruction set moves words.
pub(super) trait Words {
    /// Writes word `j` of the 4 at `from` in each row side by side, 64 bytes, to `out + j * apart`.
    ///
    /// # Safety
    /// The CPU has the instruction set; the words lie inside of the rows, and what is written may be.
    unsafe fn step(rows: &[*const u8; HALF], from: usize, out: *mut u8, apart: usize);

    /// Asks for the bytes at `from`, which may be any address.
    fn fetch(from: *const u8, n_bytes: usize);
}

/// [`Shape::interleave`] by `W`.
///
/// # Safety
/// The CPU has the instruction set of `W`. `rows` are 1 to [`PANEL_ROWS`] rows of `row_bytes`, whole blocks of the
/// shape, and `out` has [`PANEL_ROWS`] times as many bytes.
#[inline(always)]
pub(super) unsafe fn interleave<W: Words>(
    shape: &Shape,
    rows: &[u8],
    row_bytes: usize,
    out: &mut [u8],
) {
    let last = rows.len() / row_bytes - 1;
    let mut halves = [[rows.as_ptr(); HALF]; 2];
    for (row, from) in halves.as_flattened_mut().iter_mut().enumerate() {
        *from = from.wrapping_add(row.min(last) * row_bytes);
    }
    // What is asked of memory is what comes after these rows: in sequence, which 32 rows at a time are not.
    let behind = rows.as_ptr_range().end;
    let mut at = 0;
    while at < row_bytes {
        let n_bytes = match shape.size {
            WORD => FLOATS.min(row_bytes - at),
            size => size,
        };
        W::fetch(behind.wrapping_add(at * PANEL_ROWS), n_bytes * PANEL_ROWS);
        // SAFETY: the block lies inside of the rows, and its place inside of `out`, which is as much larger as there are
        // rows; the instruction set is the caller's promise.
        unsafe {
            let out = out.as_mut_ptr().add(at * PANEL_ROWS);
            block::<W>(shape, &halves, (at, n_bytes), out);
        }
        at += n_bytes;
    }
}

/// One block, or a line of floats, of `n_bytes` at `at` of each row.
///
/// # Safety
/// They lie inside of the rows, and `out` may be written for as many of each. The CPU has the instruction set.
#[inline(always)]
unsafe fn block<W: Words>(
    shape: &Shape,
    halves: &[[*const u8; HALF]; 2],
    (at, n_bytes): (usize, usize),
    out: *mut u8,
) {
    // SAFETY: odd bytes and words make up the block, here and there; the last step ends with the last word.
    unsafe {
        let odd = at + shape.odd;
        match shape.n_odd {
            0 => {}
            1 => copy_odd::<1>(halves, odd, out),
            2 => copy_odd::<2>(halves, odd, out),
            _ => copy_odd::<3>(halves, odd, out),
        }
        let out = out.add(shape.n_odd * PANEL_ROWS);
        let n_words = n_bytes / WORD;
        let (apart, next_half) = match shape.size {
            WORD => (2 * HALF_BYTES, HALF_BYTES),
            _ => (HALF_BYTES, n_words * HALF_BYTES),
        };
        for (half, rows) in halves.iter().enumerate() {
            let out = out.add(half * next_half);
            let mut word = 0;
            while word < n_words {
                // Words that do not fill a step are written again with those before.
                let first = word.min(n_words - STEP);
                let from = at + shape.words() + first * WORD;
                W::step(rows, from, out.add(first * apart), apart);
                word += STEP;
            }
        }
    }
}

/// # Safety
/// `N` bytes at `from` lie inside of the rows, and `out` may be written for as many of each.
#[inline(always)]
unsafe fn copy_odd<const N: usize>(halves: &[[*const u8; HALF]; 2], from: usize, out: *mut u8) {
    for (row, bytes) in halves.as_flattened().iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = bytes.add(from).cast::<[u8; N]>().read();
            out.cast::<[u8; N]>().add(row).write(bytes);
        }
    }
}
