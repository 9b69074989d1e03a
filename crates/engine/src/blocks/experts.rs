//! Where the MoE block gets its experts from: the one type to change when they do not all fit in memory.

use cadre_kernels::{Compute, Grouped, MatmulScratch, Matrix};

use super::{FeedForward, FeedForwardScratch};

/// The experts of one layer, all in memory.
#[derive(Debug)]
pub(crate) struct Experts {
    experts: Vec<FeedForward>,
}

/// The rows that each picked expert computes, sorted by expert.
#[derive(Clone, Copy)]
pub(crate) struct ExpertRows<'a> {
    /// Ids of the experts that have rows, ascending.
    pub(crate) active: &'a [u16],
    /// Expert `active[i]` owns rows `offsets[i]..offsets[i + 1]`.
    pub(crate) offsets: &'a [usize],
    /// The token that each row comes from.
    pub(crate) token_of_row: &'a [u32],
}

impl Experts {
    /// Experts of one shape.
    pub(crate) fn new(experts: Vec<FeedForward>) -> Self {
        Self { experts }
    }

    pub(crate) fn n_experts(&self) -> usize {
        self.experts.len()
    }

    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        for expert in &self.experts {
            expert.matrices(all);
        }
    }

    /// Computes every row by its expert, from the tokens' `x_td` into `y_pd`, `[rows, d]`.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        rows: ExpertRows<'_>,
        (x_td, y_pd): (&[f32], &mut [f32]),
        scratch: (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let expert = |g: usize| &self.experts[usize::from(rows.active[g])];
        let rows = Grouped {
            offsets: rows.offsets,
            x: x_td,
            index: Some(rows.token_of_row),
        };
        FeedForward::forward_groups(compute, rows, &expert, y_pd, scratch);
    }
}
