//! Quantisation to MXFP4: the exponent of the largest magnitude, then the nearest of eight values for each.

use super::Encode;
use crate::blocks::{BlockMxfp4, MXFP4_VALUES, Q8_BLOCK};

/// Largest exponent of an E2M1 value, and the bias of E8M0.
const TOP: f32 = 2.0;
const BIAS: f32 = 127.0;

/// The shared exponent: that of the largest magnitude, less that of the largest code.
fn exponent(amax: f32) -> u8 {
    if amax == 0.0 {
        return 0;
    }
    // The logarithm is rounded to f32 before its floor, which lifts numbers just below a power of two over it: ggml
    // takes `log2f`. Saturates at 0 for numbers below 2^-125, which ggml's conversion leaves undefined.
    let log = f64::from(amax).log2() as f32;
    (log.floor() - TOP + BIAS) as u8
}

/// The code nearest to `x`; the first wins a tie.
fn code(x: f32, scale: f32) -> u8 {
    let mut best = (0, x.abs());
    for (at, value) in MXFP4_VALUES[..8].iter().enumerate().skip(1) {
        let error = (f32::from(*value) * scale - x.abs()).abs();
        if error < best.1 {
            best = (at as u8, error);
        }
    }
    // Codes of negative values are 8 above; both zeros are code 0.
    if x < 0.0 && best.0 > 0 {
        best.0 + 8
    } else {
        best.0
    }
}

impl Encode for BlockMxfp4 {
    fn encode(x: &[f32]) -> Option<Self> {
        let amax = x.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        let e = exponent(amax);
        let scale = Self::scale_of(e);
        let mut codes = [0; Q8_BLOCK];
        for (code_of, v) in codes.iter_mut().zip(x) {
            *code_of = code(*v, scale);
        }
        Some(Self {
            e,
            qs: std::array::from_fn(|j| codes[j] | codes[j + 16] << 4),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_block_is_reproduced() {
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) / 8.0).collect();
        let block = BlockMxfp4::encode(&x).unwrap();
        // floor(log2(2)) - 2 + 127.
        assert_eq!(block.e, 126);
        let expected = [
            0x0e, 0x0e, 0x1d, 0x1d, 0x2d, 0x2d, 0x3c, 0x3c, 0x4c, 0x4b, 0x4b, 0x5a, 0x5a, 0x59,
            0x59, 0x60,
        ];
        assert_eq!(block.qs, expected);
    }

    #[test]
    fn exponents_at_the_edges() {
        assert_eq!((exponent(0.0), exponent(1.0), exponent(1.9)), (0, 125, 125));
        // 4 - 2^-22: its logarithm is nearer to 2 than to the f32 below 2? No: 1.2e-7 steps, 8.6e-8 off.
        assert_eq!(exponent(4.0 - 2.0f32.powi(-22)), 126);
        // 16 - 2^-20: 8.6e-8 below 4, where f32 has steps of 2.4e-7, so that the logarithm rounds to 4.
        assert_eq!(exponent(16.0 - 2.0f32.powi(-20)), 129);
        assert_eq!((exponent(1e-44), exponent(f32::MAX)), (0, 253));
    }
}
