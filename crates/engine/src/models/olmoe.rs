//! OLMoE: norms over the whole query and key projections, optional clamps, softmax top-k experts.
//!
//! Source: OLMoE, Muennighoff et al., 2024, arXiv 2409.02060.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
