//! The weighted searches for scales that the super-blocks of ggml are made by.
//!
//! Sums run in order of the values and products associate from the left: that is what makes the bytes come out.

/// A group whose magnitudes stay below this is all zeros.
pub(super) const ZERO_BELOW: f32 = 1e-15;

/// The nearest integer, halves to even, by the addition of a number whose last bit is worth 1.
///
/// Beyond 2^22 the result is not near, and still the one of ggml's files.
pub(super) fn nearest(value: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    let bits = (value + SHIFT).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

/// What is tried in [`scale_and_min`].
pub(super) struct Steps {
    /// Largest quant.
    pub(super) top: i32,
    /// Steps are `(first + delta * step + top) / range` for step 0 to `last`.
    pub(super) first: f32,
    pub(super) delta: f32,
    pub(super) last: i32,
}

/// Scale and minimum that fit `x` by `scale * q - min` with least squared error, each value weighted by its magnitude
/// plus the group's root mean square. Writes the quants to `qs`; the minimum is at least 0.
pub(super) fn scale_and_min(x: &[f32; 32], qs: &mut [u8; 32], steps: &Steps) -> (f32, f32) {
    let root_mean_square = (x.iter().fold(0.0, |sum, v| sum + v * v) / 32.0).sqrt();
    let weights = x.map(|v| root_mean_square + v.abs());
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (v, w) in x.iter().zip(&weights).skip(1) {
        low = if *v < low { *v } else { low };
        high = if *v > high { *v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    low = if low > 0.0 { 0.0 } else { low };
    if high == low {
        *qs = [0; 32];
        return (0.0, -low);
    }
    let top = steps.top as f32;
    let round =
        |inverse: f32, low: f32| x.map(|v| nearest(inverse * (v - low)).clamp(0, steps.top) as u8);
    let error = |qs: &[u8; 32], scale: f32, min: f32| {
        let mut error = 0.0;
        for ((v, w), q) in x.iter().zip(&weights).zip(qs) {
            let off = scale * f32::from(*q) + min - v;
            error += w * (off * off);
        }
        error
    };
    let inverse = top / (high - low);
    *qs = round(inverse, low);
    let mut best = 1.0 / inverse;
    let mut best_error = error(qs, best, low);
    for step in 0..=steps.last {
        // The minimum of the best fit so far is where the next steps start from.
        let inverse = (steps.first + steps.delta * step as f32 + top) / (high - low);
        let tried = round(inverse, low);
        let Some((scale, min)) = fit(x, &weights, &tried, (sum_w, sum_x)) else {
            continue;
        };
        let tried_error = error(&tried, scale, min);
        if tried_error < best_error {
            (*qs, best, low, best_error) = (tried, scale, min, tried_error);
        }
    }
    (best, -low)
}

/// The line through quants and values of least weighted squares, whose offset is at most 0.
fn fit(
    x: &[f32; 32],
    weights: &[f32; 32],
    qs: &[u8; 32],
    (sum_w, sum_x): (f32, f32),
) -> Option<(f32, f32)> {
    let (mut sum_q, mut sum_qq, mut sum_xq) = (0.0, 0.0, 0.0);
    for ((v, w), q) in x.iter().zip(weights).zip(qs) {
        let q = f32::from(*q);
        sum_q += w * q;
        sum_qq += w * q * q;
        sum_xq += w * q * v;
    }
    let determinant = sum_w * sum_qq - sum_q * sum_q;
    if determinant <= 0.0 || determinant.is_nan() {
        return None;
    }
    let scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
    let min = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
    Some(if min > 0.0 {
        (sum_xq / sum_qq, 0.0)
    } else {
        (scale, min)
    })
}

/// The scale that fits `x` by `scale * (q - half)`, each value weighted by its square. Writes the quants, 0 to
/// `2 * half - 1`, to `qs`.
pub(super) fn symmetric_scale(x: &[f32; 16], qs: &mut [u8; 16], half: i32) -> f32 {
    let max = x
        .iter()
        .fold(0.0f32, |max, v| if v.abs() > max.abs() { *v } else { max });
    if max.abs() < ZERO_BELOW {
        *qs = [0; 16];
        return 0.0;
    }
    let round = |v: f32, inverse: f32| nearest(inverse * v).clamp(-half, half - 1);
    let sums = |inverse: f32| {
        let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
        for v in x {
            let q = round(*v, inverse) as f32;
            let w = v * v;
            sum_xq += w * v * q;
            sum_qq += w * q * q;
        }
        (sum_xq, sum_qq)
    };
    let quants = |inverse: f32| x.map(|v| (round(v, inverse) + half) as u8);
    let inverse = -half as f32 / max;
    *qs = quants(inverse);
    let (sum_xq, sum_qq) = sums(inverse);
    let mut scale = if sum_qq == 0.0 { 0.0 } else { sum_xq / sum_qq };
    let mut best = scale * sum_xq;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(half as f32 + 0.1 * step as f32) / max;
        let (sum_xq, sum_qq) = sums(inverse);
        if sum_qq > 0.0 && sum_xq * sum_xq > best * sum_qq {
            *qs = quants(inverse);
            scale = sum_xq / sum_qq;
            best = scale * sum_xq;
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_even() {
        let rounded = [0.5, 1.5, 2.5, -0.5, -1.5, 2.4999, -7.0].map(nearest);
        assert_eq!(rounded, [0, 2, 2, 0, -2, 2, -7]);
    }

    #[test]
    fn exact_grids_are_found() {
        // -3 to 12 in steps of 1: scale 1, minimum 3, no error.
        let x: [f32; 32] = std::array::from_fn(|i| (i % 16) as f32 - 3.0);
        let mut qs = [0; 32];
        let steps = Steps {
            top: 15,
            first: -1.0,
            delta: 0.1,
            last: 20,
        };
        assert_eq!(scale_and_min(&x, &mut qs, &steps), (1.0, 3.0));
        assert_eq!(qs, std::array::from_fn(|i| (i % 16) as u8));
        let x: [f32; 16] = std::array::from_fn(|i| 0.5 * (i as f32 - 8.0));
        let mut qs = [0; 16];
        assert_eq!(symmetric_scale(&x, &mut qs, 8), 0.5);
        assert_eq!(qs, std::array::from_fn(|i| i as u8));
    }
}
