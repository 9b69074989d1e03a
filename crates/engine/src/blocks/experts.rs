//! Where the MoE block gets its experts from: all of them in memory, or as a store brings them in.

use std::ops::Range;
use std::sync::Arc;

use cadre_kernels::{Compute, Grouped, MatmulScratch, Matrix};
use cadre_store::Pass;

use super::{FactoredExpert, FeedForward, FeedForwardScratch};
use crate::error::EngineError;
use crate::streaming::{ExpertStore, MadeExpert, StoredExperts};

/// The experts of one layer.
#[derive(Debug)]
pub(crate) enum Experts {
    /// All in memory, of one shape.
    Resident(Vec<FeedForward>),
    /// All in memory, in factors.
    Factored(Vec<FactoredExpert>),
    /// Some in memory.
    Streamed {
        /// Shared by all layers.
        store: Arc<ExpertStore>,
        /// Index of this layer among those that have experts.
        layer: u16,
        /// How many there are, with copies in fewer bits.
        n_experts: usize,
    },
}

/// The rows that each picked expert computes, sorted by expert.
#[derive(Clone, Copy)]
pub(crate) struct ExpertRows<'a> {
    /// The `i`-th expert of the order owns rows `offsets[i]..offsets[i + 1]`.
    pub(crate) offsets: &'a [usize],
    /// The token that each row comes from.
    pub(crate) token_of_row: &'a [u32],
}

/// The experts of a layer while one pass uses them.
pub(crate) enum Turn<'a> {
    Resident {
        experts: &'a [FeedForward],
        order: &'a [u16],
    },
    Factored {
        experts: &'a [FactoredExpert],
        order: &'a [u16],
    },
    Streamed(Pass<'a, StoredExperts>),
}

impl Experts {
    pub(crate) fn n_experts(&self) -> usize {
        match self {
            Self::Resident(experts) => experts.len(),
            Self::Factored(experts) => experts.len(),
            Self::Streamed { n_experts, .. } => *n_experts,
        }
    }

    /// Whether each of them is in memory.
    pub(crate) fn mark_cached(&self, is_cached: &mut Vec<bool>) {
        is_cached.resize(self.n_experts(), true);
        match self {
            Self::Resident(_) | Self::Factored(_) => is_cached.fill(true),
            Self::Streamed { store, layer, .. } => store.mark_cached(*layer, is_cached),
        }
    }

    /// Adds its matrices to `all`; those on disk are not there.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        match self {
            Self::Resident(experts) => experts.iter().for_each(|expert| expert.matrices(all)),
            Self::Factored(experts) => experts.iter().for_each(|expert| expert.matrices(all)),
            Self::Streamed { .. } => {}
        }
    }

    /// Begins to bring in the experts `active`, ascending, of which each serves `counts[expert]` of `n_tokens` tokens.
    pub(crate) fn begin<'a>(
        &'a self,
        active: &'a [u16],
        counts: &[u32],
        n_tokens: usize,
    ) -> Turn<'a> {
        match self {
            Self::Resident(experts) => Turn::Resident {
                experts,
                order: active,
            },
            Self::Factored(experts) => Turn::Factored {
                experts,
                order: active,
            },
            Self::Streamed { store, layer, .. } => {
                let wanted = active.iter().map(|id| (*id, counts[usize::from(*id)]));
                Turn::Streamed(store.begin(*layer, wanted, n_tokens))
            }
        }
    }
}

impl Turn<'_> {
    /// Experts in the order in which they are computed; rows are to be laid out in it.
    pub(crate) fn order(&self) -> &[u16] {
        match self {
            Self::Resident { order, .. } | Self::Factored { order, .. } => order,
            Self::Streamed(pass) => pass.order(),
        }
    }

    /// Computes every row by its expert, from the tokens' `x_td` into `y_pd`, `[rows, d]`. What a row becomes does not
    /// depend on what is computed beside it, so batches change nothing.
    pub(crate) fn forward(
        &mut self,
        compute: &Compute,
        rows: ExpertRows<'_>,
        (x_td, y_pd): (&[f32], &mut [f32]),
        (offsets, ffn, matmul): (&mut Vec<usize>, &mut FeedForwardScratch, &mut MatmulScratch),
    ) -> Result<(), EngineError> {
        if let Self::Factored { experts, order } = self {
            let expert = |g: usize| &experts[usize::from(order[g])];
            let scratch = (&mut ffn.factored, matmul);
            FactoredExpert::forward_groups(compute, rows, &expert, (x_td, y_pd), scratch);
            return Ok(());
        }
        let d = y_pd.len() / rows.token_of_row.len().max(1);
        let mut batches = Batches {
            compute,
            rows,
            d,
            x_td,
            y_pd,
            offsets,
            ffn,
            matmul,
            keeps_inputs: matches!(self, Self::Streamed(_)),
            is_same: false,
        };
        match self {
            Self::Resident { experts, order } => {
                let expert = |g: usize| &experts[usize::from(order[g])];
                batches.forward(0..order.len(), &expert);
            }
            Self::Factored { .. } => {}
            Self::Streamed(pass) => {
                while let Some(batch) = pass.next_batch()? {
                    let (mut whole, mut factored) = (Vec::new(), Vec::new());
                    for at in batch.clone() {
                        match pass.expert(at) {
                            MadeExpert::Whole(expert) => whole.push(expert),
                            MadeExpert::Factored(expert) => factored.push(expert),
                        }
                    }
                    // All experts of a model are of one kind.
                    match factored.is_empty() {
                        true => batches.forward(batch, &|g| whole[g]),
                        false => batches.forward_factored(batch, &|g| factored[g]),
                    }
                }
            }
        }
        Ok(())
    }
}

/// Rows of a layer that are computed a batch of experts at a time.
struct Batches<'a> {
    compute: &'a Compute,
    rows: ExpertRows<'a>,
    d: usize,
    x_td: &'a [f32],
    y_pd: &'a mut [f32],
    offsets: &'a mut Vec<usize>,
    ffn: &'a mut FeedForwardScratch,
    matmul: &'a mut MatmulScratch,
    /// Whether there are several batches, all about the same inputs.
    keeps_inputs: bool,
    is_same: bool,
}

impl Batches<'_> {
    /// As [`Self::forward`], of experts in factors.
    fn forward_factored<'w>(
        &mut self,
        batch: Range<usize>,
        expert: &dyn Fn(usize) -> &'w FactoredExpert,
    ) {
        let rows = ExpertRows {
            offsets: &self.rows.offsets[batch.start..=batch.end],
            ..self.rows
        };
        let scratch = (&mut self.ffn.factored, &mut *self.matmul);
        let values = (self.x_td, &mut *self.y_pd);
        FactoredExpert::forward_groups(self.compute, rows, expert, values, scratch);
    }

    /// Computes the rows of the experts `batch` of the order; `expert(0)` is the first of these.
    fn forward<'w>(
        &mut self,
        batch: Range<usize>,
        expert: &(dyn Fn(usize) -> &'w FeedForward + Sync),
    ) {
        let offsets = &self.rows.offsets[batch.start..=batch.end];
        let rows = offsets[0]..offsets[offsets.len() - 1];
        self.offsets.clear();
        self.offsets
            .extend(offsets.iter().map(|offset| offset - rows.start));
        let grouped = Grouped {
            offsets: self.offsets,
            x: self.x_td,
            index: Some(&self.rows.token_of_row[rows.clone()]),
            is_same: self.is_same,
        };
        self.is_same = self.keeps_inputs;
        let y_pd = &mut self.y_pd[rows.start * self.d..rows.end * self.d];
        let scratch = (&mut *self.ffn, &mut *self.matmul, self.keeps_inputs);
        FeedForward::forward_groups(self.compute, grouped, expert, y_pd, scratch);
    }
}
