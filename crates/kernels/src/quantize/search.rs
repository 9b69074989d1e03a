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
#[derive(Clone, Copy)]
pub(super) struct Steps {
    /// Largest quant.
    pub(super) top: i32,
    /// Steps are `(first + delta * step + top) / range` for step 0 to `last`.
    pub(super) first: f32,
    pub(super) delta: f32,
    pub(super) last: i32,
    /// Whether errors count by their magnitudes rather than by their squares.
    pub(super) absolute: bool,
}

impl Steps {
    /// What is tried for quants up to `top` where every value's error has its own weight.
    pub(super) const fn weighted(top: i32) -> Self {
        Self {
            top,
            first: -0.9,
            delta: 0.05,
            last: 36,
            absolute: false,
        }
    }
}

/// Scale and minimum that fit `x` by `scale * q - min` with the least weighted error. Writes the quants to `qs`; the
/// minimum is at least 0.
pub(super) fn scale_and_min<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    qs: &mut [u8; N],
    steps: &Steps,
) -> (f32, f32) {
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (v, w) in x.iter().zip(weights).skip(1) {
        low = if *v < low { *v } else { low };
        high = if *v > high { *v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    low = if low > 0.0 { 0.0 } else { low };
    if high == low {
        *qs = [0; N];
        return (0.0, -low);
    }
    let top = steps.top as f32;
    let round =
        |inverse: f32, low: f32| x.map(|v| nearest(inverse * (v - low)).clamp(0, steps.top) as u8);
    let error = |qs: &[u8; N], scale: f32, min: f32| {
        let mut error = 0.0;
        for ((v, w), q) in x.iter().zip(weights).zip(qs) {
            let off = scale * f32::from(*q) + min - v;
            error += w * if steps.absolute { off.abs() } else { off * off };
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
        let Some((scale, min)) = fit(x, weights, &tried, (sum_w, sum_x)) else {
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
fn fit<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    qs: &[u8; N],
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

/// The first value of the largest magnitude, with its sign.
pub(super) fn signed_max(x: &[f32]) -> f32 {
    x.iter().fold(
        0.0,
        |max: f32, v| if v.abs() > max.abs() { *v } else { max },
    )
}

/// The squares of values: how much their errors count where nothing else is said.
pub(super) fn squares<const N: usize>(x: &[f32; N]) -> [f32; N] {
    x.map(|v| v * v)
}

/// The scale that fits `x` by `scale * (q - half)` with least weighted squared error. Writes the quants, 0 to
/// `2 * half - 1`, to `qs`.
pub(super) fn symmetric_scale<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    qs: &mut [u8; N],
    half: i32,
) -> f32 {
    let max = signed_max(x);
    if max.abs() < ZERO_BELOW {
        *qs = [0; N];
        return 0.0;
    }
    let round = |v: f32, inverse: f32| nearest(inverse * v).clamp(-half, half - 1);
    let sums = |inverse: f32| {
        let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
        for (v, w) in x.iter().zip(weights) {
            let q = round(*v, inverse) as f32;
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

/// Rounds in which single quants are moved where that lowers the error.
const ROUNDS: usize = 5;

/// [`symmetric_scale`] with values weighted by their squares, found by moving single quants rather than by trying scales.
pub(super) fn symmetric_scale_by_moves<const N: usize>(
    x: &[f32; N],
    qs: &mut [u8; N],
    half: i32,
) -> f32 {
    let max = signed_max(x);
    if max.abs() < ZERO_BELOW {
        *qs = [0; N];
        return 0.0;
    }
    let inverse = -half as f32 / max;
    let mut signed = x.map(|v| nearest(inverse * v).clamp(-half, half - 1));
    let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
    for (v, q) in x.iter().zip(&signed) {
        let (w, q) = (v * v, *q as f32);
        sum_xq += w * v * q;
        sum_qq += w * q * q;
    }
    for _ in 0..ROUNDS {
        let mut moved = false;
        for (v, q) in x.iter().zip(&mut signed) {
            let (w, old) = (v * v, *q as f32);
            let mut xq = sum_xq - w * v * old;
            if xq <= 0.0 || xq.is_nan() {
                continue;
            }
            let mut qq = sum_qq - w * old * old;
            let new = nearest(v * qq / xq).clamp(-half, half - 1);
            if new == *q {
                continue;
            }
            xq += w * v * new as f32;
            qq += w * new as f32 * new as f32;
            if qq > 0.0 && xq * xq * sum_qq > sum_xq * sum_xq * qq {
                (*q, sum_xq, sum_qq, moved) = (new, xq, qq, true);
            }
        }
        if !moved {
            break;
        }
    }
    *qs = signed.map(|q| (q + half) as u8);
    if sum_qq > 0.0 { sum_xq / sum_qq } else { 0.0 }
}

/// The scale that fits the values `x`, which are not negative, by `scale * q` with least weighted squared error. Writes
/// the quants, 0 to `top`, to `qs`.
pub(super) fn positive_scale<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    qs: &mut [u8; N],
    top: i32,
) -> f32 {
    let max = x
        .iter()
        .fold(0.0, |max: f32, v| if *v > max { *v } else { max });
    if max < ZERO_BELOW {
        *qs = [0; N];
        return 0.0;
    }
    let mut inverse = top as f32 / max;
    let error = |scale: f32, quant: &dyn Fn(f32) -> f32| {
        let mut error = 0.0;
        for (v, w) in x.iter().zip(weights) {
            let off = v - scale * quant(*v);
            error += w * off * off;
        }
        error
    };
    // The first try is in bytes without a bound, which is how ggml's files come out.
    let mut best = error(1.0 / inverse, &|v| f32::from(nearest(inverse * v) as u8));
    for step in (-4..=4).filter(|step| *step != 0) {
        let tried = (0.1 * step as f32 + top as f32) / max;
        let tried_error = error(1.0 / tried, &|v| nearest(tried * v).min(top) as f32);
        if tried_error < best {
            (best, inverse) = (tried_error, tried);
        }
    }
    let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
    for ((v, w), q) in x.iter().zip(weights).zip(qs.iter_mut()) {
        let quant = nearest(inverse * v).min(top);
        *q = quant as u8;
        sum_xq += w * v * quant as f32;
        sum_qq += w * quant as f32 * quant as f32;
    }
    for _ in 0..ROUNDS {
        let mut moved = false;
        for ((v, w), q) in x.iter().zip(weights).zip(qs.iter_mut()) {
            let old = f32::from(*q);
            let (mut xq, mut qq) = (sum_xq - w * v * old, sum_qq - w * old * old);
            if !(xq > 0.0 && qq > 0.0) {
                continue;
            }
            let new = nearest(v * qq / xq).min(top);
            if new == i32::from(*q) {
                continue;
            }
            xq += w * v * new as f32;
            qq += w * new as f32 * new as f32;
            if xq * xq * sum_qq > sum_xq * sum_xq * qq {
                (*q, sum_xq, sum_qq, moved) = (new as u8, xq, qq, true);
            }
        }
        if !moved {
            break;
        }
    }
    if sum_qq > 0.0 { sum_xq / sum_qq } else { 0.0 }
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
            absolute: false,
        };
        let weights = [1.0; 32];
        assert_eq!(scale_and_min(&x, &weights, &mut qs, &steps), (1.0, 3.0));
        assert_eq!(qs, std::array::from_fn(|i| (i % 16) as u8));
        let x: [f32; 16] = std::array::from_fn(|i| 0.5 * (i as f32 - 8.0));
        let mut qs = [0; 16];
        assert_eq!(symmetric_scale(&x, &squares(&x), &mut qs, 8), 0.5);
        assert_eq!(qs, std::array::from_fn(|i| i as u8));
        qs = [0; 16];
        assert_eq!(symmetric_scale_by_moves(&x, &mut qs, 8), 0.5);
        assert_eq!(qs, std::array::from_fn(|i| i as u8));
        let x: [f32; 16] = std::array::from_fn(|i| 0.25 * i as f32);
        qs = [9; 16];
        assert_eq!(positive_scale(&x, &[1.0; 16], &mut qs, 15), 0.25);
        assert_eq!(qs, std::array::from_fn(|i| i as u8));
        assert_eq!(positive_scale(&[0.0; 16], &[1.0; 16], &mut qs, 15), 0.0);
        assert_eq!(qs, [0; 16]);
    }

    #[test]
    fn what_counts_more_is_met_better() {
        // Half of the values lie on a grid of 1, half on one of 0.9: the scale follows the half that counts.
        let x: [f32; 16] = std::array::from_fn(|i| match i % 2 {
            0 => -((i / 2) as f32),
            _ => 0.9 * (i / 2) as f32,
        });
        let scale_where = |even: f32| {
            let weights = std::array::from_fn(|i| if i % 2 == 0 { even } else { 1.0 - even });
            symmetric_scale(&x, &weights, &mut [0; 16], 8)
        };
        assert!((scale_where(1.0) - 1.0).abs() < 1e-6);
        assert!((scale_where(0.0).abs() - 0.9).abs() < 1e-6);
    }
}
