//! What a model is made of: one description for every architecture and file format.
//!
//! `crate::models` fills it from `config.json` or from GGUF metadata, so that nothing after loading knows dialects.

use crate::error::{CheckpointError, Result};
use crate::keys::Keys;
use crate::models;
use crate::rope::RopeConfig;
use crate::{Dtype, generation};

pub use crate::decoupled_router::DecoupledRouter;
pub use crate::moe_config::{Factors, MoeConfig, ResidualMlp, RouterConfig, Score, SharedExpert};

/// What a model is made of. Every spelling of every format arrives here as one.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture, as Hugging Face names it: `qwen3_moe`, `mixtral`, ...
    pub model_type: String,
    /// Rows of the embedding and of the logits. May exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream, `d_model`.
    pub hidden_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Whether the output head has a bias.
    pub lm_head_bias: bool,
    /// The kind of all norms over the residual stream.
    pub norm: NormKind,
    /// Added to the mean square (or variance) in every norm.
    pub norm_eps: f64,
    /// Whether the outputs of attention and feed-forward are normed too, before they join the residual stream.
    pub post_norms: bool,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one query and key head.
    pub head_dim: usize,
    /// What else attention does.
    pub attention: AttentionConfig,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Rotary positions of the layers with a sliding window, where they have their own.
    pub local_rope: Option<RopeConfig>,
    /// Width of the feed-forward of layers that are not MoE.
    pub intermediate_size: usize,
    /// Whether the products of dense feed-forwards have biases.
    pub mlp_bias: bool,
    /// What experts and dense feed-forwards apply between their products.
    pub activation: Activation,
    /// The experts; [`MoeConfig::default`] for dense models.
    pub moe: MoeConfig,
    /// Constant factors on the stream.
    pub scales: Scales,
    /// Tokens that end a text, ascending, from all places that name them.
    pub eos_token_ids: Vec<u32>,
    /// Token put before a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Token used for padding, if the model has one.
    pub pad_token_id: Option<u32>,
    /// Number format named by the configuration. The tensors' own headers decide.
    pub dtype: Option<Dtype>,
}

/// Kinds of norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / rms(x) * weight`.
    Rms,
    /// `x / rms(x) * (1 + weight)` (Gemma).
    RmsPlusOne,
    /// `(x - mean(x)) / std(x) * weight + bias`.
    LayerNorm,
    /// `x / rms(x) * weight + bias` (what llama.cpp computes for PhiMoE).
    RmsWithBias,
}

impl NormKind {
    /// Whether norms have a bias.
    #[must_use]
    pub fn has_bias(self) -> bool {
        matches!(self, Self::LayerNorm | Self::RmsWithBias)
    }
}

/// Norms on queries and keys, before the rotary positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// One weight of `head_dim`, applied to every head by itself.
    PerHead,
    /// One weight over the whole projection.
    WholeProjection,
}

/// What attention does besides grouped queries.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Biases on the query, key and value projections (of MLA: on the two down projections).
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub o_bias: bool,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// A learned logit per head that takes part in the softmax and adds nothing (attention sinks).
    pub sinks: bool,
    /// Queries, keys and values are clamped to this magnitude.
    pub clip_qkv: Option<f64>,
    /// Factor on the scores.
    pub scale: f64,
    /// Per layer, how many positions a token sees, itself included; `None`: all before it. One entry per layer.
    pub windows: Vec<Option<usize>>,
    /// Multi-head latent attention instead of grouped queries.
    pub mla: Option<MlaConfig>,
    /// Heads in groups that tokens choose among; `None`: every token uses all heads.
    pub experts: Option<AttentionExperts>,
}

/// Attention cut into experts by heads: the attention of Union of Experts (arXiv 2503.02495).
///
/// Expert `e` is the `e`-th part of the query heads and of the key and value heads, with its columns of the output
/// projection. It is attention among the tokens that took it, and its positions count only these.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionExperts {
    /// Experts of every layer; divides the key and value heads.
    pub n_experts: usize,
    /// Experts that a token takes.
    pub top_k: usize,
    /// A token's output is multiplied by `M / (M + eps)`, where `M` is what its experts have of the router's softmax.
    pub eps: f64,
}

/// Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
///
/// The norms of the compressed queries, keys and values add 1e-6, whatever `rms_norm_eps` says, as in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaConfig {
    /// Width of the compressed queries; `None`: queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the compressed keys and values, which is what the cache holds.
    pub kv_lora_rank: usize,
    /// Part of a head without positions.
    pub qk_nope_head_dim: usize,
    /// Part of a head with rotary positions; all heads share its key.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Whether keys and values come from two tensors, `k_b_proj` (transposed) and `v_b_proj`, as GGUF files have them, or
    /// from one `kv_b_proj`.
    pub split_kv_b: bool,
}

/// What is applied between the products of a feed-forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu(gate) * up`, with the tanh approximation.
    GeluTanh,
    /// gpt-oss: `g * sigmoid(alpha * g) * (u + 1)` with `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`.
    SwigluOai {
        /// Factor inside the sigmoid.
        alpha: f64,
        /// Where gate and up are clamped.
        limit: f64,
    },
}

/// Constant factors on the stream; all 1 in most architectures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Multiplies the embedding.
    pub embedding: f64,
    /// Multiplies the output of every block before it joins the residual stream.
    pub residual: f64,
    /// Divides the logits.
    pub logits_divisor: f64,
}

impl Default for Scales {
    fn default() -> Self {
        Self {
            embedding: 1.0,
            residual: 1.0,
            logits_divisor: 1.0,
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` text, and `generation_config.json` text where there is one.
    ///
    /// `origin` names the checkpoint in errors.
    ///
    /// # Errors
    /// Broken JSON, a missing or contradictory key, and every key that asks for something this
    /// version would compute wrongly.
    pub fn parse(origin: &str, config: &str, generation: Option<&str>) -> Result<Self> {
        let keys = Keys::parse(format!("{origin}/config.json"), config)?;
        let keys = keys.inner("text_config")?;
        let file = keys.file.clone();
        let mut parsed = models::read(keys)?;
        if let Some(text) = generation {
            let keys = Keys::parse(format!("{origin}/generation_config.json"), text)?;
            parsed.eos_token_ids.extend(keys.ids("eos_token_id")?);
        }
        parsed.eos_token_ids.sort_unstable();
        parsed.eos_token_ids.dedup();
        parsed.check(&file)?;
        Ok(parsed)
    }

    /// Whether layer `layer` (from 0) has experts; the others have one dense feed-forward.
    #[must_use]
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.moe.layers.binary_search(&layer).is_ok()
    }

    /// Indices of the layers that have experts, ascending.
    #[must_use]
    pub fn moe_layers(&self) -> Vec<usize> {
        self.moe.layers.clone()
    }

    /// Experts of layer `layer` (from 0), null ones not among them; 0 where it has a dense feed-forward.
    #[must_use]
    pub fn n_experts_in(&self, layer: usize) -> usize {
        let at = self.moe.layers.binary_search(&layer);
        at.map_or(0, |at| self.moe.n_experts_at(at))
    }

    /// Experts of layer `layer` (from 0) whose weights are stored: those that there are, or fewer where some share them.
    #[must_use]
    pub fn n_stored_in(&self, layer: usize) -> usize {
        let at = self.moe.layers.binary_search(&layer);
        at.map_or(0, |at| self.moe.n_stored_at(at))
    }

    /// The most experts that one token uses in layer `layer` (from 0); 0 where it has a dense feed-forward.
    #[must_use]
    pub fn picks_in(&self, layer: usize) -> usize {
        self.moe.top_k.min(self.n_stored_in(layer))
    }

    /// Whether any layer has a dense feed-forward.
    #[must_use]
    pub fn has_dense_layers(&self) -> bool {
        self.moe.layers.len() < self.n_layers
    }

    /// What only `cadre_moe` can say, in words; empty for a model of one of the published architectures' kind.
    #[must_use]
    pub fn only_ours(&self) -> Vec<String> {
        let mut list = self.moe.only_ours();
        list.extend(self.attention.experts.map(|experts| {
            format!(
                "attention cut into {} experts of which a token takes {}",
                experts.n_experts, experts.top_k
            )
        }));
        list
    }

    /// Values that the cache holds per token and layer.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        match self.attention.mla {
            Some(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
            None => 2 * self.n_kv_heads * self.head_dim,
        }
    }

    /// Checks the relations between the fields. `file` names the configuration in errors.
    ///
    /// # Errors
    /// The first relation that does not hold, with its key.
    pub fn check(&self, file: &str) -> Result<()> {
        let complain = |key: &str, problem: String| {
            Err(CheckpointError::Key {
                file: file.to_owned(),
                key: key.to_owned(),
                problem,
            })
        };
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let problem = format!(
                "is {}, which does not divide num_attention_heads = {}",
                self.n_kv_heads, self.n_heads
            );
            return complain("num_key_value_heads", problem);
        }
        let rotary = self
            .attention
            .mla
            .map_or(self.head_dim, |mla| mla.qk_rope_head_dim);
        for rope in [Some(&self.rope), self.local_rope.as_ref()]
            .into_iter()
            .flatten()
        {
            if rope.dim == 0 || !rope.dim.is_multiple_of(2) || rope.dim > rotary {
                let problem = format!(
                    "leaves {} rotated values of {rotary}, expected a positive even number",
                    rope.dim
                );
                return complain("head_dim", problem);
            }
            rope.check()
                .or_else(|(key, problem)| complain(key, problem))?;
        }
        if self.attention.windows.len() != self.n_layers {
            let problem = format!(
                "gives {} layers, expected num_hidden_layers = {}",
                self.attention.windows.len(),
                self.n_layers
            );
            return complain("layer_types", problem);
        }
        self.check_attention_experts()
            .or_else(|(key, problem)| complain(key, problem))?;
        for (key, value) in [
            ("rms_norm_eps", self.norm_eps),
            ("embedding_multiplier", self.scales.embedding),
            ("logits_scaling", self.scales.logits_divisor),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return complain(key, format!("is {value}, expected a positive number"));
            }
        }
        let ids = self.eos_token_ids.iter().chain(&self.bos_token_id);
        if let Some(id) = ids.copied().find(|id| *id as usize >= self.vocab_size) {
            let problem = format!("is {id}, outside of vocab_size = {}", self.vocab_size);
            return complain("eos_token_id / bos_token_id", problem);
        }
        self.moe
            .check(self.n_layers)
            .or_else(|(key, problem)| complain(key, problem))
    }

    /// The heads must divide, and what would make an expert depend on more than its own heads and tokens is not there.
    fn check_attention_experts(&self) -> Result<(), (&'static str, String)> {
        let Some(experts) = self.attention.experts else {
            return Ok(());
        };
        let AttentionExperts {
            n_experts, top_k, ..
        } = experts;
        let possible = (2..=usize::from(u16::MAX)).contains(&n_experts);
        if !(possible && self.n_kv_heads.is_multiple_of(n_experts)) {
            let problem = format!(
                "is {n_experts}, expected at least 2, and a divisor of the {} key and value heads",
                self.n_kv_heads
            );
            return Err(("attention_experts.n_experts", problem));
        }
        if !(1..=n_experts).contains(&top_k) {
            let problem = format!("is {top_k}, expected 1 to n_experts = {n_experts}");
            return Err(("attention_experts.top_k", problem));
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&experts.eps) {
            let problem = format!("is {}, expected a finite number of at least 0", experts.eps);
            return Err(("attention_experts.eps", problem));
        }
        let attention = &self.attention;
        let plain = !(attention.qkv_bias || attention.o_bias || attention.sinks)
            && attention.mla.is_none()
            && attention.qk_norm != QkNorm::WholeProjection
            && attention.windows.iter().all(Option::is_none);
        if plain {
            return Ok(());
        }
        let problem =
            "goes with plain attention only: no biases, windows, sinks or latent attention";
        Err(("attention_experts", problem.to_owned()))
    }

    /// The `config.json` that transformers reads for this model, keys sorted, with the spellings
    /// of both transformers 4 and 5 where they differ.
    ///
    /// # Errors
    /// The architecture has no such form for this model.
    pub fn to_config_json(&self, dtype: Dtype) -> Result<String> {
        let value = models::get(&self.model_type)?.to_json(self, dtype)?;
        Ok(format!("{value:#}\n"))
    }

    /// The `generation_config.json` that belongs to this model.
    #[must_use]
    pub fn to_generation_json(&self) -> String {
        generation::to_json(self)
    }
}
#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The published layout of transformers 4.
    const V4: &str = r#"{"model_type":"qwen3_moe","vocab_size":64,"hidden_size":32,
        "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
        "num_experts":8,"num_experts_per_tok":2,"moe_intermediate_size":16,
        "intermediate_size":48,"norm_topk_prob":true,"mlp_only_layers":[],"decoder_sparse_step":1,
        "rms_norm_eps":1e-06,"rope_theta":1000000.0,"rope_scaling":null,
        "max_position_embeddings":128,"tie_word_embeddings":false,"eos_token_id":5,
        "bos_token_id":3,"attention_bias":false,"use_sliding_window":false,"sliding_window":null,
        "hidden_act":"silu","torch_dtype":"bfloat16"}"#;

    fn edited(key: &str, value: Value) -> String {
        let mut config: Value = serde_json::from_str(V4).unwrap();
        config[key] = value;
        config.to_string()
    }

    fn message(config: &str) -> String {
        ModelConfig::parse("m", config, None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn both_dialects_give_the_same_config() {
        let v4 = ModelConfig::parse("m", V4, None).unwrap();
        let mut other: Value = serde_json::from_str(V4).unwrap();
        let map = other.as_object_mut().unwrap();
        for gone in ["num_experts", "rope_theta", "rope_scaling", "torch_dtype"] {
            map.remove(gone);
        }
        map.insert("num_local_experts".into(), json!(8));
        map.insert(
            "rope_parameters".into(),
            json!({"rope_theta": 1e6, "rope_type": "default"}),
        );
        map.insert("dtype".into(), json!("bfloat16"));
        assert_eq!(
            ModelConfig::parse("m", &other.to_string(), None).unwrap(),
            v4
        );
        assert_eq!(
            (v4.moe.n_experts, v4.moe.top_k, v4.head_dim, v4.rope.theta),
            (8, 2, 16, 1e6)
        );
        assert_eq!((v4.bos_token_id, v4.dtype), (Some(3), Some(Dtype::Bf16)));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = ModelConfig::parse("m", V4, Some(r#"{"eos_token_id":[7,5]}"#)).unwrap();
        assert_eq!(config.eos_token_ids, [5, 7]);
        let text = config.to_config_json(Dtype::Bf16).unwrap();
        let generation = config.to_generation_json();
        assert_eq!(
            ModelConfig::parse("m", &text, Some(&generation)).unwrap(),
            config
        );
    }

    #[test]
    fn sparse_layers_follow_step_and_exceptions() {
        let mut config: Value = serde_json::from_str(V4).unwrap();
        for (key, value) in [
            ("num_hidden_layers", json!(6)),
            ("decoder_sparse_step", json!(2)),
            ("mlp_only_layers", json!([3])),
        ] {
            config[key] = value;
        }
        let config = ModelConfig::parse("m", &config.to_string(), None).unwrap();
        assert_eq!(config.moe_layers(), [1, 5]);
        let text = config.to_config_json(Dtype::F32).unwrap();
        let again = ModelConfig::parse("m", &text, None).unwrap();
        assert_eq!(again.moe_layers(), [1, 5]);
    }

    #[test]
    fn keys_that_would_change_the_result_are_refused_by_name() {
        let cases = [
            ("model_type", json!("megatron"), "qwen3_moe"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            (
                "rope_scaling",
                json!({"type": "dynamic", "factor": 4.0}),
                "rope_scaling",
            ),
            ("rope_parameters", json!({"rope_type": "linear"}), "factor"),
            (
                "quantization_config",
                json!({"quant_method": "gptq"}),
                "quantization_config",
            ),
            ("layer_types", json!(["sliding_attention"]), "layer_types"),
            ("num_local_experts", json!(4), "num_local_experts"),
            ("dtype", json!("float64"), "float64"),
        ];
        for (key, value, expected) in cases {
            let text = message(&edited(key, value));
            assert!(
                text.contains(expected) && text.contains("m/config.json"),
                "{key}: {text}"
            );
        }
    }

    #[test]
    fn impossible_numbers_are_refused_by_name() {
        let cases = [
            ("hidden_size", json!("wide")),
            ("num_hidden_layers", json!(0)),
            ("num_hidden_layers", json!(1_000_000)),
            ("hidden_size", json!(1u64 << 40)),
            ("vocab_size", Value::Null),
            ("num_key_value_heads", json!(3)),
            ("head_dim", json!(15)),
            ("num_experts_per_tok", json!(9)),
            ("mlp_only_layers", json!([2])),
            ("rms_norm_eps", json!(0.0)),
            ("eos_token_id", json!(64)),
            ("norm_topk_prob", json!("yes")),
        ];
        for (key, value) in cases {
            let text = message(&edited(key, value));
            assert!(text.contains(key), "{key}: {text}");
        }
        assert!(message("{").contains("m/config.json"));
        assert!(message("[]").contains("not an object"));
    }
}
