//! `gpt_oss` (gpt-oss 20B and 120B): attention sinks, biases everywhere, clamped SwiGLU, windows in every second layer
//! from layer 0 on, yarn.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{Activation, ModelConfig, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling, mscale};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "gpt_oss",
    class: "GptOssForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "attention_bias": true, "head_dim": 64, "max_position_embeddings": 131_072,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
        "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    if keys.get("rope_parameters").is_none() && keys.get("rope_scaling").is_none() {
        config.rope = default_rope(config.rope.theta, config.head_dim);
    }
    common::attention_bias(keys, &mut config, true)?;
    config.attention.sinks = true;
    let window = keys.size_maybe("sliding_window")?;
    let even = |layer: usize| layer.is_multiple_of(2);
    config.attention.windows = common::windows(keys, config.n_layers, window, even)?;
    config.activation = Activation::SwigluOai {
        alpha: keys.positive("swiglu_alpha")?,
        limit: keys.positive("swiglu_limit")?,
    };
    config.moe = common::moe(keys, config.n_layers, "intermediate_size")?;
    config.moe.router = RouterConfig::TopK { norm: true };
    config.moe.router_bias = true;
    config.moe.expert_bias = true;
    Ok(config)
}

/// What the class of transformers uses when the file says nothing.
fn default_rope(theta: f64, head_dim: usize) -> RopeConfig {
    let factor = 32.0;
    let scaling = RopeScaling::Yarn {
        factor,
        original: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: mscale(factor, 1.0),
        truncate: false,
    };
    RopeConfig {
        scaling,
        ..RopeConfig::plain(theta, head_dim)
    }
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    if let Activation::SwigluOai { alpha, limit } = config.activation {
        map.insert("swiglu_alpha".to_owned(), json!(alpha));
        map.insert("swiglu_limit".to_owned(), json!(limit));
    }
    common::put_windows(config, map);
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("experts_per_token", json!(moe.top_k)),
            ("intermediate_size", json!(moe.intermediate_size)),
            ("num_local_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.9)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "gpt_oss", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 8, "intermediate_size": 12, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        })
    }

    #[test]
    fn the_defaults_of_the_class() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!((config.head_dim, config.rope.theta), (64, 150_000.0));
        assert_eq!(config.attention.windows, [Some(128), None, Some(128)]);
        let expected = Activation::SwigluOai {
            alpha: 1.702,
            limit: 7.0,
        };
        assert_eq!(config.activation, expected);
        // 0.1 ln 32 + 1.
        assert!((config.rope.frequencies(1).1 - 1.346_573_6).abs() < 1e-6);
        assert!(matches!(
            config.rope.scaling,
            RopeScaling::Yarn {
                truncate: false,
                ..
            }
        ));
        let attention = &config.attention;
        assert!(attention.sinks && attention.qkv_bias && attention.o_bias);
        let plain = json!({"rope_parameters": {"rope_type": "default"}});
        let plain = parse(&base(), plain).unwrap();
        assert_eq!(
            (plain.rope.scaling, plain.rope.theta),
            (RopeScaling::None, 150_000.0)
        );
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"swiglu_limit": 0.0}),
                json!({"layer_types": ["sliding_attention", "full_attention", "linear"]}),
                json!({"quantization_config": {"quant_method": "awq"}}),
                json!({"hidden_act": "gelu"}),
            ],
        );
    }
}
