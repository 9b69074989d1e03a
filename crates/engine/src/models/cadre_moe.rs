//! What Cadre trains and no published architecture can hold: Qwen3's attention, perhaps in experts, and experts of any kind.
//!
//! Source: `docs/guide/models.md`, with the papers of the parts. What a layer is made of follows from the configuration.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
