//! Quantisation to the super-blocks Q4_K, Q5_K and Q6_K.

use half::f16;

use super::search::{
    Steps, ZERO_BELOW, nearest, positive_scale, scale_and_min, squares, symmetric_scale,
};
use super::{Encode, Importance, half_scale, sum_of_squares};
use crate::blocks::{BlockQ4K, BlockQ5K, BlockQ6K, N_SCALES, SUPER_BLOCK, scale_and_min_of};

/// Groups of 32 in a super-block.
const N_GROUPS: usize = 8;
/// Largest 6-bit scale.
const TOP_SCALE: f32 = 63.0;

/// What Q4_K and Q5_K share: scales, and one quant a byte.
struct WithMin {
    d: f16,
    dmin: f16,
    scales: [u8; 12],
    qs: [[u8; 32]; N_GROUPS],
}

/// The larger of the values and 0.
fn positive_max(values: &[f32; N_GROUPS]) -> f32 {
    values
        .iter()
        .fold(0.0, |max, v| if *v > max { *v } else { max })
}

/// Six bits of every scale and minimum, as [`scale_and_min_of`] reads them.
fn pack(scales: &[u8; N_GROUPS], mins: &[u8; N_GROUPS]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        let (scale, min) = (scales[j + 4], mins[j + 4]);
        packed[j] = scales[j] | scale >> 4 << 6;
        packed[j + 4] = mins[j] | min >> 4 << 6;
        packed[j + 8] = scale & 15 | (min & 15) << 4;
    }
    packed
}

/// The search of the reference quantisers: a value counts by its magnitude plus its group's root mean square.
fn with_min(x: &[f32], steps: &Steps) -> Option<WithMin> {
    let groups = x.as_chunks::<32>().0;
    let mut qs = [[0; 32]; N_GROUPS];
    let (mut scales, mut mins) = ([0.0; N_GROUPS], [0.0; N_GROUPS]);
    for (j, x) in groups.iter().enumerate() {
        let root_mean_square = (sum_of_squares(x) / 32.0).sqrt();
        let weights = x.map(|v| root_mean_square + v.abs());
        (scales[j], mins[j]) = scale_and_min(x, &weights, &mut qs[j], steps);
    }
    let (max_scale, max_min) = (positive_max(&scales), positive_max(&mins));
    let inverse = |max: f32| if max > 0.0 { TOP_SCALE / max } else { 0.0 };
    let six_bits = |value: f32, inverse: f32| (nearest(inverse * value) as u8).min(63);
    let packed = pack(
        &scales.map(|scale| six_bits(scale, inverse(max_scale))),
        &mins.map(|min| six_bits(min, inverse(max_min))),
    );
    let ds = (
        half_scale(max_scale / TOP_SCALE)?,
        half_scale(max_min / TOP_SCALE)?,
    );
    Some(rounded(groups, qs, (packed, ds), steps.top))
}

/// The search where errors do not count alike: scales and minima are fitted too, each group by what it counts in all.
fn with_min_weighted(x: &[f32], importance: Importance<'_>, top: i32) -> Option<WithMin> {
    let groups = x.as_chunks::<32>().0;
    let floor = 2.0 * sum_of_squares(x) / SUPER_BLOCK as f32;
    let mut qs = [[0; 32]; N_GROUPS];
    let mut sums = [0.0; N_GROUPS];
    let (mut scales, mut mins) = ([0.0; N_GROUPS], [0.0; N_GROUPS]);
    for (j, x) in groups.iter().enumerate() {
        let weights = importance.weights(x, 32 * j, floor);
        sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
        (scales[j], mins[j]) = scale_and_min(x, &weights, &mut qs[j], &Steps::weighted(top));
    }
    let (mut six_scales, mut six_mins) = ([0; N_GROUPS], [0; N_GROUPS]);
    let d = positive_scale(&scales, &sums, &mut six_scales, TOP_SCALE as i32);
    let dmin = positive_scale(&mins, &sums, &mut six_mins, TOP_SCALE as i32);
    let packed = pack(&six_scales, &six_mins);
    Some(rounded(
        groups,
        qs,
        (packed, (half_scale(d)?, half_scale(dmin)?)),
        top,
    ))
}

/// Quants again, by the scales as they are stored. A group whose scale is stored as zero keeps those of the search.
fn rounded(
    groups: &[[f32; 32]],
    mut qs: [[u8; 32]; N_GROUPS],
    (scales, (d, dmin)): ([u8; 12], (f16, f16)),
    top: i32,
) -> WithMin {
    for (j, (x, qs)) in groups.iter().zip(&mut qs).enumerate() {
        let (scale, min) = scale_and_min_of(&scales, j);
        let (scale, min) = (
            d.to_f32() * f32::from(scale),
            dmin.to_f32() * f32::from(min),
        );
        if scale != 0.0 {
            *qs = x.map(|v| nearest((v + min) / scale).clamp(0, top) as u8);
        }
    }
    WithMin {
        d,
        dmin,
        scales,
        qs,
    }
}

/// The lower four bits of two groups to a byte.
fn low_bits(qs: &[[u8; 32]; N_GROUPS]) -> [u8; 128] {
    std::array::from_fn(|i| {
        let (pair, l) = (2 * (i / 32), i % 32);
        qs[pair][l] & 15 | (qs[pair + 1][l] & 15) << 4
    })
}

impl BlockQ4K {
    fn of(block: &WithMin) -> Self {
        Self {
            d: block.d,
            dmin: block.dmin,
            scales: block.scales,
            qs: low_bits(&block.qs),
        }
    }
}

impl Encode for BlockQ4K {
    fn encode(x: &[f32]) -> Option<Self> {
        let steps = Steps {
            top: 15,
            first: -1.0,
            delta: 0.1,
            last: 20,
            absolute: false,
        };
        Some(Self::of(&with_min(x, &steps)?))
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        Some(Self::of(&with_min_weighted(x, importance, 15)?))
    }
}

impl BlockQ5K {
    fn of(block: &WithMin) -> Self {
        let fifth_bits = |l: usize| {
            let groups = block.qs.iter().enumerate();
            groups.fold(0, |byte, (j, qs)| byte | (qs[l] >> 4) << j)
        };
        Self {
            d: block.d,
            dmin: block.dmin,
            scales: block.scales,
            qh: std::array::from_fn(fifth_bits),
            qs: low_bits(&block.qs),
        }
    }
}

impl Encode for BlockQ5K {
    fn encode(x: &[f32]) -> Option<Self> {
        let steps = Steps {
            top: 31,
            first: -0.5,
            delta: 0.1,
            last: 15,
            absolute: false,
        };
        Some(Self::of(&with_min(x, &steps)?))
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        Some(Self::of(&with_min_weighted(x, importance, 31)?))
    }
}

/// Q6_K, where `weights` says how much the errors of a group, by its index and its values, count.
fn six_bits(x: &[f32], weights: impl Fn(usize, &[f32; 16]) -> [f32; 16]) -> Option<BlockQ6K> {
    const HALF: i32 = 32;
    let groups = x.as_chunks::<16>().0;
    let mut qs = [[0; 16]; N_SCALES];
    let mut scales = [0.0; N_SCALES];
    let mut max = 0.0f32;
    for (j, x) in groups.iter().enumerate() {
        scales[j] = symmetric_scale(x, &weights(j, x), &mut qs[j], HALF);
        if scales[j].abs() > max.abs() {
            max = scales[j];
        }
    }
    if max.abs() < ZERO_BELOW {
        return Some(BlockQ6K {
            ql: [0; 128],
            qh: [0; 64],
            scales: [0; N_SCALES],
            d: f16::ZERO,
        });
    }
    let inverse = -128.0 / max;
    let d = half_scale(1.0 / inverse)?;
    let scales = scales.map(|scale| nearest(inverse * scale).min(127) as i8);
    for ((x, qs), scale) in groups.iter().zip(&mut qs).zip(scales) {
        let scale = d.to_f32() * f32::from(scale);
        if scale != 0.0 {
            *qs = x.map(|v| (nearest(v / scale).clamp(-HALF, HALF - 1) + HALF) as u8);
        }
    }
    Some(pack_six_bits(qs.as_flattened(), scales, d))
}

impl Encode for BlockQ6K {
    fn encode(x: &[f32]) -> Option<Self> {
        six_bits(x, |_, x| squares(x))
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        // The importance as it is, not times magnitudes: so does ggml.
        six_bits(x, |j, _| std::array::from_fn(|l| importance.of[16 * j + l]))
    }
}

fn pack_six_bits(qs: &[u8], scales: [i8; N_SCALES], d: f16) -> BlockQ6K {
    let mut block = BlockQ6K {
        ql: [0; 128],
        qh: [0; 64],
        scales,
        d,
    };
    for (half, qs) in qs.chunks_exact(SUPER_BLOCK / 2).enumerate() {
        for l in 0..32 {
            let four: [u8; 4] = std::array::from_fn(|j| qs[l + 32 * j]);
            block.ql[64 * half + l] = four[0] & 15 | (four[2] & 15) << 4;
            block.ql[64 * half + l + 32] = four[1] & 15 | (four[3] & 15) << 4;
            let high = four.iter().enumerate();
            block.qh[32 * half + l] = high.fold(0, |byte, (j, q)| byte | q >> 4 << (2 * j));
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn packed_scales_come_back() {
        let scales = [0, 63, 17, 40, 62, 1, 33, 63];
        let mins = [63, 5, 32, 0, 48, 15, 16, 63];
        let packed = pack(&scales, &mins);
        for j in 0..N_GROUPS {
            assert_eq!(scale_and_min_of(&packed, j), (scales[j], mins[j]));
        }
    }

    fn round_trip<B: Encode>(x: &[f32]) -> f32 {
        let mut y = vec![0.0; x.len()];
        B::encode(x).unwrap().decode(&mut y);
        let squares = x.iter().zip(&y).map(|(a, b)| (a - b) * (a - b));
        (squares.sum::<f32>() / x.iter().map(|v| v * v).sum::<f32>()).sqrt()
    }

    #[test]
    fn more_bits_lose_less() {
        let x = crate::samples::noise(256, 3);
        let losses = [
            round_trip::<BlockQ4K>(&x),
            round_trip::<BlockQ5K>(&x),
            round_trip::<BlockQ6K>(&x),
        ];
        // Steps of 2/15, 2/31 and 1/32 of uniform noise in -1..1, whose root mean square is 1/sqrt(3):
        // step / sqrt(12) * sqrt(3) = step / 2.
        for (loss, step) in losses.into_iter().zip([2.0 / 15.0, 2.0 / 31.0, 1.0 / 32.0]) {
            assert!(loss < 0.55 * step && loss > 0.35 * step, "{losses:?}");
        }
    }

    #[test]
    fn zeros_and_what_does_not_fit() {
        for x in [[0.0; 256], [1e-20; 256]] {
            let mut y = [1.0; 256];
            BlockQ6K::encode(&x).unwrap().decode(&mut y);
            assert_eq!(y, [0.0; 256]);
        }
        assert!(BlockQ4K::encode(&[-1e9; 256]).is_none());
        assert!(BlockQ6K::encode(&[1e12; 256]).is_none());
    }
}
