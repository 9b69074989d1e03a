//! What the token before picked in the same layer.
//!
//! Source: the temporal prefetch of many engines, which most of them measured to be of no use: it is here to be compared with.

use super::Predictor;

/// Expects the same again.
#[derive(Debug)]
pub struct Previous {
    layers: Vec<Vec<u16>>,
}

impl Previous {
    /// For `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self {
            layers: vec![Vec::new(); n_layers],
        }
    }
}

impl Predictor for Previous {
    fn name(&self) -> &'static str {
        "previous"
    }

    fn observe(&mut self, layer: u16, experts: &[u16]) {
        let picks = &mut self.layers[usize::from(layer)];
        picks.clear();
        picks.extend_from_slice(experts);
    }

    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>) {
        ranked.clear();
        ranked.extend_from_slice(&self.layers[usize::from(layer)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_picks_are_expected() {
        let (mut previous, mut ranked) = (Previous::new(2), vec![1]);
        previous.rank(1, &mut ranked);
        assert_eq!(ranked, []);
        previous.observe(1, &[5, 2]);
        previous.observe(0, &[7, 8]);
        previous.rank(1, &mut ranked);
        assert_eq!(ranked, [5, 2]);
    }
}
