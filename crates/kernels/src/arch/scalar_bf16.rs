//! The scalar twin of products of bf16: their meaning, word by word.

use std::mem::MaybeUninit;

use half::bf16;

use super::bf16_gemm::{Bf16, LINE, Line, Strip, View};

pub(super) static TABLE: Bf16 = Bf16 {
    native: false,
    pack_row,
    pack_down,
    pack_across,
    rows,
    panels,
};

/// To bf16, halves to even; what is too small for a normal number becomes zero.
fn round(x: f32) -> u32 {
    let x = if x.is_subnormal() { 0.0 * x } else { x };
    u32::from(bf16::from_f32(x).to_bits())
}

fn word(low: f32, high: f32) -> u32 {
    round(low) | round(high) << 16
}

fn pack_row(x: &[f32], out: &mut [MaybeUninit<u32>]) {
    for (out, x) in out.iter_mut().zip(x.chunks(2)) {
        out.write(word(x[0], x.get(1).copied().unwrap_or(0.0)));
    }
}

fn pack_down(x: &View<'_>, n_rows: usize, from: usize, n: usize, out: &mut [MaybeUninit<Line>]) {
    let at = |row: usize, col: usize| match row < n_rows && col < n {
        true => x.part(row, from, n)[col],
        false => 0.0,
    };
    for (p, line) in out.iter_mut().enumerate() {
        let words = std::array::from_fn(|j| word(at(2 * p, j), at(2 * p + 1, j)));
        line.write(Line(words));
    }
}

fn pack_across(x: &View<'_>, from: usize, n: usize, out: &mut [MaybeUninit<Line>]) {
    let at = |j: usize, i: usize| match j < n && i < x.cols {
        true => x.part(from + j, 0, x.cols)[i],
        false => 0.0,
    };
    for (p, line) in out.iter_mut().enumerate() {
        let words = std::array::from_fn(|j| word(at(j, 2 * p), at(j, 2 * p + 1)));
        line.write(Line(words));
    }
}

/// # Safety
/// See [`Bf16`].
unsafe fn rows(strip: &Strip) {
    // SAFETY: the caller's.
    unsafe { multiply(strip, strip.a_row, 1) }
}

/// # Safety
/// See [`Bf16`].
unsafe fn panels(strip: &Strip) {
    // SAFETY: the caller's.
    unsafe { multiply(strip, 1, LINE) }
}

/// # Safety
/// As [`Strip`] says.
unsafe fn multiply(strip: &Strip, a_row: usize, a_word: usize) {
    let halves = |word: u32| {
        (
            f32::from_bits(word << 16),
            f32::from_bits(word & 0xffff_0000),
        )
    };
    for i in 0..strip.n_rows {
        for j in 0..strip.n_cols {
            // SAFETY: inside of the operands, by the caller's contract.
            unsafe {
                let c = strip.c.add(i * strip.c_row + j);
                let mut sum = if strip.add { *c } else { 0.0 };
                for p in 0..strip.n_words {
                    let (a_low, a_high) = halves(*strip.a.add(i * a_row + p * a_word));
                    let (b_low, b_high) = halves((*strip.b.add(p)).0[j]);
                    // Products of bf16 are exact in f32.
                    sum += a_high * b_high;
                    sum += a_low * b_low;
                }
                *c = sum;
            }
        }
    }
}
