//! `olmoe` (OLMoE-1B-7B): norms over the whole query and key projections, then an optional clamp; softmax top-k.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, QkNorm, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "olmoe",
    class: "OlmoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "eos_token_id": 50_279, "max_position_embeddings": 4096, "pad_token_id": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    common::no_windows(keys, &config)?;
    common::attention_bias(keys, &mut config, false)?;
    config.attention.qk_norm = QkNorm::WholeProjection;
    // The clamp comes after the norms and before the rotation, on values too.
    config.attention.clip_qkv = match keys.get("clip_qkv") {
        Some(_) => Some(keys.positive("clip_qkv")?),
        None => None,
    };
    config.moe = common::moe(keys, config.n_layers, "intermediate_size")?;
    config.moe.router = RouterConfig::TopK {
        norm: keys.flag_or("norm_topk_prob", false)?,
    };
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("clip_qkv", json!(config.attention.clip_qkv)),
            ("intermediate_size", json!(moe.intermediate_size)),
            ("norm_topk_prob", json!(moe.norm_topk_prob())),
            ("num_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.01)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "olmoe", "vocab_size": 50_304, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 12, "num_experts": 4,
            "num_experts_per_tok": 2,
        })
    }

    #[test]
    fn norms_span_the_projection_and_the_clamp_is_optional() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!(config.attention.qk_norm, QkNorm::WholeProjection);
        assert_eq!((config.attention.clip_qkv, config.n_kv_heads), (None, 4));
        assert_eq!(config.eos_token_ids, [50_279]);
        let config = parse(&base(), json!({"clip_qkv": 8.0, "attention_bias": true})).unwrap();
        assert_eq!(config.attention.clip_qkv, Some(8.0));
        assert!(config.attention.qkv_bias && config.attention.o_bias);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"clip_qkv": 0.0}),
                json!({"sliding_window": 4}),
                json!({"hidden_act": "gelu"}),
            ],
        );
    }
}
