//! `qwen2`, `qwen3`, `qwen2moe`, `qwen3moe`, and `olmoe`, which only norms whole projections besides.
//!
//! llama.cpp divides the weights of picked experts by their sum for `qwen3moe` and not for the others, whatever
//! `norm_topk_prob` was, has experts in every layer, and knows no windows here.

use super::base::{Kind, base, expert_width, moe};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{ModelConfig, QkNorm, RouterConfig, SharedExpert};
use crate::error::Result;

const fn architecture(
    name: &'static str,
    read: fn(&Meta<'_>) -> Result<ModelConfig>,
) -> GgufArchitecture {
    GgufArchitecture {
        name,
        read,
        norms: NormNames::Usual,
    }
}

pub(super) const QWEN2: GgufArchitecture =
    architecture("qwen2", |meta| base(meta, &halves("qwen2")));
pub(super) const QWEN3: GgufArchitecture =
    architecture("qwen3", |meta| base(meta, &halves("qwen3")));
pub(super) const QWEN2_MOE: GgufArchitecture = architecture("qwen2moe", qwen2_moe);
pub(super) const QWEN3_MOE: GgufArchitecture = architecture("qwen3moe", qwen3_moe);
pub(super) const OLMOE: GgufArchitecture = architecture("olmoe", olmoe);

fn halves(model_type: &'static str) -> Kind {
    Kind {
        model_type,
        interleaved: false,
    }
}

/// An expert's width: its key, or the dense width shared out to the experts of a token.
fn width(meta: &Meta<'_>, config: &ModelConfig) -> Result<usize> {
    if let Some(width) = expert_width(meta)? {
        return Ok(width);
    }
    Ok(config.intermediate_size / meta.size("expert_used_count")?)
}

fn qwen2_moe(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(meta, &halves("qwen2_moe"))?;
    let router = RouterConfig::TopK { norm: false };
    config.moe = moe(meta, 0..config.n_layers, width(meta, &config)?, router)?;
    let shared = meta.size_opt("expert_shared_feed_forward_length")?;
    config.moe.shared = Some(SharedExpert {
        intermediate_size: shared.unwrap_or(config.intermediate_size),
        gated: true,
    });
    Ok(config)
}

fn qwen3_moe(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(meta, &halves("qwen3_moe"))?;
    let router = RouterConfig::TopK { norm: true };
    config.moe = moe(meta, 0..config.n_layers, width(meta, &config)?, router)?;
    Ok(config)
}

fn olmoe(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(meta, &halves("olmoe"))?;
    config.attention.qk_norm = QkNorm::WholeProjection;
    let router = RouterConfig::TopK { norm: false };
    config.moe = moe(meta, 0..config.n_layers, config.intermediate_size, router)?;
    Ok(config)
}
