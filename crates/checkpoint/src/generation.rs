//! `generation_config.json`: the token ids that generation needs.

use serde_json::{Value, json};

use crate::config::ModelConfig;

/// The file for `config`.
pub(crate) fn to_json(config: &ModelConfig) -> String {
    let value = json!({
        "_from_model_config": true,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_many(&config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    });
    format!("{value:#}\n")
}

/// Ids as transformers spells them: null, one id, or a list.
pub(crate) fn one_or_many(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        _ => json!(ids),
    }
}
