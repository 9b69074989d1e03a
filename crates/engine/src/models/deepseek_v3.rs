//! DeepSeek-V3 (also R1, Kimi-K2, Moonlight): latent attention, sigmoid routing with a selection bias.
//!
//! Source: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.latent(layer)?, b.experts_or_dense(layer)?))
}
