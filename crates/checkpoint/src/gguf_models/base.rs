//! The keys that all architectures of GGUF share.

use super::EXPERT_MAP;
use super::meta::Meta;
use super::rope;
use crate::config::{
    Activation, AttentionConfig, ModelConfig, MoeConfig, NormKind, QkNorm, RouterConfig, Scales,
};
use crate::error::Result;
use crate::rope::RopeConfig;

/// How an architecture differs from the shared ones before its own keys are read.
pub(super) struct Kind {
    /// Name of Hugging Face.
    pub(super) model_type: &'static str,
    /// Whether rope pairs are neighbours.
    pub(super) interleaved: bool,
}

/// A dense model with grouped-query attention over everything before. Architectures change what differs.
pub(super) fn base(meta: &Meta<'_>, kind: &Kind) -> Result<ModelConfig> {
    let n_blocks = meta.size("block_count")?;
    let n_next = meta.size_opt("nextn_predict_layers")?.unwrap_or(0);
    let Some(n_layers) = n_blocks.checked_sub(n_next).filter(|n| *n > 0) else {
        let problem = format!("is {n_next} of block_count = {n_blocks}");
        return Err(meta.problem("nextn_predict_layers", problem));
    };
    let hidden_size = meta.size("embedding_length")?;
    let n_heads = needed(meta, "attention.head_count", n_blocks)?;
    let n_kv_heads = meta.uniform_size("attention.head_count_kv", n_blocks)?;
    let head_dim = match meta.size_opt("attention.key_length")? {
        Some(length) => length,
        None => (hidden_size / n_heads).max(1),
    };
    let embedding = meta
        .tensor("token_embd.weight")
        .ok_or_else(|| meta.missing_tensor("token_embd.weight"))?;
    let mut eos_token_ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        eos_token_ids.extend(meta.token(name)?);
    }
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    Ok(ModelConfig {
        model_type: kind.model_type.to_owned(),
        vocab_size: embedding.shape.first().copied().unwrap_or(0),
        hidden_size,
        n_layers,
        max_position_embeddings: meta.size("context_length")?,
        tie_word_embeddings: meta.tensor("output.weight").is_none(),
        lm_head_bias: meta.tensor("output.bias").is_some(),
        norm: NormKind::Rms,
        norm_eps: meta.number("attention.layer_norm_rms_epsilon")?,
        post_norms: false,
        n_heads,
        n_kv_heads: n_kv_heads.unwrap_or(n_heads),
        head_dim,
        attention: attention(meta, head_dim, n_layers)?,
        rope: rope::read(meta, rotated(meta, head_dim)?, kind.interleaved)?,
        local_rope: None,
        // Left out where every layer has experts of a width of their own.
        intermediate_size: meta
            .uniform_size("feed_forward_length", n_blocks)?
            .unwrap_or(0),
        mlp_bias: meta.tensor("blk.0.ffn_gate.bias").is_some(),
        activation: Activation::Silu,
        moe: MoeConfig::default(),
        scales: Scales::default(),
        eos_token_ids,
        bos_token_id: meta.token("bos")?,
        pad_token_id: meta.token("padding")?,
        dtype: None,
    })
}

fn needed(meta: &Meta<'_>, name: &str, n_layers: usize) -> Result<usize> {
    meta.uniform_size(name, n_layers)?
        .ok_or_else(|| meta.problem(name, "is missing"))
}

/// Values of a head that are rotated.
fn rotated(meta: &Meta<'_>, head_dim: usize) -> Result<usize> {
    Ok(meta.size_opt("rope.dimension_count")?.unwrap_or(head_dim))
}

fn attention(meta: &Meta<'_>, head_dim: usize, n_layers: usize) -> Result<AttentionConfig> {
    let values = meta.size_opt("attention.value_length")?;
    if let Some(length) = values.filter(|length| *length != head_dim)
        && !meta.has("attention.kv_lora_rank")
    {
        let problem = format!("is {length}, but the heads of keys have {head_dim}");
        return Err(meta.problem("attention.value_length", problem));
    }
    let has = |name: &str| meta.tensor(&format!("blk.0.{name}")).is_some();
    let bias = |name: &str| has(&format!("{name}.bias"));
    Ok(AttentionConfig {
        qkv_bias: bias("attn_q") || bias("attn_qkv"),
        o_bias: bias("attn_output"),
        qk_norm: match has("attn_q_norm.weight") {
            true => QkNorm::PerHead,
            false => QkNorm::None,
        },
        sinks: has("attn_sinks.weight"),
        clip_qkv: None,
        scale: 1.0 / (head_dim as f64).sqrt(),
        windows: vec![None; n_layers],
        mla: None,
        experts: None,
    })
}

/// Experts in `layers`. `width` is that of one expert.
pub(super) fn moe(
    meta: &Meta<'_>,
    layers: std::ops::Range<usize>,
    width: usize,
    router: RouterConfig,
) -> Result<MoeConfig> {
    let n_blocks = meta.size("block_count")?;
    let has = |name: &str| {
        let layer = layers.start;
        meta.tensor(&format!("blk.{layer}.{name}")).is_some()
    };
    let mut moe = MoeConfig {
        n_experts: 0,
        top_k: needed(meta, "expert_used_count", n_blocks)?,
        intermediate_size: width,
        router,
        router_bias: has("ffn_gate_inp.bias"),
        expert_bias: has("ffn_down_exps.bias"),
        layers: layers.clone().collect(),
        ..MoeConfig::default()
    };
    let counts = expert_counts(meta)?;
    let counts = counts.ok_or_else(|| meta.problem("expert_count", "is missing"))?;
    moe.n_experts = counts.iter().copied().max().unwrap_or(0);
    if let Some(counts) = counts.get(layers).filter(|counts| !counts.is_empty()) {
        moe.set_counts(counts.to_vec());
    }
    moe.shared_weights = expert_map(meta, &moe)?;
    Ok(moe)
}

/// For every expert of every layer that has some, one after the other, the one whose weights it has; llama.cpp knows
/// nothing of it, and refuses the stacks.
fn expert_map(meta: &Meta<'_>, moe: &MoeConfig) -> Result<Vec<Vec<u16>>> {
    let Some(ids) = meta.i32s_opt(EXPERT_MAP)? else {
        return Ok(Vec::new());
    };
    let all: Option<Vec<u16>> = ids.iter().map(|id| u16::try_from(*id).ok()).collect();
    let mut rest = match all {
        Some(ids) if ids.len() == moe.n_experts_in_all() => ids,
        _ => {
            let problem = format!(
                "has {} numbers, expected one from 0 for each of {} experts",
                ids.len(),
                moe.n_experts_in_all()
            );
            return Err(meta.problem(EXPERT_MAP, problem));
        }
    };
    Ok(moe.counts().map(|n| rest.drain(..n).collect()).collect())
}

/// Whether any layer has experts.
pub(super) fn has_experts(meta: &Meta<'_>) -> Result<bool> {
    Ok(expert_counts(meta)?.is_some())
}

/// Experts of every block, if there are any. llama.cpp knows one number for all; a list with one for each is ours.
fn expert_counts(meta: &Meta<'_>) -> Result<Option<Vec<usize>>> {
    let counts = meta.sizes_per_block("expert_count")?;
    Ok(counts.filter(|counts| counts.iter().any(|n| *n > 0)))
}

/// Width of an expert where it has a key of its own.
pub(super) fn expert_width(meta: &Meta<'_>) -> Result<Option<usize>> {
    let n_blocks = meta.size("block_count")?;
    meta.uniform_size("expert_feed_forward_length", n_blocks)
}

/// Windows of all but every `period`-th layer, unless the file says which layers have one.
pub(super) fn windows(
    meta: &Meta<'_>,
    n_layers: usize,
    period: usize,
) -> Result<Vec<Option<usize>>> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let Some(window) = meta.size_opt("attention.sliding_window")? else {
        return Ok(vec![None; n_layers]);
    };
    if meta.is_array(PATTERN) {
        let n_blocks = meta.size("block_count")?;
        let listed = meta.flags_per_layer(PATTERN, n_blocks)?.unwrap_or_default();
        let listed = listed.into_iter().take(n_layers);
        return Ok(listed.map(|sliding| sliding.then_some(window)).collect());
    }
    // Every `period`-th layer sees everything.
    let period = meta.size_opt(PATTERN)?.unwrap_or(period);
    let of = |layer| (layer % period < period - 1).then_some(window);
    Ok((0..n_layers).map(of).collect())
}

/// A second rope for the layers with a window, where it has another base.
pub(super) fn local_rope(full: &RopeConfig, theta: f64) -> Option<RopeConfig> {
    (theta != full.theta).then(|| RopeConfig {
        theta,
        ..full.clone()
    })
}
