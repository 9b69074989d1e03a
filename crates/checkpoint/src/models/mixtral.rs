//! `mixtral` (Mixtral 8x7B and 8x22B): experts in every layer, softmax top-k renormalised, one window for all layers.
//!
//! `router_jitter_noise` only acts in training.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "mixtral",
    class: "MixtralForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 131_072,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    let reason = "mixtral always divides by the sum";
    keys.only("norm_topk_prob", &[json!(true)], reason)?;
    let window = keys.size_maybe("sliding_window")?;
    config.attention.windows = common::windows(keys, config.n_layers, window, |_| true)?;
    config.moe = common::moe(keys, config.n_layers, "intermediate_size")?;
    config.moe.router = RouterConfig::TopK { norm: true };
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let window = config.attention.windows.iter().flatten().next();
    common::put(
        map,
        [
            ("intermediate_size", json!(moe.intermediate_size)),
            ("num_local_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.001)),
            ("router_jitter_noise", json!(0.0)),
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
            "model_type": "mixtral", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 16, "intermediate_size": 12, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        })
    }

    #[test]
    fn absent_keys_mean_what_the_class_says_and_null_what_it_always_means() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!((config.n_kv_heads, config.head_dim), (8, 2));
        assert_eq!((config.rope.theta, config.norm_eps), (1e6, 1e-5));
        assert_eq!(
            (config.bos_token_id, &config.eos_token_ids[..]),
            (Some(1), &[2][..])
        );
        let nulls =
            json!({"num_key_value_heads": null, "bos_token_id": null, "sliding_window": null});
        let config = parse(&base(), nulls).unwrap();
        assert_eq!((config.n_kv_heads, config.bos_token_id), (16, None));
        assert_eq!(config.attention.windows, [None, None]);
    }

    #[test]
    fn a_window_is_for_all_layers() {
        let config = parse(&base(), json!({"sliding_window": 5})).unwrap();
        assert_eq!(config.attention.windows, [Some(5), Some(5)]);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"norm_topk_prob": false}),
                json!({"hidden_act": "gelu"}),
                json!({"partial_rotary_factor": 0.5}),
                json!({"attn_logit_softcapping": 30.0}),
                json!({"layer_types": ["chunked_attention", "full_attention"]}),
                json!({"num_experts_per_tok": 5}),
            ],
        );
    }
}
