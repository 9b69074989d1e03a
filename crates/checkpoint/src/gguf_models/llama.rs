//! `llama`: Llama, and Mixtral when there are experts. Rows of queries and keys are permuted for rope on neighbours.

use super::base::{Kind, base, has_experts, moe};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{ModelConfig, RouterConfig};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "llama",
    read,
    norms: NormNames::Usual,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let has_experts = has_experts(meta)?;
    let mut config = base(
        meta,
        &Kind {
            model_type: if has_experts { "mixtral" } else { "llama" },
            interleaved: true,
        },
    )?;
    if let Some(scale) = meta.number_opt("attention.scale")?.filter(|v| *v != 0.0) {
        config.attention.scale = scale;
    }
    if has_experts {
        let width = config.intermediate_size;
        let router = RouterConfig::TopK { norm: true };
        config.moe = moe(meta, 0..config.n_layers, width, router)?;
    }
    Ok(config)
}
