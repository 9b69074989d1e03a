//! The ragged result of routing: for each token, which experts with which weights, in compressed sparse rows.
//!
//! A token may have any number of picks, also none, so every rule from top-1 to "as many as needed" fits without
//! padding. Picks of one token are listed best first by the rule's own selection key, so the first one is the
//! token's leading expert.

use serde::{Deserialize, Serialize};

use crate::RoutingError;

/// Expert picks of `T` tokens. Token `t` owns the pairs `offsets[t]..offsets[t + 1]` of `experts` and `weights`.
///
/// A value is meant to be kept and reused: [`Routing::clear`] keeps the memory, so that steady-state routing does
/// not allocate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Parts", into = "Parts")]
pub struct Routing {
    /// `[T + 1]`, starts with 0, never decreases.
    offsets: Vec<u32>,
    /// `[pairs]` expert ids.
    experts: Vec<u16>,
    /// `[pairs]` combine weights.
    weights: Vec<f32>,
}

impl Default for Routing {
    fn default() -> Self {
        Self::new()
    }
}

impl Routing {
    /// A routing of zero tokens.
    #[must_use]
    pub fn new() -> Self {
        Self {
            offsets: vec![0],
            experts: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// A routing of zero tokens with room for `n_tokens` tokens of `top_k` picks each.
    #[must_use]
    pub fn with_capacity(n_tokens: usize, top_k: usize) -> Self {
        let mut routing = Self::new();
        routing.reserve(n_tokens, n_tokens * top_k);
        routing
    }

    /// Builds a routing from its three arrays, as read from outside.
    ///
    /// # Errors
    /// [`RoutingError::BadRouting`] when the offsets do not start at 0, decrease, or do not end at the number of
    /// pairs, when the two pair arrays differ in length, or when a weight is not finite.
    pub fn from_parts(
        offsets: Vec<u32>,
        experts: Vec<u16>,
        weights: Vec<f32>,
    ) -> Result<Self, RoutingError> {
        let bad = |reason: String| Err(RoutingError::BadRouting { reason });
        if offsets.first() != Some(&0) {
            return bad(format!(
                "offsets start with {:?}, expected 0",
                offsets.first()
            ));
        }
        if let Some(t) = offsets.windows(2).position(|w| w[0] > w[1]) {
            return bad(format!(
                "offsets decrease from {} to {} at token {t}",
                offsets[t],
                offsets[t + 1]
            ));
        }
        if experts.len() != weights.len() {
            return bad(format!(
                "{} expert ids but {} weights",
                experts.len(),
                weights.len()
            ));
        }
        let end = offsets.last().map_or(0, |&end| end as usize);
        if end != experts.len() {
            return bad(format!(
                "offsets end at {end} but there are {} pairs",
                experts.len()
            ));
        }
        if let Some(i) = weights.iter().position(|w| !w.is_finite()) {
            return bad(format!("weight of pair {i} is {}", weights[i]));
        }
        Ok(Self {
            offsets,
            experts,
            weights,
        })
    }

    /// Forgets all tokens and keeps the memory.
    pub fn clear(&mut self) {
        self.offsets.truncate(1);
        self.experts.clear();
        self.weights.clear();
    }

    /// Makes room for `n_tokens` more tokens with `n_pairs` more picks in all.
    pub fn reserve(&mut self, n_tokens: usize, n_pairs: usize) {
        self.offsets.reserve(n_tokens);
        self.experts.reserve(n_pairs);
        self.weights.reserve(n_pairs);
    }

    /// Appends one token with its picks, best first.
    ///
    /// # Panics
    /// When `experts` and `weights` differ in length, or when there are more than `u32::MAX` pairs in all.
    pub fn push_token(&mut self, experts: &[u16], weights: &[f32]) {
        assert_eq!(
            experts.len(),
            weights.len(),
            "a token needs one weight per expert"
        );
        self.experts.extend_from_slice(experts);
        self.weights.extend_from_slice(weights);
        self.end_token();
    }

    /// Appends one pick to the token under construction; [`Routing::end_token`] closes it.
    pub fn push_pair(&mut self, expert: u16, weight: f32) {
        self.experts.push(expert);
        self.weights.push(weight);
    }

    /// Closes the token under construction: it owns every pair pushed since the last token.
    ///
    /// # Panics
    /// When there are more than `u32::MAX` pairs in all.
    pub fn end_token(&mut self) {
        let end =
            u32::try_from(self.experts.len()).expect("a routing holds at most u32::MAX pairs");
        self.offsets.push(end);
    }

    /// Appends one token of exactly `n_picks` picks and lends its slots, zeroed, to be filled in place.
    pub(crate) fn push_slots(&mut self, n_picks: usize) -> (&mut [u16], &mut [f32]) {
        let start = self.experts.len();
        self.experts.resize(start + n_picks, 0);
        self.weights.resize(start + n_picks, 0.0);
        self.end_token();
        (&mut self.experts[start..], &mut self.weights[start..])
    }

    /// The pairs whose flag is set, with the same tokens.
    ///
    /// # Panics
    /// When there is not one flag per pair.
    #[must_use]
    pub fn kept(&self, keep: &[bool]) -> Self {
        assert_eq!(keep.len(), self.n_pairs(), "one flag per pair");
        let mut kept = Self::new();
        kept.reserve(self.n_tokens(), self.n_pairs());
        let mut keep = keep.iter();
        for (ids, weights) in self.iter() {
            for ((&id, &w), keep) in ids.iter().zip(weights).zip(&mut keep) {
                if *keep {
                    kept.push_pair(id, w);
                }
            }
            kept.end_token();
        }
        kept
    }

    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of (token, expert) pairs.
    #[must_use]
    pub fn n_pairs(&self) -> usize {
        self.experts.len()
    }

    /// The picks of token `t`: expert ids and combine weights, best first.
    ///
    /// # Panics
    /// When `t >= n_tokens()`.
    #[must_use]
    pub fn token(&self, t: usize) -> (&[u16], &[f32]) {
        let pairs = self.offsets[t] as usize..self.offsets[t + 1] as usize;
        (&self.experts[pairs.clone()], &self.weights[pairs])
    }

    /// All tokens in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u16], &[f32])> {
        (0..self.n_tokens()).map(|t| self.token(t))
    }

    /// Row starts, `[T + 1]`.
    #[must_use]
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Expert id of every pair, `[pairs]`.
    #[must_use]
    pub fn experts(&self) -> &[u16] {
        &self.experts
    }

    /// Combine weight of every pair, `[pairs]`.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Combine weights, to be changed in place (steering, scaling after a filter).
    pub fn weights_mut(&mut self) -> &mut [f32] {
        &mut self.weights
    }
}

/// The stored form; reading goes through [`Routing::from_parts`] so that a damaged file is refused.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    offsets: Vec<u32>,
    experts: Vec<u16>,
    weights: Vec<f32>,
}

impl From<Routing> for Parts {
    fn from(routing: Routing) -> Self {
        Self {
            offsets: routing.offsets,
            experts: routing.experts,
            weights: routing.weights,
        }
    }
}

impl TryFrom<Parts> for Routing {
    type Error = RoutingError;

    fn try_from(parts: Parts) -> Result<Self, RoutingError> {
        Self::from_parts(parts.offsets, parts.experts, parts.weights)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_come_back_as_pushed() {
        let mut routing = Routing::new();
        routing.push_token(&[3, 1], &[0.75, 0.25]);
        routing.push_token(&[], &[]);
        routing.push_pair(2, 1.0);
        routing.end_token();
        assert_eq!(routing.n_tokens(), 3);
        assert_eq!(routing.n_pairs(), 3);
        assert_eq!(routing.token(0), (&[3, 1][..], &[0.75, 0.25][..]));
        assert_eq!(routing.token(1), (&[][..], &[][..]));
        assert_eq!(routing.token(2), (&[2][..], &[1.0][..]));
        assert_eq!(routing.offsets(), [0, 2, 2, 3]);
        routing.clear();
        assert_eq!(routing, Routing::default());
    }

    #[test]
    fn damaged_parts_are_refused_with_the_reason() {
        let reason = |offsets: &[u32], experts: &[u16], weights: &[f32]| {
            Routing::from_parts(offsets.to_vec(), experts.to_vec(), weights.to_vec())
                .unwrap_err()
                .to_string()
        };
        assert!(reason(&[], &[], &[]).contains("start with None"));
        assert!(reason(&[1, 1], &[0], &[1.0]).contains("expected 0"));
        assert!(reason(&[0, 2, 1], &[0], &[1.0]).contains("at token 1"));
        assert!(reason(&[0, 1], &[0], &[]).contains("1 expert ids but 0 weights"));
        assert!(reason(&[0, 2], &[0], &[1.0]).contains("end at 2"));
        assert!(reason(&[0, 1], &[0], &[f32::NAN]).contains("pair 0 is NaN"));
    }

    #[test]
    fn json_is_checked_while_reading() {
        let text = r#"{"offsets":[0,1],"experts":[5],"weights":[0.5]}"#;
        let routing: Routing = serde_json::from_str(text).unwrap();
        assert_eq!(routing.token(0), (&[5][..], &[0.5][..]));
        assert!(serde_json::from_str::<Routing>(&text.replace("[0,1]", "[0,2]")).is_err());
    }

    proptest! {
        #[test]
        fn round_trips(tokens in prop::collection::vec(prop::collection::vec((0u16..64, -1f32..1.0), 0..6), 0..20)) {
            let mut routing = Routing::with_capacity(tokens.len(), 4);
            for token in &tokens {
                let (experts, weights): (Vec<u16>, Vec<f32>) = token.iter().copied().unzip();
                routing.push_token(&experts, &weights);
            }
            prop_assert_eq!(routing.n_tokens(), tokens.len());
            for (row, token) in routing.iter().zip(&tokens) {
                let back: Vec<(u16, f32)> = row.0.iter().copied().zip(row.1.iter().copied()).collect();
                prop_assert_eq!(&back, token);
            }
            let text = serde_json::to_string(&routing).unwrap();
            prop_assert_eq!(serde_json::from_str::<Routing>(&text).unwrap(), routing);
        }
    }
}
