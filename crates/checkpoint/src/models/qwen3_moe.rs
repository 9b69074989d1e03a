//! `qwen3_moe` (Qwen3-30B-A3B and others): norms on query and key heads, softmax top-k, some layers may be dense.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, QkNorm, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3_moe",
    class: "Qwen3MoeForCausalLM",
    defaults,
    from_json,
    to_json,
};

fn defaults() -> Value {
    json!({
        "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0, "sliding_window": 4096,
    })
}

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    common::attention_bias(keys, &mut config, false)?;
    config.attention.qk_norm = QkNorm::PerHead;
    let window = common::switched_window(keys)?;
    config.attention.windows = common::windows(keys, config.n_layers, window, |_| true)?;
    config.moe = common::moe(keys, config.n_layers, "moe_intermediate_size")?;
    config.moe.layers = common::qwen_moe_layers(keys, config.n_layers)?;
    config.moe.router = RouterConfig::TopK {
        norm: keys.flag_or("norm_topk_prob", false)?,
    };
    Ok(config)
}

fn to_json(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let sliding = config.attention.windows.iter().flatten().next();
    common::put_qwen_moe_layers(config, map);
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("moe_intermediate_size", json!(moe.intermediate_size)),
            ("norm_topk_prob", json!(moe.norm_topk_prob())),
            ("num_experts", json!(moe.n_experts)),
            ("num_local_experts", json!(moe.n_experts)),
            ("num_experts_per_tok", json!(moe.top_k)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.001)),
            ("sliding_window", json!(sliding)),
            ("use_sliding_window", json!(sliding.is_some())),
        ],
    );
}
