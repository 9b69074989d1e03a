//! `phimoe` (Phi-3.5-MoE): layer norms with biases, a bias on the output head, SparseMixer routing, long rope.
//!
//! `input_jitter_noise` only acts in training; `router_jitter_noise` is the threshold of the router at all times. Beyond
//! the original context the long divisors are used, as the model was made for; transformers 5 keeps the short ones there
//! and only switches the factor (its `PhimoeRotaryEmbedding` asks for the frequencies without a length).

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, NormKind, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;
use crate::rope::RopeScaling;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "phimoe",
    class: "PhimoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 131_072,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
        "router_jitter_noise": 0.01,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    config.norm = NormKind::LayerNorm;
    config.lm_head_bias = keys.flag_or("lm_head_bias", false)?;
    common::attention_bias(keys, &mut config, false)?;
    check_rope(keys, &config)?;
    let window = keys.size_maybe("sliding_window")?;
    config.attention.windows = common::windows(keys, config.n_layers, window, |_| true)?;
    config.moe = common::moe(keys, config.n_layers, "intermediate_size")?;
    let reason = "SparseMixer picks two experts";
    keys.only("num_experts_per_tok", &[json!(2)], reason)?;
    let eps = keys.number("router_jitter_noise")?;
    if !(eps.is_finite() && eps >= 0.0) {
        let problem = format!("is {eps}, expected a number of at least 0");
        return Err(keys.problem("router_jitter_noise", problem));
    }
    config.moe.router = RouterConfig::SparseMixer { eps };
    Ok(config)
}

/// Long rope must say its two factors on sines and cosines; there are no other scalings.
fn check_rope(keys: &Keys, config: &ModelConfig) -> Result<()> {
    let map = match keys.object("rope_parameters")? {
        Some(map) => Some(map),
        None => keys.object("rope_scaling")?,
    };
    match (&config.rope.scaling, map) {
        (RopeScaling::None, _) | (_, None) => Ok(()),
        (RopeScaling::LongRope { .. }, Some(map)) => {
            map.positive("short_mscale")?;
            map.positive("long_mscale").map(drop)
        }
        (_, Some(map)) => {
            let kind = map.get("rope_type").or_else(|| map.get("type"));
            let kind = kind.cloned().unwrap_or_default();
            Err(map.unsupported("rope_type", &kind, "phimoe has default and longrope"))
        }
    }
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let window = config.attention.windows.iter().flatten().next();
    if let RouterConfig::SparseMixer { eps } = moe.router {
        map.insert("router_jitter_noise".to_owned(), json!(eps));
    }
    if let RopeScaling::LongRope { original, .. } = config.rope.scaling {
        map.insert(
            "original_max_position_embeddings".to_owned(),
            json!(original),
        );
    }
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("input_jitter_noise", json!(0.0)),
            ("intermediate_size", json!(moe.intermediate_size)),
            ("lm_head_bias", json!(config.lm_head_bias)),
            ("num_local_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.0)),
            ("sliding_window", json!(window)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "phimoe", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 8, "intermediate_size": 12, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        })
    }

    fn long_rope() -> Value {
        json!({
            "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
            "short_mscale": 1.25, "long_mscale": 1.5, "original_max_position_embeddings": 16,
        })
    }

    #[test]
    fn layer_norms_and_the_threshold_of_the_class() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!(config.norm, NormKind::LayerNorm);
        assert_eq!(config.moe.router, RouterConfig::SparseMixer { eps: 0.01 });
        assert!(!config.lm_head_bias && !config.attention.o_bias);
    }

    #[test]
    fn long_rope_has_its_own_two_factors() {
        let config = parse(&base(), json!({"rope_scaling": long_rope()})).unwrap();
        assert_eq!(config.rope.frequencies(16).1, 1.25);
        assert_eq!(config.rope.frequencies(17).1, 1.5);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        let mut without = long_rope();
        without["long_mscale"] = Value::Null;
        assert_refused(
            &base(),
            &[
                json!({"num_experts_per_tok": 1}),
                json!({"router_jitter_noise": -0.5}),
                json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
                json!({"original_max_position_embeddings": 32, "rope_scaling": long_rope()}),
            ],
        );
        let text = parse(&base(), json!({"rope_scaling": without}))
            .unwrap_err()
            .to_string();
        assert!(text.contains("long_mscale"), "{text}");
    }
}
