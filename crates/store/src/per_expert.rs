//! A table with one value for every expert of every layer.

use std::ops::{Index, IndexMut};

use crate::expert::ExpertId;

/// One `T` per expert, in the order of layers. Indexing with an expert outside of the model panics.
#[derive(Clone, Debug)]
pub(crate) struct PerExpert<T> {
    n_experts: usize,
    values: Vec<T>,
}

impl<T: Clone> PerExpert<T> {
    /// The same value for all.
    pub(crate) fn new(n_layers: usize, n_experts: usize, value: T) -> Self {
        Self {
            n_experts,
            values: vec![value; n_layers * n_experts],
        }
    }

    fn at(&self, id: ExpertId) -> usize {
        let expert = usize::from(id.expert);
        // Without this an id that is too large would be another layer's expert.
        assert!(expert < self.n_experts, "{id:?} of {}", self.n_experts);
        usize::from(id.layer) * self.n_experts + expert
    }
}

impl<T: Clone> Index<ExpertId> for PerExpert<T> {
    type Output = T;

    fn index(&self, id: ExpertId) -> &T {
        &self.values[self.at(id)]
    }
}

impl<T: Clone> IndexMut<ExpertId> for PerExpert<T> {
    fn index_mut(&mut self, id: ExpertId) -> &mut T {
        let at = self.at(id);
        &mut self.values[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_kept_apart() {
        let id = |layer, expert| ExpertId { layer, expert };
        let mut table = PerExpert::new(2, 3, 0);
        table[id(1, 0)] = 7;
        assert_eq!((table[id(1, 0)], table[id(0, 2)]), (7, 0));
    }

    #[test]
    #[should_panic(expected = "of 3")]
    fn an_expert_is_not_taken_for_one_of_the_next_layer() {
        let id = ExpertId {
            layer: 0,
            expert: 3,
        };
        let _ = PerExpert::new(2, 3, 0)[id];
    }
}
