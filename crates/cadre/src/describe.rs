//! Attention, routers and rotary positions of a configuration, in words for people and keys for programs.

use std::collections::BTreeMap;
use std::fmt;

use cadre_checkpoint::{ModelConfig, QkNorm, RopeConfig, RopeScaling, RouterConfig, Score};
use serde::Serialize;

/// How positions look at each other.
#[derive(Debug, Serialize)]
pub(crate) struct Attention {
    /// `grouped` or `latent`.
    kind: &'static str,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    /// Width of the compressed keys and values of latent attention.
    kv_lora_rank: Option<usize>,
    q_lora_rank: Option<usize>,
    /// Layers by the positions that they see; those that see all are not listed.
    windows: BTreeMap<usize, usize>,
    sinks: bool,
    qk_norm: Option<&'static str>,
    clip_qkv: Option<f64>,
    /// Experts that the heads are cut into, and how many of them a token takes.
    n_experts: Option<usize>,
    top_k: Option<usize>,
}

impl Attention {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let attention = &config.attention;
        let mut windows = BTreeMap::new();
        for window in attention.windows.iter().flatten() {
            *windows.entry(*window).or_default() += 1;
        }
        Self {
            kind: if attention.mla.is_some() {
                "latent"
            } else {
                "grouped"
            },
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            kv_lora_rank: attention.mla.map(|mla| mla.kv_lora_rank),
            q_lora_rank: attention.mla.and_then(|mla| mla.q_lora_rank),
            windows,
            sinks: attention.sinks,
            qk_norm: match attention.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some("per head"),
                QkNorm::WholeProjection => Some("whole projection"),
            },
            clip_qkv: attention.clip_qkv,
            n_experts: attention.experts.map(|experts| experts.n_experts),
            top_k: attention.experts.map(|experts| experts.top_k),
        }
    }
}

impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kv_lora_rank {
            Some(rank) => write!(
                f,
                "{} heads over a latent of {rank} per token",
                self.n_heads
            )?,
            None => write!(
                f,
                "{} query heads, {} key/value heads, width {}",
                self.n_heads, self.n_kv_heads, self.head_dim
            )?,
        }
        for (window, n) in &self.windows {
            write!(f, ", {n} layers see {window} tokens")?;
        }
        if self.sinks {
            f.write_str(", sinks")?;
        }
        if let Some(norm) = self.qk_norm {
            write!(f, ", queries and keys normed {norm}")?;
        }
        if let Some(clip) = self.clip_qkv {
            write!(f, ", clamped to {clip}")?;
        }
        if let (Some(n), Some(k)) = (self.n_experts, self.top_k) {
            write!(f, ", in {n} experts of which a token takes {k}")?;
        }
        Ok(())
    }
}

/// From router logits to experts.
#[derive(Debug, Serialize)]
pub(crate) struct Router {
    /// The rule, by the name of its policy: `top_k`, `group_limited`, ...
    kind: &'static str,
    /// `softmax`, `sigmoid` or `random numbers`.
    score: &'static str,
    /// Whether the weights are divided by their sum.
    norm: bool,
    n_groups: Option<usize>,
    keep_groups: Option<usize>,
    scale: Option<f64>,
    /// Probability that is collected.
    mass: Option<f64>,
    temperature: Option<f64>,
    /// Whether a stored bias moves the selection.
    correction_bias: bool,
    /// Whether the logits have a bias.
    bias: bool,
}

impl Router {
    /// `None` for dense models.
    pub(crate) fn new(config: &ModelConfig) -> Option<Self> {
        let moe = &config.moe;
        if moe.layers.is_empty() {
            return None;
        }
        let plain = Self {
            kind: moe.router.name(),
            score: "softmax",
            norm: moe.norm_topk_prob(),
            n_groups: None,
            keep_groups: None,
            scale: None,
            mass: None,
            temperature: None,
            correction_bias: false,
            bias: moe.router_bias,
        };
        Some(match moe.router {
            RouterConfig::TopK { .. }
            | RouterConfig::Union { .. }
            | RouterConfig::Switch
            | RouterConfig::Top2
            | RouterConfig::NullExperts
            | RouterConfig::SparseMixer { .. } => plain,
            RouterConfig::TopP { mass } => Self {
                mass: Some(mass),
                ..plain
            },
            RouterConfig::DenseToSparse { temperature, .. } => Self {
                temperature: Some(temperature),
                ..plain
            },
            RouterConfig::Uniform { .. } => Self {
                score: "random numbers",
                ..plain
            },
            RouterConfig::GroupLimited {
                score,
                n_groups,
                keep_groups,
                scale,
                correction_bias,
                ..
            } => Self {
                score: match score {
                    Score::Softmax => "softmax",
                    Score::Sigmoid => "sigmoid",
                },
                n_groups: Some(n_groups),
                keep_groups: Some(keep_groups),
                scale: Some(scale),
                correction_bias,
                ..plain
            },
        })
    }
}

impl fmt::Display for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.kind, self.score)?;
        if let (Some(keep), Some(n)) = (self.keep_groups, self.n_groups) {
            write!(f, ", {keep} of {n} groups")?;
        }
        if let Some(mass) = self.mass {
            write!(f, ", until {mass} is collected")?;
        }
        if let Some(temperature) = self.temperature {
            write!(f, ", temperature {temperature}")?;
        }
        if self.norm {
            f.write_str(", weights sum to 1")?;
        }
        if let Some(scale) = self.scale.filter(|scale| *scale != 1.0) {
            write!(f, ", times {scale}")?;
        }
        if self.correction_bias {
            f.write_str(", selection corrected by a bias")?;
        }
        if self.bias {
            f.write_str(", with bias")?;
        }
        Ok(())
    }
}

/// Rotary positions.
#[derive(Debug, Serialize)]
pub(crate) struct Rope {
    theta: f64,
    /// Rotated values of a head.
    dim: usize,
    /// `none`, `linear`, `llama3`, `yarn`, `longrope` or `factors`.
    scaling: &'static str,
    factor: Option<f64>,
    /// Context of pre-training, where the scaling names it.
    original_context: Option<f64>,
    /// Pairs are neighbours, not halves.
    interleaved: bool,
    /// Base of the layers with a window, where it differs.
    local_theta: Option<f64>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let RopeConfig {
            theta,
            dim,
            interleaved,
            ref scaling,
        } = config.rope;
        let (scaling, factor, original_context) = match *scaling {
            RopeScaling::None => ("none", None, None),
            RopeScaling::Linear { factor } => ("linear", Some(factor), None),
            RopeScaling::Llama3 {
                factor, original, ..
            } => ("llama3", Some(factor), Some(original)),
            RopeScaling::Yarn {
                factor, original, ..
            } => ("yarn", Some(factor), Some(original)),
            RopeScaling::LongRope { original, .. } => ("longrope", None, Some(original as f64)),
            RopeScaling::Factors(_) => ("factors", None, None),
        };
        Self {
            theta,
            dim,
            scaling,
            factor,
            original_context,
            interleaved,
            local_theta: config.local_rope.as_ref().map(|rope| rope.theta),
        }
    }
}

impl fmt::Display for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "theta {}, {} values", self.theta, self.dim)?;
        if self.scaling != "none" {
            write!(f, ", {}", self.scaling)?;
        }
        if let Some(factor) = self.factor {
            write!(f, " by {factor}")?;
        }
        if let Some(original) = self.original_context {
            write!(f, " from {original} tokens")?;
        }
        if let Some(theta) = self.local_theta {
            write!(f, ", theta {theta} in layers with a window")?;
        }
        Ok(())
    }
}
