//! Qwen3-MoE: pre-norm decoder layers of grouped-query attention and a top-k mixture of SwiGLU experts.
//!
//! Published as `Qwen3MoeForCausalLM` (Qwen3-30B-A3B and others). Query and key heads are normed before
//! the rotary positions; some layers may be dense; the head may be the embedding.

use std::sync::Arc;

use cadre_checkpoint::{Checkpoint, ModelConfig, tensor_specs};
use cadre_kernels::{Compute, Matrix};
use cadre_routing::policies::TopK;

use crate::blocks::{
    Attention, Experts, KvShape, LayerKv, Moe, MoeShape, RmsNorm, Rope, Step, SwiGlu,
};
use crate::error::{EngineError, Result};
use crate::model::{Logits, Model, ModelInfo, Observer};
use crate::session::{Scratch, Session, SessionOptions, SessionShape};
use crate::weights::Weights;

#[derive(Debug)]
struct Qwen3Moe {
    info: ModelInfo,
    shape: SessionShape,
    compute: Compute,
    /// `[vocab, d]`.
    embed_tokens: Matrix,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// `[vocab, d]`; the embedding when absent.
    lm_head: Option<Matrix>,
    rope: Rope,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: FeedForward,
}

#[derive(Debug)]
enum FeedForward {
    Moe(Moe),
    Dense(SwiGlu),
}

impl Layer {
    /// Bytes of the matrices; norms are negligible.
    fn n_bytes(&self) -> usize {
        let mlp = match &self.mlp {
            FeedForward::Moe(moe) => moe.n_bytes(),
            FeedForward::Dense(dense) => dense.n_bytes(),
        };
        self.self_attn.n_bytes() + mlp
    }
}

/// Loads a checkpoint whose tensor names and shapes have been checked.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    weights: &Weights<'_>,
    compute: Compute,
) -> Result<Arc<dyn Model>> {
    let config = checkpoint.config();
    let (vocab, d) = (config.vocab_size, config.hidden_size);
    let embed_tokens = weights.matrix("model.embed_tokens.weight", vocab, d)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(weights.matrix("lm_head.weight", vocab, d)?),
    };
    let layers: Result<Vec<Layer>> = (0..config.n_layers)
        .map(|layer| load_layer(weights, config, &compute, layer))
        .collect();
    let mut model = Qwen3Moe {
        info: info(checkpoint),
        shape: session_shape(config),
        compute,
        embed_tokens,
        layers: layers?,
        norm: norm(weights, config, "model.norm.weight", d)?,
        lm_head,
        rope: Rope::new(config.head_dim, config.rope.theta),
    };
    model.info.weight_bytes = model.weight_bytes();
    Ok(Arc::new(model))
}

fn load_layer(
    weights: &Weights<'_>,
    config: &ModelConfig,
    compute: &Compute,
    layer: usize,
) -> Result<Layer> {
    let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
    let (d, head_dim) = (config.hidden_size, config.head_dim);
    let (q_dim, kv_dim) = (config.n_heads * head_dim, config.n_kv_heads * head_dim);
    let self_attn = Attention {
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim,
        q_proj: weights.matrix(&name("self_attn.q_proj"), q_dim, d)?,
        k_proj: weights.matrix(&name("self_attn.k_proj"), kv_dim, d)?,
        v_proj: weights.matrix(&name("self_attn.v_proj"), kv_dim, d)?,
        o_proj: weights.matrix(&name("self_attn.o_proj"), d, q_dim)?,
        q_norm: norm(weights, config, &name("self_attn.q_norm"), head_dim)?,
        k_norm: norm(weights, config, &name("self_attn.k_norm"), head_dim)?,
    };
    let mlp = if config.is_moe_layer(layer) {
        FeedForward::Moe(load_moe(weights, config, compute, layer)?)
    } else {
        let prefix = format!("model.layers.{layer}.mlp");
        FeedForward::Dense(load_swiglu(weights, &prefix, config.intermediate_size, d)?)
    };
    Ok(Layer {
        input_layernorm: norm(weights, config, &name("input_layernorm"), d)?,
        self_attn,
        post_attention_layernorm: norm(weights, config, &name("post_attention_layernorm"), d)?,
        mlp,
    })
}

fn load_moe(
    weights: &Weights<'_>,
    config: &ModelConfig,
    compute: &Compute,
    layer: usize,
) -> Result<Moe> {
    let prefix = format!("model.layers.{layer}.mlp");
    let policy = TopK::new(
        config.moe.n_experts,
        config.moe.top_k,
        config.moe.norm_topk_prob(),
    )
    .map_err(|source| EngineError::Routing {
        layer,
        position: 0,
        source,
    })?;
    // Quantising is most of the work of loading, and experts are most of the weights.
    let mut slots: Vec<Option<Result<SwiGlu>>> = (0..config.moe.n_experts).map(|_| None).collect();
    compute
        .pool()
        .for_each_chunk(&mut slots, 1, |expert, slot| {
            let prefix = format!("{prefix}.experts.{expert}");
            let width = config.moe.intermediate_size;
            slot[0] = Some(load_swiglu(weights, &prefix, width, config.hidden_size));
        });
    let experts: Result<Vec<SwiGlu>> = slots.into_iter().flatten().collect();
    Ok(Moe {
        gate: weights.matrix_f32(
            &format!("{prefix}.gate.weight"),
            config.moe.n_experts,
            config.hidden_size,
        )?,
        policy: Box::new(policy),
        experts: Experts::new(experts?),
    })
}

fn load_swiglu(weights: &Weights<'_>, prefix: &str, width: usize, d: usize) -> Result<SwiGlu> {
    Ok(SwiGlu {
        gate_proj: weights.matrix(&format!("{prefix}.gate_proj.weight"), width, d)?,
        up_proj: weights.matrix(&format!("{prefix}.up_proj.weight"), width, d)?,
        down_proj: weights.matrix(&format!("{prefix}.down_proj.weight"), d, width)?,
    })
}

fn norm(weights: &Weights<'_>, config: &ModelConfig, name: &str, n: usize) -> Result<RmsNorm> {
    Ok(RmsNorm::new(
        weights.vector(name, n)?,
        config.norm_eps as f32,
    ))
}

fn session_shape(config: &ModelConfig) -> SessionShape {
    let has_dense = config.moe_layers().len() < config.n_layers;
    SessionShape {
        d_model: config.hidden_size,
        kv: KvShape {
            n_layers: config.n_layers,
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
        },
        n_heads: config.n_heads,
        moe: MoeShape {
            d_model: config.hidden_size,
            n_experts: config.moe.n_experts,
            max_picks: config.moe.top_k,
            d_expert: config.moe.intermediate_size,
        },
        d_dense: if has_dense {
            config.intermediate_size
        } else {
            0
        },
    }
}

fn info(checkpoint: &Checkpoint) -> ModelInfo {
    let config = checkpoint.config();
    let n_params: u64 = tensor_specs(config)
        .iter()
        .map(|(_, shape)| shape.iter().map(|n| *n as u64).product::<u64>())
        .sum();
    let per_expert = 3 * (config.hidden_size * config.moe.intermediate_size) as u64;
    let moe_layers = config.moe_layers();
    let n_unused = (moe_layers.len() * (config.moe.n_experts - config.moe.top_k)) as u64;
    ModelInfo {
        model_type: config.model_type.clone(),
        digest: checkpoint.digest().to_owned(),
        vocab_size: config.vocab_size,
        d_model: config.hidden_size,
        n_layers: config.n_layers,
        moe_layers,
        n_experts: config.moe.n_experts,
        top_k: config.moe.top_k,
        max_context: config.max_position_embeddings,
        eos_token_ids: config.eos_token_ids.clone(),
        n_params,
        n_active_params: n_params - n_unused * per_expert,
        weight_bytes: 0,
    }
}

impl Model for Qwen3Moe {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn compute(&self) -> &Compute {
        &self.compute
    }

    fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(&self.info, self.shape.clone(), options)
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

impl Qwen3Moe {
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
        let kernels = self.compute.kernels();
        let position = session.position;
        let Scratch {
            hidden,
            normed,
            block_out,
            attention,
            moe,
            matmul,
            ..
        } = &mut session.scratch;
        let (hidden, normed, block_out) = (&mut hidden[..n], &mut normed[..n], &mut block_out[..n]);
        for (row, token) in hidden.chunks_exact_mut(d).zip(tokens) {
            self.embed_tokens.row(*token as usize, row);
        }
        self.rope
            .angles(position, tokens.len(), &mut attention.angles);
        for (index, (layer, kv)) in self.layers.iter().zip(&mut session.kv.layers).enumerate() {
            let kv: &mut LayerKv = kv;
            let compute = &self.compute;
            let step = Step {
                compute,
                layer: index,
                position,
                n_tokens: tokens.len(),
            };
            layer.input_layernorm.forward(compute, hidden, normed);
            layer
                .self_attn
                .forward(step, normed, block_out, kv, (attention, matmul));
            kernels.axpy(1.0, block_out, hidden);
            layer
                .post_attention_layernorm
                .forward(compute, hidden, normed);
            match &layer.mlp {
                FeedForward::Moe(block) => block
                    .forward(step, normed, block_out, (moe, matmul), observer)
                    .map_err(|source| EngineError::Routing {
                        layer: index,
                        position,
                        source,
                    })?,
                FeedForward::Dense(block) => {
                    block.forward(compute, normed, block_out, (&mut moe.ffn, matmul));
                }
            }
            kernels.axpy(1.0, block_out, hidden);
        }
        Ok(())
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
        let head = self.lm_head.as_ref().unwrap_or(&self.embed_tokens);
        self.compute.matmul(head, normed, logits, matmul);
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
        let head = self.lm_head.as_ref().map_or(0, Matrix::n_bytes);
        let layers = self.layers.iter().map(Layer::n_bytes).sum::<usize>();
        (self.embed_tokens.n_bytes() + head + layers) as u64
    }
}
