//! `deepseek_v3` (DeepSeek-V3 and R1, Moonlight, Kimi-K2 files of this type): latent attention, sigmoid scores with a
//! bias that moves the selection, groups ranked by their two best experts.
//!
//! The multi-token-prediction block behind the last layer is no part of the model here, as in transformers.

use serde_json::{Map, Value, json};

use super::{Architecture, common, latent};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "deepseek_v3",
    class: "DeepseekV3ForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
        "kv_lora_rank": 512, "max_position_embeddings": 4096, "n_group": 8, "n_shared_experts": 1,
        "norm_topk_prob": true, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6, "rope_interleave": true, "rope_theta": 10_000.0,
        "routed_scaling_factor": 2.5, "topk_group": 4, "v_head_dim": 128,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = latent::base(keys)?;
    config.rope.interleaved = keys.flag_or("rope_interleave", true)?;
    latent::noaux_router(keys)?;
    config.moe = latent::moe(keys, config.n_layers)?;
    config.moe.router = latent::v3_router(keys)?;
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    latent::put_attention(config, map);
    latent::put_moe(config, map);
    common::put(
        map,
        [
            ("rope_interleave", json!(config.rope.interleaved)),
            ("scoring_func", json!("sigmoid")),
            ("topk_method", json!("noaux_tc")),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    use crate::config::{RouterConfig, Score};

    fn base() -> Value {
        json!({
            "model_type": "deepseek_v3", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 5,
            "num_attention_heads": 4, "intermediate_size": 12, "n_routed_experts": 16,
            "num_experts_per_tok": 2, "moe_intermediate_size": 6, "n_shared_experts": 2,
        })
    }

    #[test]
    fn the_defaults_of_the_class() {
        let config = parse(&base(), Value::Null).unwrap();
        let mla = config.attention.mla.unwrap();
        assert_eq!(
            (mla.q_lora_rank, mla.kv_lora_rank, mla.v_head_dim),
            (Some(1536), 512, 128)
        );
        assert_eq!((config.head_dim, config.rope.dim), (192, 64));
        assert_eq!(config.attention.scale, 1.0 / 192f64.sqrt());
        assert!(config.rope.interleaved);
        assert_eq!(config.moe_layers(), [3, 4]);
        assert_eq!(config.moe.shared.unwrap().intermediate_size, 12);
        let expected = RouterConfig::GroupLimited {
            score: Score::Sigmoid,
            n_groups: 8,
            keep_groups: 4,
            sum_of_best_two: true,
            norm: true,
            scale: 2.5,
            correction_bias: true,
        };
        assert_eq!(config.moe.router, expected);
        let config = parse(
            &base(),
            json!({"q_lora_rank": null, "rope_interleave": false}),
        )
        .unwrap();
        assert_eq!(config.attention.mla.unwrap().q_lora_rank, None);
        assert!(!config.rope.interleaved);
    }

    #[test]
    fn yarn_scales_the_scores_by_the_square_of_mscale_all_dim() {
        let yarn = |all: f64| {
            json!({"rope_scaling": {
                "type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": all,
                "original_max_position_embeddings": 4096,
            }})
        };
        let config = parse(&base(), yarn(1.0)).unwrap();
        let mscale = 0.1 * 40f64.ln() + 1.0;
        let expected = mscale * mscale / 192f64.sqrt();
        assert!((config.attention.scale - expected).abs() < 1e-15);
        assert_eq!(config.rope.frequencies(1).1, 1.0);
        let config = parse(&base(), yarn(0.0)).unwrap();
        assert_eq!(config.attention.scale, 1.0 / 192f64.sqrt());
        assert!((f64::from(config.rope.frequencies(1).1) - mscale).abs() < 1e-6);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"scoring_func": "softmax"}),
                json!({"topk_method": "greedy"}),
                json!({"moe_layer_freq": 2}),
                json!({"num_key_value_heads": 2}),
                json!({"topk_group": 9}),
                json!({"sliding_window": 4}),
                json!({"partial_rotary_factor": 0.5}),
            ],
        );
    }
}
