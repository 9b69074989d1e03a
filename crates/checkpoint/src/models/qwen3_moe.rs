//! `qwen3_moe` (Qwen3-30B-A3B and others): norms on query and key heads, softmax top-k, some layers may be dense.

use serde_json::{Map, Value, json};

use super::{Architecture, common};
use crate::config::{ModelConfig, QkNorm, RouterConfig};
use crate::error::Result;
use crate::keys::Keys;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    model_type: "qwen3_moe",
    class: "Qwen3MoeForCausalLM",
    from_json,
    to_json,
};

fn from_json(keys: &Keys) -> Result<ModelConfig> {
    let mut config = common::base(keys)?;
    let bias = keys.flag_or("attention_bias", false)?;
    (config.attention.qkv_bias, config.attention.o_bias) = (bias, bias);
    config.attention.qk_norm = QkNorm::PerHead;
    let sliding = keys.flag_or("use_sliding_window", false)?;
    config.attention.windows = common::windows(keys, config.n_layers, |_| sliding)?;
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
    for (key, value) in [
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
    ] {
        map.insert(key.into(), value);
    }
}
