//! `granitemoe` (IBM Granite 3 MoE, PowerMoE): experts in every layer, constant factors on embedding, residual branches,
//! scores and logits.
//!
//! `attention_multiplier` replaces the usual factor on the scores, `residual_multiplier` acts on both blocks of a layer
//! before they join the residual stream, `logits_scaling` divides.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, RouterConfig, Scales};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "granitemoe",
    class: "GraniteMoeForCausalLM",
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
    let reason = "a shared expert makes it another architecture, granitemoeshared";
    keys.only("shared_intermediate_size", &[json!(0)], reason)?;
    common::attention_bias(keys, &mut config, false)?;
    let factor = |key| match keys.get(key) {
        Some(_) => keys.positive(key),
        None => Ok(1.0),
    };
    config.attention.scale = factor("attention_multiplier")?;
    config.scales = Scales {
        embedding: factor("embedding_multiplier")?,
        residual: factor("residual_multiplier")?,
        logits_divisor: factor("logits_scaling")?,
    };
    config.moe = common::moe(keys, config.n_layers, "intermediate_size")?;
    config.moe.router = RouterConfig::TopK { norm: true };
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let (moe, scales) = (&config.moe, &config.scales);
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("attention_multiplier", json!(config.attention.scale)),
            ("embedding_multiplier", json!(scales.embedding)),
            ("intermediate_size", json!(moe.intermediate_size)),
            ("logits_scaling", json!(scales.logits_divisor)),
            ("num_local_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("residual_multiplier", json!(scales.residual)),
            ("router_aux_loss_coef", json!(0.001)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "granitemoe", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 12, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        })
    }

    #[test]
    fn factors_are_1_unless_given_that_of_the_scores_too() {
        let config = parse(&base(), Value::Null).unwrap();
        assert_eq!(
            (config.attention.scale, config.scales),
            (1.0, Scales::default())
        );
        let given = json!({
            "attention_multiplier": 0.015625, "embedding_multiplier": 12, "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        });
        let config = parse(&base(), given).unwrap();
        let expected = Scales {
            embedding: 12.0,
            residual: 0.22,
            logits_divisor: 6.0,
        };
        assert_eq!(
            (config.attention.scale, config.scales),
            (0.015625, expected)
        );
        assert!(config.moe.norm_topk_prob());
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"shared_intermediate_size": 16}),
                json!({"logits_scaling": 0.0}),
                json!({"sliding_window": 4}),
                json!({"hidden_act": "gelu"}),
            ],
        );
    }
}
