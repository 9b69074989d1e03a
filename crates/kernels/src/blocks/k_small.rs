//! Q2_K and Q3_K: super-blocks of two and three bits.

use half::f16;

use super::{ActQ8K, Block256, N_SCALES, Quants256, block};

/// `d * scale * q - dmin * min`, with a 4-bit scale and minimum per 16 weights.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ2K {
    /// Scale in the low half, minimum in the high half.
    pub(crate) scales: [u8; N_SCALES],
    /// Per 128 weights 32 bytes; weight `l + 32 j` is bits `2j` of byte `l`.
    pub(crate) qs: [u8; 64],
    pub(crate) d: f16,
    pub(crate) dmin: f16,
}

/// `d * (scale - 32) * (q - 4)`, with a 6-bit scale per 16 weights.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ3K {
    /// Third bits: bit `j` of byte `l` belongs to weight `l + 32 j`.
    pub(crate) hmask: [u8; 32],
    /// Lower two bits, as in Q2_K.
    pub(crate) qs: [u8; 64],
    /// Lower halves of the 16 scales in the first 8 bytes, upper two bits in the last 4.
    pub(crate) scales: [u8; 12],
    pub(crate) d: f16,
}

block!(BlockQ2K, of_256, 84, |block| block.d.is_finite()
    && block.dmin.is_finite());
block!(BlockQ3K, of_256, 110, |block| block.d.is_finite());

impl Block256 for BlockQ2K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        (out.d, out.dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (halves, _) = self.qs.as_chunks::<32>();
        let (runs, _) = out.qs.as_chunks_mut::<128>();
        for (run, half) in runs.iter_mut().zip(halves) {
            for l in 0..32 {
                run[l] = (half[l] & 3) as i8;
                run[l + 32] = (half[l] >> 2 & 3) as i8;
                run[l + 64] = (half[l] >> 4 & 3) as i8;
                run[l + 96] = (half[l] >> 6) as i8;
            }
        }
        out.scales = self.scales.map(|s| i16::from(s & 15));
        out.mins = self.scales.map(|s| i16::from(s >> 4));
    }
}

impl BlockQ3K {
    /// The 16 scales, -32..=31.
    #[inline(always)]
    fn unpack_scales(&self) -> [i16; N_SCALES] {
        const LOW_4: u32 = 0x0f0f_0f0f;
        const BITS_4_5: u32 = 0x3030_3030;
        let [a, b, c] = std::array::from_fn(|i| {
            u32::from_le_bytes(std::array::from_fn(|j| self.scales[4 * i + j]))
        });
        let words = [
            a & LOW_4 | (c << 4) & BITS_4_5,
            b & LOW_4 | (c << 2) & BITS_4_5,
            (a >> 4) & LOW_4 | c & BITS_4_5,
            (b >> 4) & LOW_4 | (c >> 2) & BITS_4_5,
        ];
        let bytes = words.map(u32::to_le_bytes);
        std::array::from_fn(|at| i16::from(bytes[at / 4][at % 4]) - 32)
    }
}

impl Block256 for BlockQ3K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const OFFSET: i8 = 4;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        out.d = self.d.to_f32();
        let (halves, _) = self.qs.as_chunks::<32>();
        let (runs, _) = out.qs.as_chunks_mut::<128>();
        for (at, (run, half)) in runs.iter_mut().zip(halves).enumerate() {
            for l in 0..32 {
                let (low, high) = (half[l], self.hmask[l] >> (4 * at));
                run[l] = (low & 3 | (high & 1) << 2) as i8;
                run[l + 32] = (low >> 2 & 3 | (high & 2) << 1) as i8;
                run[l + 64] = (low >> 4 & 3 | high & 4) as i8;
                run[l + 96] = (low >> 6 | (high & 8) >> 1) as i8;
            }
        }
        out.scales = self.unpack_scales();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn two_bits_as_in_the_specification() {
        let block = BlockQ2K {
            scales: std::array::from_fn(|i| (17 * i + 5) as u8),
            qs: std::array::from_fn(|i| (7 * i + 3) as u8),
            d: f16::from_f32(0.5),
            dmin: f16::from_f32(0.25),
        };
        let mut y = [0.0; 256];
        block.decode(&mut y);
        assert_eq!(y[..4], [7.5, 5.0, 2.5, 0.0]);
        assert_eq!(y[16..20], [8.75, 5.75, 2.75, -0.25]);
        assert_eq!((y[255], y.iter().sum()), (4.0, 936.0));
    }

    #[test]
    fn three_bits_by_hand() {
        let mut block = BlockQ3K {
            hmask: [0xff; 32],
            qs: [0; 64],
            scales: [0; 12],
            d: f16::from_f32(0.5),
        };
        // Weight 0 lacks its third bit: 0 - 4; weight 1 has it and lower bits 3: 7 - 4.
        block.hmask[0] = 0xfe;
        block.qs[1] = 3;
        // Scale 0: low 5, high 2: 37 - 32 = 5. Scale 15: low 1, high 3: 49 - 32 = 17.
        block.scales[0] = 0x05;
        block.scales[8] = 0x02;
        block.scales[7] = 0x10;
        block.scales[11] = 0xc0;
        block.qs[63] = 0x40;
        let mut y = [0.0; 256];
        block.decode(&mut y);
        assert_eq!((y[0], y[1], y[2], y[255]), (-10.0, 7.5, 0.0, 8.5));
    }
}
