//! Every architecture: how its `config.json` becomes a [`ModelConfig`] and back. One file and one line each.

mod common;
mod qwen3_moe;

use serde_json::{Map, Value, json};

use crate::Dtype;
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::keys::Keys;

/// One architecture.
pub(crate) struct Architecture {
    /// `model_type` of Hugging Face, and the name of its file here and in the engine.
    pub(crate) model_type: &'static str,
    /// `architectures[0]` of Hugging Face.
    class: &'static str,
    /// Reads `config.json`; refuses every key that would change the result and is not implemented.
    pub(crate) from_json: fn(&Keys) -> Result<ModelConfig>,
    /// The keys of `config.json` beyond those that [`common::to_json`] writes.
    to_json: fn(&ModelConfig, &mut Map<String, Value>),
}

/// Every architecture that Cadre reads.
const ARCHITECTURES: &[Architecture] = &[qwen3_moe::ARCHITECTURE];

/// Names of all architectures.
pub(crate) fn known() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|a| a.model_type).collect()
}

/// The architecture that `config.json` names.
pub(crate) fn by_model_type(keys: &Keys) -> Result<&'static Architecture> {
    let name = keys.text("model_type")?;
    find(name).ok_or_else(|| {
        let known = format!("known model types: {}", known().join(", "));
        keys.unsupported("model_type", &json!(name), &known)
    })
}

/// The architecture of a configuration that is already in memory.
pub(crate) fn get(model_type: &str) -> Result<&'static Architecture> {
    find(model_type).ok_or_else(|| CheckpointError::Unsupported {
        file: "(configuration)".to_owned(),
        key: "model_type".to_owned(),
        value: model_type.to_owned(),
        reason: format!("known model types: {}", known().join(", ")),
    })
}

fn find(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|a| a.model_type == name)
}

impl Architecture {
    /// `config.json` for `config`.
    pub(crate) fn to_json(&self, config: &ModelConfig, dtype: Dtype) -> Result<Value> {
        let mut map = common::to_json(config, self.class, dtype)?;
        (self.to_json)(config, &mut map);
        Ok(Value::Object(map))
    }
}
