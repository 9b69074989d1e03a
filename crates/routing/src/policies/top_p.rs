//! Dynamic top-p routing.
//!
//! Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv 2403.07652.
//! Rule: sort `p = softmax(l)` descending; keep the shortest prefix whose sum is strictly more than `top_p` (all
//! experts when no prefix is); weights are the kept p, not renormalised (head A).
//! Shapes: logits [T, E], ids ragged (1 to E per token).
//! Aux: load balance 1e-2 and an entropy loss 1e-4 that keeps the distribution sharp. Differs from paper: nothing.
//! Check: policies::top_p::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores::Softmax;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// As many experts as it takes to collect the probability mass `top_p`.
#[derive(Clone, Debug, PartialEq)]
pub struct TopP {
    n_experts: usize,
    top_p: f32,
}

impl TopP {
    /// Collects more than `top_p` of the probability; 0 gives one expert, 1 gives all of them.
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] when `top_p` is outside 0 to 1 or the number of experts does not fit.
    pub fn new(n_experts: usize, top_p: f32) -> Result<Self, RoutingError> {
        policy::check_sizes("top_p", n_experts, 1)?;
        policy::check_option(
            "top_p",
            "top_p",
            top_p,
            (0.0..=1.0).contains(&top_p),
            "0 to 1",
        )?;
        Ok(Self { n_experts, top_p })
    }
}

impl Policy for TopP {
    fn name(&self) -> &'static str {
        "top_p"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        self.n_experts
    }

    fn causal(&self) -> bool {
        true
    }

    fn batch_invariant(&self) -> bool {
        true
    }

    fn stages(&self) -> Option<&dyn Stages> {
        Some(self)
    }

    fn route(&self, logits: &[f32], routing: &mut Routing) -> Result<(), RoutingError> {
        policy::begin(logits, self.n_experts, 0, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            let softmax = Softmax::of(row);
            let mut last = None;
            let mut collected = 0.0;
            while collected <= self.top_p {
                last = select::next_best(row, last);
                let Some((id, logit)) = last else { break };
                let p = softmax.p(logit);
                collected += p;
                routing.push_pair(id, p);
            }
            routing.end_token();
        }
        Ok(())
    }
}

impl Stages for TopP {
    fn reach(&self) -> Reach {
        Reach::Mass(self.top_p)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        let softmax = Softmax::of(logits);
        weights.iter_mut().for_each(|w| *w = softmax.p(*w));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_crossing_expert_is_kept_and_the_threshold_is_strict() {
        // Four equal logits: p = 0.25 each, exactly. A sum of exactly 0.5 does not pass a threshold of 0.5.
        let mut routing = Routing::new();
        TopP::new(4, 0.5)
            .unwrap()
            .route(&[7.0; 4], &mut routing)
            .unwrap();
        assert_eq!(routing.token(0), (&[0, 1, 2][..], &[0.25; 3][..]));
    }

    #[test]
    fn a_threshold_outside_0_to_1_is_refused() {
        assert!(
            TopP::new(4, 1.5)
                .unwrap_err()
                .to_string()
                .contains("top_p = 1.5, expected 0 to 1")
        );
        assert!(TopP::new(4, f32::NAN).is_err());
    }

    proptest! {
        #[test]
        fn picks_grow_with_the_threshold(row in prop::collection::vec(-4f32..4.0, 8), a in 0f32..1.0, b in 0f32..1.0) {
            let picks = |top_p: f32| {
                let mut routing = Routing::new();
                TopP::new(8, top_p).unwrap().route(&row, &mut routing).unwrap();
                routing
            };
            let (few, many) = (picks(a.min(b)), picks(a.max(b)));
            prop_assert!(many.experts().starts_with(few.experts()));
            prop_assert_eq!(picks(0.0).n_pairs(), 1);
            prop_assert_eq!(picks(1.0).n_pairs(), 8);
        }
    }
}
