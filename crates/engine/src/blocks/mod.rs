//! The parts that models are built of. A block holds weights, borrows scratch, and knows no model.
//!
//! Legend of shape suffixes: `t` tokens of the pass, `d` width of the residual stream, `e` experts,
//! `p` (token, expert) pairs, `f` width of a feed-forward.

mod ahead;
mod attention;
mod attention_experts;
mod decoupled;
mod embedding;
mod experts;
mod factored;
mod feed_forward;
mod groups;
mod kv_cache;
mod latent_attention;
mod linear;
mod lossy;
mod moe;
mod norm;
mod pick;
mod residual;
mod rope;
mod router;
mod told;

pub(crate) use ahead::{Ahead, foresee, tell};
pub(crate) use attention::{Attention, AttentionScratch};
pub(crate) use attention_experts::{AttentionExperts, AttentionExpertsScratch};
pub(crate) use decoupled::{DecoupledRouter, DecoupledScratch, DecoupledShape, RouterLayer};
pub(crate) use embedding::Embedding;
pub(crate) use experts::Experts;
pub(crate) use factored::{Factored, FactoredExpert, FactoredScratch, factored_rows};
pub(crate) use feed_forward::{FeedForward, FeedForwardScratch};
pub(crate) use kv_cache::{KvCache, KvShape, LayerKv};
pub(crate) use latent_attention::{LatentAttention, LatentScratch, QueryProjection};
pub(crate) use linear::{Linear, add_rows};
pub(crate) use lossy::LossyRules;
pub(crate) use moe::{Moe, MoeError, MoeScratch, MoeShape, Shared};
pub(crate) use norm::Norm;
pub(crate) use residual::Residual;
pub(crate) use rope::{Rope, RopeAngles};
pub(crate) use router::{Foretold, GruCell, Random, Recurrent, Router, RouterScratch};

use std::sync::Arc;

use cadre_kernels::Compute;
use cadre_routing::Steered;

use crate::batch::{Sequence, Span, n_rows};

/// What a block needs to know about the pass it is part of.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) layer: usize,
    /// The rows of each sequence, one after the other.
    pub(crate) spans: &'a [Span],
    /// How each sequence is steered; empty where none can be.
    pub(crate) steering: &'a [Option<Arc<Steered>>],
    /// Whether the pass has at most one token of each sequence.
    pub(crate) decodes: bool,
}

impl Step<'_> {
    /// Rows of all sequences.
    pub(crate) fn n_rows(&self) -> usize {
        n_rows(self.spans)
    }

    /// The rows of sequence `i` beside what it holds, for [`Compute::attend`].
    pub(crate) fn stored<'k>(
        &self,
        batch: &'k [Sequence<'_>],
        i: usize,
    ) -> cadre_kernels::Span<'k> {
        let span = self.spans[i];
        cadre_kernels::Span {
            kv: &batch[i].session.kv.layers[self.layer],
            position: span.position,
            first: span.first_row,
            n_tokens: span.n_rows,
        }
    }
}
