//! gpt-oss: attention sinks, windows in every other layer, biases everywhere, clamped experts.
//!
//! Source: gpt-oss model card, 2025, arXiv 2508.10925.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
