//! MXFP4: 32 four-bit floats (E2M1) with a shared power of two (E8M0).

use super::{ActQ8, Block32, Quants32, block, nibbles};

/// Twice what the 16 codes stand for, so that they are integers.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The exponent that stands for NaN.
const NAN_EXPONENT: u8 = 0xff;

/// `value(code) * 2^(e - 128)`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockMxfp4 {
    pub(crate) e: u8,
    /// Weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    pub(crate) qs: [u8; 16],
}

block!(BlockMxfp4, of_32, 17, |block| block.e < 252);

impl BlockMxfp4 {
    /// `2^(e - 128)`, what an integer of the table is worth; NaN for the code of NaN.
    #[inline(always)]
    pub(crate) fn scale_of(e: u8) -> f32 {
        match e {
            // ggml reads this code as 2^127, which would turn a broken block into plausible numbers.
            NAN_EXPONENT => f32::NAN,
            // Below the normal numbers: 2^-128 and 2^-127.
            0 | 1 => f32::from_bits(0x0020_0000 << e),
            _ => f32::from_bits(u32::from(e - 1) << 23),
        }
    }
}

impl Block32 for BlockMxfp4 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: nibbles(&self.qs).map(|code| MXFP4_VALUES[usize::from(code)]),
            d: Self::scale_of(self.e),
            m: 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn codes_and_exponents_by_hand() {
        let mut qs = [0; 16];
        qs[0] = 0xf7;
        let mut y = [0.0; 32];
        // e = 127: codes 7 and 15 are 6 and -6.
        BlockMxfp4 { e: 127, qs }.decode(&mut y);
        assert_eq!((y[0], y[16], y[1]), (6.0, -6.0, 0.0));
        for (e, power) in [(0, -128), (1, -127), (2, -126), (254, 126)] {
            assert_eq!(BlockMxfp4::scale_of(e), 2f64.powi(power) as f32, "{e}");
        }
        BlockMxfp4 { e: 0xff, qs }.decode(&mut y);
        assert!(y.iter().all(|v| v.is_nan()));
    }
}
