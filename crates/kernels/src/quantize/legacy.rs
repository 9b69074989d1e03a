//! Quantisation to the blocks of 32 with f16 scales: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

use half::f16;

use super::search::{Steps, scale_and_min, signed_max, symmetric_scale};
use super::{Encode, Importance, half_scale, inverse};
use crate::blocks::{
    BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, Q8_BLOCK, quantize_q8_0,
};

/// The smallest and the largest value.
fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, -f32::MAX), |(min, max), v| {
        (
            if *v < min { *v } else { min },
            if *v > max { *v } else { max },
        )
    })
}

/// Quants of the symmetric formats: 0 to `2 * half - 1`, with the scale that maps the largest value to `-half`.
fn symmetric(x: &[f32], half: f32) -> Option<(f16, [u8; Q8_BLOCK])> {
    let d = signed_max(x) / -half;
    let id = inverse(d);
    let top = (2.0 * half - 1.0) as u8;
    let mut qs = [0; Q8_BLOCK];
    for (q, v) in qs.iter_mut().zip(x) {
        *q = ((v * id + (half + 0.5)) as u8).min(top);
    }
    Some((half_scale(d)?, qs))
}

/// Quants of the formats with a minimum: 0 to `top`.
fn with_min(x: &[f32], top: u8) -> Option<(f16, f16, [u8; Q8_BLOCK])> {
    let (min, max) = range(x);
    let d = (max - min) / f32::from(top);
    let id = inverse(d);
    let mut qs = [0; Q8_BLOCK];
    for (q, v) in qs.iter_mut().zip(x) {
        *q = (((v - min) * id + 0.5) as u8).min(top);
    }
    Some((half_scale(d)?, half_scale(min)?, qs))
}

/// [`symmetric`] by a search, where errors do not count alike.
fn symmetric_weighted(
    x: &[f32],
    importance: Importance<'_>,
    half: i32,
) -> Option<(f16, [u8; Q8_BLOCK])> {
    let x = x.as_chunks::<Q8_BLOCK>().0.first()?;
    let weights = importance.weights(x, 0, importance.mean_square);
    let mut qs = [0; Q8_BLOCK];
    let d = symmetric_scale(x, &weights, &mut qs, half);
    Some((half_scale(d)?, qs))
}

/// [`with_min`] by a search, where errors do not count alike.
fn with_min_weighted(
    x: &[f32],
    importance: Importance<'_>,
    top: i32,
) -> Option<(f16, f16, [u8; Q8_BLOCK])> {
    let x = x.as_chunks::<Q8_BLOCK>().0.first()?;
    let weights = importance.weights(x, 0, importance.mean_square);
    let mut qs = [0; Q8_BLOCK];
    let (d, min) = scale_and_min(x, &weights, &mut qs, &Steps::weighted(top));
    Some((half_scale(d)?, half_scale(-min)?, qs))
}

fn low_bits(qs: &[u8; Q8_BLOCK]) -> [u8; 16] {
    std::array::from_fn(|j| qs[j] & 15 | (qs[j + 16] & 15) << 4)
}

fn fifth_bits(qs: &[u8; Q8_BLOCK]) -> [u8; 4] {
    let bits = qs.iter().enumerate();
    bits.fold(0, |word, (j, q)| word | u32::from(q >> 4 & 1) << j)
        .to_le_bytes()
}

impl BlockQ4_0 {
    fn of((d, qs): (f16, [u8; Q8_BLOCK])) -> Self {
        Self {
            d,
            qs: low_bits(&qs),
        }
    }
}

impl Encode for BlockQ4_0 {
    fn encode(x: &[f32]) -> Option<Self> {
        symmetric(x, 8.0).map(Self::of)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        symmetric_weighted(x, importance, 8).map(Self::of)
    }
}

impl BlockQ4_1 {
    fn of((d, m, qs): (f16, f16, [u8; Q8_BLOCK])) -> Self {
        Self {
            d,
            m,
            qs: low_bits(&qs),
        }
    }
}

impl Encode for BlockQ4_1 {
    fn encode(x: &[f32]) -> Option<Self> {
        with_min(x, 15).map(Self::of)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        with_min_weighted(x, importance, 15).map(Self::of)
    }
}

impl BlockQ5_0 {
    fn of((d, qs): (f16, [u8; Q8_BLOCK])) -> Self {
        Self {
            d,
            qh: fifth_bits(&qs),
            qs: low_bits(&qs),
        }
    }
}

impl Encode for BlockQ5_0 {
    fn encode(x: &[f32]) -> Option<Self> {
        symmetric(x, 16.0).map(Self::of)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        symmetric_weighted(x, importance, 16).map(Self::of)
    }
}

impl BlockQ5_1 {
    fn of((d, m, qs): (f16, f16, [u8; Q8_BLOCK])) -> Self {
        Self {
            d,
            m,
            qh: fifth_bits(&qs),
            qs: low_bits(&qs),
        }
    }
}

impl Encode for BlockQ5_1 {
    fn encode(x: &[f32]) -> Option<Self> {
        with_min(x, 31).map(Self::of)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        with_min_weighted(x, importance, 31).map(Self::of)
    }
}

impl Encode for BlockQ8_0 {
    fn encode(x: &[f32]) -> Option<Self> {
        let mut block = [Self::ZERO];
        quantize_q8_0(x, &mut block).then_some(block[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_block_is_reproduced() {
        // x[i] = (i - 16) / 8: the largest magnitude is -2, so d is 0.25 and q = 4 x + 8.5 truncated.
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) / 8.0).collect();
        let block = BlockQ4_0::encode(&x).unwrap();
        assert_eq!(block.d.to_bits(), 0x3400);
        let expected = [
            0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3, 0xc4, 0xc4, 0xd5, 0xd5, 0xe6, 0xe6, 0xf7,
            0xf7, 0xf8,
        ];
        assert_eq!(block.qs, expected);
    }

    #[test]
    fn minima_by_hand() {
        // From 1 to 16 in 15 steps of 1.
        let x: Vec<f32> = (0..32).map(|i| 1.0 + (i % 16) as f32).collect();
        let block = BlockQ4_1::encode(&x).unwrap();
        assert_eq!((block.d, block.m), (f16::ONE, f16::ONE));
        assert_eq!(block.qs[15], 0xff);
        // From 0 to 31 in steps of 1: the upper half has its fifth bit.
        let x: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let block = BlockQ5_1::encode(&x).unwrap();
        assert_eq!((block.qh, block.qs[3]), ([0, 0, 0xff, 0xff], 0x33));
        assert!(BlockQ4_1::encode(&[1e9; 32]).is_none());
    }
}
