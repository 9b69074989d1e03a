//! Dispatch: the picks of a batch, ragged, grouped by expert; gathering rows for experts and adding their rows up again.

use super::math::{axpy, vectorised};
use cadre_kernels::{Piece, Room};
use cadre_routing::Routing;
use rayon::prelude::*;

/// Tokens per task when rows are combined.
const ROWS: usize = 64;

/// Position of a pair that goes to no expert.
const NOWHERE: u32 = u32::MAX;

/// Which token goes to which expert: the (token, expert) pairs of a batch, sorted by expert.
///
/// A token may have any number of pairs, also none. Pairs of null experts and pairs that a capacity filter dropped keep
/// their place among the weights and go nowhere: they add nothing, and their weights get no gradient.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// Pairs of token `t` are `offsets[t]..offsets[t + 1]`.
    offsets: Vec<u32>,
    /// Sorted positions of expert `e` are `starts[e]..starts[e + 1]`.
    starts: Vec<usize>,
    /// Token of each sorted position.
    tokens: Vec<u32>,
    /// Pair of each sorted position.
    pairs: Vec<u32>,
    /// Sorted position of each pair, or [`NOWHERE`].
    positions: Vec<u32>,
}

impl Dispatch {
    /// Sorts the picks of `routing` by expert, keeping token order within an expert. Ids from `n_experts` on are null
    /// experts.
    #[must_use]
    pub fn of(routing: &Routing, n_experts: usize) -> Self {
        Self::sorted(
            routing.offsets().to_vec(),
            routing.experts(),
            n_experts,
            |_| true,
        )
    }

    /// As [`Dispatch::of`], of the pairs that `keep` (one flag per pair) lets through.
    ///
    /// # Panics
    /// When there is not one flag per pair.
    #[must_use]
    pub fn kept(routing: &Routing, n_experts: usize, keep: &[bool]) -> Self {
        assert_eq!(keep.len(), routing.n_pairs(), "one flag per pair");
        let offsets = routing.offsets().to_vec();
        Self::sorted(offsets, routing.experts(), n_experts, |pair| keep[pair])
    }

    /// Every token to the one expert there is: a dense MLP.
    #[must_use]
    pub fn dense(n_tokens: usize) -> Self {
        let offsets = (0..=n_tokens as u32).collect();
        Self::sorted(offsets, &vec![0; n_tokens], 1, |_| true)
    }

    fn sorted(
        offsets: Vec<u32>,
        ids: &[u16],
        n_experts: usize,
        keep: impl Fn(usize) -> bool,
    ) -> Self {
        let goes = |pair: usize| usize::from(ids[pair]) < n_experts && keep(pair);
        let mut starts = vec![0; n_experts + 1];
        for pair in (0..ids.len()).filter(|&pair| goes(pair)) {
            starts[usize::from(ids[pair]) + 1] += 1;
        }
        for e in 0..n_experts {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let mut pairs = vec![0; starts[n_experts]];
        let mut tokens = vec![0; starts[n_experts]];
        let mut positions = vec![NOWHERE; ids.len()];
        for (t, ends) in offsets.windows(2).enumerate() {
            for pair in (ends[0] as usize..ends[1] as usize).filter(|&pair| goes(pair)) {
                let position = next[usize::from(ids[pair])];
                next[usize::from(ids[pair])] += 1;
                pairs[position] = pair as u32;
                tokens[position] = t as u32;
                positions[pair] = position as u32;
            }
        }
        Self {
            offsets,
            starts,
            tokens,
            pairs,
            positions,
        }
    }

    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of pairs, those that go nowhere included: the length of the weights.
    #[must_use]
    pub fn n_pairs(&self) -> usize {
        self.positions.len()
    }

    /// Number of pairs that an expert computes.
    #[must_use]
    pub fn n_dispatched(&self) -> usize {
        self.pairs.len()
    }

    /// Number of experts that exist.
    #[must_use]
    pub fn n_experts(&self) -> usize {
        self.starts.len() - 1
    }

    /// Number of pairs of each expert.
    #[must_use]
    pub fn loads(&self) -> Vec<usize> {
        self.starts.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Sorted positions of expert `e`.
    pub(super) fn range(&self, e: usize) -> std::ops::Range<usize> {
        self.starts[e]..self.starts[e + 1]
    }

    /// The pair of each sorted position.
    pub(super) fn pairs(&self) -> &[u32] {
        &self.pairs
    }

    /// The token of each sorted position.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Cuts `buffer`, `width` values per sorted position, into one piece per expert.
    pub(super) fn split<'a>(&self, mut buffer: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        self.loads()
            .into_iter()
            .map(|n| {
                let (piece, rest) = std::mem::take(&mut buffer).split_at_mut(n * width);
                buffer = rest;
                piece
            })
            .collect()
    }

    /// As [`Self::split`], of memory that nobody has written.
    pub(super) fn pieces<'a>(&self, mut room: Piece<'a>, width: usize) -> Vec<Piece<'a>> {
        let mut pieces = Vec::with_capacity(self.n_experts());
        for n in self.loads() {
            let (piece, rest) = room.split_at(n * width);
            pieces.push(piece);
            room = rest;
        }
        pieces
    }

    /// Rows of `x` for the pairs of expert `e`, in order.
    pub(super) fn gather(&self, x: &[f32], d: usize, e: usize) -> Vec<f32> {
        let tokens = &self.tokens[self.range(e)];
        let mut rows = Vec::with_capacity(tokens.len() * d);
        for &t in tokens {
            rows.extend_from_slice(&x[t as usize * d..(t as usize + 1) * d]);
        }
        rows
    }

    /// `y[t] = sum over the token's pairs of weight * rows[position]`; without weights, the plain sum. A token of which
    /// nothing was dispatched gets zeros.
    pub(super) fn combine(&self, rows: &[f32], weights: Option<&[f32]>, d: usize) -> Vec<f32> {
        let mut y = Room::new(self.n_tokens() * d);
        let pieces = y.whole().chunks(ROWS * d).into_par_iter();
        pieces.enumerate().for_each(|(task, y)| {
            // In the cache, where the sums are.
            let y = y.zeros();
            vectorised(
                #[inline(always)]
                || {
                    for (row, y) in y.chunks_exact_mut(d).enumerate() {
                        let t = task * ROWS + row;
                        for pair in self.offsets[t] as usize..self.offsets[t + 1] as usize {
                            let position = self.positions[pair];
                            if position != NOWHERE {
                                let from = position as usize * d;
                                let weight = weights.map_or(1.0, |w| w[pair]);
                                axpy(y, weight, &rows[from..from + d]);
                            }
                        }
                    }
                },
            );
        });
        y.finish()
    }

    /// Values by sorted position as values by pair; 0 for pairs that go nowhere.
    pub(super) fn by_pair(&self, sorted: &[f32]) -> Vec<f32> {
        let value = |&p: &u32| sorted.get(p as usize).copied().unwrap_or(0.0);
        self.positions.iter().map(value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing(tokens: &[&[u16]]) -> Routing {
        let mut routing = Routing::new();
        for ids in tokens {
            routing.push_token(ids, &vec![1.0; ids.len()]);
        }
        routing
    }

    #[test]
    fn dispatch_sorts_by_expert_and_keeps_token_order() {
        let d = Dispatch::of(&routing(&[&[2, 0], &[0, 1], &[2, 1]]), 4);
        assert_eq!(d.loads(), [2, 2, 2, 0]);
        assert_eq!(d.pairs, [1, 2, 3, 5, 0, 4]);
        for (pair, &position) in d.positions.iter().enumerate() {
            assert_eq!(d.pairs[position as usize] as usize, pair);
        }
    }

    #[test]
    fn gather_then_combine_without_weights_counts_the_picks() {
        let d = Dispatch::of(&routing(&[&[2, 0], &[0, 1]]), 3);
        let x = [1.0, 2.0, 10.0, 20.0];
        let rows: Vec<f32> = (0..3).flat_map(|e| d.gather(&x, 2, e)).collect();
        assert_eq!(d.combine(&rows, None, 2), [2.0, 4.0, 20.0, 40.0]);
    }

    #[test]
    fn null_and_dropped_pairs_go_nowhere() {
        // Ids from 2 on are null; the pair (token 2, expert 1) is dropped.
        let routing = routing(&[&[3, 0], &[], &[1, 2], &[2]]);
        let d = Dispatch::kept(&routing, 2, &[true, true, false, true, true]);
        assert_eq!(
            (d.n_tokens(), d.n_pairs(), d.n_dispatched(), d.loads()),
            (4, 5, 1, vec![1, 0])
        );
        let x = [1.0, 2.0, 3.0, 4.0];
        let rows: Vec<f32> = (0..2).flat_map(|e| d.gather(&x, 1, e)).collect();
        let weights = [9.0, 0.5, 9.0, 9.0, 9.0];
        assert_eq!(d.combine(&rows, Some(&weights), 1), [0.5, 0.0, 0.0, 0.0]);
        assert_eq!(d.by_pair(&[7.0]), [0.0, 7.0, 0.0, 0.0, 0.0]);
    }
}
