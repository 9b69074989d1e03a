//! Activations quantised to 8 bits, for integer products with quantised weights.

use half::f16;

use super::{N_SCALES, Q8_BLOCK, SUB_BLOCK, SUPER_BLOCK};

/// Thirty-two activations quantised for an integer dot product with blocks of 32 weights.
///
/// Quants and scale are those of ggml's Q8_0 and Q8_1 as its x86 code makes them: values times `127 / amax`, rounded
/// to nearest even, with the scale `amax / 127` rounded through f16.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct ActQ8 {
    /// Scale. NaN when an input was NaN or infinite, so that the product says so.
    pub d: f32,
    /// What a minimum that all 32 weights share is multiplied by: the sum of the quants times the scale before its
    /// rounding, itself rounded through f16.
    pub sum: f32,
    /// `-128 * sum(qs)`: what an unsigned product with `weight + 128` has to be corrected by.
    pub bias: i32,
    /// Quants in -127..=127; activation `j` is `qs[j] * d`.
    pub qs: [i8; Q8_BLOCK],
}

/// 256 activations quantised for an integer dot product with super-blocks, as ggml's Q8_K.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct ActQ8K {
    /// Scale. NaN when an input was NaN or infinite.
    pub d: f32,
    /// Quants in -127..=127; activation `j` is `qs[j] * d`.
    pub qs: [i8; SUPER_BLOCK],
    /// Sums of every 16 quants.
    pub sums: [i16; N_SCALES],
}

const _: () = assert!(size_of::<ActQ8>() == 44 && align_of::<ActQ8>() == 4);
const _: () = assert!(size_of::<ActQ8K>() == 292 && align_of::<ActQ8K>() == 4);

impl ActQ8 {
    /// How far a product may be off because its activations are these: this times, per block, the largest magnitude of
    /// an activation and the sum of the magnitudes that make up the weights. A quant is off by half a step of the 127
    /// (and by what `127 / amax` is rounded), the scale by the rounding to 11 bits.
    pub const PRODUCT_ERROR: f64 = 0.5001 / 127.0 + 1.0 / 2048.0;
    /// What the same may be off besides where a scale is too small for a normal f16, in place of its share: 127 times
    /// half of the smallest f16.
    pub(crate) const SMALLEST: f64 = 127.0 / (1 << 25) as f64;

    /// A block of zeros.
    pub const ZERO: Self = Self {
        d: 0.0,
        sum: 0.0,
        bias: 0,
        qs: [0; Q8_BLOCK],
    };
}

impl ActQ8K {
    /// As [`ActQ8::PRODUCT_ERROR`]. The scale is an f32, whose rounding is within the last digit.
    pub const PRODUCT_ERROR: f64 = 0.5001 / 127.0;

    /// A block of zeros.
    pub const ZERO: Self = Self {
        d: 0.0,
        qs: [0; SUPER_BLOCK],
        sums: [0; N_SCALES],
    };
}

impl ActQ8K {
    /// Quantises 256 values. The value of largest magnitude becomes -127, whatever its sign; halves round to even.
    #[inline(always)]
    pub(crate) fn quantize(x: &[f32; SUPER_BLOCK]) -> Self {
        const MAGNITUDE: u32 = 0x7fff_ffff;
        // As integers, the bits of NaN and infinity are above those of every finite value.
        let bits = x.map(|v| v.to_bits() & MAGNITUDE);
        let amax = bits.iter().fold(0, |m: u32, v| m.max(*v));
        let mut out = Self::ZERO;
        if amax == 0 {
            return out;
        }
        let first = bits.iter().position(|v| *v == amax).unwrap_or(0);
        let inverse = -127.0 / x[first];
        out.d = 1.0 / inverse;
        if !f32::from_bits(amax).is_finite() {
            out.d = f32::NAN;
        } else if inverse.is_infinite() {
            // Numbers far below the normal ones.
            out.d = 0.0;
        } else {
            for (q, v) in out.qs.iter_mut().zip(x) {
                *q = (v * inverse).round_ties_even() as i8;
            }
        }
        let groups = out.qs.as_chunks::<SUB_BLOCK>().0;
        for (sum, group) in out.sums.iter_mut().zip(groups) {
            *sum = group.iter().map(|q| i16::from(*q)).sum();
        }
        out
    }
}

/// How to quantise a block of activations whose largest magnitude is known.
pub(crate) struct ActScale {
    /// What a quant is worth, before the rounding through f16.
    d: f32,
    /// What a value is multiplied by before rounding; 0 when the quants are to be zeros.
    pub(crate) inverse: f32,
}

impl ActScale {
    /// A block that is not finite gets a NaN scale; one too small for a normal scale becomes zeros.
    #[inline]
    pub(crate) fn of(amax: f32) -> Self {
        let d = amax / 127.0;
        if !d.is_finite() {
            Self {
                d: f32::NAN,
                inverse: 0.0,
            }
        } else if d < f32::MIN_POSITIVE {
            Self {
                d: 0.0,
                inverse: 0.0,
            }
        } else {
            Self {
                d,
                inverse: 127.0 / amax,
            }
        }
    }

    /// Sets everything but the quants, whose sum is `sum`.
    #[inline]
    pub(crate) fn finish(&self, sum: i32, out: &mut ActQ8) {
        out.d = f16::from_f32(self.d).to_f32();
        out.sum = f16::from_f32(self.d * sum as f32).to_f32();
        out.bias = -128 * sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn super_blocks_take_their_sign_from_the_first_largest_value() {
        let mut x = [0.0; SUPER_BLOCK];
        (x[3], x[200], x[16]) = (-2.0, 2.0, 1.0);
        let block = ActQ8K::quantize(&x);
        // -127 / -2 = 63.5; 1 * 63.5 lies midway between 63 and 64, the even one.
        assert_eq!((block.qs[3], block.qs[200], block.qs[16]), (-127, 127, 64));
        assert_eq!(block.d, 1.0 / 63.5);
        assert_eq!(
            (block.sums[0], block.sums[1], block.sums[12]),
            (-127, 64, 127)
        );
        assert_eq!(ActQ8K::quantize(&[0.0; SUPER_BLOCK]), ActQ8K::ZERO);
        assert_eq!(ActQ8K::quantize(&[1e-42; SUPER_BLOCK]).qs, [0; SUPER_BLOCK]);
        x[7] = f32::INFINITY;
        assert!(ActQ8K::quantize(&x).d.is_nan());
    }

    #[test]
    fn scales_pass_through_half_precision() {
        let scale = ActScale::of(1.0);
        let mut block = ActQ8::ZERO;
        scale.finish(100, &mut block);
        // 1/127 = 0.0078740157; the nearest f16 is 0x2008 = 1032 * 2^-17.
        assert_eq!(block.d, 1032.0 / 131_072.0);
        // 100/127 = 0.78740157; the nearest f16 is 1613 * 2^-11.
        assert_eq!((block.sum, block.bias), (1613.0 / 2048.0, -12800));
    }
}
