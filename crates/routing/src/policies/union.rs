//! Union of experts: slices of one feed-forward, chosen by tokens and then by themselves, summed and not averaged.
//!
//! Paper: Union of Experts (UoE), Yang, Lian and Li, 2025, arXiv 2503.02495; the multi-layer perceptron part.
//! Rule: each token takes its k best experts by `p = softmax(l)`; each expert keeps, of the tokens that took it, the
//! `floor(keep T)` (at least one) with the largest p. The outputs are summed with one scalar per token (head E):
//! `M / (M + eps)`, M the sum of its picks' p.
//! Shapes: logits [T, E] of one sequence, ids ragged (0 to k per token).
//! Aux: none. Differs from paper: an expert never takes a token that did not take it, where the code pads.
//! Check: policies::union::tests.

use crate::filters::{self, DropOrder};
use crate::policy::{self, Policy};
use crate::scores::Softmax;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Top-k of the tokens, then the best tokens of the experts. Looks at all tokens of a call unless `keep` is 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Union {
    n_experts: usize,
    top_k: usize,
    keep: f32,
    eps: f32,
}

impl Union {
    /// Picks `top_k` of `n_experts`, of which each keeps the share `keep` of the tokens; `eps` is that of the scalar.
    ///
    /// # Errors
    /// [`RoutingError::TopKTooLarge`] and [`RoutingError::BadOption`] for sizes that do not fit, `keep` outside of 0 to 1,
    /// and a negative `eps`.
    pub fn new(n_experts: usize, top_k: usize, keep: f32, eps: f32) -> Result<Self, RoutingError> {
        const NAME: &str = "union";
        policy::check_sizes(NAME, n_experts, top_k)?;
        let valid = keep > 0.0 && keep <= 1.0;
        policy::check_option(NAME, "keep", keep, valid, "more than 0, at most 1")?;
        let valid = eps.is_finite() && eps >= 0.0;
        policy::check_option(NAME, "eps", eps, valid, "a finite number of at least 0")?;
        Ok(Self {
            n_experts,
            top_k,
            keep,
            eps,
        })
    }

    /// Tokens that each expert keeps out of `n_tokens`.
    #[must_use]
    pub fn tokens_per_expert(&self, n_tokens: usize) -> usize {
        ((f64::from(self.keep) * n_tokens as f64) as usize).max(1)
    }

    /// Turns the p of a token's picks into their scalar.
    fn finish(&self, weights: &mut [f32]) {
        let mass: f32 = weights.iter().sum();
        weights.fill(mass / (mass + self.eps));
    }
}

impl Policy for Union {
    fn name(&self) -> &'static str {
        "union"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        self.top_k
    }

    fn causal(&self) -> bool {
        self.keep >= 1.0
    }

    fn batch_invariant(&self) -> bool {
        self.keep >= 1.0
    }

    fn stages(&self) -> Option<&dyn Stages> {
        let stages: &dyn Stages = self;
        self.batch_invariant().then_some(stages)
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        policy::begin(logits, self.n_experts, self.top_k, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            let (ids, weights) = routing.push_slots(self.top_k);
            select::top_k(select::numbered(row), ids, weights);
            let softmax = Softmax::of(row);
            weights.iter_mut().for_each(|w| *w = softmax.p(*w));
        }
        if !self.causal() {
            let slots = vec![self.tokens_per_expert(routing.n_tokens()); self.n_experts];
            let keep = filters::keep(routing, &slots, DropOrder::Weight);
            *routing = routing.kept(&keep);
        }
        for token in 0..routing.n_tokens() {
            let [first, end] = [token, token + 1].map(|at| routing.offsets()[at] as usize);
            self.finish(&mut routing.weights_mut()[first..end]);
        }
        Ok(())
    }
}

impl Stages for Union {
    fn reach(&self) -> Reach {
        Reach::Fixed(self.top_k)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        let softmax = Softmax::of(logits);
        weights.iter_mut().for_each(|w| *w = softmax.p(*w));
        self.finish(weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_keep_their_best_tokens_among_those_that_took_them() {
        // Every token takes expert 0 first and expert 1 second; expert 0 keeps the surest two of four.
        let logits = [1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 0.5, 0.0];
        let mut routing = Routing::new();
        let policy = Union::new(2, 1, 0.5, 0.0).unwrap();
        policy.route(&logits, &mut routing).unwrap();
        let picks: Vec<&[u16]> = routing.iter().map(|(ids, _)| ids).collect();
        assert_eq!(picks, [&[][..], &[0], &[0], &[]]);
        assert_eq!(routing.weights(), [1.0, 1.0]);
        assert_eq!((policy.causal(), policy.batch_invariant()), (false, false));
    }

    #[test]
    fn the_scalar_is_one_for_a_token() {
        let mut routing = Routing::new();
        let policy = Union::new(2, 2, 1.0, 1.0).unwrap();
        policy.route(&[0.0, 3f32.ln()], &mut routing).unwrap();
        assert_eq!(routing.experts(), [1, 0]);
        // All mass is picked: 1 / (1 + 1).
        assert_eq!(routing.weights(), [0.5, 0.5]);
        assert!(policy.causal());
        assert!(Union::new(2, 2, 0.0, 0.0).is_err() && Union::new(2, 2, 1.0, -1.0).is_err());
    }
}
