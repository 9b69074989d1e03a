//! `granitemoe`: Granite's constant factors; rows of queries and keys are permuted as in `llama`.

use super::base::{Kind, base, moe};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{ModelConfig, RouterConfig, Scales, SharedExpert};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "granitemoe",
    read,
    norms: NormNames::Usual,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(
        meta,
        &Kind {
            model_type: "granitemoe",
            interleaved: true,
        },
    )?;
    if let Some(scale) = meta.number_opt("attention.scale")?.filter(|v| *v != 0.0) {
        config.attention.scale = scale;
    }
    config.scales = Scales {
        embedding: meta.factor("embedding_scale")?,
        residual: meta.factor("residual_scale")?,
        logits_divisor: meta.number("logit_scale")?,
    };
    let router = RouterConfig::TopK { norm: true };
    config.moe = moe(meta, 0..config.n_layers, config.intermediate_size, router)?;
    let shared = meta.size_opt("expert_shared_feed_forward_length")?;
    config.moe.shared = shared.map(|intermediate_size| SharedExpert {
        intermediate_size,
        gated: false,
    });
    Ok(config)
}
