//! Where the MoE block gets its experts from: the one type to change when they do not all fit in memory.

use cadre_kernels::{Compute, MatmulScratch};

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
    /// Their inputs, `[offsets.last(), d]`.
    pub(crate) x_pd: &'a [f32],
}

impl Experts {
    /// Experts of one shape.
    pub(crate) fn new(experts: Vec<FeedForward>) -> Self {
        Self { experts }
    }

    pub(crate) fn n_experts(&self) -> usize {
        self.experts.len()
    }

    /// Bytes of the weights.
    pub(crate) fn n_bytes(&self) -> usize {
        self.experts.iter().map(FeedForward::n_bytes).sum()
    }

    /// Computes every row by its expert into `out_pd`, in the same order.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        rows: ExpertRows<'_>,
        out_pd: &mut [f32],
        scratch: (&mut FeedForwardScratch, &mut MatmulScratch),
    ) {
        let expert = |g: usize| &self.experts[usize::from(rows.active[g])];
        FeedForward::forward_groups(compute, rows.offsets, &expert, (rows.x_pd, out_pd), scratch);
    }
}
