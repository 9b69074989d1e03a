//! What is picked most in a layer, where picks fade.
//!
//! Source: the static list of popular experts that engines pin; here it is learned while the model runs.

use super::{Predictor, rank_by};

/// Expects the favourites of a layer.
#[derive(Debug)]
pub struct Popularity {
    n_experts: usize,
    /// Faded counts `[layers, experts]`, in units that grow with every token of the layer instead of fading all.
    counts: Vec<f32>,
    /// What a pick counts in each layer at the moment.
    units: Vec<f32>,
    growth: f32,
}

/// A layer's counts are scaled down when its unit is above this, long before sums lose digits.
const MAX_UNIT: f32 = 1e6;

impl Popularity {
    /// For `n_layers` layers of `n_experts` experts; a pick counts half after `half_life` tokens.
    pub fn new(n_layers: usize, n_experts: usize, half_life: f64) -> Self {
        Self {
            n_experts,
            counts: vec![0.0; n_layers * n_experts],
            units: vec![1.0; n_layers],
            growth: half_life.recip().exp2() as f32,
        }
    }

    fn layer(&mut self, layer: u16) -> &mut [f32] {
        &mut self.counts[usize::from(layer) * self.n_experts..][..self.n_experts]
    }
}

impl Predictor for Popularity {
    fn name(&self) -> &'static str {
        "popularity"
    }

    fn observe(&mut self, layer: u16, experts: &[u16]) {
        let mut unit = self.units[usize::from(layer)] * self.growth;
        if unit > MAX_UNIT {
            for count in self.layer(layer) {
                *count /= unit;
            }
            unit = 1.0;
        }
        for &expert in experts {
            self.layer(layer)[usize::from(expert)] += unit;
        }
        self.units[usize::from(layer)] = unit;
    }

    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>) {
        rank_by(self.layer(layer), 0.0, ranked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn favourites_change() {
        let (mut popularity, mut ranked) = (Popularity::new(2, 4, 2.0), Vec::new());
        for _ in 0..20 {
            popularity.observe(1, &[3, 0]);
            popularity.observe(1, &[3, 2]);
        }
        popularity.rank(1, &mut ranked);
        assert_eq!(ranked, [3, 2, 0]);
        // With picks that fade by half in two tokens, four others are enough; and no number runs out of range.
        for _ in 0..1000 {
            popularity.observe(1, &[1]);
        }
        popularity.rank(1, &mut ranked);
        assert_eq!(ranked[0], 1);
        popularity.rank(0, &mut ranked);
        assert_eq!(ranked, []);
    }
}
