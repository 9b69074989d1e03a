//! What somebody else expects, passed on: the next layer's own router, asked a layer early.

use super::Predictor;

/// Expects what it was last given for a layer, once.
#[derive(Debug)]
pub struct Given {
    name: &'static str,
    layers: Vec<Vec<u16>>,
}

impl Given {
    /// For `n_layers` layers, under the name of who gives.
    pub fn new(name: &'static str, n_layers: usize) -> Self {
        Self {
            name,
            layers: vec![Vec::new(); n_layers],
        }
    }
}

impl Predictor for Given {
    fn name(&self) -> &'static str {
        self.name
    }

    fn observe(&mut self, layer: u16, _: &[u16]) {
        // It was about this token, and says nothing about the next.
        self.layers[usize::from(layer)].clear();
    }

    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>) {
        ranked.clear();
        ranked.extend_from_slice(&self.layers[usize::from(layer)]);
    }

    fn give(&mut self, layer: u16, given: &[u16]) {
        let layer = &mut self.layers[usize::from(layer)];
        layer.clear();
        layer.extend_from_slice(given);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_holds_for_one_token() {
        let (mut gate, mut ranked) = (Given::new("gate", 2), Vec::new());
        gate.give(1, &[4, 2, 6]);
        gate.observe(0, &[1, 2]);
        gate.rank(1, &mut ranked);
        assert_eq!((gate.name(), &ranked[..]), ("gate", &[4, 2, 6][..]));
        gate.observe(1, &[4, 6]);
        gate.rank(1, &mut ranked);
        assert_eq!(ranked, []);
    }
}
