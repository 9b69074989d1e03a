//! `qwen2_moe` (Qwen1.5-MoE, Qwen2-57B-A14B): biases on queries, keys and values, a gated shared expert, some layers may
//! be dense.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, RouterConfig, SharedExpert};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen2_moe",
    class: "Qwen2MoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "max_position_embeddings": 32_768, "max_window_layers": 28, "num_key_value_heads": 16,
        "qkv_bias": true, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    config.attention.qkv_bias = keys.flag_or("qkv_bias", true)?;
    // With neither layer_types nor a switched-off window, transformers 5 gives every second of the first
    // max_window_layers a window, from layer 0 on. No published model depends on it.
    let first = keys.count_or("max_window_layers", 28)?;
    let default = |layer: usize| layer.is_multiple_of(2) && layer < first;
    let window = common::switched_window(keys)?;
    config.attention.windows = common::windows(keys, config.n_layers, window, default)?;
    config.moe = common::moe(keys, config.n_layers, "moe_intermediate_size")?;
    config.moe.layers = common::qwen_moe_layers(keys, config.n_layers)?;
    config.moe.router = RouterConfig::TopK {
        norm: keys.flag_or("norm_topk_prob", false)?,
    };
    config.moe.shared = Some(SharedExpert {
        intermediate_size: keys.size("shared_expert_intermediate_size")?,
        gated: true,
    });
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let shared = moe.shared.map(|shared| shared.intermediate_size);
    common::put_qwen_moe_layers(config, map);
    common::put_windows(config, map);
    common::put(
        map,
        [
            ("moe_intermediate_size", json!(moe.intermediate_size)),
            ("norm_topk_prob", json!(moe.norm_topk_prob())),
            ("num_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("qkv_bias", json!(config.attention.qkv_bias)),
            ("router_aux_loss_coef", json!(0.001)),
            ("shared_expert_intermediate_size", json!(shared)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "qwen2_moe", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 16, "intermediate_size": 12, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 6,
            "shared_expert_intermediate_size": 7,
        })
    }

    #[test]
    fn biases_and_raw_weights_by_default() {
        let config = parse(&base(), json!({"sliding_window": 32})).unwrap();
        assert!(config.attention.qkv_bias && !config.attention.o_bias);
        assert!(!config.moe.norm_topk_prob());
        assert_eq!(config.attention.windows, [None; 4]);
        let shared = config.moe.shared.unwrap();
        assert!(shared.gated && shared.intermediate_size == 7);
        let config = parse(&base(), json!({"qkv_bias": false})).unwrap();
        assert!(!config.attention.qkv_bias);
    }

    #[test]
    fn windows_are_in_every_second_of_the_first_layers() {
        let on = json!({"use_sliding_window": true, "max_window_layers": 1});
        let config = parse(&base(), on).unwrap();
        assert_eq!(config.attention.windows, [Some(4096), None, None, None]);
        let on = json!({"use_sliding_window": true, "sliding_window": 3});
        let config = parse(&base(), on).unwrap();
        assert_eq!(config.attention.windows, [Some(3), None, Some(3), None]);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"hidden_act": "relu"}),
                json!({"shared_expert_intermediate_size": null}),
                json!({"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"]}),
                json!({"mlp_only_layers": [4]}),
            ],
        );
    }
}
