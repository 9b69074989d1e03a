//! From logits to scores: the softmax pieces, the sigmoid and the entropy that policies and load metrics share.

/// Largest value of a row; negative infinity for an empty one.
pub(crate) fn max(row: &[f32]) -> f32 {
    row.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// What turns a logit into a softmax probability: `p = exp((l - max) / temperature) / sum`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softmax {
    max: f32,
    temperature: f32,
    sum: f32,
}

impl Softmax {
    /// Prepares the softmax of one row of finite logits.
    pub(crate) fn of(row: &[f32]) -> Self {
        Self::with_temperature(row, 1.0)
    }

    /// Prepares the softmax of one row of finite logits divided by `temperature`, which is positive.
    pub(crate) fn with_temperature(row: &[f32], temperature: f32) -> Self {
        let max = max(row);
        let sum = row.iter().map(|l| ((l - max) / temperature).exp()).sum();
        Self {
            max,
            temperature,
            sum,
        }
    }

    /// Probability of a logit of that row.
    pub(crate) fn p(&self, logit: f32) -> f32 {
        ((logit - self.max) / self.temperature).exp() / self.sum
    }

    /// Entropy of the row in nats: `log sum - sum_j p_j (l_j - max) / temperature`.
    pub(crate) fn entropy(&self, row: &[f32]) -> f32 {
        let energy = |l: f32| {
            let p = self.p(l);
            // A probability that underflowed to 0 contributes 0, however large its logit's distance is.
            if p > 0.0 {
                p * (l - self.max) / self.temperature
            } else {
                0.0
            }
        };
        self.sum.ln() - row.iter().map(|&l| energy(l)).sum::<f32>()
    }
}

/// `1 / (1 + exp(-x))`.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Turns logits into softmax weights over themselves, in place: the renormalised weights of the selected experts.
/// Uses their own maximum, so it cannot underflow to 0 / 0.
pub(crate) fn softmax_in_place(logits: &mut [f32]) {
    let max = max(logits);
    let mut sum = 0.0;
    for l in &mut *logits {
        *l = (*l - max).exp();
        sum += *l;
    }
    for w in logits {
        *w /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_ln_n_when_uniform_and_0_when_certain() {
        let row = [3.0; 8];
        assert!((Softmax::of(&row).entropy(&row) - 8f32.ln()).abs() < 1e-6);
        let row = [0.0, 200.0, 0.0];
        assert!(Softmax::of(&row).entropy(&row).abs() < 1e-6);
    }

    #[test]
    fn huge_logits_do_not_overflow() {
        let row = [1e30, -1e30];
        let softmax = Softmax::of(&row);
        assert_eq!((softmax.p(row[0]), softmax.p(row[1])), (1.0, 0.0));
        assert_eq!((sigmoid(-1e30), sigmoid(1e30)), (0.0, 1.0));
        let mut selected = [-500.0, -500.0];
        softmax_in_place(&mut selected);
        assert_eq!(selected, [0.5, 0.5]);
    }
}
