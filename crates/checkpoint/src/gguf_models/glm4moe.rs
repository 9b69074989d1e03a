//! `glm4moe`: GLM-4.5 and later, grouped queries with the router of DeepSeek-V3. The last blocks predict ahead.

use super::base::{Kind, base, expert_width, moe};
use super::deepseek2::{grouped_router, shared};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{ModelConfig, Score};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "glm4moe",
    read,
    norms: NormNames::PostAttention,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(
        meta,
        &Kind {
            model_type: "glm4_moe",
            interleaved: false,
        },
    )?;
    let first = meta.size_opt("leading_dense_block_count")?.unwrap_or(0);
    let width = match expert_width(meta)? {
        Some(width) => width,
        None => config.intermediate_size / meta.size("expert_used_count")?,
    };
    let router = grouped_router(meta, first, Score::Sigmoid)?;
    let layers = first.min(config.n_layers)..config.n_layers;
    config.moe = moe(meta, layers, width, router)?;
    config.moe.shared = shared(meta, width)?;
    Ok(config)
}
