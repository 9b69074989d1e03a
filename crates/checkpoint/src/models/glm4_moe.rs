//! `glm4_moe` (GLM-4.5 to 4.7): half of each head is rotated, DeepSeek-V3's router, a shared expert, the first layers
//! dense.
//!
//! The multi-token-prediction block behind the last layer is no part of the model here, as in transformers.

use serde_json::{Map, Value, json};

use super::{Architecture, common, latent};
use crate::config::{ModelConfig, QkNorm};
use crate::error::Result;
use crate::keys::Keys;
use crate::rope::RopeConfig;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "glm4_moe",
    class: "Glm4MoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "first_k_dense_replace": 1, "max_position_embeddings": 131_072, "n_group": 1,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "routed_scaling_factor": 1.0, "topk_group": 1,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    common::silu(keys)?;
    let mut config = common::shared(keys, |head_dim| rope(keys, head_dim))?;
    common::no_windows(keys, &config)?;
    config.attention.qkv_bias = keys.flag_or("attention_bias", false)?;
    if keys.flag_or("use_qk_norm", false)? {
        config.attention.qk_norm = QkNorm::PerHead;
    }
    latent::noaux_router(keys)?;
    config.moe = latent::moe(keys, config.n_layers)?;
    config.moe.router = latent::v3_router(keys)?;
    Ok(config)
}

/// Half of each head is rotated unless the file says otherwise.
fn rope(keys: &Keys, head_dim: usize) -> Result<RopeConfig> {
    let nested = keys.object("rope_parameters")?;
    let said = |map: &Keys| map.get("partial_rotary_factor").is_some();
    let is_said = said(keys) || nested.as_ref().is_some_and(said);
    let mut rope = RopeConfig::from_json(keys, head_dim)?;
    if !is_said {
        rope.dim = head_dim / 2;
    }
    Ok(rope)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let qk_norm = config.attention.qk_norm == QkNorm::PerHead;
    // Absent means one half.
    if config.rope.dim == config.head_dim {
        map.insert("partial_rotary_factor".to_owned(), json!(1.0));
    }
    latent::put_moe(config, map);
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("use_qk_norm", json!(qk_norm)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    use crate::config::{RouterConfig, Score, SharedExpert};

    fn base() -> Value {
        json!({
            "model_type": "glm4_moe", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 8, "head_dim": 12, "intermediate_size": 12, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 6,
        })
    }

    #[test]
    fn the_defaults_of_the_class() {
        let config = parse(&base(), json!({"attention_bias": true})).unwrap();
        assert_eq!((config.rope.dim, config.moe_layers()), (6, vec![1, 2]));
        assert!(config.attention.qkv_bias && !config.attention.o_bias);
        assert_eq!(config.attention.qk_norm, QkNorm::None);
        let shared = SharedExpert {
            intermediate_size: 6,
            gated: false,
        };
        assert_eq!(config.moe.shared, Some(shared));
        let RouterConfig::GroupLimited {
            score,
            norm,
            scale,
            correction_bias,
            ..
        } = config.moe.router
        else {
            panic!("{:?}", config.moe.router);
        };
        assert_eq!((score, norm, scale), (Score::Sigmoid, true, 1.0));
        assert!(correction_bias);
    }

    #[test]
    fn whole_and_partial_rotation_survive_writing() {
        for (factor, dim) in [(1.0, 12), (0.34, 4), (0.5, 6)] {
            let config = parse(&base(), json!({"partial_rotary_factor": factor})).unwrap();
            assert_eq!(config.rope.dim, dim);
            let text = config.to_config_json(crate::Dtype::F32).unwrap();
            let again = ModelConfig::parse("m", &text, None).unwrap();
            assert_eq!(again.rope, config.rope);
        }
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"scoring_func": "softmax"}),
                json!({"topk_method": "greedy"}),
                json!({"moe_layer_freq": 2}),
                json!({"n_group": 3}),
                json!({"partial_rotary_factor": 1.5}),
            ],
        );
    }
}
