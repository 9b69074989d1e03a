//! The decoder that all architectures are: an embedding, layers of attention and feed-forward, a head.
//!
//! An architecture (a file of `models/`) says which blocks its layers are made of. What it holds is here, what runs is
//! in `pass.rs`.

use std::sync::Arc;

use cadre_checkpoint::{ModelConfig, tensor_specs};
use cadre_kernels::{Compute, MatmulScratch, Matrix};
use cadre_routing::{Policy, RoutingError, Steered, Steering};

use crate::batch::Sequence;
use crate::blocks::{
    Attention, AttentionExperts, DecoupledRouter, DecoupledShape, Embedding, FeedForward, KvShape,
    LatentAttention, Linear, Moe, MoeShape, Norm, Rope, RopeAngles, Step, add_rows,
};
use crate::builder::Builder;
use crate::error::Result;
use crate::model::{ModelInfo, Observer};
use crate::session::SessionShape;
use crate::streaming::ExpertStore;
use crate::workspace::AnyAttentionScratch;

/// A decoder-only transformer.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub(crate) info: ModelInfo,
    pub(crate) shape: SessionShape,
    pub(crate) compute: Arc<Compute>,
    /// Where experts are read from, unless all are in memory.
    pub(crate) store: Option<Arc<ExpertStore>>,
    /// Makes the router logits of all layers before they run, where the model has that.
    pub(crate) decoupled: Option<DecoupledRouter>,
    pub(crate) embed_tokens: Embedding,
    pub(crate) embedding_scale: f32,
    pub(crate) layers: Vec<Layer>,
    /// Factor on the output of every block.
    pub(crate) residual_scale: f32,
    pub(crate) norm: Norm,
    pub(crate) head: Head,
    /// Rotations; a layer says which one is its own.
    pub(crate) ropes: Vec<Rope>,
    /// How new sessions are steered.
    pub(crate) steering: Option<Arc<Steered>>,
}

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Norm,
    pub(crate) attention: AnyAttention,
    /// On the output of attention, before it joins the stream.
    pub(crate) attention_post_norm: Option<Norm>,
    pub(crate) ffn_norm: Norm,
    pub(crate) ffn: AnyFeedForward,
    /// On the output of the feed-forward, before it joins the stream.
    pub(crate) ffn_post_norm: Option<Norm>,
    /// Which of the model's rotations: 0 the usual one, 1 the one of layers with a window.
    pub(crate) rope: usize,
}

#[derive(Debug)]
pub(crate) enum AnyAttention {
    Grouped(Attention),
    Latent(LatentAttention),
    Experts(AttentionExperts),
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub(crate) enum AnyFeedForward {
    Moe(Moe),
    Dense(FeedForward),
}

#[derive(Debug)]
pub(crate) struct Head {
    /// `None`: the embedding.
    linear: Option<Linear>,
    bias: Option<Vec<f32>>,
    logits_divisor: f32,
}

impl AnyAttention {
    /// Stores keys and values of every row. Fails where a router's logits are not finite.
    pub(crate) fn remember(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        x_td: &[f32],
        batch: &mut [Sequence<'_>],
        (scratch, matmul): (&mut AnyAttentionScratch, &mut MatmulScratch),
    ) -> Result<(), RoutingError> {
        match (self, scratch) {
            (Self::Grouped(block), AnyAttentionScratch::Grouped(scratch)) => {
                block.remember(step, angles, x_td, batch, (scratch, matmul));
            }
            (Self::Latent(block), AnyAttentionScratch::Latent(scratch)) => {
                block.remember(step, angles, x_td, batch, (scratch, matmul));
            }
            (Self::Experts(block), AnyAttentionScratch::Experts(scratch)) => {
                block.remember(step, x_td, batch, (scratch, matmul))?;
            }
            _ => unreachable!("a workspace is made for its model's attention"),
        }
        Ok(())
    }

    /// `out_td = attention(x_td)`, for rows whose keys and values are stored; tells `observer` about the routing, if there is any.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        rows: (&[f32], &mut [f32]),
        batch: &[Sequence<'_>],
        (scratch, matmul): (&mut AnyAttentionScratch, &mut MatmulScratch),
        observer: &mut dyn Observer,
    ) -> Result<(), RoutingError> {
        match (self, scratch) {
            (Self::Grouped(block), AnyAttentionScratch::Grouped(scratch)) => {
                block.forward(step, angles, rows, batch, (scratch, matmul));
            }
            (Self::Latent(block), AnyAttentionScratch::Latent(scratch)) => {
                block.forward(step, angles, rows, batch, (scratch, matmul));
            }
            (Self::Experts(block), AnyAttentionScratch::Experts(scratch)) => {
                block.forward(step, rows, batch, (scratch, matmul), observer)?;
            }
            _ => unreachable!("a workspace is made for its model's attention"),
        }
        Ok(())
    }
}

impl Layer {
    /// The usual layer: a norm before attention, a norm before the feed-forward.
    pub(crate) fn pre_norm(
        b: &Builder<'_>,
        layer: usize,
        attention: AnyAttention,
        ffn: AnyFeedForward,
    ) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Ok(Self {
            attention_norm: b.norm(&name("input_layernorm"))?,
            attention,
            attention_post_norm: None,
            ffn_norm: b.norm(&name("post_attention_layernorm"))?,
            ffn,
            ffn_post_norm: None,
            rope: 0,
        })
    }

    /// Adds its matrices to `all`.
    fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        match &self.attention {
            AnyAttention::Grouped(block) => block.matrices(all),
            AnyAttention::Latent(block) => block.matrices(all),
            AnyAttention::Experts(block) => block.matrices(all),
        }
        match &self.ffn {
            AnyFeedForward::Moe(block) => block.matrices(all),
            AnyFeedForward::Dense(block) => block.matrices(all),
        }
    }
}

impl Builder<'_> {
    /// Grouped-query attention as a layer's attention, whole or cut into experts.
    pub(crate) fn grouped(&self, layer: usize) -> Result<AnyAttention> {
        Ok(match self.config.attention.experts {
            None => AnyAttention::Grouped(self.attention(layer)?),
            Some(sizes) => AnyAttention::Experts(self.attention_experts(layer, sizes)?),
        })
    }

    /// Latent attention as a layer's attention.
    pub(crate) fn latent(&self, layer: usize) -> Result<AnyAttention> {
        Ok(AnyAttention::Latent(self.latent_attention(layer)?))
    }

    /// A dense feed-forward as a layer's.
    pub(crate) fn dense(&self, layer: usize) -> Result<AnyFeedForward> {
        let prefix = format!("model.layers.{layer}.mlp");
        let width = self.config.intermediate_size;
        Ok(AnyFeedForward::Dense(self.feed_forward(
            &prefix,
            width,
            self.config.mlp_bias,
        )?))
    }

    /// Experts, or a dense feed-forward in the layers that have none.
    pub(crate) fn experts_or_dense(&self, layer: usize) -> Result<AnyFeedForward> {
        if self.config.is_moe_layer(layer) {
            Ok(AnyFeedForward::Moe(self.moe(layer)?))
        } else {
            self.dense(layer)
        }
    }

    /// The whole decoder, with `layer` making one layer after the other.
    pub(crate) fn decoder(self, layer: impl Fn(&Self, usize) -> Result<Layer>) -> Result<Decoder> {
        let config = self.config;
        let (vocab, d) = (config.vocab_size, config.hidden_size);
        let embed_tokens = self.weights.embedding(
            "model.embed_tokens.weight",
            [vocab, d],
            config.tie_word_embeddings,
        )?;
        let linear = match config.tie_word_embeddings {
            true => None,
            false => Some(self.weights.linear("lm_head", [vocab, d], false)?),
        };
        let bias = config
            .lm_head_bias
            .then(|| self.weights.vector("lm_head.bias", vocab));
        let head = Head {
            linear,
            bias: bias.transpose()?,
            logits_divisor: config.scales.logits_divisor as f32,
        };
        let layers: Result<Vec<Layer>> = (0..config.n_layers)
            .map(|index| layer(&self, index))
            .collect();
        let ropes = [Some(&config.rope), config.local_rope.as_ref()];
        let n_kept = self.weights.n_kept();
        let mut decoder = Decoder {
            info: info(&self),
            shape: session_shape(config),
            decoupled: self.decoupled_router()?,
            embed_tokens,
            embedding_scale: config.scales.embedding as f32,
            layers: layers?,
            residual_scale: config.scales.residual as f32,
            norm: self.norm("model.norm")?,
            head,
            ropes: ropes.into_iter().flatten().map(Rope::new).collect(),
            steering: None,
            store: self.weights.store.clone(),
            compute: self.weights.compute,
        };
        decoder.info.weight_bytes = decoder.weight_bytes();
        if n_kept > 0 {
            tracing::warn!(
                n_matrices = n_kept,
                "some matrices stay as stored: their rows are not a multiple of 32, which q8_0 needs"
            );
        }
        Ok(decoder)
    }
}

pub(crate) fn session_shape(config: &ModelConfig) -> SessionShape {
    let experts = config.attention.experts;
    let n_experts = experts.map_or(0, |experts| experts.n_experts);
    let kv = match config.attention.mla {
        Some(mla) => KvShape {
            n_layers: config.n_layers,
            n_experts: 0,
            n_kv_heads: 1,
            key_dim: mla.qk_rope_head_dim,
            value_dim: mla.kv_lora_rank,
        },
        None => KvShape {
            n_layers: config.n_layers,
            n_experts,
            n_kv_heads: config.n_kv_heads / n_experts.max(1),
            key_dim: config.head_dim,
            value_dim: config.head_dim,
        },
    };
    let moe = &config.moe;
    let shared = moe.shared.map_or(0, |shared| shared.intermediate_size);
    let residual = moe.residual.map_or(0, |part| part.intermediate_size);
    let decoupled = moe.decoupled_router.map(|router| DecoupledShape {
        d: router.hidden_size,
        n_layers: router.n_layers,
        n_heads: router.n_heads,
        head_dim: router.head_dim,
        d_inner: router.intermediate_size,
        n_logits: router.n_logits(moe),
    });
    SessionShape {
        d_model: config.hidden_size,
        kv,
        mla: config.attention.mla,
        n_heads: config.n_heads,
        n_ropes: 1 + usize::from(config.local_rope.is_some()),
        moe: MoeShape {
            d_model: config.hidden_size,
            n_experts: moe.n_logits(),
            max_picks: moe.top_k,
            d_expert: moe.intermediate_size,
            d_beside: shared.max(residual),
            d_router: moe.recurrent_router.unwrap_or(0),
            n_foretold: decoupled.map_or(0, |router| router.n_logits),
        },
        decoupled,
        d_dense: if config.has_dense_layers() {
            config.intermediate_size
        } else {
            0
        },
    }
}

fn info(b: &Builder<'_>) -> ModelInfo {
    let config = b.config;
    let n_params: u64 = tensor_specs(config)
        .iter()
        .map(|(_, shape)| shape.iter().map(|n| *n as u64).product::<u64>())
        .sum();
    let moe = &config.moe;
    let (d, f) = (config.hidden_size, moe.intermediate_size);
    let size = |at: usize, expert: usize| {
        let matrices = match &moe.factors {
            None => 3 * d * f,
            Some(factors) => {
                let [gate, up, down] = factors.rows_of(at, expert);
                3 * factors.rank * (d + f) + (gate + up) * (d + 1) + down * (f + 1)
            }
        };
        let biases = if moe.expert_bias { 2 * f + d } else { 0 };
        (matrices + biases) as u64
    };
    // Experts of a layer that no token of it uses at once, of the mean size where they differ.
    let unused = |(at, layer): (usize, &usize)| {
        let n = config.n_stored_in(*layer) as u64;
        let all: u64 = (0..n as usize).map(|expert| size(at, expert)).sum();
        all * (n - config.picks_in(*layer) as u64) / n.max(1)
    };
    let n_unused: u64 = moe.layers.iter().enumerate().map(unused).sum();
    let heads = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim;
    let unused_heads = config.attention.experts.map_or(0, |experts| {
        heads / experts.n_experts * (experts.n_experts - experts.top_k)
    });
    let n_unused_heads = (config.n_layers * config.hidden_size * unused_heads) as u64;
    ModelInfo {
        model_type: config.model_type.clone(),
        vocab_size: config.vocab_size,
        d_model: config.hidden_size,
        n_layers: config.n_layers,
        moe_layers: config.moe_layers(),
        n_experts: moe.n_experts,
        experts_per_layer: moe.counts().collect(),
        n_null: moe.n_null,
        top_k: moe.top_k,
        attention_experts: config.attention.experts,
        max_context: config.max_position_embeddings,
        eos_token_ids: config.eos_token_ids.clone(),
        n_params,
        n_active_params: n_params - n_unused - n_unused_heads,
        weight_bytes: 0,
        lossy: b.weights.lossy,
        steering: Steering::default(),
    }
}

impl Decoder {
    /// Every matrix; norms and biases are negligible.
    pub(crate) fn matrices(&self) -> Vec<&Matrix> {
        let mut all: Vec<&Matrix> = self.embed_tokens.matrix().into_iter().collect();
        if let Some(linear) = &self.head.linear {
            linear.matrices(&mut all);
        }
        for layer in &self.layers {
            layer.matrices(&mut all);
        }
        let shared = self.layers.iter().find_map(|layer| match &layer.ffn {
            AnyFeedForward::Moe(moe) => moe.router.shared_matrices(),
            AnyFeedForward::Dense(_) => None,
        });
        all.extend(shared.into_iter().flatten());
        if let Some(router) = &self.decoupled {
            router.matrices(&mut all);
        }
        all
    }

    /// How `steering` changes each layer; `None` when it changes nothing.
    pub(crate) fn prepare(&self, steering: &Steering) -> Result<Option<Arc<Steered>>> {
        let mut policies: Vec<(usize, &dyn Policy)> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if let AnyFeedForward::Moe(moe) = &layer.ffn {
                policies.push((index, &*moe.policy));
            }
        }
        let prepared = steering.prepare(&policies)?;
        self.info.lossy.check_steering(steering)?;
        Ok(prepared.map(Arc::new))
    }

    /// Steers the sessions that are made from now on.
    pub(crate) fn steer_new_sessions(&mut self, steering: &Steering) -> Result<()> {
        self.steering = self.prepare(steering)?;
        if self.steering.is_some() {
            self.info.steering = steering.clone();
            tracing::warn!("results are not the model's own: lossy {steering}");
        }
        Ok(())
    }

    fn weight_bytes(&self) -> u64 {
        let matrices = self.matrices();
        let dense: u64 = matrices.iter().map(|matrix| matrix.n_bytes() as u64).sum();
        dense + self.store.as_ref().map_or(0, |store| store.n_bytes())
    }
}

impl Head {
    /// Logits of normed rows; `embed_tokens` is the head where it has no matrix of its own.
    pub(crate) fn forward(
        &self,
        compute: &Compute,
        embed_tokens: &Embedding,
        (x, logits): (&[f32], &mut [f32]),
        matmul: &mut MatmulScratch,
    ) {
        let own = self.linear.as_ref().map(|linear| &linear.weight);
        let Some(weight) = own.or(embed_tokens.matrix()) else {
            unreachable!("an embedding that is the head is in memory");
        };
        compute.matmul(weight, x, logits, matmul);
        if let Some(bias) = &self.bias {
            add_rows(compute, logits, bias);
        }
        if self.logits_divisor != 1.0 {
            logits
                .iter_mut()
                .for_each(|logit| *logit /= self.logits_divisor);
        }
    }
}
