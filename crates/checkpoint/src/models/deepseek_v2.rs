//! `deepseek_v2` (DeepSeek-V2, V2-Lite, Coder-V2): latent attention, softmax scores, groups ranked by their best expert.
//!
//! transformers gives experts outside of the kept groups the score 0, V3 minus infinity. Here both are the same: softmax
//! scores are above 0, so that a masked one is only picked when all live ones have underflowed to 0 as well.
//! transformers never reads `norm_topk_prob`, the code published with the model does: `true` is refused.

use serde_json::{Map, Value, json};

use super::{Architecture, common, latent};
use crate::config::{ModelConfig, RouterConfig, Score};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "deepseek_v2",
    class: "DeepseekV2ForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 0,
        "kv_lora_rank": 512, "max_position_embeddings": 2048, "n_shared_experts": 2,
        "norm_topk_prob": false, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "routed_scaling_factor": 1.0,
        "topk_method": "greedy", "v_head_dim": 128,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = latent::base(keys)?;
    config.rope.interleaved = true;
    config.moe = latent::moe(keys, config.n_layers)?;
    config.moe.router = router(keys)?;
    Ok(config)
}

fn router(keys: &Keys) -> Result<RouterConfig> {
    let softmax = [json!("softmax")];
    keys.only("scoring_func", &softmax, "deepseek_v2 has softmax")?;
    let reason = "transformers ignores it, the code published with the model does not";
    keys.only("norm_topk_prob", &[json!(false)], reason)?;
    let (n_groups, keep_groups) = match keys.text("topk_method")? {
        "greedy" => (1, 1),
        "group_limited_greedy" => (keys.size("n_group")?, keys.size("topk_group")?),
        other => {
            let reason = "known methods: greedy, group_limited_greedy";
            return Err(keys.unsupported("topk_method", &json!(other), reason));
        }
    };
    Ok(RouterConfig::GroupLimited {
        score: Score::Softmax,
        n_groups,
        keep_groups,
        sum_of_best_two: false,
        norm: false,
        scale: keys.number("routed_scaling_factor")?,
        correction_bias: false,
    })
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    latent::put_attention(config, map);
    latent::put_moe(config, map);
    let grouped = matches!(
        config.moe.router,
        RouterConfig::GroupLimited { n_groups: 2.., .. }
    );
    let method = if grouped {
        "group_limited_greedy"
    } else {
        "greedy"
    };
    common::put(
        map,
        [
            ("mlp_bias", json!(false)),
            ("scoring_func", json!("softmax")),
            ("topk_method", json!(method)),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_refused, parse};
    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "deepseek_v2", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 12, "n_routed_experts": 12,
            "num_experts_per_tok": 3, "moe_intermediate_size": 6,
        })
    }

    fn groups(config: &ModelConfig) -> (usize, usize, f64) {
        match config.moe.router {
            RouterConfig::GroupLimited {
                n_groups,
                keep_groups,
                scale,
                sum_of_best_two: false,
                norm: false,
                correction_bias: false,
                ..
            } => (n_groups, keep_groups, scale),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn greedy_ignores_groups() {
        let config = parse(&base(), json!({"n_group": 4, "topk_group": 2})).unwrap();
        assert_eq!(groups(&config), (1, 1, 1.0));
        assert!(config.rope.interleaved);
        assert_eq!(config.moe_layers(), [0, 1]);
        assert_eq!(config.moe.shared.unwrap().intermediate_size, 12);
        let limited = json!({
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 16.0,
        });
        assert_eq!(groups(&parse(&base(), limited).unwrap()), (4, 2, 16.0));
    }

    #[test]
    fn what_is_not_implemented_is_refused() {
        assert_refused(
            &base(),
            &[
                json!({"norm_topk_prob": true}),
                json!({"topk_method": "noaux_tc"}),
                json!({"scoring_func": "sigmoid"}),
                json!({"moe_layer_freq": 2}),
                json!({"mlp_bias": true}),
                json!({"n_group": 5, "topk_method": "group_limited_greedy", "topk_group": 1}),
            ],
        );
    }
}
