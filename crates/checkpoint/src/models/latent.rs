//! What DeepSeek V2, V3 and GLM-4 MoE share: multi-head latent attention, grouped routers, dense first layers.

use serde_json::{Map, Value, json};

use super::common;
use crate::config::{MlaConfig, ModelConfig, MoeConfig, RouterConfig, Score, SharedExpert};
use crate::error::Result;
use crate::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling, mscale};

/// A dense model with latent attention, from the shared keys.
pub(super) fn base(keys: &Keys) -> Result<ModelConfig> {
    common::silu(keys)?;
    let whole = [json!(1.0), json!(1)];
    let reason = "latent attention rotates qk_rope_head_dim values";
    keys.only("partial_rotary_factor", &whole, reason)?;
    keys.only("mlp_bias", &[json!(false)], "not implemented")?;
    let mla = MlaConfig {
        q_lora_rank: keys.size_maybe("q_lora_rank")?,
        kv_lora_rank: keys.size("kv_lora_rank")?,
        qk_nope_head_dim: keys.size("qk_nope_head_dim")?,
        qk_rope_head_dim: keys.size("qk_rope_head_dim")?,
        v_head_dim: keys.size("v_head_dim")?,
        split_kv_b: false,
    };
    // The file's head_dim, if any, is that of the rotated part.
    let rope = |_| RopeConfig::from_json(keys, mla.qk_rope_head_dim);
    let mut config = common::shared(keys, rope)?;
    common::no_windows(keys, &config)?;
    let heads = [json!(config.n_heads)];
    let reason = "latent attention has as many key heads as query heads";
    keys.only("num_key_value_heads", &heads, reason)?;
    config.head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
    common::attention_bias(keys, &mut config, false)?;
    config.attention.scale = score_scale(keys, config.head_dim)?;
    config.attention.mla = Some(mla);
    Ok(config)
}

/// The factor on the scores: `1 / sqrt(head_dim)`, times the square of the published scale of attention for a stretched
/// context where `mscale_all_dim` says so.
fn score_scale(keys: &Keys, head_dim: usize) -> Result<f64> {
    let plain = 1.0 / (head_dim as f64).sqrt();
    let map = match keys.object("rope_parameters")? {
        Some(map) => Some(map),
        None => keys.object("rope_scaling")?,
    };
    let Some(map) = map else {
        return Ok(plain);
    };
    let kind = map.get("rope_type").or_else(|| map.get("type"));
    let all_dim = map.number_or("mscale_all_dim", 0.0)?;
    if all_dim == 0.0 || kind.and_then(Value::as_str).unwrap_or("default") == "default" {
        return Ok(plain);
    }
    let mscale = mscale(map.positive("factor")?, all_dim);
    Ok(plain * mscale * mscale)
}

/// The experts of every layer from `first_k_dense_replace` on. The shared ones are stored as one.
pub(super) fn moe(keys: &Keys, n_layers: usize) -> Result<MoeConfig> {
    let reason = "only experts in every layer after the dense ones are implemented";
    keys.only("moe_layer_freq", &[json!(1)], reason)?;
    let mut moe = common::moe(keys, n_layers, "moe_intermediate_size")?;
    moe.layers = (keys.count_or("first_k_dense_replace", 0)?..n_layers).collect();
    let n_shared = keys.count_or("n_shared_experts", 0)?;
    moe.shared = (n_shared > 0).then(|| SharedExpert {
        intermediate_size: n_shared.saturating_mul(moe.intermediate_size),
        gated: false,
    });
    Ok(moe)
}

/// Refuses spellings of other routers where only V3's is known.
pub(super) fn noaux_router(keys: &Keys) -> Result<()> {
    keys.only(
        "scoring_func",
        &[json!("sigmoid")],
        "only sigmoid is implemented here",
    )?;
    keys.only(
        "topk_method",
        &[json!("noaux_tc")],
        "only noaux_tc is implemented here",
    )
}

/// V3's router: sigmoid, a bias on the selection, groups ranked by the sum of their two best.
pub(super) fn v3_router(keys: &Keys) -> Result<RouterConfig> {
    Ok(RouterConfig::GroupLimited {
        score: Score::Sigmoid,
        n_groups: keys.size("n_group")?,
        keep_groups: keys.size("topk_group")?,
        sum_of_best_two: true,
        norm: keys.flag_or("norm_topk_prob", true)?,
        scale: keys.number("routed_scaling_factor")?,
        correction_bias: true,
    })
}

/// The keys that [`moe`] and the routers read.
pub(super) fn put_moe(config: &ModelConfig, map: &mut Map<String, Value>) {
    let moe = &config.moe;
    let shared = moe.shared.map_or(0, |shared| shared.intermediate_size);
    let n_shared = shared / moe.intermediate_size.max(1);
    let first = moe.layers.first().copied().unwrap_or(config.n_layers);
    common::put(
        map,
        [
            ("first_k_dense_replace", json!(first)),
            ("moe_intermediate_size", json!(moe.intermediate_size)),
            ("moe_layer_freq", json!(1)),
            ("n_routed_experts", json!(moe.n_experts)),
            ("n_shared_experts", json!(n_shared)),
            ("norm_topk_prob", json!(moe.norm_topk_prob())),
            ("num_experts_per_tok", json!(moe.top_k)),
            // Prediction blocks are not read, so none are written.
            ("num_nextn_predict_layers", json!(0)),
            ("output_router_logits", json!(false)),
        ],
    );
    if let RouterConfig::GroupLimited {
        n_groups,
        keep_groups,
        scale,
        ..
    } = moe.router
    {
        common::put(
            map,
            [
                ("n_group", json!(n_groups)),
                ("topk_group", json!(keep_groups)),
                ("routed_scaling_factor", json!(scale)),
            ],
        );
    }
}

/// The keys that [`base`] reads.
pub(super) fn put_attention(config: &ModelConfig, map: &mut Map<String, Value>) {
    let Some(mla) = config.attention.mla else {
        return;
    };
    common::put(
        map,
        [
            ("attention_bias", json!(config.attention.qkv_bias)),
            ("head_dim", json!(mla.qk_rope_head_dim)),
            ("kv_lora_rank", json!(mla.kv_lora_rank)),
            ("num_key_value_heads", json!(config.n_heads)),
            ("pretraining_tp", json!(1)),
            ("q_lora_rank", json!(mla.q_lora_rank)),
            ("qk_head_dim", json!(config.head_dim)),
            ("qk_nope_head_dim", json!(mla.qk_nope_head_dim)),
            ("qk_rope_head_dim", json!(mla.qk_rope_head_dim)),
            ("v_head_dim", json!(mla.v_head_dim)),
        ],
    );
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(rope) = map.get_mut(key).and_then(Value::as_object_mut) {
            put_mscales(config, rope);
        }
    }
}

/// `mscale` and `mscale_all_dim`, recovered from the two factors that follow from them.
fn put_mscales(config: &ModelConfig, rope: &mut Map<String, Value>) {
    let RopeScaling::Yarn {
        factor,
        attention_factor,
        ..
    } = config.rope.scaling
    else {
        return;
    };
    let plain = 1.0 / (config.head_dim as f64).sqrt();
    if config.attention.scale == plain || factor <= 1.0 {
        return;
    }
    let of_all = (config.attention.scale / plain).sqrt();
    // What people write has few digits; those found here have an error in the last of many.
    let exact = |mscale: f64| (mscale - 1.0) / (0.1 * factor.ln());
    let rounded = |mscale: f64| (exact(mscale) * 1e9).round() / 1e9;
    let same = |all: f64| {
        let mscale = mscale(factor, all);
        plain * mscale * mscale == config.attention.scale
    };
    let all = Some(rounded(of_all)).filter(|all| same(*all));
    let all = all.unwrap_or_else(|| exact(of_all));
    rope.insert(
        "mscale".to_owned(),
        json!(rounded(attention_factor * of_all)),
    );
    rope.insert("mscale_all_dim".to_owned(), json!(all));
}
