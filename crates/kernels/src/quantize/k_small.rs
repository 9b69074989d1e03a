//! Quantisation to the super-blocks Q2_K and Q3_K.

use half::f16;

use super::search::{
    Steps, nearest, positive_scale, scale_and_min, signed_max, symmetric_scale,
    symmetric_scale_by_moves,
};
use super::{Encode, Importance, half_scale, sum_of_squares};
use crate::blocks::{BlockQ2K, BlockQ3K, N_SCALES, SUB_BLOCK, SUPER_BLOCK};

/// Largest 4-bit scale of Q2_K.
const TOP_SCALE: i32 = 15;
/// Half of the range of Q3_K's quants, and of its scales.
const HALF: i32 = 4;
const HALF_SCALES: i32 = 32;

/// One quant a byte.
type Quants = [[u8; SUB_BLOCK]; N_SCALES];

/// The lower two bits of four values to a byte: weight `l + 32 j` of 128 is bits `2j` of byte `l`.
fn two_bits(qs: &Quants) -> [u8; 64] {
    let qs = qs.as_flattened();
    std::array::from_fn(|at| {
        let first = at / 32 * 128 + at % 32;
        (0..4).fold(0, |byte, j| byte | (qs[first + 32 * j] & 3) << (2 * j))
    })
}

/// Q2_K of scales, minima and the quants of the search.
fn with_min(x: &[f32], mut qs: Quants, scales: [u8; N_SCALES], (d, dmin): (f16, f16)) -> BlockQ2K {
    let groups = x.as_chunks::<SUB_BLOCK>().0;
    for ((x, qs), scale) in groups.iter().zip(&mut qs).zip(scales) {
        let (scale, min) = (
            d.to_f32() * f32::from(scale & 15),
            dmin.to_f32() * f32::from(scale >> 4),
        );
        // A group whose scale is stored as zero keeps the quants of the search.
        if scale != 0.0 {
            *qs = x.map(|v| nearest((v + min) / scale).clamp(0, 3) as u8);
        }
    }
    BlockQ2K {
        scales,
        qs: two_bits(&qs),
        d,
        dmin,
    }
}

impl Encode for BlockQ2K {
    fn encode(x: &[f32]) -> Option<Self> {
        let steps = Steps {
            top: 3,
            first: -0.5,
            delta: 0.1,
            last: 15,
            absolute: true,
        };
        let mut qs: Quants = [[0; SUB_BLOCK]; N_SCALES];
        let (mut scales, mut mins) = ([0.0f32; N_SCALES], [0.0f32; N_SCALES]);
        for (j, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            (scales[j], mins[j]) = scale_and_min(x, &x.map(f32::abs), &mut qs[j], &steps);
        }
        let largest = |values: &[f32]| {
            let larger = |max: f32, v: &f32| if *v > max { *v } else { max };
            values.iter().fold(0.0, larger)
        };
        let (max_scale, max_min) = (largest(&scales), largest(&mins));
        let top = TOP_SCALE as f32;
        let four_bits = |value: f32, max: f32| match max > 0.0 {
            true => nearest(top / max * value) as u8,
            false => 0,
        };
        let packed = std::array::from_fn(|j| {
            four_bits(scales[j], max_scale) | four_bits(mins[j], max_min) << 4
        });
        let ds = (half_scale(max_scale / top)?, half_scale(max_min / top)?);
        Some(with_min(x, qs, packed, ds))
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        let floor = sum_of_squares(x) / SUPER_BLOCK as f32;
        let mut qs: Quants = [[0; SUB_BLOCK]; N_SCALES];
        let mut sums = [0.0; N_SCALES];
        let (mut scales, mut mins) = ([0.0; N_SCALES], [0.0; N_SCALES]);
        for (j, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            let weights = importance.weights(x, SUB_BLOCK * j, floor);
            sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            (scales[j], mins[j]) = scale_and_min(x, &weights, &mut qs[j], &Steps::weighted(3));
        }
        let (mut four_scales, mut four_mins) = ([0; N_SCALES], [0; N_SCALES]);
        let d = positive_scale(&scales, &sums, &mut four_scales, TOP_SCALE);
        let dmin = positive_scale(&mins, &sums, &mut four_mins, TOP_SCALE);
        let packed = std::array::from_fn(|j| four_scales[j] | four_mins[j] << 4);
        Some(with_min(x, qs, packed, (half_scale(d)?, half_scale(dmin)?)))
    }
}

/// Six bits of every scale, as [`BlockQ3K`] holds them.
fn pack(scales: &[u8; N_SCALES]) -> [u8; 12] {
    std::array::from_fn(|at| match at {
        0..8 => scales[at] & 15 | (scales[at + 8] & 15) << 4,
        _ => (0..4).fold(0, |byte, j| byte | scales[at - 8 + 4 * j] >> 4 << (2 * j)),
    })
}

/// Q3_K of scales, which are 32 more than what they stand for, and the quants of the search.
fn without_min(x: &[f32], mut qs: Quants, scales: [u8; N_SCALES], d: f16) -> BlockQ3K {
    let groups = x.as_chunks::<SUB_BLOCK>().0;
    for ((x, qs), scale) in groups.iter().zip(&mut qs).zip(scales) {
        let scale = d.to_f32() * (i32::from(scale) - HALF_SCALES) as f32;
        if scale != 0.0 {
            *qs = x.map(|v| (nearest(v / scale).clamp(-HALF, HALF - 1) + HALF) as u8);
        }
    }
    let flat = qs.as_flattened();
    let third_bits = |l: usize| (0..8).fold(0, |byte, j| byte | (flat[l + 32 * j] >> 2) << j);
    BlockQ3K {
        hmask: std::array::from_fn(third_bits),
        qs: two_bits(&qs),
        scales: pack(&scales),
        d,
    }
}

impl Encode for BlockQ3K {
    fn encode(x: &[f32]) -> Option<Self> {
        let mut qs: Quants = [[0; SUB_BLOCK]; N_SCALES];
        let mut scales = [0.0; N_SCALES];
        for (j, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            scales[j] = symmetric_scale_by_moves(x, &mut qs[j], HALF);
        }
        let max = signed_max(&scales);
        if max == 0.0 {
            return Some(without_min(x, qs, [0; N_SCALES], f16::ZERO));
        }
        let inverse = -HALF_SCALES as f32 / max;
        let six_bits = |scale: f32| {
            let rounded = nearest(inverse * scale);
            (rounded.clamp(-HALF_SCALES, HALF_SCALES - 1) + HALF_SCALES) as u8
        };
        let d = half_scale(1.0 / inverse)?;
        Some(without_min(x, qs, scales.map(six_bits), d))
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        let floor = 2.0 * sum_of_squares(x) / SUPER_BLOCK as f32;
        let mut qs: Quants = [[0; SUB_BLOCK]; N_SCALES];
        let (mut sums, mut scales) = ([0.0; N_SCALES], [0.0; N_SCALES]);
        for (j, x) in x.as_chunks::<SUB_BLOCK>().0.iter().enumerate() {
            let weights = importance.weights(x, SUB_BLOCK * j, floor);
            sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            scales[j] = symmetric_scale(x, &weights, &mut qs[j], HALF);
        }
        let mut six_bits = [0; N_SCALES];
        let d = symmetric_scale(&scales, &sums, &mut six_bits, HALF_SCALES);
        Some(without_min(x, qs, six_bits, half_scale(d)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;
    use crate::format::Format;

    #[test]
    fn packed_scales_come_back() {
        let scales = std::array::from_fn(|j| (j * 23 % 64) as u8);
        let block = BlockQ3K {
            hmask: [0; 32],
            qs: [0; 64],
            scales: pack(&scales),
            d: f16::ONE,
        };
        let mut y = [0.0; SUPER_BLOCK];
        block.decode(&mut y);
        for (group, scale) in y.as_chunks::<SUB_BLOCK>().0.iter().zip(scales) {
            assert_eq!(group[0], -4.0 * (f32::from(scale) - 32.0));
        }
    }

    #[test]
    fn few_bits_lose_as_much_as_their_steps_say() {
        let x = crate::samples::noise(SUPER_BLOCK, 3);
        let loss = |format: Format| {
            let y = format.decode(&format.encode(&x).unwrap());
            let squares = x.iter().zip(&y).map(|(a, b)| (a - b) * (a - b));
            (squares.sum::<f32>() / x.iter().map(|v| v * v).sum::<f32>()).sqrt()
        };
        // Steps of 2/3 and 2/7 of uniform noise in -1..1: see `k_quants`. Sixteen values seldom span all of it.
        for (format, step) in [(Format::Q2K, 2.0 / 3.0), (Format::Q3K, 2.0 / 7.0)] {
            let loss = loss(format);
            assert!(loss < 0.55 * step && loss > 0.3 * step, "{format}: {loss}");
        }
    }
}
