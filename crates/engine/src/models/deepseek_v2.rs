//! DeepSeek-V2: latent attention, group-limited softmax routing, shared experts; the first layers are dense.
//!
//! Source: DeepSeek-V2, 2024, arXiv 2405.04434.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.latent(layer)?, b.experts_or_dense(layer)?))
}
