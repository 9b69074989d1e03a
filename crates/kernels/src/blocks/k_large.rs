//! Q4_K, Q5_K and Q6_K: super-blocks of four to six bits.

use half::f16;

use super::{ActQ8K, Block256, N_SCALES, Quants256, block};

/// `d * scale * q - dmin * min`, with a 6-bit scale and minimum per 32 weights.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ4K {
    pub(crate) d: f16,
    pub(crate) dmin: f16,
    /// See [`scales_and_mins`].
    pub(crate) scales: [u8; 12],
    /// Per 64 weights 32 bytes: the first 32 weights in the low halves, the next in the high halves.
    pub(crate) qs: [u8; 128],
}

/// As [`BlockQ4K`], with the fifth bits apart.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ5K {
    pub(crate) d: f16,
    pub(crate) dmin: f16,
    pub(crate) scales: [u8; 12],
    /// Bit `j` of byte `l` is the fifth bit of weight `l + 32 j`.
    pub(crate) qh: [u8; 32],
    pub(crate) qs: [u8; 128],
}

/// `d * scale * (q - 32)`, with an 8-bit scale per 16 weights.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct BlockQ6K {
    /// Lower four bits. Per 128 weights 64 bytes: the first 64 weights in the low halves, the next in the high halves.
    pub(crate) ql: [u8; 128],
    /// Upper two bits. Per 128 weights 32 bytes; weight `l + 32 j` has bits `2j` of byte `l`.
    pub(crate) qh: [u8; 64],
    pub(crate) scales: [i8; N_SCALES],
    pub(crate) d: f16,
}

block!(BlockQ4K, of_256, 144, |block| block.d.is_finite()
    && block.dmin.is_finite());
block!(BlockQ5K, of_256, 176, |block| block.d.is_finite()
    && block.dmin.is_finite());
block!(BlockQ6K, of_256, 210, |block| block.d.is_finite());

/// The 6-bit scale and minimum of group `j` of eight, packed in 12 bytes.
///
/// The first four scales and minima are the low six bits of bytes 0 to 7; the others have their lower four bits in
/// bytes 8 to 11 and their upper two in the top of bytes 0 to 7.
#[inline(always)]
pub(crate) fn scale_and_min_of(packed: &[u8; 12], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    }
}

/// [`scale_and_min_of`] for all groups, four at a time.
#[inline(always)]
fn scales_and_mins(packed: &[u8; 12], out: &mut Quants256) {
    const LOW_4: u32 = 0x0f0f_0f0f;
    const LOW_6: u32 = 0x3f3f_3f3f;
    let [a, b, c] =
        std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| packed[4 * i + j])));
    let top = |word: u32| (word >> 2) & (LOW_6 ^ LOW_4);
    let scales = u64::from(a & LOW_6) | u64::from(c & LOW_4 | top(a)) << 32;
    let mins = u64::from(b & LOW_6) | u64::from((c >> 4) & LOW_4 | top(b)) << 32;
    let (scales, mins) = (scales.to_le_bytes(), mins.to_le_bytes());
    for j in 0..8 {
        out.scales[2 * j] = i16::from(scales[j]);
        out.scales[2 * j + 1] = i16::from(scales[j]);
        out.mins[2 * j] = i16::from(mins[j]);
        out.mins[2 * j + 1] = i16::from(mins[j]);
    }
}

impl Block256 for BlockQ4K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        (out.d, out.dmin) = (self.d.to_f32(), self.dmin.to_f32());
        scales_and_mins(&self.scales, out);
        let (groups, _) = self.qs.as_chunks::<32>();
        let (runs, _) = out.qs.as_chunks_mut::<64>();
        for (run, group) in runs.iter_mut().zip(groups) {
            for l in 0..32 {
                run[l] = (group[l] & 15) as i8;
                run[l + 32] = (group[l] >> 4) as i8;
            }
        }
    }
}

impl Block256 for BlockQ5K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        (out.d, out.dmin) = (self.d.to_f32(), self.dmin.to_f32());
        scales_and_mins(&self.scales, out);
        let (groups, _) = self.qs.as_chunks::<32>();
        let (runs, _) = out.qs.as_chunks_mut::<64>();
        for (at, (run, group)) in runs.iter_mut().zip(groups).enumerate() {
            for l in 0..32 {
                let high = self.qh[l] >> (2 * at);
                run[l] = (group[l] & 15 | (high & 1) << 4) as i8;
                run[l + 32] = (group[l] >> 4 | (high & 2) << 3) as i8;
            }
        }
    }
}

impl Block256 for BlockQ6K {
    const PRODUCT_ERROR: f64 = ActQ8K::PRODUCT_ERROR;
    const OFFSET: i8 = 32;

    #[inline(always)]
    fn unpack(&self, out: &mut Quants256) {
        out.d = self.d.to_f32();
        out.scales = self.scales.map(i16::from);
        let (low, _) = self.ql.as_chunks::<32>();
        let (high, _) = self.qh.as_chunks::<32>();
        let (runs, _) = out.qs.as_chunks_mut::<32>();
        for (at, run) in runs.iter_mut().enumerate() {
            let (half, j) = (at / 4, at % 4);
            let (low, high) = (&low[2 * half + j % 2], &high[half]);
            *run = std::array::from_fn(|l| {
                (low[l] >> (4 * (j / 2)) & 15 | (high[l] >> (2 * j) & 3) << 4) as i8
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    fn pattern<const N: usize>(step: usize, start: usize) -> [u8; N] {
        std::array::from_fn(|i| (step * i + start) as u8)
    }

    #[test]
    fn packed_scales_as_in_the_specification() {
        let packed = pattern(17, 5);
        let expected = [
            (5, 9),
            (22, 26),
            (39, 43),
            (56, 60),
            (13, 24),
            (14, 25),
            (15, 26),
            (0, 28),
        ];
        for (j, expected) in expected.into_iter().enumerate() {
            assert_eq!(scale_and_min_of(&packed, j), expected, "{j}");
        }
    }

    #[test]
    fn super_blocks_as_in_the_specification() {
        let (d, dmin) = (f16::from_f32(0.5), f16::from_f32(0.25));
        let (scales, qs) = (pattern(17, 5), pattern(7, 3));
        let mut y = [0.0; 256];
        BlockQ4K {
            d,
            dmin,
            scales,
            qs,
        }
        .decode(&mut y);
        assert_eq!(y[..4], [5.25, 22.75, 0.25, 17.75]);
        assert_eq!(y[32..36], [-6.5, -6.5, 4.5, 4.5]);
        assert_eq!(y[128..132], [13.5, 59.0, 0.5, 46.0]);
        assert_eq!((y[255], y.iter().sum()), (-7.0, 16840.0));
        let qh = pattern(13, 1);
        BlockQ5K {
            d,
            dmin,
            scales,
            qh,
            qs,
        }
        .decode(&mut y);
        assert_eq!(y[..4], [45.25, 22.75, 40.25, 17.75]);
        assert_eq!(y[32..36], [-6.5, 169.5, 180.5, 4.5]);
        assert_eq!((y[255], y.iter().sum()), (-7.0, 37376.0));
        let block = BlockQ6K {
            ql: pattern(7, 3),
            qh: pattern(13, 1),
            scales: pattern(11, 2).map(|s: u8| s as i8),
            d,
        };
        block.decode(&mut y);
        assert_eq!(y[..4], [-13.0, 10.0, 17.0, -24.0]);
        assert_eq!(y[32..36], [-348.0, 312.0, 12.0, 96.0]);
        assert_eq!(y[64..68], [-736.0, -736.0, -345.0, 23.0]);
        assert_eq!((y[255], y.iter().sum()), (1112.5, -14840.0));
    }
}
