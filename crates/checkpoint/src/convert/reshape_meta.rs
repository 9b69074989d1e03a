//! What is written beside the tensors of a checkpoint with other experts: its own `config.json` or GGUF metadata with the
//! new numbers, and nothing else changed.

use serde_json::{Map, Value as Json, json};

use super::{Planned, vocab};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::gguf::{Array, Gguf, GgufTensor, Value};
use crate::gguf_models;
use crate::models::{
    EXPERT_MAP, FACTORS, LAYER_EXPERTS, N_EXPERTS, TOP_K, expert_map_json, factors_json,
};

use super::experts::Piece;
use super::recipe::Recipe;

/// Why tensors for predicting several tokens are not used.
pub(super) const MTP: &str = "multi-token prediction";

/// How configurations count the layers for predicting several tokens.
const N_MTP: &[&str] = &["num_nextn_predict_layers", "num_mtp_layers"];

/// The small files of a folder, `config.json` last, because its presence is what makes a folder a checkpoint.
pub(super) fn files(
    source: &Checkpoint,
    new: &ModelConfig,
    drops_mtp: bool,
) -> Result<Vec<(String, String)>> {
    let mut files = vocab::kept_files(source)?;
    let generation = source.file_text("generation_config.json")?;
    if let Some(text) = &generation {
        files.push(("generation_config.json".to_owned(), text.clone()));
    }
    let missing = || CheckpointError::MissingFile {
        origin: source.origin().to_owned(),
        file: "config.json".to_owned(),
        hint: "it was there when the checkpoint was opened".to_owned(),
    };
    let mut text = source.file_text("config.json")?.ok_or_else(missing)?;
    if new != source.config() {
        text = config_json(source, &text, new, drops_mtp)?;
        let theirs = ModelConfig::parse(source.origin(), &text, generation.as_deref())?;
        expect_same(source.origin(), &theirs, new)?;
    }
    files.push(("config.json".to_owned(), text));
    Ok(files)
}

/// `config.json` with other numbers of experts, every other key as it was.
fn config_json(
    source: &Checkpoint,
    text: &str,
    new: &ModelConfig,
    drops_mtp: bool,
) -> Result<String> {
    let file = format!("{}/config.json", source.origin());
    let mut json: Map<String, Json> =
        serde_json::from_str(text).map_err(|error| CheckpointError::Json {
            file,
            source: error,
        })?;
    let inner = match json.get("text_config") {
        Some(Json::Object(_)) => json.get_mut("text_config").and_then(Json::as_object_mut),
        _ => None,
    };
    match inner {
        Some(inner) => set_counts(inner, new, drops_mtp),
        None => set_counts(&mut json, new, drops_mtp),
    }
    Ok(format!("{:#}\n", Json::Object(json)))
}

fn set_counts(json: &mut Map<String, Json>, new: &ModelConfig, drops_mtp: bool) {
    json.remove(EXPERT_MAP);
    if let Some(factors) = factors_json(new) {
        json.insert(FACTORS.to_owned(), factors);
    }
    if let Some(maps) = expert_map_json(new) {
        json.insert(EXPERT_MAP.to_owned(), maps);
    }
    if let Some(ours) = json.get_mut("cadre_moe").and_then(Json::as_object_mut) {
        let counts: Vec<usize> = new.moe.counts().collect();
        ours.insert("n_experts".to_owned(), json!(counts));
        if let Some(top_k) = ours.get_mut("top_k").filter(|top_k| top_k.is_number()) {
            *top_k = json!(new.moe.top_k);
        }
        return;
    }
    let mut n_known = 0;
    for key in N_EXPERTS {
        if let Some(value) = json.get_mut(*key).filter(|value| !value.is_null()) {
            *value = json!(new.moe.n_experts);
            n_known += 1;
        }
    }
    if n_known == 0 {
        json.insert("num_experts".to_owned(), json!(new.moe.n_experts));
    }
    // Where the number goes without saying it need not be said, unless it is another.
    for key in TOP_K {
        if let Some(value) = json.get_mut(*key).filter(|value| !value.is_null()) {
            *value = json!(new.moe.top_k);
        }
    }
    json.remove(LAYER_EXPERTS);
    if !new.moe.uneven.is_empty() {
        json.insert(LAYER_EXPERTS.to_owned(), json!(per_layer(new)));
    }
    for key in N_MTP.iter().filter(|_| drops_mtp) {
        if let Some(value) = json.get_mut(*key) {
            *value = json!(0);
        }
    }
}

/// Experts of every decoder layer, 0 for dense ones.
fn per_layer(config: &ModelConfig) -> Vec<usize> {
    (0..config.n_layers)
        .map(|layer| config.n_experts_in(layer))
        .collect()
}

/// The metadata of a GGUF file with other numbers of experts.
pub(super) fn entries(
    gguf: &Gguf,
    new: &ModelConfig,
    drops_mtp: bool,
    tensors: &[Planned],
) -> Result<Vec<(String, Value)>> {
    let name = gguf.text("general.architecture")?;
    let key = |key: &str| format!("{name}.{key}");
    let n_blocks = gguf.size(&key("block_count"))?;
    let mut entries = Vec::new();
    for (known, value) in gguf.entries() {
        let value = if *known == key("expert_count") {
            expert_count(new)
        } else if *known == key("expert_used_count") {
            used_count(value, new)
        } else if drops_mtp && *known == key("nextn_predict_layers") {
            continue;
        } else if drops_mtp && *known == key("block_count") {
            (new.n_layers as u32).into()
        } else if drops_mtp && known.starts_with(&format!("{name}.")) {
            first_blocks(value, n_blocks, new.n_layers)
        } else {
            value.clone()
        };
        entries.push((known.clone(), value));
    }
    if !new.moe.shared_weights.is_empty() {
        let ids = new.moe.shared_weights.iter().flatten();
        let ids: Vec<i32> = ids.map(|id| i32::from(*id)).collect();
        entries.push((key(gguf_models::EXPERT_MAP), Array::from(&ids[..]).into()));
    }
    let planned = tensors.iter().map(|tensor| GgufTensor {
        name: tensor.plan.name.clone(),
        dtype: tensor.plan.dtype,
        shape: tensor.plan.shape.clone(),
        // Values are asked for of small tensors only, which are copied whole.
        bytes: match &tensor.recipe {
            Recipe::Pieces(pieces) => match pieces.as_slice() {
                [Piece::Stored(bytes)] => bytes.clone(),
                _ => bytes::Bytes::new(),
            },
            _ => bytes::Bytes::new(),
        },
    });
    let theirs = Gguf::planned(gguf.origin(), entries.clone(), planned.collect())?;
    expect_same(gguf.origin(), &gguf_models::read_config(&theirs)?, new)?;
    Ok(entries)
}

/// As many of `new` in the form of `old`.
fn used_count(old: &Value, new: &ModelConfig) -> Value {
    match old {
        Value::Array(_) => old.clone(),
        _ => (new.moe.top_k as u32).into(),
    }
}

/// One number for all layers, or one for each.
pub(crate) fn expert_count(config: &ModelConfig) -> Value {
    if config.moe.uneven.is_empty() {
        return (config.moe.n_experts as u32).into();
    }
    let counts: Vec<u32> = per_layer(config).iter().map(|n| *n as u32).collect();
    Array::from(&counts[..]).into()
}

/// A list with an entry for each of `n_blocks`, without those of the blocks that are left out.
fn first_blocks(value: &Value, n_blocks: usize, n: usize) -> Value {
    match value {
        Value::Array(list) if list.len() == n_blocks => match list.first(n) {
            Some(list) => list.into(),
            None => value.clone(),
        },
        _ => value.clone(),
    }
}

/// What is written must be read as it is meant.
fn expect_same(origin: &str, theirs: &ModelConfig, new: &ModelConfig) -> Result<()> {
    if theirs == new {
        return Ok(());
    }
    Err(CheckpointError::experts(
        origin,
        format!(
            "its configuration has no place for the new numbers of experts: {:?} would be read as {:?}",
            new.moe, theirs.moe
        ),
    ))
}
