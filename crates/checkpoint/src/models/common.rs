//! The keys of `config.json` that (nearly) all architectures share.

use serde_json::{Map, Value, json};

use crate::Dtype;
use crate::config::{
    Activation, AttentionConfig, ModelConfig, MoeConfig, NormKind, QkNorm, Scales,
};
use crate::error::{CheckpointError, Result};
use crate::generation::one_or_many;
use crate::keys::Keys;
use crate::rope::{RopeConfig, RopeScaling};

/// Spellings of the number of experts.
pub(crate) const N_EXPERTS: &[&str] = &[
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
];

/// Spellings of the number of experts per token.
pub(crate) const TOP_K: &[&str] = &[
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
];

/// A dense model with plain grouped-query attention, from the shared keys. Architectures change what differs.
pub(super) fn base(keys: &Keys) -> Result<ModelConfig> {
    silu(keys)?;
    let config = shared(keys, |head_dim| RopeConfig::from_json(keys, head_dim))?;
    if config.rope.dim != config.head_dim {
        let value = json!(config.rope.dim as f64 / config.head_dim as f64);
        let reason = "this architecture rotates whole heads";
        return Err(keys.unsupported("partial_rotary_factor", &value, reason));
    }
    Ok(config)
}

/// Refuses activations other than SiLU.
pub(super) fn silu(keys: &Keys) -> Result<()> {
    let silu = [json!("silu"), json!("swish")];
    keys.only("hidden_act", &silu, "only silu is implemented here")
}

/// As [`base`], for architectures with other activations or their own way to say how they rotate a head.
pub(super) fn shared(
    keys: &Keys,
    rope: impl FnOnce(usize) -> Result<RopeConfig>,
) -> Result<ModelConfig> {
    refuse_quantization(keys)?;
    for key in [
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_chunk_size",
        "use_bidirectional_attention",
    ] {
        keys.only(key, &[json!(false)], "not implemented")?;
    }
    let n_heads = keys.size("num_attention_heads")?;
    let hidden_size = keys.size("hidden_size")?;
    let n_layers = keys.layers("num_hidden_layers")?;
    let head_dim = keys.size_or("head_dim", (hidden_size / n_heads).max(1))?;
    Ok(ModelConfig {
        model_type: keys.text("model_type")?.to_owned(),
        vocab_size: keys.size("vocab_size")?,
        hidden_size,
        n_layers,
        max_position_embeddings: keys.size("max_position_embeddings")?,
        tie_word_embeddings: keys.flag_or("tie_word_embeddings", false)?,
        lm_head_bias: false,
        norm: NormKind::Rms,
        norm_eps: keys.number("rms_norm_eps")?,
        post_norms: false,
        n_heads,
        n_kv_heads: keys.size_or("num_key_value_heads", n_heads)?,
        head_dim,
        attention: attention(head_dim, n_layers),
        rope: rope(head_dim)?,
        local_rope: None,
        intermediate_size: keys.size("intermediate_size")?,
        mlp_bias: false,
        activation: Activation::Silu,
        moe: MoeConfig::default(),
        scales: Scales::default(),
        eos_token_ids: keys.ids("eos_token_id")?,
        bos_token_id: keys.ids("bos_token_id")?.first().copied(),
        pad_token_id: keys.ids("pad_token_id")?.first().copied(),
        dtype: keys.dtype()?,
    })
}

/// Plain attention over everything before.
pub(super) fn attention(head_dim: usize, n_layers: usize) -> AttentionConfig {
    AttentionConfig {
        qkv_bias: false,
        o_bias: false,
        qk_norm: QkNorm::None,
        sinks: false,
        clip_qkv: None,
        scale: 1.0 / (head_dim as f64).sqrt(),
        windows: vec![None; n_layers],
        mla: None,
        experts: None,
    }
}

/// Experts in every layer, from the shared keys. `width` is the spelling of an expert's width.
pub(super) fn moe(keys: &Keys, n_layers: usize, width: &str) -> Result<MoeConfig> {
    Ok(MoeConfig {
        layers: (0..n_layers).collect(),
        n_experts: keys.size_of(N_EXPERTS)?,
        top_k: keys.size_of(TOP_K)?,
        intermediate_size: keys.size(width)?,
        ..MoeConfig::default()
    })
}

/// Biases on all four projections of attention, or on none, as `attention_bias` says.
pub(super) fn attention_bias(keys: &Keys, config: &mut ModelConfig, default: bool) -> Result<()> {
    let bias = keys.flag_or("attention_bias", default)?;
    (config.attention.qkv_bias, config.attention.o_bias) = (bias, bias);
    Ok(())
}

/// The layers with experts of the Qwen family: those that `decoder_sparse_step` hits and `mlp_only_layers` spares.
pub(super) fn qwen_moe_layers(keys: &Keys, n_layers: usize) -> Result<Vec<usize>> {
    let step = keys.size_or("decoder_sparse_step", 1)?;
    let dense = keys.sizes("mlp_only_layers")?;
    if let Some(layer) = dense.iter().find(|layer| **layer >= n_layers) {
        let problem = format!("names layer {layer}, but there are {n_layers} layers");
        return Err(keys.problem("mlp_only_layers", problem));
    }
    let is_moe = |layer: &usize| (layer + 1).is_multiple_of(step) && !dense.contains(layer);
    Ok((0..n_layers).filter(is_moe).collect())
}

/// `mlp_only_layers` and `decoder_sparse_step` that say which layers have experts.
pub(super) fn put_qwen_moe_layers(config: &ModelConfig, map: &mut Map<String, Value>) {
    let dense = (0..config.n_layers).filter(|layer| !config.is_moe_layer(*layer));
    let dense: Vec<usize> = dense.collect();
    map.insert("decoder_sparse_step".into(), json!(1));
    map.insert("mlp_only_layers".into(), json!(dense));
}

/// The window of every layer. With `layer_types`, those that are `sliding_attention` have `window`; without,
/// `default(layer)` says which do.
pub(super) fn windows(
    keys: &Keys,
    n_layers: usize,
    window: Option<usize>,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let Some(types) = keys.texts("layer_types")? else {
        let of = |layer| window.filter(|_| default(layer));
        return Ok((0..n_layers).map(of).collect());
    };
    if types.len() < n_layers {
        let problem = format!("has {} entries for {n_layers} layers", types.len());
        return Err(keys.problem("layer_types", problem));
    }
    let of = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => window.map(Some).ok_or_else(|| {
            let problem =
                "asks for sliding_attention, but sliding_window is missing or switched off";
            keys.problem("layer_types", problem.to_owned())
        }),
        other => Err(keys.unsupported(
            "layer_types",
            &json!(other),
            "known layer types: full_attention, sliding_attention",
        )),
    };
    types[..n_layers].iter().map(of).collect()
}

/// `sliding_window` where `use_sliding_window` switches it on, as in the Qwen family.
pub(super) fn switched_window(keys: &Keys) -> Result<Option<usize>> {
    if keys.flag_or("use_sliding_window", false)? {
        keys.size_maybe("sliding_window")
    } else {
        Ok(None)
    }
}

/// Refuses windows where the architecture has none: transformers would ignore the keys, other readers would not.
pub(super) fn no_windows(keys: &Keys, config: &ModelConfig) -> Result<()> {
    let reason = "this architecture has no sliding windows; remove the key if it is a leftover";
    keys.only("sliding_window", &[], reason)?;
    windows(keys, config.n_layers, None, |_| false).map(drop)
}

/// `layer_types`, `sliding_window` and, for older readers, the switches around it.
pub(super) fn put_windows(config: &ModelConfig, map: &mut Map<String, Value>) {
    let windows = &config.attention.windows;
    let window = windows.iter().flatten().next();
    let kind = |window: &Option<usize>| match window {
        None => "full_attention",
        Some(_) => "sliding_attention",
    };
    let types: Vec<_> = windows.iter().map(kind).collect();
    let first = windows.iter().position(Option::is_some);
    put(
        map,
        [
            ("layer_types", json!(types)),
            ("max_window_layers", json!(first.unwrap_or(config.n_layers))),
            ("sliding_window", json!(window)),
            ("use_sliding_window", json!(window.is_some())),
        ],
    );
}

/// Sets several keys.
pub(super) fn put<const N: usize>(map: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    for (key, value) in entries {
        map.insert(key.to_owned(), value);
    }
}

/// Quantised safetensors that are read: the tensors themselves carry their formats.
fn refuse_quantization(keys: &Keys) -> Result<()> {
    let Some(map) = keys.object("quantization_config")? else {
        return Ok(());
    };
    let reason = "quantised safetensors are read as fp8 (with weight_scale_inv) and mxfp4; use those, the unquantised \
                  checkpoint, or a GGUF file";
    map.only("quant_method", &[json!("fp8"), json!("mxfp4")], reason)?;
    if map.get("quant_method").is_none() {
        let value = keys.get("quantization_config").cloned();
        return Err(keys.unsupported("quantization_config", &value.unwrap_or_default(), reason));
    }
    map.only("fmt", &[json!("e4m3")], "only e4m3 is read")
}

/// The shared keys, in the spellings of transformers 4 and 5.
pub(super) fn to_json(
    config: &ModelConfig,
    class: &str,
    dtype: Dtype,
) -> Result<Map<String, Value>> {
    let mut rope = rope_json(&config.rope)?;
    let partial = partial_rotary_factor(config);
    if let (Some(factor), Some(rope)) = (partial, rope.as_object_mut()) {
        rope.insert("partial_rotary_factor".to_owned(), json!(factor));
    }
    let torch = dtype.torch_name();
    let value = json!({
        "architectures": [class],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "dtype": torch,
        "eos_token_id": one_or_many(&config.eos_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_scaling": (config.rope.scaling != RopeScaling::None).then_some(&rope),
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": torch,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    let Value::Object(mut map) = value else {
        return Ok(Map::new());
    };
    if let Some(factor) = partial {
        map.insert("partial_rotary_factor".to_owned(), json!(factor));
    }
    Ok(map)
}

/// The part of a head that is rotated, where it is not the whole: readers multiply it by `head_dim` and round down.
fn partial_rotary_factor(config: &ModelConfig) -> Option<f64> {
    let (dim, head_dim) = (config.rope.dim, config.head_dim);
    if dim == head_dim || config.attention.mla.is_some() {
        return None;
    }
    let factor = dim as f64 / head_dim as f64;
    let rounded = (head_dim as f64 * factor) as usize;
    Some(if rounded < dim {
        factor.next_up()
    } else {
        factor
    })
}

/// `rope_parameters` of transformers 5; `rope_scaling` of version 4 reads the same keys.
pub(super) fn rope_json(rope: &RopeConfig) -> Result<Value> {
    let theta = rope.theta;
    Ok(match &rope.scaling {
        RopeScaling::None => json!({"rope_theta": theta, "rope_type": "default"}),
        RopeScaling::Linear { factor } => {
            json!({"rope_theta": theta, "rope_type": "linear", "factor": factor})
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original,
        } => json!({
            "rope_theta": theta, "rope_type": "llama3", "factor": factor,
            "low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": *original as u64,
        }),
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_theta": theta, "rope_type": "yarn", "factor": factor,
            "original_max_position_embeddings": *original as u64, "beta_fast": beta_fast,
            "beta_slow": beta_slow, "attention_factor": attention_factor, "truncate": truncate,
        }),
        RopeScaling::LongRope {
            short,
            long,
            original,
            short_mscale,
            long_mscale,
        } => json!({
            "rope_theta": theta, "rope_type": "longrope", "short_factor": short,
            "long_factor": long, "original_max_position_embeddings": original,
            "short_mscale": short_mscale, "long_mscale": long_mscale,
            "attention_factor": (short_mscale == long_mscale).then_some(short_mscale),
        }),
        RopeScaling::Factors(_) => {
            return Err(CheckpointError::Unsupported {
                file: "config.json".to_owned(),
                key: "rope_type".to_owned(),
                value: "(stored factors)".to_owned(),
                reason: "a Hugging Face folder cannot hold one divisor per frequency".to_owned(),
            });
        }
    })
}
