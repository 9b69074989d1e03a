//! GGUF models: how the metadata of every architecture becomes a [`ModelConfig`], and their tensors canonical ones.
//!
//! A GGUF file does not say everything about its computation: what llama.cpp hard-codes per architecture (how picked
//! experts are weighted, which layers see a window, where the gate sits) is written down here. So a GGUF file computes
//! what llama.cpp computes from it, even where transformers computes something else from the folder it was made of.
//! Facts are those of the llama.cpp that llama-cpp-python 0.3.36 holds.

mod base;
mod deepseek2;
mod gemma3;
mod glm4moe;
mod gpt_oss;
mod granite;
mod llama;
mod meta;
mod names;
mod phimoe;
mod qwen;
mod rope;
mod tensors;
mod write;

use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::gguf::Gguf;
use meta::Meta;
/// Key of the list that says which experts share weights; ours, see [`crate::MoeConfig::shared_weights`].
pub(crate) const EXPERT_MAP: &str = "expert_map";

pub(crate) use names::{NormNames, outside_gguf};
pub(crate) use rope::TENSORS as ROPE_TENSORS;
pub(crate) use tensors::{PROJECTIONS, canonical_tensors, lone_expert, stacked};
pub(crate) use write::{Target, entries, refusals, rope_tensors, target};

/// One architecture of GGUF.
pub(crate) struct GgufArchitecture {
    /// `general.architecture`.
    pub(crate) name: &'static str,
    /// Reads its keys; refuses what would be computed otherwise.
    read: fn(&Meta<'_>) -> Result<ModelConfig>,
    /// What its norms are called.
    pub(crate) norms: NormNames,
}

/// Every architecture that is read.
const ARCHITECTURES: &[GgufArchitecture] = &[
    llama::ARCHITECTURE,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN2_MOE,
    qwen::QWEN3_MOE,
    qwen::OLMOE,
    deepseek2::ARCHITECTURE,
    gpt_oss::ARCHITECTURE,
    granite::ARCHITECTURE,
    phimoe::ARCHITECTURE,
    glm4moe::ARCHITECTURE,
    gemma3::ARCHITECTURE,
];

/// The architecture of an open file.
///
/// # Errors
/// It is not known; the error lists those that are.
pub(crate) fn architecture(gguf: &Gguf) -> Result<&'static GgufArchitecture> {
    const KEY: &str = "general.architecture";
    let name = gguf.text(KEY)?;
    let found = ARCHITECTURES.iter().find(|known| known.name == name);
    found.ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        CheckpointError::Unsupported {
            file: gguf.origin().to_owned(),
            key: KEY.to_owned(),
            value: name.to_owned(),
            reason: format!("known architectures: {}", known.join(", ")),
        }
    })
}

/// What the metadata of an open file says.
///
/// # Errors
/// An unknown architecture, a missing or contradictory key, and what would be computed otherwise than llama.cpp does.
pub(crate) fn read_config(gguf: &Gguf) -> Result<ModelConfig> {
    let architecture = architecture(gguf)?;
    let config = (architecture.read)(&Meta::new(gguf, architecture.name))?;
    config.check(gguf.origin())?;
    Ok(config)
}
