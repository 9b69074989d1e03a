//! Switch routing: one expert per token.
//!
//! Paper: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, Fedus, Zoph
//! and Shazeer, 2021, arXiv 2101.03961.
//! Rule: the expert with the largest `p = softmax(l)`; its weight is the raw p (head A), because a renormalised
//! single weight is always 1 and would give the router no gradient.
//! Shapes: logits [T, E], ids [T, 1].
//! Aux: load balance 1e-2. Differs from paper: capacity is a separate stage, see `filters`.
//! Check: policies::switch::tests, tests/golden.rs with golden/routing/section.json.

use crate::policy::{self, Policy};
use crate::scores::Softmax;
use crate::select;
use crate::stages::{self, Reach, Stages};
use crate::{Routing, RoutingError};

/// Top-1 with raw probability. Does not allocate once `routing` has grown to its working size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    n_experts: usize,
}

impl Switch {
    /// Picks one of `n_experts`.
    ///
    /// # Errors
    /// [`RoutingError::BadOption`] when there is no expert or there are more experts than ids.
    pub fn new(n_experts: usize) -> Result<Self, RoutingError> {
        policy::check_sizes("switch", n_experts, 1)?;
        Ok(Self { n_experts })
    }
}

impl Policy for Switch {
    fn name(&self) -> &'static str {
        "switch"
    }

    fn n_experts(&self) -> usize {
        self.n_experts
    }

    fn max_picks(&self) -> usize {
        1
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
        policy::begin(logits, self.n_experts, 1, routing)?;
        for row in logits.chunks_exact(self.n_experts) {
            if let Some((id, logit)) = select::next_best(row, None) {
                routing.push_token(&[id], &[Softmax::of(row).p(logit)]);
            }
        }
        Ok(())
    }
}

impl Stages for Switch {
    fn reach(&self) -> Reach {
        Reach::Fixed(1)
    }

    fn weigh(&self, logits: &[f32], ids: &[u16], weights: &mut [f32]) {
        stages::gather(logits, ids, weights);
        let softmax = Softmax::of(logits);
        weights.iter_mut().for_each(|w| *w = softmax.p(*w));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_is_the_raw_probability() {
        let mut routing = Routing::new();
        // softmax(0, ln 3) = 1/4, 3/4; the second token is a tie.
        Switch::new(2)
            .unwrap()
            .route(&[0.0, 3f32.ln(), 1.0, 1.0], &mut routing)
            .unwrap();
        assert_eq!(routing.experts(), [1, 0]);
        assert!((routing.weights()[0] - 0.75).abs() < 1e-6);
        assert_eq!(routing.weights()[1], 0.5);
    }
}
