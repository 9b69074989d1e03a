//! Q8_0 and Q8_K: signed bytes with one scale per 32 or 256 weights.

use half::f16;

use super::{
    ActQ8, ActQ8K, Block32, Block256, N_SCALES, Q8_BLOCK, Quants32, Quants256, SUPER_BLOCK, block,
};

/// Thirty-two weights in 34 bytes, laid out as GGUF's Q8_0.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: f16,
    /// Quants; weight `j` is `qs[j] * d`.
    pub qs: [i8; Q8_BLOCK],
}

/// 256 weights `q * d`. An intermediate of ggml's that files hardly ever hold.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ8K {
    /// Scale: a little-endian f32, in bytes to need no alignment.
    pub(crate) d: [u8; 4],
    pub(crate) qs: [i8; SUPER_BLOCK],
    /// Sums of every 16 quants, which weights do not need.
    pub(crate) sums: [[u8; 2]; N_SCALES],
}

block!(BlockQ8_0, of_32, 34, |block| block.d.is_finite());
block!(BlockQ8K, of_256, 292, |block| f32::from_le_bytes(block.d)
    .abs()
    < 1e36);

impl BlockQ8_0 {
    /// A block of zeros.
    pub const ZERO: Self = Self {
        d: f16::ZERO,
        qs: [0; Q8_BLOCK],
    };
}

impl Block32 for BlockQ8_0 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: self.qs,
            d: self.d.to_f32(),
            m: 0.0,
        }
    }
}

impl Block256 for BlockQ8K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        out.d = f32::from_le_bytes(self.d);
        out.qs = self.qs;
        out.scales = [1; N_SCALES];
    }
}

/// Quantises `weights` (a multiple of 32 of them) to `blocks`, rounding halves away from zero.
///
/// Returns false when a value is NaN or infinite, or too large for an f16 scale; `blocks` is then unusable.
///
/// # Panics
/// When the lengths do not match.
pub fn quantize_q8_0(weights: &[f32], blocks: &mut [BlockQ8_0]) -> bool {
    assert_eq!(
        weights.len(),
        blocks.len() * Q8_BLOCK,
        "one block per 32 weights"
    );
    let mut representable = true;
    for (weights, block) in weights.chunks_exact(Q8_BLOCK).zip(blocks) {
        // The sum carries any NaN, which `f32::max` would swallow.
        let amax = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        let finite = (weights.iter().map(|w| w * 0.0).sum::<f32>()) == 0.0;
        let d = amax / 127.0;
        // A scale so small that its inverse overflows is stored as zero anyway.
        let inverse = if (1.0 / d).is_finite() { 1.0 / d } else { 0.0 };
        block.d = f16::from_f32(d);
        representable &= finite && block.d.is_finite();
        for (q, w) in block.qs.iter_mut().zip(weights) {
            *q = (w * inverse).round() as i8;
        }
    }
    representable
}

/// Expands `blocks` to f32.
///
/// # Panics
/// When the lengths do not match.
pub fn dequantize_q8_0(blocks: &[BlockQ8_0], weights: &mut [f32]) {
    assert_eq!(
        weights.len(),
        blocks.len() * Q8_BLOCK,
        "32 weights per block"
    );
    for (weights, block) in weights.chunks_exact_mut(Q8_BLOCK).zip(blocks) {
        let d = block.d.to_f32();
        for (w, q) in weights.iter_mut().zip(block.qs) {
            *w = f32::from(q) * d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_block_is_reproduced() {
        // x[i] = (i - 16) / 8: amax 2, d = 2 / 127; bytes computed by hand from the format's rule.
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) / 8.0).collect();
        let mut block = [BlockQ8_0::ZERO];
        assert!(quantize_q8_0(&x, &mut block));
        assert_eq!(block[0].d.to_bits(), 0x2408);
        let quants: Vec<u8> = block[0].qs.iter().map(|q| *q as u8).collect();
        let expected: [u8; 32] = [
            0x81, 0x89, 0x91, 0x99, 0xa1, 0xa9, 0xb1, 0xb9, 0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8,
            0xf0, 0xf8, 0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x47, 0x4f, 0x57,
            0x5f, 0x67, 0x6f, 0x77,
        ];
        assert_eq!(quants, expected);
    }

    #[test]
    fn the_round_trip_error_is_at_most_half_a_step() {
        let x: Vec<f32> = (0..64)
            .map(|i| ((i * 37 % 64) as f32 - 31.0) * 0.013)
            .collect();
        let mut blocks = [BlockQ8_0::ZERO; 2];
        assert!(quantize_q8_0(&x, &mut blocks));
        let mut y = vec![0.0; 64];
        dequantize_q8_0(&blocks, &mut y);
        let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // Half a step of rounding, and 127 steps times the f16 error of the scale (2^-11).
        let bound = amax / 127.0 * 0.5 + amax / 2048.0;
        for (a, b) in x.iter().zip(&y) {
            assert!((a - b).abs() <= bound, "{a} {b}");
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_cannot_be_stored_is_refused() {
        let mut block = [BlockQ8_0::ZERO];
        assert!(quantize_q8_0(&[0.0; 32], &mut block));
        assert_eq!(block, [BlockQ8_0::ZERO]);
        assert!(quantize_q8_0(&[1e-40; 32], &mut block));
        assert_eq!(block, [BlockQ8_0::ZERO]);
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let mut x = [0.5; 32];
            x[7] = bad;
            assert!(!quantize_q8_0(&x, &mut block), "{bad}");
        }
    }
}
