//! Quantisation: f32 to blocks, byte for byte as ggml's quantisers, with and without an importance matrix.
//!
//! Byte for byte means: the same f32 operations in the same order, without fused multiply-add, and the same rounding
//! (halves away from zero in Q8_0, a shift by one half and truncation in the other blocks of 32, halves to even in the
//! super-blocks). Where ggml's C leaves the result undefined (scales whose inverse overflows, exponents below zero)
//! this stores zeros or the nearest exponent.

mod iq4;
mod k_quants;
mod k_small;
mod legacy;
mod mxfp4;
mod search;

use half::f16;

use crate::blocks::{self, Block};

/// How much the errors of the values of a block count.
#[derive(Clone, Copy)]
pub(crate) struct Importance<'a> {
    /// Of each value, from 0.
    of: &'a [f32],
    /// Mean of the squares of the row that the block is part of.
    mean_square: f32,
}

impl Importance<'_> {
    /// Weights of the errors of `x`, the group of values from `from` on: the importance times the magnitude, which
    /// `floor`, a square, keeps from being nothing.
    fn weights<const N: usize>(&self, x: &[f32; N], from: usize, floor: f32) -> [f32; N] {
        std::array::from_fn(|l| self.of[from + l] * (floor + x[l] * x[l]).sqrt())
    }
}

/// Sum of squares, in order.
fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, v| sum + v * v)
}

/// Blocks that can be written.
pub(crate) trait Encode: Block {
    /// Quantises `x` (`[LEN]`, finite); `None` when a scale does not fit its format.
    fn encode(x: &[f32]) -> Option<Self>;

    /// The same where errors do not count alike. Formats that are made without a search look at the values alone.
    fn encode_weighted(x: &[f32], _importance: Importance<'_>) -> Option<Self> {
        Self::encode(x)
    }
}

/// Quantises `values` to `out`, which has room for whole blocks. False when a value is not finite or too large;
/// `out` is then unusable.
pub(crate) fn encode_blocks<B: Encode>(values: &[f32], out: &mut [u8]) -> bool {
    store(values, out, |_, x| B::encode(x))
}

/// [`encode_blocks`] of rows of `importance.len()` values, with the importance of each column.
pub(crate) fn encode_weighted<B: Encode>(
    values: &[f32],
    importance: &[f32],
    out: &mut [u8],
) -> bool {
    let cols = importance.len();
    let row_bytes = cols / B::LEN * size_of::<B>();
    let rows = values.chunks_exact(cols);
    rows.zip(out.chunks_exact_mut(row_bytes)).all(|(row, out)| {
        let mean_square = sum_of_squares(row) / cols as f32;
        store(row, out, |at, x| {
            let of = &importance[at * B::LEN..][..B::LEN];
            B::encode_weighted(x, Importance { of, mean_square })
        })
    })
}

/// Stores what `encode` makes of every block of `values`.
fn store<B: Encode>(
    values: &[f32],
    out: &mut [u8],
    encode: impl Fn(usize, &[f32]) -> Option<B>,
) -> bool {
    let blocks = out.chunks_exact_mut(size_of::<B>());
    for (at, (values, out)) in values.chunks_exact(B::LEN).zip(blocks).enumerate() {
        if !values.iter().all(|v| v.is_finite()) {
            return false;
        }
        let Some(block) = encode(at, values) else {
            return false;
        };
        out.copy_from_slice(blocks::bytes_of(&[block]));
    }
    true
}

/// `scale` in half precision, if that is finite.
fn half_scale(scale: f32) -> Option<f16> {
    Some(f16::from_f32(scale)).filter(|scale| scale.is_finite())
}

/// `1 / d`, or 0 when that is not a number to multiply by.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}
