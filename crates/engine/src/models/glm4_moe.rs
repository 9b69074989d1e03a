//! GLM-4 MoE (GLM-4.5 to 4.7): half-rotated heads, sigmoid routing with a selection bias, a shared expert.
//!
//! Source: GLM-4.5, 2025, arXiv 2508.06471.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
