//! Expert choice routing: experts pick tokens.
//!
//! Paper: Mixture-of-Experts with Expert Choice Routing, Zhou et al., 2022, arXiv 2202.09368.
//! Rule: `p = softmax(l)` over the experts; each expert takes the `floor(T c / E)` tokens (at least one) that give it
//! the largest p; weights are the raw p (head A). A token may get no expert or all of them.
//! Shapes: logits [T, E], ids ragged (0 to E per token).
//! Aux: none needed, the load is even by construction. Differs from paper: at least one token per expert; no cap on
//! the experts of a token.
//! Check: policies::expert_choice::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores::Softmax;
use crate::{Routing, RoutingError};

/// Every expert picks the same number of tokens. Looks at all tokens of a call, so it is neither causal nor
/// batch-invariant: for encoders and for studies, not for serving. Allocates scratch per call.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertChoice {
    n_experts: usize,
    capacity_factor: f32,
}

impl ExpertChoice {
    /// `capacity_factor` is the mean number of experts per token.
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] when the factor is not a positive number or the number of experts does not fit.
    pub fn new(n_experts: usize, capacity_factor: f32) -> Result<Self, RoutingError> {
        policy::check_sizes("expert_choice", n_experts, 1)?;
        let valid = capacity_factor.is_finite() && capacity_factor > 0.0;
        policy::check_option(
            "expert_choice",
            "capacity_factor",
            capacity_factor,
            valid,
            "more than 0",
        )?;
        Ok(Self {
            n_experts,
            capacity_factor,
        })
    }

    /// Tokens that each expert takes out of `n_tokens`.
    #[must_use]
    pub fn tokens_per_expert(&self, n_tokens: usize) -> usize {
        let share = n_tokens as f64 * f64::from(self.capacity_factor) / self.n_experts as f64;
        (share as usize).max(1).min(n_tokens)
    }
}

impl Policy for ExpertChoice {
    fn name(&self) -> &'static str {
        "expert_choice"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        self.n_experts
    }

    fn causal(&self) -> bool {
        false
    }

    fn batch_invariant(&self) -> bool {
        false
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        policy::begin(logits, self.n_experts, 0, routing)?;
        let n_tokens = logits.len() / self.n_experts;
        let mut probs = Vec::with_capacity(logits.len());
        for row in logits.chunks_exact(self.n_experts) {
            let softmax = Softmax::of(row);
            probs.extend(row.iter().map(|&l| softmax.p(l)));
        }
        let mut picks: Vec<Vec<(u16, f32)>> = vec![Vec::new(); n_tokens];
        let mut tokens: Vec<usize> = (0..n_tokens).collect();
        for expert in 0..self.n_experts as u16 {
            let p = |t: usize| probs[t * self.n_experts + usize::from(expert)];
            tokens.sort_unstable_by(|&a, &b| p(b).total_cmp(&p(a)).then(a.cmp(&b)));
            for &t in &tokens[..self.tokens_per_expert(n_tokens)] {
                picks[t].push((expert, p(t)));
            }
        }
        for token in &mut picks {
            token.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            token
                .iter()
                .for_each(|&(expert, p)| routing.push_pair(expert, p));
            routing.end_token();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expert_takes_its_best_token_and_ties_go_to_the_earlier_one() {
        let mut routing = Routing::new();
        let policy = ExpertChoice::new(2, 1.0).unwrap();
        // Two tokens, one per expert: both experts' best token is the one whose row leans to them.
        policy.route(&[2.0, 0.0, 0.0, 2.0], &mut routing).unwrap();
        assert_eq!(routing.experts(), [0, 1]);
        // Equal rows: token 0 is taken by both experts, token 1 by none.
        policy.route(&[1.0; 4], &mut routing).unwrap();
        assert_eq!(routing.token(0), (&[0, 1][..], &[0.5, 0.5][..]));
        assert!(routing.token(1).0.is_empty());
    }

    #[test]
    fn the_number_of_tokens_is_floored_but_at_least_one_and_at_most_all() {
        let policy = ExpertChoice::new(8, 2.0).unwrap();
        assert_eq!(
            [0, 1, 6, 8, 15].map(|t| policy.tokens_per_expert(t)),
            [0, 1, 1, 2, 3]
        );
        assert_eq!(ExpertChoice::new(2, 9.0).unwrap().tokens_per_expert(4), 4);
        let mut routing = Routing::new();
        policy.route(&[], &mut routing).unwrap();
        assert_eq!(routing.n_tokens(), 0);
    }

    #[test]
    fn the_choice_for_a_token_depends_on_later_ones() {
        let policy = ExpertChoice::new(2, 1.0).unwrap();
        let (mut short, mut long) = (Routing::new(), Routing::new());
        policy.route(&[1.0, 0.0], &mut short).unwrap();
        policy.route(&[1.0, 0.0, 3.0, 0.0], &mut long).unwrap();
        assert!(!policy.causal() && short.token(0) != long.token(0));
    }
}
