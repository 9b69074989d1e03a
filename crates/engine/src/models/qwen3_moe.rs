//! Qwen3-MoE: norms on query and key heads, softmax top-k experts; some layers may be dense.
//!
//! Source: Qwen3 Technical Report, 2025, arXiv 2505.09388.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
