//! Quantisation to IQ4_NL and IQ4_XS: codes of 16 uneven values.

use super::search::{ZERO_BELOW, nearest, signed_max, squares};
use super::{Encode, Importance, half_scale, sum_of_squares};
use crate::blocks::{BlockIq4Nl, BlockIq4Xs, IQ4_VALUES, Q8_BLOCK, SUPER_BLOCK};

/// Scales that are tried on either side of the one that maps the largest value to the first of the table.
const TRIES: i32 = 7;
/// Groups of a super-block.
const N_GROUPS: usize = SUPER_BLOCK / Q8_BLOCK;

/// The code whose value is nearest to `x`, the higher one when two are.
fn code(x: f32) -> u8 {
    let value = |at: usize| f32::from(IQ4_VALUES[at]);
    if x <= value(0) {
        return 0;
    }
    if x >= value(15) {
        return 15;
    }
    let above = (1..15).find(|at| x < value(*at)).unwrap_or(15);
    match x - value(above - 1) < value(above) - x {
        true => above as u8 - 1,
        false => above as u8,
    }
}

/// The scale that fits `x` with least weighted squared error.
fn scale_of(x: &[f32; Q8_BLOCK], weights: &[f32; Q8_BLOCK]) -> f32 {
    let max = signed_max(x);
    if max.abs() < ZERO_BELOW {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
        for (v, w) in x.iter().zip(weights) {
            let q = f32::from(IQ4_VALUES[usize::from(code(inverse * v))]);
            sum_xq += w * q * v;
            sum_qq += w * q * q;
        }
        (sum_xq, sum_qq)
    };
    let first = i32::from(IQ4_VALUES[0]);
    let (sum_xq, sum_qq) = sums(1.0 / (-max / first as f32));
    let mut scale = if sum_qq > 0.0 { sum_xq / sum_qq } else { 0.0 };
    let mut best = scale * sum_xq;
    for step in -TRIES..=TRIES {
        let (sum_xq, sum_qq) = sums((step + first) as f32 / max);
        if sum_qq > 0.0 && sum_xq * sum_xq > best * sum_qq {
            scale = sum_xq / sum_qq;
            best = scale * sum_xq;
        }
    }
    scale
}

/// How much errors count: by squares, or by importance and magnitude.
fn weights_of(
    x: &[f32; Q8_BLOCK],
    importance: Option<Importance<'_>>,
    (from, floor): (usize, f32),
) -> [f32; Q8_BLOCK] {
    match importance {
        Some(importance) => importance.weights(x, from, floor),
        None => squares(x),
    }
}

/// `1 / scale`, or 0 of 0.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Codes of `x`, two a byte: `j` and `j + 16`.
fn codes(x: &[f32; Q8_BLOCK], inverse: f32) -> [u8; 16] {
    let codes = x.map(|v| code(inverse * v));
    std::array::from_fn(|j| codes[j] | codes[j + 16] << 4)
}

fn one(x: &[f32], importance: Option<Importance<'_>>) -> Option<BlockIq4Nl> {
    let floor = sum_of_squares(x) * (2.0 / Q8_BLOCK as f32);
    let x = x.as_chunks::<Q8_BLOCK>().0.first()?;
    let scale = scale_of(x, &weights_of(x, importance, (0, floor)));
    Some(BlockIq4Nl {
        d: half_scale(scale)?,
        qs: codes(x, inverse(scale)),
    })
}

fn eight(x: &[f32], importance: Option<Importance<'_>>) -> Option<BlockIq4Xs> {
    let floor = sum_of_squares(x) * (2.0 / SUPER_BLOCK as f32);
    let groups = x.as_chunks::<Q8_BLOCK>().0;
    let mut scales = [0.0; N_GROUPS];
    for (at, (x, scale)) in groups.iter().zip(&mut scales).enumerate() {
        let weights = weights_of(x, importance, (Q8_BLOCK * at, floor));
        *scale = scale_of(x, &weights);
    }
    let d = -signed_max(&scales) / 32.0;
    let by = inverse(d);
    let mut block = BlockIq4Xs {
        d: half_scale(d)?,
        scales_h: [0; 2],
        scales_l: [0; 4],
        qs: [0; 128],
    };
    let quants = block.qs.as_chunks_mut::<16>().0;
    let mut high = 0u16;
    for (at, (x, qs)) in groups.iter().zip(quants).enumerate() {
        let scale = nearest(by * scales[at]).clamp(-32, 31);
        *qs = codes(x, inverse(d * scale as f32));
        let stored = (scale + 32) as u8;
        block.scales_l[at / 2] |= (stored & 15) << (4 * (at % 2));
        high |= u16::from(stored >> 4) << (2 * at);
    }
    block.scales_h = high.to_le_bytes();
    Some(block)
}

impl Encode for BlockIq4Nl {
    fn encode(x: &[f32]) -> Option<Self> {
        one(x, None)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        one(x, Some(importance))
    }
}

impl Encode for BlockIq4Xs {
    fn encode(x: &[f32]) -> Option<Self> {
        eight(x, None)
    }

    fn encode_weighted(x: &[f32], importance: Importance<'_>) -> Option<Self> {
        eight(x, Some(importance))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::Block;

    #[test]
    fn codes_are_the_nearest() {
        for (at, value) in IQ4_VALUES.iter().enumerate() {
            assert_eq!(usize::from(code(f32::from(*value))), at);
        }
        // Between -10 and 1 the middle is -4.5, which goes up.
        assert_eq!((code(-4.6), code(-4.5), code(-4.4)), (7, 8, 8));
        assert_eq!((code(-1e9), code(1e9), code(101.0)), (0, 15, 15));
    }

    #[test]
    fn what_lies_on_the_table_comes_back() {
        // Both signs of the scale: the largest magnitude is the table's first, which is negative.
        for sign in [0.5f32, -0.5] {
            let x: [f32; 32] = std::array::from_fn(|i| sign * f32::from(IQ4_VALUES[i % 16]));
            let mut y = [0.0; 32];
            BlockIq4Nl::encode(&x).unwrap().decode(&mut y);
            assert_eq!(x, y);
        }
        let mut y = [1.0; 256];
        BlockIq4Xs::encode(&[0.0; 256]).unwrap().decode(&mut y);
        assert_eq!(y, [0.0; 256]);
    }
}
