//! The decoder-only language model in the Qwen3-MoE layout, and its loss.

use crate::init::Init;
use crate::layers::attention::SelfAttention;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{Moe, RoutingReport};
use crate::ops::{self, AttentionShape};
use crate::routers::{Route, TopK};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_checkpoint::ModelConfig;
use cadre_routing::{Loads, RoutingError};
use std::sync::Arc;

/// Feed-forward part of a layer.
#[derive(Module, Debug)]
pub enum FeedForward {
    /// Routed experts.
    Moe(Moe),
    /// One dense feed-forward.
    Dense(Mlp),
}

/// One decoder layer.
#[derive(Module, Debug)]
pub struct Layer {
    /// Norm before attention, `[d_model]`
    pub input_layernorm: Param<Tensor<1>>,
    /// Attention
    pub self_attn: SelfAttention,
    /// Norm before the feed-forward, `[d_model]`
    pub post_attention_layernorm: Param<Tensor<1>>,
    /// Feed-forward
    pub mlp: FeedForward,
}

/// All parameters.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// `[vocab, d_model]`
    pub embed_tokens: Param<Tensor<2>>,
    /// Decoder layers
    pub layers: Vec<Layer>,
    /// Final norm, `[d_model]`
    pub norm: Param<Tensor<1>>,
    /// `[vocab, d_model]`; absent when tied to the embedding
    pub lm_head: Option<Param<Tensor<2>>>,
}

/// Token ids of some sequences of equal length, and the tokens that follow each.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `n_sequences * seq_len` ids, sequence by sequence.
    pub tokens: Arc<Vec<u32>>,
    /// The next token of each.
    pub targets: Arc<Vec<u32>>,
    /// Tokens per sequence.
    pub seq_len: usize,
}

/// Loss parts of one batch; the router losses are means over the MoE layers (zero without any).
#[derive(Debug)]
pub struct Losses {
    /// Mean next-token cross-entropy, nats.
    pub cross_entropy: Tensor<1>,
    /// Load-balance loss, 1 when perfectly even.
    pub balance: Tensor<1>,
    /// Router z-loss.
    pub z: Tensor<1>,
    /// Picks of each MoE layer.
    pub loads: Vec<Loads>,
}

impl LanguageModel {
    /// Random parameters for `config`.
    #[must_use]
    pub fn init(config: &ModelConfig, init: &Init) -> Self {
        // Keeps the variance of the residual stream independent of the depth (GPT-2, Radford et al. 2019).
        let residual_scale = 1.0 / (2.0 * config.n_layers as f32).sqrt();
        let (v, d) = (config.vocab_size, config.hidden_size);
        let norm = || Param::from_tensor(init.ones(d));
        let layers = (0..config.n_layers).map(|layer| {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let mlp = if config.is_moe_layer(layer) {
                FeedForward::Moe(Moe::init(config, init, &name("mlp"), residual_scale))
            } else {
                let width = config.intermediate_size;
                FeedForward::Dense(Mlp::init(d, width, init, &name("mlp"), residual_scale))
            };
            Layer {
                input_layernorm: norm(),
                self_attn: SelfAttention::init(config, init, &name("self_attn"), residual_scale),
                post_attention_layernorm: norm(),
                mlp,
            }
        });
        Self {
            embed_tokens: Param::from_tensor(init.normal("embed_tokens", [v, d], 1.0)),
            layers: layers.collect(),
            norm: norm(),
            lm_head: (!config.tie_word_embeddings)
                .then(|| Param::from_tensor(init.normal("lm_head", [v, d], 1.0))),
        }
    }

    /// The loss parts on `batch`.
    ///
    /// # Errors
    /// Router logits that are not finite (the run has diverged).
    pub fn losses(&self, config: &ModelConfig, batch: &Batch) -> Result<Losses, RoutingError> {
        let eps = config.norm_eps as f32;
        let shape = AttentionShape {
            batch: batch.tokens.len() / batch.seq_len,
            seq_len: batch.seq_len,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            rope_theta: config.rope.theta,
            eps,
        };
        let router = TopK::new(
            config.moe.n_experts,
            config.moe.top_k,
            config.moe.norm_topk_prob(),
        )?;
        let mut x = ops::embedding(self.embed_tokens.val(), batch.tokens.clone());
        let mut reports = Vec::new();
        for layer in &self.layers {
            let (y, report) = layer.forward(x, shape, &router)?;
            x = y;
            reports.extend(report);
        }
        let x = ops::rms_norm(x, self.norm.val(), eps);
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        let cross_entropy = ops::cross_entropy(x, head.val(), batch.targets.clone());
        Ok(combine(cross_entropy, reports))
    }
}

fn combine(cross_entropy: Tensor<1>, reports: Vec<RoutingReport>) -> Losses {
    let n = reports.len().max(1) as f32;
    let zero = Tensor::zeros([1], &cross_entropy.device());
    let mut losses = Losses {
        cross_entropy,
        balance: zero.clone(),
        z: zero,
        loads: Vec::with_capacity(reports.len()),
    };
    for report in reports {
        losses.balance = losses.balance + report.balance / n;
        losses.z = losses.z + report.z / n;
        losses.loads.push(report.loads);
    }
    losses
}

impl Layer {
    fn forward(
        &self,
        x: Tensor<2>,
        shape: AttentionShape,
        router: &dyn Route,
    ) -> Result<(Tensor<2>, Option<RoutingReport>), RoutingError> {
        let normed = ops::rms_norm(x.clone(), self.input_layernorm.val(), shape.eps);
        let x = x + self.self_attn.forward(normed, shape);
        let normed = ops::rms_norm(x.clone(), self.post_attention_layernorm.val(), shape.eps);
        let (y, report) = match &self.mlp {
            FeedForward::Moe(moe) => {
                let (y, report) = moe.forward(normed, router)?;
                (y, Some(report))
            }
            FeedForward::Dense(mlp) => (mlp.forward(normed), None),
        };
        Ok((x + y, report))
    }
}
