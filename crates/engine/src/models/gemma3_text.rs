//! Gemma 3 (text): norms around every block, windows in most layers with a rotation of their own, tanh GELU.
//!
//! Source: Gemma 3 Technical Report, 2025, arXiv 2503.19786.

use crate::builder::Builder;
use crate::decoder::{Decoder, Layer};
use crate::error::Result;

/// Builds the model of a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(b: Builder<'_>) -> Result<Decoder> {
    b.decoder(|b, layer| {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let windowed = b.config.attention.windows[layer].is_some();
        Ok(Layer {
            attention_norm: b.norm(&name("input_layernorm"))?,
            attention: b.grouped(layer)?,
            attention_post_norm: Some(b.norm(&name("post_attention_layernorm"))?),
            ffn_norm: b.norm(&name("pre_feedforward_layernorm"))?,
            ffn: b.dense(layer)?,
            ffn_post_norm: Some(b.norm(&name("post_feedforward_layernorm"))?),
            rope: usize::from(windowed && b.config.local_rope.is_some()),
        })
    })
}
