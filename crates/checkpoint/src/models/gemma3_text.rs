//! `gemma3_text`, and the text part of `gemma3` (Gemma 3): norms before and after each block with weights around 0, a
//! scaled embedding, windows in most layers with rotary positions of their own.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{Activation, ModelConfig, NormKind, QkNorm};
use crate::error::Result;
use crate::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 131_072,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "sliding_window_pattern": 6, "tie_word_embeddings": true, "vocab_size": 262_208,
    })
}

/// Base of the frequencies of layers without a window, and of those with one.
const THETA: [f64; 2] = [1_000_000.0, 10_000.0];

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let gelu = [json!("gelu_pytorch_tanh")];
    let reason = "only gelu_pytorch_tanh is implemented here";
    keys.only("hidden_activation", &gelu, reason)?;
    let (global, local) = (
        rope(keys, "full_attention")?,
        rope(keys, "sliding_attention")?,
    );
    let turned = |rope: RopeConfig, dim| RopeConfig { dim, ..rope };
    let mut config = common::shared(keys, |head_dim| Ok(turned(global, head_dim)))?;
    config.local_rope = Some(turned(local, config.head_dim));
    config.norm = NormKind::RmsPlusOne;
    config.post_norms = true;
    config.activation = Activation::GeluTanh;
    config.scales.embedding = (config.hidden_size as f64).sqrt();
    common::attention_bias(keys, &mut config, false)?;
    config.attention.qk_norm = QkNorm::PerHead;
    config.attention.scale = 1.0 / keys.positive("query_pre_attn_scalar")?.sqrt();
    let pattern = keys.size_or("sliding_window_pattern", 6)?;
    let window = keys.size_maybe("sliding_window")?;
    let sliding = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    config.attention.windows = common::windows(keys, config.n_layers, window, sliding)?;
    Ok(config)
}

/// The rotation of one kind of layer: version 5 nests it under the kind; version 4 scales the layers without a window by
/// `rope_scaling`, and has a base for each kind.
fn rope(keys: &Keys, kind: &str) -> Result<RopeConfig> {
    let nested = match keys.object("rope_parameters")? {
        None => None,
        Some(map)
            if map.get("full_attention").is_none() && map.get("sliding_attention").is_none() =>
        {
            let problem = "has neither full_attention nor sliding_attention inside";
            return Err(keys.problem("rope_parameters", problem.to_owned()));
        }
        Some(map) => map.object(kind)?,
    };
    let is_global = kind == "full_attention";
    let flat = if is_global {
        keys.object("rope_scaling")?
    } else {
        None
    };
    let scaling = |map: &Option<Keys>| match map {
        Some(map) => {
            let whole = [json!(1.0), json!(1)];
            map.only(
                "partial_rotary_factor",
                &whole,
                "gemma3 rotates whole heads",
            )?;
            RopeScaling::from_json(keys, map)
        }
        None => Ok(RopeScaling::None),
    };
    if nested.is_some() && flat.is_some() && scaling(&nested)? != scaling(&flat)? {
        let problem = "does not say the same as rope_parameters".to_owned();
        return Err(keys.problem("rope_scaling", problem));
    }
    let key = if is_global {
        "rope_theta"
    } else {
        "rope_local_base_freq"
    };
    let theta = match nested
        .as_ref()
        .filter(|map| map.get("rope_theta").is_some())
    {
        Some(map) => {
            let theta = map.number("rope_theta")?;
            if keys.number_or(key, theta)? != theta {
                let problem = format!("is not {theta}, as rope_parameters says");
                return Err(keys.problem(key, problem));
            }
            theta
        }
        None => keys.number_or(key, THETA[usize::from(!is_global)])?,
    };
    let scaling = scaling(if flat.is_some() { &flat } else { &nested })?;
    Ok(RopeConfig {
        scaling,
        ..RopeConfig::plain(theta, 0)
    })
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let local = config.local_rope.as_ref().unwrap_or(&config.rope);
    let scalar = (1.0 / (config.attention.scale * config.attention.scale)).round();
    map.remove("hidden_act");
    common::put_windows(config, map);
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("attn_logit_softcapping", Value::Null),
            ("final_logit_softcapping", Value::Null),
            ("hidden_activation", json!("gelu_pytorch_tanh")),
            ("query_pre_attn_scalar", json!(scalar as u64)),
            ("rope_local_base_freq", json!(local.theta)),
        ],
    );
    let global = map.remove("rope_parameters").unwrap_or_default();
    // A local scaling cannot be stored divisors: those come from GGUF files, of which this architecture has none.
    let local = common::rope_json(local).unwrap_or_default();
    let nested = json!({"full_attention": global, "sliding_attention": local});
    map.insert("rope_parameters".to_owned(), nested);
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({"model_type": "gemma3_text"})
    }

    #[test]
    fn a_file_may_leave_everything_to_the_class() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!(
            (config.vocab_size, config.hidden_size, config.n_layers),
            (262_208, 2304, 26)
        );
        assert_eq!(
            (config.head_dim, config.n_heads, config.n_kv_heads),
            (256, 8, 4)
        );
        assert!(config.tie_word_embeddings && config.post_norms);
        assert_eq!(
            (config.scales.embedding, config.attention.scale),
            (48.0, 1.0 / 16.0)
        );
        assert_eq!(config.rope.theta, 1e6);
        assert_eq!(config.local_rope.unwrap().theta, 1e4);
        let full = config.attention.windows.iter().enumerate();
        let full: Vec<_> = full
            .filter(|(_, w)| w.is_none())
            .map(|(layer, _)| layer)
            .collect();
        assert_eq!(full, [5, 11, 17, 23]);
    }

    #[test]
    fn wrappers_hand_their_tokens_down() {
        let wrapped = json!({
            "model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 4},
            "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 7,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        });
        let config = parse(&wrapped, Value::Null).unwrap();
        assert_eq!(config.model_type, "gemma3_text");
        assert_eq!(config.eos_token_ids, [1, 106]);
        assert_eq!(config.attention.windows, [Some(7); 2]);
        assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(config.local_rope.unwrap().scaling, RopeScaling::None);
        let quantised = json!({"quantization_config": {"quant_method": "gptq"}});
        assert!(parse(&wrapped, quantised).is_err());
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"attn_logit_softcapping": 50.0}),
                json!({"final_logit_softcapping": 30.0}),
                json!({"use_bidirectional_attention": true}),
                json!({"hidden_activation": "gelu"}),
                json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
                json!({"rope_theta": 5.0, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
                json!({"sliding_window_pattern": 0}),
            ],
        );
    }
}
