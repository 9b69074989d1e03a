//! What a token will pick, known in advance because the router does not wait for the layers.
//!
//! Source: Read-ME (arXiv 2410.19123), whose one router runs before the model: while a layer computes, the experts of
//! the next are brought in without guessing, and eviction may use Belady's rule (`policies::Belady`, told by
//! `Policy::foresee`). A model of that kind gives the routing of as many tokens as it has read. Here replays are told of any
//! number of tokens; a store is told of one pass at a time (`crate::Foresight`).

use std::collections::VecDeque;

use super::Predictor;

/// Expects what is certain.
#[derive(Debug)]
pub struct Exact {
    /// Of every layer the picks of tokens to come, the current one first.
    layers: Vec<VecDeque<Vec<u16>>>,
}

impl Exact {
    /// For `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        Self {
            layers: vec![VecDeque::new(); n_layers],
        }
    }
}

impl Predictor for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }

    fn observe(&mut self, layer: u16, _: &[u16]) {
        self.layers[usize::from(layer)].pop_front();
    }

    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>) {
        ranked.clear();
        if let Some(picks) = self.layers[usize::from(layer)].front() {
            ranked.extend_from_slice(picks);
        }
    }

    /// The picks of the next token of the layer of which nothing has been given yet.
    fn give(&mut self, layer: u16, picks: &[u16]) {
        self.layers[usize::from(layer)].push_back(picks.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_are_given_back_token_by_token() {
        let (mut exact, mut ranked) = (Exact::new(1), Vec::new());
        exact.give(0, &[1, 2]);
        exact.give(0, &[3]);
        for expected in [&[1, 2][..], &[3], &[]] {
            exact.rank(0, &mut ranked);
            assert_eq!(ranked, expected);
            exact.observe(0, expected);
        }
    }
}
