//! `gpt-oss`: attention sinks, biases everywhere, windows on every other layer from the first on.

use super::base::{Kind, base, expert_width, local_rope, moe, windows};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{Activation, ModelConfig, RouterConfig};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "gpt-oss",
    read,
    norms: NormNames::PostAttention,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(
        meta,
        &Kind {
            model_type: "gpt_oss",
            interleaved: false,
        },
    )?;
    config.attention.windows = windows(meta, config.n_layers, 2)?;
    let theta = meta.number_opt("rope.freq_base_swa")?;
    config.local_rope = local_rope(&config.rope, theta.unwrap_or(config.rope.theta));
    // Constants of llama.cpp; no key holds them.
    config.activation = Activation::SwigluOai {
        alpha: 1.702,
        limit: 7.0,
    };
    let width = expert_width(meta)?.unwrap_or(config.intermediate_size);
    // A softmax over the logits of the picked experts.
    let router = RouterConfig::TopK { norm: true };
    config.moe = moe(meta, 0..config.n_layers, width, router)?;
    Ok(config)
}
