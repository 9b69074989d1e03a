//! `gemma3`: norms before and after every part, windows on all but every sixth layer, which have a rope of their own.
//!
//! The converter of llama.cpp adds 1 to the norms, so here they are plain.

use super::base::{Kind, base, windows};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{Activation, ModelConfig};
use crate::error::Result;
use crate::rope::RopeConfig;

/// Layers of the 27B model, which alone scales its queries by the width per head of the stream.
const LAYERS_27B: usize = 62;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "gemma3",
    read,
    norms: NormNames::Gemma,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    const SOFTCAP: &str = "final_logit_softcapping";
    let mut config = base(
        meta,
        &Kind {
            model_type: "gemma3_text",
            interleaved: false,
        },
    )?;
    if let Some(cap) = meta.number_opt(SOFTCAP)?.filter(|cap| *cap != 0.0) {
        return Err(meta.unsupported(SOFTCAP, cap, "logits are not capped here"));
    }
    config.post_norms = true;
    config.activation = Activation::GeluTanh;
    config.scales.embedding = (config.hidden_size as f64).sqrt();
    if config.n_layers == LAYERS_27B {
        let width = config.hidden_size / config.n_heads;
        config.attention.scale = 1.0 / (width as f64).sqrt();
    }
    config.attention.windows = windows(meta, config.n_layers, 6)?;
    if config.attention.windows.iter().any(Option::is_some) {
        // Stretching the context is for the layers that see all of it.
        let theta = meta.number_opt("rope.freq_base_swa")?.unwrap_or(10_000.0);
        config.local_rope = Some(RopeConfig::plain(theta, config.rope.dim));
    }
    Ok(config)
}
