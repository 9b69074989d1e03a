//! The decoder that all architectures are: an embedding, layers of attention and feed-forward, a head.
//!
//! An architecture (a file of `models/`) says which blocks its layers are made of; what runs is here.

use cadre_kernels::Compute;

use crate::blocks::{
    Attention, AttentionScratch, FeedForward, KvShape, LatentAttention, LatentScratch, LayerKv,
    Linear, Moe, MoeShape, Norm, Rope, RopeAngles, Step,
};
use crate::builder::Builder;
use crate::error::{EngineError, Result};
use crate::model::{Logits, Model, ModelInfo, Observer};
use crate::session::{Scratch, Session, SessionOptions, SessionShape};
use cadre_checkpoint::{ModelConfig, tensor_specs};
use cadre_kernels::{MatmulScratch, Matrix};

/// A decoder-only transformer.
#[derive(Debug)]
pub(crate) struct Decoder {
    info: ModelInfo,
    shape: SessionShape,
    compute: Compute,
    /// `[vocab, d]`.
    embed_tokens: Matrix,
    embedding_scale: f32,
    layers: Vec<Layer>,
    /// Factor on the output of every block.
    residual_scale: f32,
    norm: Norm,
    head: Head,
    /// Rotations; a layer says which one is its own.
    ropes: Vec<Rope>,
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
}

#[derive(Debug)]
pub(crate) enum AnyFeedForward {
    Moe(Moe),
    Dense(FeedForward),
}

#[derive(Debug)]
struct Head {
    /// `None`: the embedding.
    linear: Option<Linear>,
    bias: Option<Vec<f32>>,
    logits_divisor: f32,
}

/// Buffers of whichever attention the model has.
#[derive(Debug)]
pub(crate) enum AnyAttentionScratch {
    Grouped(AttentionScratch),
    Latent(LatentScratch),
}

impl AnyAttentionScratch {
    pub(crate) fn new(shape: &SessionShape, chunk: usize) -> Self {
        match &shape.mla {
            Some(mla) => Self::Latent(LatentScratch::new(shape.n_heads, mla, chunk)),
            None => Self::Grouped(AttentionScratch::new(
                shape.n_heads,
                shape.kv.n_kv_heads,
                shape.kv.key_dim,
                chunk,
            )),
        }
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

    /// Bytes of the matrices; norms are negligible.
    fn n_bytes(&self) -> usize {
        let attention = match &self.attention {
            AnyAttention::Grouped(block) => block.n_bytes(),
            AnyAttention::Latent(block) => block.n_bytes(),
        };
        let ffn = match &self.ffn {
            AnyFeedForward::Moe(block) => block.n_bytes(),
            AnyFeedForward::Dense(block) => block.n_bytes(),
        };
        attention + ffn
    }
}

impl Builder<'_> {
    /// Grouped-query attention as a layer's attention.
    pub(crate) fn grouped(&self, layer: usize) -> Result<AnyAttention> {
        Ok(AnyAttention::Grouped(self.attention(layer)?))
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
        let embed_tokens = self
            .weights
            .matrix("model.embed_tokens.weight", [vocab, d])?;
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
        let mut decoder = Decoder {
            info: info(&self),
            shape: session_shape(config),
            embed_tokens,
            embedding_scale: config.scales.embedding as f32,
            layers: layers?,
            residual_scale: config.scales.residual as f32,
            norm: self.norm("model.norm")?,
            head,
            ropes: ropes.into_iter().flatten().map(Rope::new).collect(),
            compute: self.compute,
        };
        decoder.info.weight_bytes = decoder.weight_bytes();
        if self.weights.n_kept() > 0 {
            tracing::warn!(
                n_matrices = self.weights.n_kept(),
                "some matrices stay as stored: their rows are not a multiple of 32, which q8_0 needs"
            );
        }
        Ok(decoder)
    }
}

fn session_shape(config: &ModelConfig) -> SessionShape {
    let kv = match config.attention.mla {
        Some(mla) => KvShape {
            n_layers: config.n_layers,
            n_kv_heads: 1,
            key_dim: mla.qk_rope_head_dim,
            value_dim: mla.kv_lora_rank,
        },
        None => KvShape {
            n_layers: config.n_layers,
            n_kv_heads: config.n_kv_heads,
            key_dim: config.head_dim,
            value_dim: config.head_dim,
        },
    };
    let moe = &config.moe;
    SessionShape {
        d_model: config.hidden_size,
        kv,
        mla: config.attention.mla,
        n_heads: config.n_heads,
        n_ropes: 1 + usize::from(config.local_rope.is_some()),
        moe: MoeShape {
            d_model: config.hidden_size,
            n_experts: moe.n_experts,
            max_picks: moe.top_k,
            d_expert: moe.intermediate_size,
            d_shared: moe.shared.map_or(0, |shared| shared.intermediate_size),
        },
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
    let mut per_expert = 3 * (config.hidden_size * moe.intermediate_size) as u64;
    if moe.expert_bias {
        per_expert += (2 * moe.intermediate_size + config.hidden_size) as u64;
    }
    let n_unused = (moe.layers.len() * (moe.n_experts - moe.top_k)) as u64;
    ModelInfo {
        model_type: config.model_type.clone(),
        digest: b.checkpoint.digest().to_owned(),
        vocab_size: config.vocab_size,
        d_model: config.hidden_size,
        n_layers: config.n_layers,
        moe_layers: config.moe_layers(),
        n_experts: moe.n_experts,
        top_k: moe.top_k,
        max_context: config.max_position_embeddings,
        eos_token_ids: config.eos_token_ids.clone(),
        n_params,
        n_active_params: n_params - n_unused * per_expert,
        weight_bytes: 0,
    }
}

impl Model for Decoder {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn compute(&self) -> &Compute {
        &self.compute
    }

    fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(
            self.compute.kernels(),
            &self.info,
            self.shape.clone(),
            options,
        )
    }

    fn forward<'s>(
        &self,
        session: &'s mut Session,
        tokens: &[u32],
        want: Logits,
        observer: &mut dyn Observer,
    ) -> Result<&'s mut [f32]> {
        self.check(session, tokens)?;
        let vocab = self.info.vocab_size;
        let n_rows = match want {
            Logits::None => 0,
            Logits::Last => tokens.len().min(1),
            Logits::All => tokens.len(),
        };
        if session.scratch.logits.len() < n_rows * vocab {
            session.scratch.logits.resize(n_rows * vocab, 0.0);
        }
        let mut n_done = 0;
        for chunk in tokens.chunks(session.chunk) {
            self.layers(session, chunk, observer)?;
            n_done += chunk.len();
            // Rows of this chunk that are wanted: its last ones.
            let wanted = match want {
                Logits::Last if n_done < tokens.len() => 0,
                Logits::None => 0,
                Logits::Last => 1,
                Logits::All => chunk.len(),
            };
            let first_row = if want == Logits::All {
                n_done - chunk.len()
            } else {
                0
            };
            self.head(session, chunk.len(), wanted, first_row)?;
            session.position += chunk.len();
        }
        Ok(&mut session.scratch.logits[..n_rows * vocab])
    }
}

impl Decoder {
    fn check(&self, session: &Session, tokens: &[u32]) -> Result<()> {
        if session.shape != self.shape {
            return Err(EngineError::ForeignSession);
        }
        let vocab_size = self.info.vocab_size;
        if let Some(token) = tokens
            .iter()
            .copied()
            .find(|token| *token as usize >= vocab_size)
        {
            return Err(EngineError::UnknownToken { token, vocab_size });
        }
        session.check_room(tokens.len())
    }

    /// Runs one chunk through the layers, leaving the residual stream in the session's scratch.
    fn layers(
        &self,
        session: &mut Session,
        tokens: &[u32],
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let d = self.info.d_model;
        let n = tokens.len() * d;
        let (position, n_ctx) = (session.position, session.n_ctx);
        let scratch = &mut session.scratch;
        for (row, token) in scratch.hidden.chunks_exact_mut(d).zip(tokens) {
            self.embed_tokens.row(*token as usize, row);
            if self.embedding_scale != 1.0 {
                row.iter_mut()
                    .for_each(|value| *value *= self.embedding_scale);
            }
        }
        for (rope, angles) in self.ropes.iter().zip(&mut scratch.angles) {
            rope.angles(position, tokens.len(), n_ctx, angles);
        }
        for (index, (layer, kv)) in self.layers.iter().zip(&mut session.kv.layers).enumerate() {
            let step = Step {
                compute: &self.compute,
                layer: index,
                position,
                n_tokens: tokens.len(),
            };
            self.attention(step, layer, kv, scratch, n);
            self.feed_forward(step, layer, scratch, n, observer)?;
        }
        Ok(())
    }

    /// `hidden += attention(norm(hidden))`.
    fn attention(
        &self,
        step: Step<'_>,
        layer: &Layer,
        kv: &mut LayerKv,
        scratch: &mut Scratch,
        n: usize,
    ) {
        let Scratch {
            hidden,
            normed,
            block_out,
            angles,
            attention,
            matmul,
            ..
        } = scratch;
        let angles: &RopeAngles = &angles[layer.rope];
        let (hidden, normed, out) = (&mut hidden[..n], &mut normed[..n], &mut block_out[..n]);
        layer.attention_norm.forward(step.compute, hidden, normed);
        match (&layer.attention, attention) {
            (AnyAttention::Grouped(block), AnyAttentionScratch::Grouped(scratch)) => {
                block.forward(step, angles, (normed, out), kv, (scratch, matmul));
            }
            (AnyAttention::Latent(block), AnyAttentionScratch::Latent(scratch)) => {
                block.forward(step, angles, (normed, out), kv, (scratch, matmul));
            }
            _ => unreachable!("a session's scratch is made for its model's attention"),
        }
        self.join(step, layer.attention_post_norm.as_ref(), out, hidden);
    }

    /// `hidden += feed_forward(norm(hidden))`.
    fn feed_forward(
        &self,
        step: Step<'_>,
        layer: &Layer,
        scratch: &mut Scratch,
        n: usize,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let Scratch {
            hidden,
            normed,
            block_out,
            moe,
            matmul,
            ..
        } = scratch;
        let (hidden, normed, out) = (&mut hidden[..n], &mut normed[..n], &mut block_out[..n]);
        layer.ffn_norm.forward(step.compute, hidden, normed);
        match &layer.ffn {
            AnyFeedForward::Moe(block) => block
                .forward(step, normed, out, (moe, matmul), observer)
                .map_err(|source| EngineError::Routing {
                    layer: step.layer,
                    position: step.position,
                    source,
                })?,
            AnyFeedForward::Dense(block) => {
                block.forward(step.compute, normed, out, (&mut moe.ffn, matmul));
            }
        }
        self.join(step, layer.ffn_post_norm.as_ref(), out, hidden);
        Ok(())
    }

    /// Adds a block's output to the stream.
    fn join(&self, step: Step<'_>, post_norm: Option<&Norm>, out: &mut [f32], hidden: &mut [f32]) {
        if let Some(norm) = post_norm {
            norm.forward_in_place(step.compute, out);
        }
        step.compute
            .kernels()
            .axpy(self.residual_scale, out, hidden);
    }

    /// Logits of the last `n_wanted` of the chunk's `n_tokens`, into rows from `first_row`.
    fn head(
        &self,
        session: &mut Session,
        n_tokens: usize,
        n_wanted: usize,
        first_row: usize,
    ) -> Result<()> {
        let (d, vocab) = (self.info.d_model, self.info.vocab_size);
        let Scratch {
            hidden,
            normed,
            matmul,
            logits,
            ..
        } = &mut session.scratch;
        let hidden = &hidden[(n_tokens - n_wanted) * d..n_tokens * d];
        let normed = &mut normed[..n_wanted * d];
        let logits = &mut logits[first_row * vocab..][..n_wanted * vocab];
        self.norm.forward(&self.compute, hidden, normed);
        self.head.forward(
            &self.compute,
            &self.embed_tokens,
            (normed, &mut *logits),
            matmul,
        );
        match logits.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(EngineError::NonFiniteLogits {
                position: session.position + n_tokens - n_wanted + at / vocab,
                token: at % vocab,
                value: logits[at],
                n_layers: self.info.n_layers,
            }),
        }
    }

    fn weight_bytes(&self) -> u64 {
        let head = self.head.linear.as_ref().map_or(0, Linear::n_bytes);
        let layers = self.layers.iter().map(Layer::n_bytes).sum::<usize>();
        (self.embed_tokens.n_bytes() + head + layers) as u64
    }
}

impl Head {
    fn forward(
        &self,
        compute: &Compute,
        embed_tokens: &Matrix,
        (x, logits): (&[f32], &mut [f32]),
        matmul: &mut MatmulScratch,
    ) {
        let weight = self.linear.as_ref().map_or(embed_tokens, |l| &l.weight);
        compute.matmul(weight, x, logits, matmul);
        if let Some(bias) = &self.bias {
            crate::blocks::add_rows(logits, bias);
        }
        if self.logits_divisor != 1.0 {
            logits
                .iter_mut()
                .for_each(|logit| *logit /= self.logits_divisor);
        }
    }
}
