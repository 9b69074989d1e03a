//! The keys of a GGUF file for a configuration: what [`super::read_config`] reads, as llama.cpp's converter writes it.

use super::NormNames;
use crate::config::{Activation, ModelConfig, RouterConfig, Score};
use crate::convert::reshape_meta::expert_count;
use crate::error::{CheckpointError, Result};
use crate::gguf::{Array, Value};
use crate::rope::{RopeConfig, RopeScaling};

/// What llama.cpp asks of the files of an architecture beyond their keys.
pub(crate) struct Target {
    /// `general.architecture`.
    pub(crate) name: &'static str,
    /// `model_type`s that become it.
    model_types: &'static [&'static str],
    pub(crate) norms: NormNames,
    /// Rope pairs are neighbours.
    pub(crate) interleaved: bool,
    /// The output head must be there, even when it is the embedding.
    pub(crate) needs_output: bool,
    /// A bias on the output projection of attention is read.
    pub(crate) reads_o_bias: bool,
    /// Factors of the rope are read from tensors.
    pub(crate) reads_factors: bool,
    /// Heads need not fill the width of the stream.
    pub(crate) free_heads: bool,
}

const PLAIN: Target = Target {
    name: "",
    model_types: &[],
    norms: NormNames::Usual,
    interleaved: false,
    needs_output: false,
    reads_o_bias: false,
    reads_factors: false,
    free_heads: true,
};

const TARGETS: &[Target] = &[
    Target {
        name: "llama",
        model_types: &["llama", "mistral", "mixtral"],
        interleaved: true,
        reads_o_bias: true,
        reads_factors: true,
        ..PLAIN
    },
    Target {
        name: "qwen2",
        model_types: &["qwen2"],
        free_heads: false,
        ..PLAIN
    },
    Target {
        name: "qwen3",
        model_types: &["qwen3"],
        ..PLAIN
    },
    Target {
        name: "qwen2moe",
        model_types: &["qwen2_moe"],
        needs_output: true,
        free_heads: false,
        ..PLAIN
    },
    Target {
        name: "qwen3moe",
        model_types: &["qwen3_moe"],
        ..PLAIN
    },
    Target {
        name: "olmoe",
        model_types: &["olmoe"],
        needs_output: true,
        free_heads: false,
        ..PLAIN
    },
    Target {
        name: "deepseek2",
        model_types: &["deepseek_v2", "deepseek_v3"],
        interleaved: true,
        ..PLAIN
    },
    Target {
        name: "gpt-oss",
        model_types: &["gpt_oss"],
        norms: NormNames::PostAttention,
        needs_output: true,
        reads_o_bias: true,
        ..PLAIN
    },
    Target {
        name: "granitemoe",
        model_types: &["granitemoe"],
        interleaved: true,
        reads_o_bias: true,
        reads_factors: true,
        ..PLAIN
    },
    Target {
        name: "phimoe",
        model_types: &["phimoe"],
        needs_output: true,
        reads_o_bias: true,
        reads_factors: true,
        free_heads: false,
        ..PLAIN
    },
    Target {
        name: "glm4moe",
        model_types: &["glm4_moe"],
        norms: NormNames::PostAttention,
        ..PLAIN
    },
    Target {
        name: "gemma3",
        model_types: &["gemma3_text"],
        norms: NormNames::Gemma,
        ..PLAIN
    },
];

/// The GGUF architecture that `config` becomes.
///
/// # Errors
/// There is none; the error lists what can be written.
pub(crate) fn target(origin: &str, config: &ModelConfig) -> Result<&'static Target> {
    let wanted = config.model_type.as_str();
    let found = TARGETS.iter().find(|t| t.model_types.contains(&wanted));
    let unreadable = config.only_ours();
    if !unreadable.is_empty() {
        return Err(CheckpointError::Unsupported {
            file: origin.to_owned(),
            key: "model_type".to_owned(),
            value: wanted.to_owned(),
            reason: format!(
                "no reader of GGUF files computes {}; convert to safetensors instead",
                unreadable.join(", ")
            ),
        });
    }
    found.ok_or_else(|| {
        let known: Vec<&str> = TARGETS
            .iter()
            .flat_map(|t| t.model_types)
            .copied()
            .collect();
        CheckpointError::Unsupported {
            file: origin.to_owned(),
            key: "model_type".to_owned(),
            value: wanted.to_owned(),
            reason: format!("GGUF is written for: {}", known.join(", ")),
        }
    })
}

/// Keys in the order of writing.
struct Keys {
    prefix: &'static str,
    list: Vec<(String, Value)>,
}

impl Keys {
    fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.list
            .push((format!("{}.{name}", self.prefix), value.into()));
    }

    fn size(&mut self, name: &str, size: usize) {
        self.put(name, u32::try_from(size).unwrap_or(u32::MAX));
    }

    fn number(&mut self, name: &str, number: f64) {
        self.put(name, number as f32);
    }
}

/// The keys of the architecture for `config`, whose rope and norms are those of GGUF already.
pub(crate) fn entries(target: &Target, config: &ModelConfig) -> Vec<(String, Value)> {
    let mut keys = Keys {
        prefix: target.name,
        list: vec![("general.architecture".to_owned(), target.name.into())],
    };
    keys.size("block_count", config.n_layers);
    keys.size("context_length", config.max_position_embeddings);
    keys.size("embedding_length", config.hidden_size);
    keys.size("vocab_size", config.vocab_size);
    let moe_only = config.moe.layers.len() == config.n_layers;
    let width = match moe_only && matches!(target.name, "llama" | "olmoe" | "granitemoe" | "phimoe")
    {
        true => config.moe.intermediate_size,
        false => config.intermediate_size,
    };
    keys.size("feed_forward_length", width.max(1));
    keys.number("attention.layer_norm_rms_epsilon", config.norm_eps);
    attention(&mut keys, config);
    rope(&mut keys, config);
    experts(&mut keys, target, config);
    if target.name == "granitemoe" {
        keys.number("attention.scale", config.attention.scale);
        keys.number("embedding_scale", config.scales.embedding);
        keys.number("residual_scale", config.scales.residual);
        keys.number("logit_scale", config.scales.logits_divisor);
    }
    keys.list
}

fn attention(keys: &mut Keys, config: &ModelConfig) {
    keys.size("attention.head_count", config.n_heads);
    match config.attention.mla {
        None => {
            keys.size("attention.head_count_kv", config.n_kv_heads);
            keys.size("attention.key_length", config.head_dim);
            keys.size("attention.value_length", config.head_dim);
        }
        Some(mla) => {
            // Latent attention as llama.cpp sees it: one key head of all heads.
            keys.size("attention.head_count_kv", 1);
            keys.size(
                "attention.key_length",
                mla.kv_lora_rank + mla.qk_rope_head_dim,
            );
            keys.size("attention.value_length", mla.kv_lora_rank);
            keys.size("attention.key_length_mla", config.head_dim);
            keys.size("attention.value_length_mla", mla.v_head_dim);
            keys.size("attention.kv_lora_rank", mla.kv_lora_rank);
            // llama.cpp wants the key except in models of certain numbers of layers; 0 is none.
            keys.size("attention.q_lora_rank", mla.q_lora_rank.unwrap_or(0));
        }
    }
    let windows = &config.attention.windows;
    let Some(window) = windows.iter().flatten().next() else {
        return;
    };
    if !matches!(keys.prefix, "gpt-oss" | "gemma3") {
        return;
    }
    keys.size("attention.sliding_window", *window);
    let period = if keys.prefix == "gemma3" { 6 } else { 2 };
    let usual = |layer: usize| layer % period < period - 1;
    if windows
        .iter()
        .enumerate()
        .any(|(layer, w)| w.is_some() != usual(layer))
    {
        let pattern: Vec<bool> = windows.iter().map(Option::is_some).collect();
        keys.put(
            "attention.sliding_window_pattern",
            Array::from(&pattern[..]),
        );
    }
}

fn rope(keys: &mut Keys, config: &ModelConfig) {
    keys.size("rope.dimension_count", config.rope.dim);
    keys.number("rope.freq_base", config.rope.theta);
    if let Some(local) = &config.local_rope {
        keys.number("rope.freq_base_swa", local.theta);
    }
    match &config.rope.scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {}
        RopeScaling::Linear { factor } => {
            keys.put("rope.scaling.type", "linear");
            keys.number("rope.scaling.factor", *factor);
        }
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            ..
        } => {
            keys.put("rope.scaling.type", "yarn");
            keys.number("rope.scaling.factor", *factor);
            keys.size("rope.scaling.original_context_length", *original as usize);
            // llama.cpp reads them for other architectures only; with other values the difference is reported.
            keys.number("rope.scaling.yarn_beta_fast", *beta_fast);
            keys.number("rope.scaling.yarn_beta_slow", *beta_slow);
            if config.attention.mla.is_some() {
                log_multiplier(keys, config, *factor);
            }
        }
        RopeScaling::LongRope {
            original,
            long_mscale,
            ..
        } => {
            keys.put("rope.scaling.type", "longrope");
            keys.size("rope.scaling.original_context_length", *original);
            keys.number("rope.scaling.attn_factor", *long_mscale);
        }
    }
}

/// `mscale_all_dim / 10`, from what the scores are multiplied by.
fn log_multiplier(keys: &mut Keys, config: &ModelConfig, factor: f64) {
    let scores = config.attention.scale * (config.head_dim as f64).sqrt();
    if factor > 1.0 && scores > 1.0 {
        let multiplier = (scores.sqrt() - 1.0) / factor.ln();
        keys.number("rope.scaling.yarn_log_multiplier", multiplier);
    }
}

fn experts(keys: &mut Keys, target: &Target, config: &ModelConfig) {
    let moe = &config.moe;
    if moe.layers.is_empty() {
        return;
    }
    keys.put("expert_count", expert_count(config));
    keys.size("expert_used_count", moe.top_k);
    if matches!(
        target.name,
        "qwen2moe" | "qwen3moe" | "deepseek2" | "glm4moe" | "gpt-oss"
    ) {
        keys.size("expert_feed_forward_length", moe.intermediate_size);
    }
    let shared = moe.shared.map(|shared| shared.intermediate_size);
    if let RouterConfig::GroupLimited {
        score,
        n_groups,
        keep_groups,
        norm,
        scale,
        ..
    } = moe.router
    {
        keys.size(
            "leading_dense_block_count",
            moe.layers.first().copied().unwrap_or(0),
        );
        keys.size(
            "expert_shared_count",
            shared.unwrap_or(0) / moe.intermediate_size.max(1),
        );
        if n_groups > 1 {
            keys.size("expert_group_count", n_groups);
            keys.size("expert_group_used_count", keep_groups);
        }
        let gating = if score == Score::Sigmoid { 2 } else { 1 };
        keys.size("expert_gating_func", gating);
        keys.number("expert_weights_scale", scale);
        keys.put("expert_weights_norm", norm);
    } else if let Some(width) = shared {
        keys.size("expert_shared_feed_forward_length", width);
    }
}

/// Tensors that hold factors of the rope: their GGUF names and values.
pub(crate) fn rope_tensors(config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
    let narrow = |list: &[f64]| list.iter().map(|v| *v as f32).collect();
    match &config.rope.scaling {
        RopeScaling::Factors(factors) => vec![("rope_freqs.weight", narrow(factors))],
        RopeScaling::Llama3 { .. } => vec![("rope_freqs.weight", llama3_factors(&config.rope))],
        RopeScaling::LongRope { short, long, .. } => vec![
            ("rope_factors_long.weight", narrow(long)),
            ("rope_factors_short.weight", narrow(short)),
        ],
        _ => Vec::new(),
    }
}

/// How much Llama 3.1's rule divides every frequency.
fn llama3_factors(rope: &RopeConfig) -> Vec<f32> {
    let plain = RopeConfig::plain(rope.theta, rope.dim);
    let (plain, _) = plain.frequencies(1);
    let (stretched, _) = rope.frequencies(1);
    let pairs = plain.into_iter().zip(stretched);
    pairs.map(|(plain, stretched)| plain / stretched).collect()
}

/// Whether llama.cpp computes what `config` says with its own constants: the reason why not.
pub(crate) fn refusals(target: &Target, config: &ModelConfig) -> Vec<String> {
    let mut list = Vec::new();
    let mut refuse = |is_bad: bool, text: String| {
        if is_bad {
            list.push(text);
        }
    };
    let name = target.name;
    refuse(
        !config.moe.uneven.is_empty(),
        "llama.cpp reads one number of experts for all layers".to_owned(),
    );
    refuse(
        config.attention.o_bias && !target.reads_o_bias,
        format!("llama.cpp reads no bias of the output projection (o_proj) for `{name}`"),
    );
    let stretched = matches!(
        config.rope.scaling,
        RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) | RopeScaling::LongRope { .. }
    );
    refuse(
        stretched && !target.reads_factors,
        format!("llama.cpp reads no rope factors for `{name}`"),
    );
    refuse(
        !target.free_heads && config.n_heads * config.head_dim != config.hidden_size,
        format!(
            "llama.cpp wants heads that fill the width for `{name}`: {} x {} is not {}",
            config.n_heads, config.head_dim, config.hidden_size
        ),
    );
    refuse(
        config.lm_head_bias && !matches!(name, "phimoe" | "qwen2"),
        format!("llama.cpp reads no bias of the output head for `{name}`"),
    );
    refuse(
        config.mlp_bias && name != "llama",
        format!("llama.cpp reads no biases of dense feed-forwards for `{name}`"),
    );
    refuse(
        name == "olmoe" && config.n_kv_heads != config.n_heads,
        "llama.cpp wants as many key heads as query heads for `olmoe`".to_owned(),
    );
    let clamped = matches!(config.activation, Activation::SwigluOai { .. });
    refuse(
        clamped != (name == "gpt-oss"),
        format!("llama.cpp has another activation for `{name}`"),
    );
    refuse(
        name == "phimoe" && !config.lm_head_bias,
        "llama.cpp wants a bias of the output head for `phimoe`".to_owned(),
    );
    list
}
