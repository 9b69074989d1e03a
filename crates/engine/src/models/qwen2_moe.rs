//! Qwen2-MoE: softmax top-k experts and a shared expert behind a sigmoid gate; some layers may be dense.
//!
//! Source: Qwen2 Technical Report, 2024, arXiv 2407.10671.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| Layer::pre_norm(b, layer, b.grouped(layer)?, b.experts_or_dense(layer)?))
}
