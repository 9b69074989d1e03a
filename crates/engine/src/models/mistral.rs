//! Mistral: Llama with a window on attention.
//!
//! Source: Mistral 7B, Jiang et al., 2023, arXiv 2310.06825.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.dense(layer)?))
}
