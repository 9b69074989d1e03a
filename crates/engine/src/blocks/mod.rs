//! The parts that models are built of. A block holds weights, borrows scratch, and knows no model.
//!
//! Legend of shape suffixes: `t` tokens of the chunk, `d` width of the residual stream, `e` experts,
//! `p` (token, expert) pairs, `f` width of a feed-forward.

mod attention;
mod experts;
mod feed_forward;
mod kv_cache;
mod latent_attention;
mod linear;
mod moe;
mod norm;
mod rope;

pub(crate) use attention::{Attention, AttentionScratch};
pub(crate) use experts::Experts;
pub(crate) use feed_forward::{FeedForward, FeedForwardScratch};
pub(crate) use kv_cache::{KvCache, KvShape, LayerKv};
pub(crate) use latent_attention::{LatentAttention, LatentScratch, QueryProjection};
pub(crate) use linear::{Linear, add_rows};
pub(crate) use moe::{Moe, MoeScratch, MoeShape, Shared};
pub(crate) use norm::Norm;
pub(crate) use rope::{Rope, RopeAngles};

use cadre_kernels::Compute;

/// What a block needs to know about the call it is part of.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) compute: &'a Compute,
    pub(crate) layer: usize,
    /// Position of the chunk's first token.
    pub(crate) position: usize,
    /// Tokens of the chunk.
    pub(crate) n_tokens: usize,
}
