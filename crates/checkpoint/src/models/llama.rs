//! `llama` (Llama 1 to 3, SmolLM and many others): dense, rotary positions with any scaling.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "llama",
    class: "LlamaForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    common::no_windows(keys, &config)?;
    keys.only("rope_interleaved", &[json!(false)], "not implemented")?;
    config.mlp_bias = keys.flag_or("mlp_bias", false)?;
    common::attention_bias(keys, &mut config, false)?;
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("mlp_bias", json!(config.mlp_bias)),
            ("pretraining_tp", json!(1)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 12,
        })
    }

    #[test]
    fn the_first_files_leave_most_keys_out() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!((config.rope.theta, config.n_kv_heads), (10_000.0, 4));
        assert!(!config.attention.qkv_bias && config.moe.layers.is_empty());
        // A base inside of rope_parameters is not contradicted by the class.
        let nested = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}});
        assert_eq!(parse(&base(), nested).unwrap().rope.theta, 5e5);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"mlp_bias": "yes"}),
                json!({"rope_interleaved": true}),
                json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
                json!({"sliding_window": 4}),
            ],
        );
    }

    #[test]
    fn two_spellings_must_say_the_same() {
        let both = |factor: f64| {
            json!({
                "rope_scaling": {"type": "linear", "factor": factor},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
            })
        };
        assert!(parse(&base(), both(2.0)).is_ok());
        assert_refused(&base(), &[both(4.0)]);
    }
}
