//! PhiMoE: LayerNorm, biases, LongRoPE, two experts picked by the thresholded softmaxes of SparseMixer.
//!
//! Source: Phi-3 Technical Report, 2024, arXiv 2404.14219; GRIN, Liu et al., 2024, arXiv 2409.12136.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
