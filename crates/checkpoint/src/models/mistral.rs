//! `mistral` (Mistral 7B, Nemo and what was tuned from them): Llama without biases, and one window for all layers. A file that
//! says nothing about the window has one of 4096, as its class says; `null` is none.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "mistral",
    class: "MistralForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 131_072,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    let reason = "this architecture has no biases";
    for key in ["attention_bias", "mlp_bias"] {
        keys.only(key, &[json!(false)], reason)?;
    }
    let window = keys.size_maybe("sliding_window")?;
    config.attention.windows = common::windows(keys, config.n_layers, window, |_| true)?;
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let window = config.attention.windows.iter().flatten().next();
    common::put(map, [("sliding_window", json!(window))]);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "mistral", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 16, "intermediate_size": 12,
        })
    }

    #[test]
    fn an_absent_window_is_that_of_the_class_and_null_is_none() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!(config.attention.windows, [Some(4096); 2]);
        assert_eq!((config.n_kv_heads, config.head_dim), (8, 2));
        let config = parse(&base(), json!({"sliding_window": null})).unwrap();
        assert_eq!(config.attention.windows, [None; 2]);
        assert_eq!((config.norm_eps, config.rope.theta), (1e-6, 1e4));
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"attention_bias": true}),
                json!({"mlp_bias": true}),
                json!({"hidden_act": "gelu"}),
                json!({"sliding_window": "wide"}),
            ],
        );
    }
}
