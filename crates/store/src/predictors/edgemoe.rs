//! EdgeMoE's statistics: what follows on the experts of the two layers before.
//!
//! Source: EdgeMoE (arXiv 2308.14352), whose table gives `P(expert of layer n | experts of layers n-2 and n-1)`, made
//! offline. Differences: it is learned while the model runs; it is for any number of picks, the sum over those of both
//! layers; a pair that has been seen little leans on what follows on the expert of layer n-1 alone (back-off); and for layers 0
//! and 1, of which the paper says nothing, the layers before are the last ones of the previous token.
//!
//! Memory: 2 bytes for every two experts of neighbouring layers, and a table of pairs that does not grow: of each pair
//! the successors seen most, and of pairs that meet in one place of the table, the one seen more.

use std::ops::Range;

use super::{Predictor, rank_by};

/// Successors that are kept of a pair.
const N_SUCCESSORS: usize = 8;
/// Picks of a layer that form pairs: those of most weight. It bounds the work per layer where many are picked.
const N_PAIRED: usize = 2;
/// Pairs that are kept, of all layers.
const MAX_PAIRS: usize = 1 << 15;
/// Observations of a pair that weigh as much as all of its second expert: how soon a pair is trusted.
const BACK_OFF: f32 = 8.0;

/// Expects what followed before.
#[derive(Debug)]
pub struct EdgeMoe {
    n_layers: usize,
    n_experts: usize,
    /// How often expert `i` of a layer followed on expert `a` of the layer before: `[layers, a, i]`.
    follows: Vec<u16>,
    pairs: Vec<Pair>,
    /// The last picks of every layer.
    last: Vec<Vec<u16>>,
    scores: Vec<f32>,
}

/// What followed on an expert of layer n-2 and one of layer n-1.
#[derive(Clone, Debug, Default)]
struct Pair {
    /// The layer and both experts, plus 1; 0 is nobody.
    key: u64,
    n_seen: u16,
    /// Expert and count, of the successors that have a count.
    successors: [(u16, u16); N_SUCCESSORS],
}

impl EdgeMoe {
    /// For `n_layers` layers of `n_experts` experts.
    pub fn new(n_layers: usize, n_experts: usize) -> Self {
        let possible = n_layers.saturating_mul(n_experts).saturating_mul(n_experts);
        Self {
            n_layers,
            n_experts,
            follows: vec![0; possible],
            pairs: vec![Pair::default(); possible.clamp(1, MAX_PAIRS).next_power_of_two()],
            last: vec![Vec::new(); n_layers],
            scores: vec![0.0; n_experts],
        }
    }

    /// The layer `back` layers before, that of the previous token where it wraps around.
    fn before(&self, layer: usize, back: usize) -> usize {
        (layer + self.n_layers * back - back) % self.n_layers
    }

    /// Pairs of experts of the two layers before `layer`: (of n-2, of n-1).
    fn pairs_before(&self, layer: usize) -> impl Iterator<Item = (u16, u16)> + use<> {
        let of = |back: usize| {
            let picks = &self.last[self.before(layer, back)];
            let mut firsts = [None; N_PAIRED];
            for (first, &pick) in firsts.iter_mut().zip(picks) {
                *first = Some(pick);
            }
            firsts.into_iter().flatten()
        };
        let second = of(1);
        of(2).flat_map(move |b| second.clone().map(move |a| (b, a)))
    }

    fn key(layer: usize, (b, a): (u16, u16)) -> u64 {
        ((layer as u64) << 32 | u64::from(b) << 16 | u64::from(a)) + 1
    }

    fn place(&self, key: u64) -> usize {
        // Fibonacci hashing: the high bits of the product are well mixed.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        mixed as usize & (self.pairs.len() - 1)
    }

    /// Where `follows` has the successors of `a`, of the layer before `layer`.
    fn row(&self, layer: usize, a: u16) -> Range<usize> {
        let start = (layer * self.n_experts + usize::from(a)) * self.n_experts;
        start..start + self.n_experts
    }

    /// Adds `weight` times the share of each expert after `a`.
    fn add_follows(&mut self, layer: usize, a: u16, weight: f32) {
        let counts = &self.follows[self.row(layer, a)];
        let total: u32 = counts.iter().map(|&n| u32::from(n)).sum();
        if total == 0 {
            return;
        }
        let weight = weight / total as f32;
        for (score, &n) in self.scores.iter_mut().zip(counts) {
            *score += weight * f32::from(n);
        }
    }
}

impl Pair {
    fn see(&mut self, expert: u16) {
        let known = |&(other, n): &(u16, u16)| n > 0 && other == expert;
        let at = self.successors.iter().position(known).unwrap_or_else(|| {
            let counts = self.successors.iter().map(|(_, n)| *n).enumerate();
            let (least, _) = counts.min_by_key(|(_, n)| *n).expect("there are some");
            // Who takes a place takes its count too, so that a newcomer that comes often can stay (as in Space-Saving,
            // Metwally and others, 2005).
            self.successors[least].0 = expert;
            least
        });
        self.successors[at].1 += 1;
    }

    fn halve(&mut self) {
        self.n_seen /= 2;
        for (_, n) in &mut self.successors {
            *n /= 2;
        }
    }
}

impl Predictor for EdgeMoe {
    fn name(&self) -> &'static str {
        "edgemoe"
    }

    fn observe(&mut self, layer: u16, experts: &[u16]) {
        let layer = usize::from(layer);
        for pair in self.pairs_before(layer) {
            let key = Self::key(layer, pair);
            let at = self.place(key);
            let entry = &mut self.pairs[at];
            if entry.key != key {
                // The one seen more stays, but not for ever.
                entry.n_seen = entry.n_seen.saturating_sub(1);
                if entry.n_seen > 0 {
                    continue;
                }
                *entry = Pair {
                    key,
                    ..Pair::default()
                };
            }
            if entry.n_seen >= u16::MAX / 2 {
                entry.halve();
            }
            entry.n_seen += 1;
            for &expert in experts {
                entry.see(expert);
            }
        }
        for at in 0..self.last[self.before(layer, 1)].len() {
            let a = self.last[self.before(layer, 1)][at];
            let row = self.row(layer, a);
            let counts = &mut self.follows[row];
            if experts.iter().any(|&i| counts[usize::from(i)] == u16::MAX) {
                counts.iter_mut().for_each(|n| *n /= 2);
            }
            for &expert in experts {
                counts[usize::from(expert)] += 1;
            }
        }
        let last = &mut self.last[layer];
        last.clear();
        last.extend_from_slice(experts);
    }

    fn rank(&mut self, layer: u16, ranked: &mut Vec<u16>) {
        let layer = usize::from(layer);
        self.scores.fill(0.0);
        for at in 0..self.last[self.before(layer, 1)].len() {
            let a = self.last[self.before(layer, 1)][at];
            self.add_follows(layer, a, 1.0);
        }
        for pair in self.pairs_before(layer) {
            let key = Self::key(layer, pair);
            let entry = &self.pairs[self.place(key)];
            if entry.key != key {
                continue;
            }
            let n_seen = f32::from(entry.n_seen);
            let sum: u32 = entry.successors.iter().map(|(_, n)| u32::from(*n)).sum();
            // (C2 + BACK_OFF * P1) / (n + BACK_OFF), whose second part has been added for every expert of n-1.
            let weight = n_seen / (n_seen + BACK_OFF) / sum.max(1) as f32;
            for &(expert, n) in &entry.successors {
                self.scores[usize::from(expert)] += weight * f32::from(n);
            }
        }
        rank_by(&self.scores, 0.0, ranked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs tokens of one pick per layer, `[layer 0, 1, 2]`, and returns the ranking of layer 2 for the last token.
    fn rank_after(tokens: &[[u16; 3]]) -> Vec<u16> {
        let mut edge = EdgeMoe::new(3, 8);
        let mut ranked = Vec::new();
        for picks in tokens {
            for (layer, &expert) in picks.iter().enumerate() {
                edge.rank(layer as u16, &mut ranked);
                edge.observe(layer as u16, &[expert]);
            }
        }
        ranked
    }

    #[test]
    fn pairs_tell_what_neighbours_alone_do_not() {
        // After 1 in layer 1 comes 4 or 5, depending on layer 0.
        let mut tokens = [[0, 1, 4], [2, 1, 5]].repeat(20);
        tokens.push([0, 1, 0]);
        assert_eq!(rank_after(&tokens), [4, 5]);
        tokens.push([2, 1, 0]);
        assert_eq!(rank_after(&tokens)[0], 5);
        // A pair never seen backs off to the neighbour: 4 and 5 are as likely.
        tokens.push([7, 1, 0]);
        let mut ranked = rank_after(&tokens);
        ranked.truncate(2);
        ranked.sort_unstable();
        assert_eq!(ranked, [4, 5]);
    }

    #[test]
    fn the_first_layers_follow_on_the_token_before() {
        let mut edge = EdgeMoe::new(2, 4);
        let mut ranked = Vec::new();
        for token in 0..20_u16 {
            // Layer 1 tells which expert of layer 0 the next token takes.
            let (now, next) = (token % 2, (token + 1) % 2);
            edge.rank(0, &mut ranked);
            if token > 2 {
                assert_eq!(ranked[0], now);
            }
            edge.observe(0, &[now]);
            edge.observe(1, &[2 + next]);
        }
    }

    #[test]
    fn memory_does_not_grow_and_counts_do_not_overflow() {
        let mut edge = EdgeMoe::new(40, 64);
        assert_eq!(edge.pairs.len(), MAX_PAIRS);
        let mut ranked = Vec::new();
        for token in 0..3000_u16 {
            for layer in 0..40 {
                edge.observe(layer, &[(token * 7 + layer) % 64, token % 61]);
            }
        }
        edge.rank(3, &mut ranked);
        assert!(!ranked.is_empty());
        let mut edge = EdgeMoe::new(1, 2);
        for _ in 0..140_000 {
            edge.observe(0, &[1]);
        }
        edge.rank(0, &mut ranked);
        assert_eq!(ranked, [1]);
        assert!(edge.follows[edge.row(0, 1)][1] > 30_000);
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_rarest() {
        let mut pair = Pair::default();
        for expert in 0..8 {
            pair.see(expert);
            pair.see(expert);
        }
        pair.see(9);
        pair.see(9);
        assert_eq!(pair.successors[0], (9, 4));
        pair.halve();
        assert_eq!(pair.successors[0], (9, 2));
    }
}
