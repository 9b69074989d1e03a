//! Random numbers that are a function of where they are used, so that any tensor can be made alone and again.

use cadre_routing::filters::mix;

/// Draws that depend on a seed and on a place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draws(u64);

impl Draws {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// Those of a place inside of this one.
    pub(super) fn of(self, place: u64) -> Self {
        Self(mix(self.0 ^ place))
    }

    /// Those of the tensor of this name.
    pub(super) fn named(self, name: &str) -> Self {
        name.bytes()
            .fold(self, |draws, byte| draws.of(u64::from(byte)))
    }

    /// The `i`-th, uniform in (0, 1].
    pub(super) fn uniform(self, i: usize) -> f64 {
        ((mix(self.0 ^ mix(i as u64)) >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// The `i`-th of a standard normal distribution (Box and Muller, 1958).
    pub(super) fn normal(self, i: usize) -> f64 {
        let (u, v) = (self.uniform(2 * i), self.uniform(2 * i + 1));
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// The numbers below `n` in a random order.
    pub(super) fn shuffled(self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_cached_key(|i| (mix(self.0 ^ mix(*i as u64)), *i));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_places() {
        let draws = Draws::new(7).of(3);
        let n = 20_000;
        let values: Vec<f64> = (0..n).map(|i| draws.normal(i)).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let square = values.iter().map(|v| v * v).sum::<f64>() / n as f64;
        assert!(
            mean.abs() < 0.03 && (square - 1.0).abs() < 0.05,
            "{mean} {square}"
        );
        assert_eq!(draws.normal(5), Draws::new(7).of(3).normal(5));
        assert_ne!(draws.normal(5), Draws::new(7).of(4).normal(5));
        let mut order = draws.shuffled(50);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
