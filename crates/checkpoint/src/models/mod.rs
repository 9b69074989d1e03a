//! Every architecture: how its `config.json` becomes a [`ModelConfig`] and back. One file and one line each.

mod cadre_moe;
mod common;
mod deepseek_v2;
mod deepseek_v3;
mod gemma3_text;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod latent;
mod llama;
mod mistral;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;

use serde_json::{Map, Value, json};

use crate::Dtype;
use crate::config::{Factors, ModelConfig};
use crate::error::{CheckpointError, Result};
use crate::keys::Keys;
pub(crate) use common::{N_EXPERTS, TOP_K};

/// Experts of every decoder layer, 0 for dense ones, where layers differ: a key of ours in any `config.json`. Programs that
/// do not know it find tensors of other shapes than they expect.
pub(crate) const LAYER_EXPERTS: &str = "cadre_layer_experts";

/// For every decoder layer and each of its experts the one whose weights it has, as they are stored; nothing for dense
/// layers. Ours: other programs refuse such models for the experts that they miss.
pub(crate) const EXPERT_MAP: &str = "cadre_expert_map";

/// How the matrices of experts are factored; see [`Factors`].
pub(crate) const FACTORS: &str = "cadre_factors";

/// One architecture.
pub(crate) struct Architecture {
    /// `model_type` of Hugging Face, and the name of its file here and in the engine.
    pub(crate) model_type: &'static str,
    /// `architectures[0]` of Hugging Face.
    class: &'static str,
    /// What absent keys mean, as the configuration class of transformers says. Sizes that every file states are left out:
    /// better an error than a guess.
    defaults: fn() -> Value,
    /// Reads `config.json`; refuses every key that would change the result and is not implemented.
    from_json: fn(&Keys) -> Result<ModelConfig>,
    /// The keys of `config.json` beyond those that [`common::to_json`] writes.
    to_json: fn(&ModelConfig, &mut Map<String, Value>),
}

/// Every architecture that Cadre reads.
const ARCHITECTURES: &[Architecture] = &[
    cadre_moe::ARCHITECTURE,
    deepseek_v2::ARCHITECTURE,
    deepseek_v3::ARCHITECTURE,
    gemma3_text::ARCHITECTURE,
    glm4_moe::ARCHITECTURE,
    gpt_oss::ARCHITECTURE,
    granitemoe::ARCHITECTURE,
    llama::ARCHITECTURE,
    mistral::ARCHITECTURE,
    mixtral::ARCHITECTURE,
    olmoe::ARCHITECTURE,
    phimoe::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen2_moe::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    qwen3_moe::ARCHITECTURE,
];

/// Other names of architectures: wrappers around their text part.
const ALIASES: &[(&str, &str)] = &[("gemma3", "gemma3_text")];

/// Names of all architectures.
pub(crate) fn known() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|a| a.model_type).collect()
}

/// Reads `config.json` by the rules of the architecture that it names.
pub(crate) fn read(keys: Keys) -> Result<ModelConfig> {
    let name = keys.text("model_type")?;
    let architecture = find(name).ok_or_else(|| {
        let known = format!("known model types: {}", known().join(", "));
        keys.unsupported("model_type", &json!(name), &known)
    })?;
    let keys = keys.or_defaults(&(architecture.defaults)());
    let mut config = (architecture.from_json)(&keys)?;
    config.model_type = architecture.model_type.to_owned();
    layer_experts(&keys, &mut config)?;
    expert_map(&keys, &mut config)?;
    factors(&keys, &mut config)?;
    Ok(config)
}

/// Reads [`LAYER_EXPERTS`].
fn layer_experts(keys: &Keys, config: &mut ModelConfig) -> Result<()> {
    if keys.get(LAYER_EXPERTS).is_none() {
        return Ok(());
    }
    let counts = keys.sizes(LAYER_EXPERTS)?;
    let problem = |problem: String| Err(keys.problem(LAYER_EXPERTS, problem));
    if config.model_type == cadre_moe::ARCHITECTURE.model_type {
        return problem("is not known here; `cadre_moe.n_experts` says it".to_owned());
    }
    if counts.len() != config.n_layers {
        return problem(format!(
            "has {} numbers for {} layers",
            counts.len(),
            config.n_layers
        ));
    }
    let most = counts.iter().copied().max().unwrap_or(0);
    if most != config.moe.n_experts {
        return problem(format!(
            "has {most} as its largest number, but there are {} experts",
            config.moe.n_experts
        ));
    }
    let wrong =
        (0..config.n_layers).find(|layer| config.is_moe_layer(*layer) != (counts[*layer] > 0));
    if let Some(layer) = wrong {
        return problem(format!(
            "is {} for layer {layer}, expected 0 for dense layers and more for others",
            counts[layer]
        ));
    }
    let layers = config.moe.layers.iter();
    let own = layers.map(|layer| counts[*layer]).collect();
    config.moe.set_counts(own);
    Ok(())
}

/// Reads [`EXPERT_MAP`]; whether its numbers make sense is checked with the rest of the configuration.
fn expert_map(keys: &Keys, config: &mut ModelConfig) -> Result<()> {
    let Some(value) = keys.get(EXPERT_MAP) else {
        return Ok(());
    };
    let problem = |problem: String| Err(keys.problem(EXPERT_MAP, problem));
    let Ok(maps) = serde_json::from_value::<Vec<Vec<u16>>>(value.clone()) else {
        return problem("is no list with a list of numbers for every layer".to_owned());
    };
    if maps.len() != config.n_layers {
        return problem(format!(
            "has {} lists for {} layers",
            maps.len(),
            config.n_layers
        ));
    }
    let of_dense = (0..)
        .zip(&maps)
        .find(|(layer, map)| !config.is_moe_layer(*layer) && !map.is_empty());
    if let Some((layer, _)) = of_dense {
        return problem(format!(
            "has numbers for layer {layer}, which has no experts"
        ));
    }
    let layers = config.moe.layers.iter();
    config.moe.shared_weights = layers.map(|layer| maps[*layer].clone()).collect();
    Ok(())
}

/// Reads [`FACTORS`].
fn factors(keys: &Keys, config: &mut ModelConfig) -> Result<()> {
    let Some(value) = keys.get(FACTORS) else {
        return Ok(());
    };
    let problem = |problem: String| keys.problem(FACTORS, problem);
    let read = match read_factors(value) {
        Some(FactorsRead::Even(factors)) => factors,
        Some(FactorsRead::Uneven(rank, lists)) => {
            if lists.len() != config.n_layers {
                let (n, layers) = (lists.len(), config.n_layers);
                return Err(problem(format!("has rows for {n} layers of {layers}")));
            }
            let of_dense = (0..)
                .zip(&lists)
                .find(|(layer, list)| !config.is_moe_layer(*layer) && !list.is_empty());
            if let Some((layer, _)) = of_dense {
                return Err(problem(format!(
                    "has rows for layer {layer}, which has no experts"
                )));
            }
            let layers = config.moe.layers.iter();
            let own = layers.map(|layer| lists[*layer].clone());
            Factors::uneven(rank, own.collect())
        }
        None => {
            return Err(problem(format!(
                "is {value}, expected rank, up_rows and down_rows, or rank and rows: three numbers for every expert of \
                 every layer"
            )));
        }
    };
    let hidden = config.hidden_size;
    if read.rank > hidden || read.down_rows > hidden {
        return Err(problem(format!(
            "has rank {} and {} rows of down matrices, of at most {hidden}",
            read.rank, read.down_rows
        )));
    }
    config.moe.factors = Some(read);
    Ok(())
}

/// The value of [`FACTORS`].
enum FactorsRead {
    /// `rank`, `up_rows` and `down_rows`.
    Even(Factors),
    /// `rank`, and `rows` by decoder layer.
    Uneven(usize, Vec<Vec<[usize; 3]>>),
}

fn read_factors(value: &Value) -> Option<FactorsRead> {
    let map = value.as_object()?;
    let number = |key: &str| usize::try_from(map.get(key)?.as_u64()?).ok();
    let rank = number("rank")?;
    match (map.len(), map.get("rows")) {
        (2, Some(rows)) => {
            let rows = serde_json::from_value(rows.clone()).ok()?;
            Some(FactorsRead::Uneven(rank, rows))
        }
        (3, None) => {
            let (up, down) = (number("up_rows")?, number("down_rows")?);
            Some(FactorsRead::Even(Factors::even(rank, up, down)))
        }
        _ => None,
    }
}

/// The value of [`FACTORS`] for a model whose experts are in factors.
pub(crate) fn factors_json(config: &ModelConfig) -> Option<Value> {
    let factors = config.moe.factors.as_ref()?;
    let (rank, rows) = (factors.rank, &factors.uneven);
    if rows.is_empty() {
        let (up, down) = (factors.up_rows, factors.down_rows);
        return Some(json!({"rank": rank, "up_rows": up, "down_rows": down}));
    }
    let of_layer = |layer| {
        let at = config.moe.layers.binary_search(&layer);
        at.map_or(&[][..], |at| rows[at].as_slice())
    };
    let rows: Vec<&[[usize; 3]]> = (0..config.n_layers).map(of_layer).collect();
    Some(json!({"rank": rank, "rows": rows}))
}

/// The value of [`EXPERT_MAP`] for a model whose experts share weights.
pub(crate) fn expert_map_json(config: &ModelConfig) -> Option<Value> {
    let moe = &config.moe;
    let of_layer = |layer| match moe.layers.binary_search(&layer) {
        Ok(at) => moe.shared_weights[at].clone(),
        Err(_) => Vec::new(),
    };
    let maps: Vec<Vec<u16>> = match moe.shared_weights.is_empty() {
        true => return None,
        false => (0..config.n_layers).map(of_layer).collect(),
    };
    Some(json!(maps))
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
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    let name = alias.map_or(name, |(_, name)| *name);
    ARCHITECTURES.iter().find(|a| a.model_type == name)
}

impl Architecture {
    /// `config.json` for `config`.
    pub(crate) fn to_json(&self, config: &ModelConfig, dtype: Dtype) -> Result<Value> {
        let unspeakable = config.only_ours();
        if !unspeakable.is_empty() && self.model_type != cadre_moe::ARCHITECTURE.model_type {
            return Err(CheckpointError::Unsupported {
                file: "config.json".to_owned(),
                key: "model_type".to_owned(),
                value: self.model_type.to_owned(),
                reason: format!("it cannot say {}; `cadre_moe` can", unspeakable.join(", ")),
            });
        }
        let mut map = common::to_json(config, self.class, dtype)?;
        (self.to_json)(config, &mut map);
        if let Some(maps) = expert_map_json(config) {
            map.insert(EXPERT_MAP.to_owned(), maps);
        }
        if let Some(factors) = factors_json(config) {
            map.insert(FACTORS.to_owned(), factors);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(factors: &Value) -> Result<ModelConfig> {
        let map = json!([[0, 1, 0, 1], []]);
        let mut config = json!({
            "model_type": "qwen3_moe", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12, "moe_intermediate_size": 6,
            "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "vocab_size": 16,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": false, "mlp_only_layers": [1],
        });
        config[EXPERT_MAP] = map;
        config[FACTORS] = factors.clone();
        ModelConfig::parse("m", &config.to_string(), None)
    }

    #[test]
    fn factors_have_the_same_rows_or_say_which() {
        let even = json!({"rank": 2, "up_rows": 3, "down_rows": 4});
        let read = parse(&even).unwrap();
        assert_eq!(read.moe.factors, Some(Factors::even(2, 3, 4)));
        assert_eq!(factors_json(&read), Some(even));
        let uneven = json!({"rank": 2, "rows": [[[0, 5, 1], [6, 2, 8]], []]});
        let read = parse(&uneven).unwrap();
        let factors = read.moe.factors.as_ref().unwrap();
        assert_eq!((factors.up_rows, factors.down_rows), (6, 8));
        assert_eq!(
            [factors.rows_of(0, 0), factors.rows_of(0, 1)],
            [[0, 5, 1], [6, 2, 8]]
        );
        assert_eq!(factors_json(&read), Some(uneven));
        for (wrong, words) in [
            (
                json!({"rank": 2}),
                "expected rank, up_rows and down_rows, or rank and rows",
            ),
            (json!({"rank": 2, "rows": [[[1, 2]], []]}), "expected rank"),
            (
                json!({"rank": 2, "rows": [], "up_rows": 1}),
                "expected rank",
            ),
            (
                json!({"rank": 2, "rows": [[[1, 1, 1], [1, 1, 1]]]}),
                "rows for 1 layers of 2",
            ),
            (
                json!({"rank": 2, "rows": [[[1, 1, 2], [1, 1, 1]], [[1, 1, 1]]]}),
                "layer 1, which has no experts",
            ),
            (
                json!({"rank": 2, "rows": [[[1, 1, 2]], []]}),
                "rows of 1 experts for layer 0, which has 2",
            ),
            (
                json!({"rank": 2, "rows": [[[1, 7, 2], [1, 1, 1]], []]}),
                "have 7 rows of 6",
            ),
            (
                json!({"rank": 2, "rows": [[[1, 1, 9], [1, 1, 1]], []]}),
                "9 rows of down matrices",
            ),
            (json!({"rank": 7, "up_rows": 1, "down_rows": 1}), "rank 7"),
        ] {
            let text = parse(&wrong).unwrap_err().to_string();
            assert!(text.contains(words), "{wrong}: {text}");
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    //! What the tests of all architectures share.

    use serde_json::Value;

    use crate::config::ModelConfig;
    use crate::error::Result;

    /// Parses `base` with `edits` merged in; `null` stays `null`.
    pub(crate) fn parse(base: &Value, edits: Value) -> Result<ModelConfig> {
        let mut config = base.clone();
        for (key, value) in edits.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        ModelConfig::parse("m", &config.to_string(), None)
    }

    /// Each of `cases` must be refused with an error that names its first key.
    pub(crate) fn assert_refused(base: &Value, cases: &[Value]) {
        assert!(parse(base, Value::Null).is_ok(), "{base}");
        for edits in cases {
            let key = edits.as_object().unwrap().keys().next().unwrap();
            let text = parse(base, edits.clone()).unwrap_err().to_string();
            assert!(text.contains(key.as_str()), "{edits}: {text}");
        }
    }
}
