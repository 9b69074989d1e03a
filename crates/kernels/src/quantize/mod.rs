//! Quantisation: f32 to blocks, byte for byte as ggml's reference quantisers without an importance matrix.
//!
//! Byte for byte means: the same f32 operations in the same order, without fused multiply-add, and the same rounding
//! (halves away from zero in Q8_0, a shift by one half and truncation in the other blocks of 32, halves to even in the
//! super-blocks). Where ggml's C leaves the result undefined (scales whose inverse overflows, exponents below zero)
//! this stores zeros or the nearest exponent.

mod k_quants;
mod legacy;
mod mxfp4;
mod search;

use half::f16;

use crate::blocks::{self, Block};

/// Blocks that can be written.
pub(crate) trait Encode: Block {
    /// Quantises `x` (`[LEN]`, finite); `None` when a scale does not fit its format.
    fn encode(x: &[f32]) -> Option<Self>;
}

/// Quantises `values` to `out`, which has room for whole blocks. False when a value is not finite or too large;
/// `out` is then unusable.
pub(crate) fn encode_blocks<B: Encode>(values: &[f32], out: &mut [u8]) -> bool {
    let blocks = out.chunks_exact_mut(size_of::<B>());
    for (values, out) in values.chunks_exact(B::LEN).zip(blocks) {
        if !values.iter().all(|v| v.is_finite()) {
            return false;
        }
        let Some(block) = B::encode(values) else {
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
