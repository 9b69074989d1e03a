//! `deepseek2`: DeepSeek-V2 and V3 and their relatives, with latent attention.
//!
//! Files come in two forms: keys and values from two tensors, keys transposed (`attn_k_b`, `attn_v_b`), or from one
//! (`attn_kv_b`, older). Groups of experts are always ranked by the sum of their two best.

use super::base::{Kind, base, expert_width, has_experts, moe};
use super::meta::Meta;
use super::{GgufArchitecture, NormNames, rope};
use crate::config::{MlaConfig, ModelConfig, RouterConfig, Score, SharedExpert};
use crate::error::Result;

pub(super) const ARCHITECTURE: GgufArchitecture = GgufArchitecture {
    name: "deepseek2",
    read,
    norms: NormNames::Usual,
};

fn read(meta: &Meta<'_>) -> Result<ModelConfig> {
    let mut config = base(
        meta,
        &Kind {
            model_type: "deepseek_v3",
            interleaved: true,
        },
    )?;
    for name in [
        "attention.temperature_scale",
        "attention.temperature_length",
    ] {
        if meta.number_opt(name)?.is_some_and(|value| value != 0.0) {
            return Err(meta.unsupported(name, "set", "attention temperature is not computed"));
        }
    }
    let (mla, head_dim) = latent(meta, &config)?;
    config.head_dim = head_dim;
    // Files count one key head, the latent one that all heads share.
    config.n_kv_heads = config.n_heads;
    config.rope.dim = mla.qk_rope_head_dim;
    config.attention.mla = Some(mla);
    config.attention.qkv_bias = false;
    config.attention.scale = rope::deepseek_score_factor(meta)? / (head_dim as f64).sqrt();
    let first = meta.size_opt("leading_dense_block_count")?.unwrap_or(0);
    if has_experts(meta)? && first < config.n_layers {
        let width = expert_width(meta)?;
        let width =
            width.ok_or_else(|| meta.problem("expert_feed_forward_length", "is missing"))?;
        let router = grouped_router(meta, first, Score::Softmax)?;
        config.moe = moe(meta, first..config.n_layers, width, router)?;
        config.moe.shared = shared(meta, width)?;
        if let RouterConfig::GroupLimited {
            score: Score::Softmax,
            correction_bias: false,
            ..
        } = router
        {
            config.model_type = "deepseek_v2".to_owned();
        }
    }
    Ok(config)
}

/// Shared experts, stored as one.
pub(super) fn shared(meta: &Meta<'_>, width: usize) -> Result<Option<SharedExpert>> {
    let count = meta.size_opt("expert_shared_count")?;
    Ok(count.map(|count| SharedExpert {
        intermediate_size: width.saturating_mul(count),
        gated: false,
    }))
}

/// Sizes of latent attention, and the width of a head of queries.
fn latent(meta: &Meta<'_>, config: &ModelConfig) -> Result<(MlaConfig, usize)> {
    let split = meta.tensor("blk.0.attn_k_b.weight").is_some();
    let (key, value) = match split {
        true => ("attention.key_length_mla", "attention.value_length_mla"),
        false => ("attention.key_length", "attention.value_length"),
    };
    let head_dim = meta.size(key)?;
    let qk_rope_head_dim = meta.size("rope.dimension_count")?;
    let Some(qk_nope_head_dim) = head_dim.checked_sub(qk_rope_head_dim).filter(|n| *n > 0) else {
        let problem = format!("is {head_dim}, not more than rope.dimension_count");
        return Err(meta.problem(key, problem));
    };
    let mla = MlaConfig {
        // Models without it may still have the key; the tensors decide.
        q_lora_rank: match meta.tensor("blk.0.attn_q_a.weight") {
            Some(_) => Some(meta.size("attention.q_lora_rank")?),
            None => None,
        },
        kv_lora_rank: meta.size("attention.kv_lora_rank")?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: meta.size_opt(value)?.unwrap_or(config.head_dim),
        split_kv_b: split,
    };
    Ok((mla, head_dim))
}

/// The router of DeepSeek and GLM; `default` is how logits become scores when the file does not say.
pub(super) fn grouped_router(
    meta: &Meta<'_>,
    first: usize,
    default: Score,
) -> Result<RouterConfig> {
    const GATING: &str = "expert_gating_func";
    let score = match meta.size_opt(GATING)? {
        None => glm_flash(meta)?.unwrap_or(default),
        Some(1) => Score::Softmax,
        Some(2) => Score::Sigmoid,
        Some(other) => {
            let reason = "known are 1 (softmax) and 2 (sigmoid)";
            return Err(meta.unsupported(GATING, other, reason));
        }
    };
    let n_groups = meta.size_opt("expert_group_count")?.unwrap_or(1);
    let keep_groups = match n_groups {
        1 => 1,
        _ => meta.size("expert_group_used_count")?,
    };
    let bias = format!("blk.{first}.exp_probs_b.bias");
    Ok(RouterConfig::GroupLimited {
        score,
        n_groups,
        keep_groups,
        sum_of_best_two: n_groups > 1 || score == Score::Sigmoid,
        norm: meta.flag_opt("expert_weights_norm")?.unwrap_or(false),
        scale: meta.factor("expert_weights_scale")?,
        correction_bias: meta.tensor(&bias).is_some(),
    })
}

/// GLM-4.7-Flash files lack the key and mean sigmoid; llama.cpp knows them by their sizes.
fn glm_flash(meta: &Meta<'_>) -> Result<Option<Score>> {
    let n_blocks = meta.size("block_count")?;
    let rows = meta.tensor("token_embd.weight").map(|t| t.shape[0]);
    let is_flash = (47..=48).contains(&n_blocks) && rows == Some(154_880);
    Ok(is_flash.then_some(Score::Sigmoid))
}
