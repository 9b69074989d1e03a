//! `qwen3` (Qwen3 0.6B to 32B): dense, norms on query and key heads.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, QkNorm};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "head_dim": 128, "max_position_embeddings": 32_768, "max_window_layers": 28,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    common::attention_bias(keys, &mut config, false)?;
    config.attention.qk_norm = QkNorm::PerHead;
    let first = keys.count_or("max_window_layers", 28)?;
    let window = common::switched_window(keys)?;
    config.attention.windows =
        common::windows(keys, config.n_layers, window, |layer| layer >= first)?;
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    common::put_windows(config, map);
    map.insert(
        "attention_bias".to_owned(),
        json!(config.attention.qkv_bias),
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "qwen3", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12,
        })
    }

    #[test]
    fn the_last_layers_have_windows_where_they_are_switched_on() {
        let config = parse(&base(), json!({"sliding_window": 32})).unwrap();
        assert_eq!(config.attention.windows, [None; 3]);
        let on = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
        let config = parse(&base(), on).unwrap();
        assert_eq!(config.attention.windows, [None, Some(5), Some(5)]);
        let on = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 0});
        assert_eq!(parse(&base(), on).unwrap().attention.windows, [Some(5); 3]);
    }

    #[test]
    fn heads_are_normed_and_128_wide_unless_the_file_says_otherwise() {
        let config = parse(&base(), json!({"attention_bias": true})).unwrap();
        assert_eq!(
            (config.head_dim, config.attention.qk_norm),
            (128, QkNorm::PerHead)
        );
        assert!(config.attention.qkv_bias && config.attention.o_bias);
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"hidden_act": "gelu"}),
                json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
                json!({"layer_types": ["full_attention"]}),
                json!({"rope_scaling": {"type": "ntk", "factor": 2.0}}),
            ],
        );
    }
}
