//! Q4_0, Q4_1, Q5_0 and Q5_1: 32 weights with one f16 scale, and in the `_1` formats an f16 minimum.

use half::f16;

use super::{ActQ8, Block32, Q8_BLOCK, Quants32, block, nibbles};

/// `(q - 8) * d`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ4_0 {
    pub(crate) d: f16,
    /// Weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    pub(crate) qs: [u8; 16],
}

/// `q * d + m`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ4_1 {
    pub(crate) d: f16,
    pub(crate) m: f16,
    pub(crate) qs: [u8; 16],
}

/// `(q - 16) * d`, with the fifth bits apart.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ5_0 {
    pub(crate) d: f16,
    /// Bit `j` of the little-endian word is the fifth bit of weight `j`.
    pub(crate) qh: [u8; 4],
    pub(crate) qs: [u8; 16],
}

/// `q * d + m`, with the fifth bits apart.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ5_1 {
    pub(crate) d: f16,
    pub(crate) m: f16,
    pub(crate) qh: [u8; 4],
    pub(crate) qs: [u8; 16],
}

block!(BlockQ4_0, of_32, 18, |block| block.d.is_finite());
block!(BlockQ4_1, of_32, 20, |block| block.d.is_finite()
    && block.m.is_finite());
block!(BlockQ5_0, of_32, 22, |block| block.d.is_finite());
block!(BlockQ5_1, of_32, 24, |block| block.d.is_finite()
    && block.m.is_finite());

fn five_bits(qh: [u8; 4], qs: &[u8; 16]) -> [u8; Q8_BLOCK] {
    let high = u32::from_le_bytes(qh);
    let low = nibbles(qs);
    std::array::from_fn(|j| low[j] | ((high >> j & 1) << 4) as u8)
}

impl Block32 for BlockQ4_0 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: nibbles(&self.qs).map(|q| q as i8 - 8),
            d: self.d.to_f32(),
            m: 0.0,
        }
    }
}

impl Block32 for BlockQ4_1 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;
    const HAS_MIN: bool = true;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: nibbles(&self.qs).map(|q| q as i8),
            d: self.d.to_f32(),
            m: self.m.to_f32(),
        }
    }
}

impl Block32 for BlockQ5_0 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: five_bits(self.qh, &self.qs).map(|q| q as i8 - 16),
            d: self.d.to_f32(),
            m: 0.0,
        }
    }
}

impl Block32 for BlockQ5_1 {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;
    const HAS_MIN: bool = true;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: five_bits(self.qh, &self.qs).map(|q| q as i8),
            d: self.d.to_f32(),
            m: self.m.to_f32(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn halves_of_bytes_and_fifth_bits_by_hand() {
        let mut y = [0.0; 32];
        let d = f16::from_f32(0.5);
        let mut qs = [0x80; 16];
        qs[0] = 0x3f;
        BlockQ4_0 { d, qs }.decode(&mut y);
        // Low nibble 15 - 8 = 7, high nibble 3 - 8 = -5; the others 0 - 8 and 8 - 8.
        assert_eq!((y[0], y[16], y[1], y[17]), (3.5, -2.5, -4.0, 0.0));
        let m = f16::from_f32(-1.0);
        BlockQ4_1 { d, m, qs }.decode(&mut y);
        assert_eq!((y[0], y[16], y[1], y[17]), (6.5, 0.5, -1.0, 3.0));
        // Fifth bits of weights 0 and 17.
        let qh = [0x01, 0, 0x02, 0];
        BlockQ5_0 { d, qh, qs }.decode(&mut y);
        assert_eq!((y[0], y[16], y[1], y[17]), (7.5, -6.5, -8.0, 4.0));
        BlockQ5_1 { d, m, qh, qs }.decode(&mut y);
        assert_eq!((y[0], y[16], y[1], y[17]), (14.5, 0.5, -1.0, 11.0));
    }
}
