//! `phimoe`: biases everywhere. llama.cpp renormalises a softmax over the picked experts (not SparseMixer), and takes
//! the norms as RMS norms with a bias (not layer norms); a window is not read.

use super::base::{Kind, base, moe};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames};
use crate::config::{ModelConfig, NormKind, RouterConfig};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "phimoe",
    read,
    norms: NormNames::Usual,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(
        meta,
        &Kind {
            model_type: "phimoe",
            interleaved: false,
        },
    )?;
    config.norm = NormKind::RmsWithBias;
    let router = RouterConfig::TopK { norm: true };
    config.moe = moe(meta, 0..config.n_layers, config.intermediate_size, router)?;
    Ok(config)
}
