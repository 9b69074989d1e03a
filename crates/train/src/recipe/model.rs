//! `[model]` of a recipe: sizes, and what the model is made of.

use crate::architecture::{Architecture, Residual};
use crate::layers::{attention_experts, decoupled};
use crate::routers::RouterOptions;
use cadre_checkpoint::{
    Activation, AttentionConfig, Factors, ModelConfig, MoeConfig, NormKind, QkNorm, RopeConfig,
    RouterConfig, Scales,
};
use serde::{Deserialize, Serialize};

/// Sizes of a Qwen3-MoE model, in the words of its `config.json`, and what may be added to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Vocabulary of the tokenizer that is trained, and of the model.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Experts per MoE layer, one number or one for each; 0 makes every layer dense.
    pub n_experts: Experts,
    /// Experts per token.
    #[serde(default)]
    pub top_k: usize,
    /// Width of an expert.
    #[serde(default)]
    pub moe_intermediate_size: usize,
    /// Total width of the experts that every token uses; absent for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_intermediate_size: Option<usize>,
    /// For each layer with experts, and each of its experts, the number of the weights that it has, as `cadre apply` makes of a merge;
    /// empty where all have their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_weights: Vec<Vec<u16>>,
    /// Matrices of experts as products of two thin ones and a few rows (MC-SMoE); absent for whole ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factors: Option<FactorSizes>,
    /// A dense feed-forward beside the experts, `sum` or `learned` (PR-MoE); absent for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
    /// Width of that feed-forward; absent for `intermediate_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual_intermediate_size: Option<usize>,
    /// Width of the state that routers hand from layer to layer (RMoE); absent for linear routers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recurrent_router: Option<usize>,
    /// Whether that state starts anew in every layer: the same parameters without the memory, for comparisons.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recurrent_restarts: bool,
    /// A router that runs before the layers and makes the logits of all (Read-ME); absent for routers of layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoupled_router: Option<decoupled::Options>,
    /// Attention cut by heads into experts (Union of Experts); absent for attention by all heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_experts: Option<attention_experts::Options>,
    /// Width of a dense feed-forward.
    #[serde(default)]
    pub intermediate_size: usize,
    /// Layers that stay dense.
    #[serde(default)]
    pub mlp_only_layers: Vec<usize>,
    /// Whether picked weights are divided by their sum.
    #[serde(default = "yes")]
    pub norm_topk_prob: bool,
    /// Whether queries and keys have norms, as in Qwen3; Llama's have none.
    #[serde(default = "yes")]
    pub qk_norm: bool,
    /// Added to the mean square in norms.
    #[serde(default = "millionth")]
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Longest sequence that the model says it can take.
    pub max_position_embeddings: usize,
    /// RoPE base.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Standard deviation of initial matrices.
    #[serde(default = "two_hundredths")]
    pub initializer_range: f32,
}

/// `model.factors` of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FactorSizes {
    /// Width of the products.
    pub rank: usize,
    /// Rows of their own of gate and up matrices.
    #[serde(default)]
    pub up_rows: usize,
    /// Rows of their own of down matrices.
    #[serde(default)]
    pub down_rows: usize,
    /// Instead of both, where matrices differ: for each layer with experts, and each stored expert, the rows of its gate, up
    /// and down matrices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Vec<[usize; 3]>>,
}

impl FactorSizes {
    fn of(factors: &Factors) -> Self {
        let is_even = factors.uneven.is_empty();
        Self {
            rank: factors.rank,
            up_rows: if is_even { factors.up_rows } else { 0 },
            down_rows: if is_even { factors.down_rows } else { 0 },
            rows: factors.uneven.clone(),
        }
    }

    fn factors(&self) -> Factors {
        match self.rows.is_empty() {
            true => Factors::even(self.rank, self.up_rows, self.down_rows),
            false => Factors::uneven(self.rank, self.rows.clone()),
        }
    }
}

/// Experts of the MoE layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Experts {
    /// The same number in all of them.
    Same(usize),
    /// One number for each, in order.
    PerLayer(Vec<usize>),
}

impl Experts {
    /// The most experts of any layer; 0 for a dense model.
    #[must_use]
    pub fn most(&self) -> usize {
        match self {
            Self::Same(n) => *n,
            Self::PerLayer(all) => all.iter().copied().max().unwrap_or(0),
        }
    }
}

fn yes() -> bool {
    true
}
fn millionth() -> f64 {
    1e-6
}
fn ten_thousand() -> f64 {
    10_000.0
}
fn two_hundredths() -> f32 {
    0.02
}

impl Model {
    /// Relations between the keys that make MoE layers, of which there are `n_layers`.
    pub(super) fn check_parts(&self, n_layers: usize) -> Result<(), String> {
        let m = self;
        if let Experts::PerLayer(counts) = &m.n_experts {
            if counts.len() != n_layers {
                let n = counts.len();
                return Err(format!(
                    "`model.n_experts` has {n} numbers, expected one for each of the {n_layers} layers with experts, or a \
                     single number"
                ));
            }
            if counts.contains(&0) {
                let layers = "name layers without experts in `model.mlp_only_layers`";
                return Err(format!("`model.n_experts` has a 0; {layers}"));
            }
        }
        if let Some(factors) = &m.factors
            && !factors.rows.is_empty()
            && (factors.up_rows, factors.down_rows) != (0, 0)
        {
            return Err(
                "`model.factors` has `rows` beside `up_rows` or `down_rows`; one of the two says how many there are"
                    .to_owned(),
            );
        }
        if m.residual.is_none() && m.residual_intermediate_size.is_some() {
            return Err(
                "`model.residual_intermediate_size` needs `model.residual`, \"sum\" or \"learned\""
                    .to_owned(),
            );
        }
        if let Some(experts) = m.attention_experts {
            let rule = experts.rule();
            rule.map_err(|e| format!("`model.attention_experts`: {e}"))?;
        }
        if m.recurrent_restarts && m.recurrent_router.is_none() {
            return Err(
                "`model.recurrent_restarts` needs `model.recurrent_router`, the width of the state"
                    .to_owned(),
            );
        }
        let widths = [
            ("shared_intermediate_size", m.shared_intermediate_size),
            ("residual_intermediate_size", m.residual_intermediate_size),
            ("recurrent_router", m.recurrent_router),
        ];
        for (key, width) in widths {
            if width == Some(0) {
                return Err(format!(
                    "`model.{key}` = 0, expected at least 1; leave it out for none"
                ));
            }
            if width.is_some() && n_layers == 0 {
                return Err(format!(
                    "`model.{key}` belongs to layers with experts, of which there are none"
                ));
            }
        }
        Ok(())
    }

    /// The sizes of a checkpoint and its rule of routing, so that a run can go on from it.
    ///
    /// # Errors
    /// What recipes say in other words: routers before the layers, and attention cut into experts.
    pub fn of(config: &ModelConfig) -> Result<(Self, Option<RouterOptions>), String> {
        let moe = &config.moe;
        if moe.decoupled_router.is_some() || config.attention.experts.is_some() {
            return Err(
                "it has a router before its layers, or experts of attention: write a recipe with `[start] from` that says which"
                    .to_owned(),
            );
        }
        let architecture = Architecture::of(config).map_err(|error| error.to_string())?;
        let is_dense = moe.layers.is_empty();
        let counts: Vec<usize> = moe.counts().collect();
        let (residual, residual_width) = match architecture.parts.residual {
            Some((kind, width)) => (Some(kind), Some(width)),
            None => (None, None),
        };
        let model = Self {
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            n_layers: config.n_layers,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            n_experts: match moe.uneven.is_empty() {
                true => Experts::Same(if is_dense { 0 } else { moe.n_experts }),
                false => Experts::PerLayer(counts),
            },
            top_k: architecture.config.moe.top_k,
            moe_intermediate_size: moe.intermediate_size,
            shared_intermediate_size: architecture.parts.shared,
            shared_weights: moe.shared_weights.clone(),
            factors: moe.factors.as_ref().map(FactorSizes::of),
            residual,
            residual_intermediate_size: residual_width,
            recurrent_router: moe.recurrent_router,
            recurrent_restarts: false,
            decoupled_router: None,
            attention_experts: None,
            intermediate_size: config.intermediate_size,
            mlp_only_layers: (0..config.n_layers)
                .filter(|layer| !is_dense && !config.is_moe_layer(*layer))
                .collect(),
            norm_topk_prob: moe.norm_topk_prob(),
            qk_norm: config.attention.qk_norm == QkNorm::PerHead,
            rms_norm_eps: config.norm_eps,
            tie_word_embeddings: config.tie_word_embeddings,
            max_position_embeddings: config.max_position_embeddings,
            rope_theta: config.rope.theta,
            initializer_range: two_hundredths(),
        };
        let is_plain = is_dense || architecture.router.name == "top_k";
        Ok((model, (!is_plain).then_some(architecture.router)))
    }

    /// The model's configuration, with the sizes that `router` decides. A dense model is a Qwen3-MoE model whose layers are
    /// all in `mlp_only_layers`.
    #[must_use]
    pub fn config(&self, router: &RouterOptions) -> ModelConfig {
        let m = self;
        let n_experts = m.n_experts.most();
        let dense = n_experts == 0;
        let is_moe = |layer: &usize| !dense && !m.mlp_only_layers.contains(layer);
        ModelConfig {
            model_type: "qwen3_moe".to_owned(),
            vocab_size: m.vocab_size,
            hidden_size: m.hidden_size,
            n_layers: m.n_layers,
            max_position_embeddings: m.max_position_embeddings,
            tie_word_embeddings: m.tie_word_embeddings,
            lm_head_bias: false,
            norm: NormKind::Rms,
            norm_eps: m.rms_norm_eps,
            post_norms: false,
            n_heads: m.n_heads,
            n_kv_heads: m.n_kv_heads,
            head_dim: m.head_dim,
            attention: AttentionConfig {
                qkv_bias: false,
                o_bias: false,
                qk_norm: match m.qk_norm {
                    true => QkNorm::PerHead,
                    false => QkNorm::None,
                },
                sinks: false,
                clip_qkv: None,
                scale: 1.0 / (m.head_dim as f64).sqrt(),
                windows: vec![None; m.n_layers],
                mla: None,
                experts: m.attention_experts.map(|experts| experts.stored()),
            },
            rope: RopeConfig::plain(m.rope_theta, m.head_dim),
            local_rope: None,
            intermediate_size: if m.intermediate_size == 0 {
                m.moe_intermediate_size
            } else {
                m.intermediate_size
            },
            mlp_bias: false,
            activation: Activation::Silu,
            moe: MoeConfig {
                layers: (0..m.n_layers).filter(is_moe).collect(),
                n_experts: if dense { 1 } else { n_experts },
                top_k: if dense { 1 } else { router.top_k(m.top_k) },
                intermediate_size: m.moe_intermediate_size.max(usize::from(dense)),
                n_null: router.null_experts(n_experts),
                router: RouterConfig::TopK {
                    norm: m.norm_topk_prob,
                },
                decoupled_router: m.decoupled_router.map(|options| options.stored()),
                shared_weights: m.shared_weights.clone(),
                factors: m.factors.as_ref().map(FactorSizes::factors),
                ..MoeConfig::default()
            },
            scales: Scales::default(),
            // The tokenizer is trained with one special token, which comes first.
            eos_token_ids: vec![0],
            bos_token_id: None,
            pad_token_id: None,
            dtype: None,
        }
    }
}
