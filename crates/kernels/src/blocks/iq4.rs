//! IQ4_NL and IQ4_XS: four bits that index a table of 16 unevenly spaced values.

use half::f16;

use super::{ActQ8, ActQ8K, Block32, Block256, Quants32, Quants256, block, nibbles};

/// What the 16 codes stand for.
pub(crate) const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// 32 weights, `value(code) * d`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockIq4Nl {
    pub(crate) d: f16,
    /// Weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    pub(crate) qs: [u8; 16],
}

/// 256 weights, `d * (scale - 32) * value(code)`, with a 6-bit scale per 32.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockIq4Xs {
    pub(crate) d: f16,
    /// Upper two bits of the eight scales, little-endian.
    pub(crate) scales_h: [u8; 2],
    /// Lower four bits, two scales a byte.
    pub(crate) scales_l: [u8; 4],
    /// Per 32 weights 16 bytes, as in IQ4_NL.
    pub(crate) qs: [u8; 128],
}

block!(BlockIq4Nl, of_32, 18, |block| block.d.is_finite());
block!(BlockIq4Xs, of_256, 136, |block| block.d.is_finite());

impl Block32 for BlockIq4Nl {
    const PRODUCT_ERROR: f64 = ActQ8::PRODUCT_ERROR;

    fn unpack(&self) -> Quants32 {
        Quants32 {
            qs: nibbles(&self.qs).map(|code| IQ4_VALUES[usize::from(code)]),
            d: self.d.to_f32(),
            m: 0.0,
        }
    }
}

impl BlockIq4Xs {
    /// Scale of 32-weight group `group`, -32..=31.
    #[inline(always)]
    pub(crate) fn scale(&self, group: usize) -> i16 {
        let low = self.scales_l[group / 2] >> (4 * (group % 2)) & 15;
        let high = u16::from_le_bytes(self.scales_h) >> (2 * group) & 3;
        i16::from(low) + (high << 4) as i16 - 32
    }
}

impl Block256 for BlockIq4Xs {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        out.d = self.d.to_f32();
        let (groups, _) = self.qs.as_chunks::<16>();
        let (quants, _) = out.qs.as_chunks_mut::<32>();
        for (group, (codes, quants)) in groups.iter().zip(quants).enumerate() {
            *quants = nibbles(codes).map(|code| IQ4_VALUES[usize::from(code)]);
            out.scales[2 * group] = self.scale(group);
            out.scales[2 * group + 1] = self.scale(group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn codes_and_scales_by_hand() {
        let mut qs = [0x88; 16];
        qs[0] = 0xf0;
        let mut y = [0.0; 32];
        let d = f16::from_f32(0.5);
        BlockIq4Nl { d, qs }.decode(&mut y);
        assert_eq!((y[0], y[16], y[1]), (-63.5, 56.5, 0.5));
        // Group 0: low 15, high 2: 47 - 32 = 15. Group 7: low 1, high 3: 49 - 32 = 17. The others: -32.
        let block = BlockIq4Xs {
            d,
            scales_h: [0x02, 0xc0],
            scales_l: [0x0f, 0, 0, 0x10],
            qs: [0x88; 128],
        };
        let mut y = [0.0; 256];
        block.decode(&mut y);
        assert_eq!((y[0], y[32], y[255]), (7.5, -16.0, 8.5));
    }
}
