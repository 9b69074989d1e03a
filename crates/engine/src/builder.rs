//! From tensors to blocks: the parts that architectures share, read as the configuration describes them.

use std::sync::{Arc, OnceLock};

use cadre_checkpoint::{Factors, ModelConfig, NormKind, QkNorm};
use cadre_kernels::Matrix;

use crate::blocks::{
    Attention, Experts, Factored, FactoredExpert, FeedForward, GruCell, LatentAttention,
    LossyRules, Moe, Norm, QueryProjection, Residual, Shared, factored_rows,
};
use crate::error::{EngineError, Result};
use crate::lossy::Weighing;
use crate::weights::{Weights, weight_error};

/// Builds blocks from the tensors of one checkpoint.
pub(crate) struct Builder<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: Weights<'a>,
    /// What recurrent routers share, once the first of them is there.
    pub(crate) router_cell: OnceLock<Arc<GruCell>>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(weights: Weights<'a>) -> Self {
        Self {
            config: weights.config(),
            weights,
            router_cell: OnceLock::new(),
        }
    }

    /// A norm over the residual stream: `model.norm`, `model.layers.0.input_layernorm`.
    pub(crate) fn norm(&self, name: &str) -> Result<Norm> {
        let width = self.config.hidden_size;
        let mut weight = self.weights.vector(&format!("{name}.weight"), width)?;
        let eps = self.config.norm_eps as f32;
        match self.config.norm {
            NormKind::Rms => Ok(Norm::Rms { weight, eps }),
            NormKind::RmsPlusOne => {
                weight.iter_mut().for_each(|w| *w += 1.0);
                Ok(Norm::Rms { weight, eps })
            }
            kind @ (NormKind::LayerNorm | NormKind::RmsWithBias) => {
                let bias = self.weights.vector(&format!("{name}.bias"), width)?;
                let centred = kind == NormKind::LayerNorm;
                Ok(Norm::Biased {
                    weight,
                    bias,
                    centred,
                    eps,
                })
            }
        }
    }

    /// An RMS norm of another width inside of attention.
    pub(crate) fn inner_norm(&self, name: &str, width: usize) -> Result<Norm> {
        let mut weight = self.weights.vector(&format!("{name}.weight"), width)?;
        if self.config.norm == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        let eps = self.config.norm_eps as f32;
        Ok(Norm::Rms { weight, eps })
    }

    /// A norm of latent attention. The models were trained with this epsilon there, whatever `rms_norm_eps` says.
    fn latent_norm(&self, name: &str, width: usize) -> Result<Norm> {
        let weight = self.weights.vector(&format!("{name}.weight"), width)?;
        Ok(Norm::Rms { weight, eps: 1e-6 })
    }

    /// Grouped-query attention of `layer`.
    pub(crate) fn attention(&self, layer: usize) -> Result<Attention> {
        let (config, attention) = (self.config, &self.config.attention);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let (d, head_dim) = (config.hidden_size, config.head_dim);
        let (q_dim, kv_dim) = (config.n_heads * head_dim, config.n_kv_heads * head_dim);
        let linear = |part: &str, n_out: usize| {
            self.weights
                .linear(&name(part), [n_out, d], attention.qkv_bias)
        };
        let (q_norm, k_norm) = match attention.qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead => (Some(head_dim), Some(head_dim)),
            QkNorm::WholeProjection => (Some(q_dim), Some(kv_dim)),
        };
        let norm = |part: &str, width: Option<usize>| {
            width
                .map(|width| self.inner_norm(&name(part), width))
                .transpose()
        };
        let sinks = attention
            .sinks
            .then(|| self.weights.vector(&name("sinks"), config.n_heads));
        Ok(Attention {
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            head_dim,
            q_proj: linear("q_proj", q_dim)?,
            k_proj: linear("k_proj", kv_dim)?,
            v_proj: linear("v_proj", kv_dim)?,
            o_proj: self
                .weights
                .linear(&name("o_proj"), [d, q_dim], attention.o_bias)?,
            q_norm: norm("q_norm", q_norm)?,
            k_norm: norm("k_norm", k_norm)?,
            clip: attention.clip_qkv.map(|clip| clip as f32),
            scale: attention.scale as f32,
            sinks: sinks.transpose()?,
            window: attention.windows[layer],
        })
    }

    /// Multi-head latent attention of `layer`.
    pub(crate) fn latent_attention(&self, layer: usize) -> Result<LatentAttention> {
        let (config, attention) = (self.config, &self.config.attention);
        let Some(mla) = attention.mla else {
            return Err(EngineError::Configuration {
                model_type: config.model_type.clone(),
                problem: "it has no sizes of latent attention".to_owned(),
            });
        };
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let (d, n_heads, latent) = (config.hidden_size, config.n_heads, mla.kv_lora_rank);
        let q_dim = n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
        let q = match mla.q_lora_rank {
            None => {
                QueryProjection::Direct(self.weights.linear(&name("q_proj"), [q_dim, d], false)?)
            }
            Some(rank) => QueryProjection::LowRank {
                q_a_proj: self
                    .weights
                    .linear(&name("q_a_proj"), [rank, d], attention.qkv_bias)?,
                q_a_norm: self.latent_norm(&name("q_a_layernorm"), rank)?,
                q_b_proj: self
                    .weights
                    .linear(&name("q_b_proj"), [q_dim, rank], false)?,
            },
        };
        let (k_b, v_b) = self.latent_heads(layer)?;
        Ok(LatentAttention {
            n_heads,
            mla,
            q,
            kv_a_proj: self.weights.linear(
                &name("kv_a_proj_with_mqa"),
                [latent + mla.qk_rope_head_dim, d],
                attention.qkv_bias,
            )?,
            kv_a_norm: self.latent_norm(&name("kv_a_layernorm"), latent)?,
            k_b,
            v_b,
            o_proj: self.weights.linear(
                &name("o_proj"),
                [d, n_heads * mla.v_head_dim],
                attention.o_bias,
            )?,
            scale: attention.scale as f32,
        })
    }

    /// The two halves of the latent's expansion, per head: `[latent, nope]` and `[v, latent]`.
    fn latent_heads(&self, layer: usize) -> Result<(Vec<Matrix>, Vec<Matrix>)> {
        let Some(mla) = self.config.attention.mla else {
            return Ok((Vec::new(), Vec::new()));
        };
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let (n_heads, latent) = (self.config.n_heads, mla.kv_lora_rank);
        let (nope, v) = (mla.qk_nope_head_dim, mla.v_head_dim);
        if mla.split_kv_b {
            let k_b = self
                .weights
                .matrices(&name("k_b_proj"), [n_heads, latent, nope])?;
            let v_b = self
                .weights
                .matrices(&name("v_b_proj"), [n_heads, v, latent])?;
            return Ok((k_b, v_b));
        }
        let name = name("kv_b_proj");
        let rows = n_heads * (nope + v);
        let both = self
            .weights
            .stored(&name, &[rows, latent], [rows, latent])?;
        let (mut k_b, mut v_b) = (Vec::new(), Vec::new());
        for head in 0..n_heads {
            let first = head * (nope + v);
            let transposed = transpose(&both.rows(first..first + nope))
                .map_err(|source| weight_error(&name, source))?;
            k_b.push(self.weights.placed(self.weights.wanted(&name, transposed)?));
            let values = both.rows(first + nope..first + nope + v);
            v_b.push(self.weights.placed(self.weights.wanted(&name, values)?));
        }
        Ok((k_b, v_b))
    }

    /// The feed-forward whose tensors start with `prefix`.
    pub(crate) fn feed_forward(
        &self,
        prefix: &str,
        width: usize,
        bias: bool,
    ) -> Result<FeedForward> {
        let d = self.config.hidden_size;
        let linear = |part: &str, shape| {
            self.weights
                .linear(&format!("{prefix}.{part}"), shape, bias)
        };
        Ok(FeedForward {
            gate_proj: linear("gate_proj", [width, d])?,
            up_proj: linear("up_proj", [width, d])?,
            down_proj: linear("down_proj", [d, width])?,
            activation: self.config.activation,
        })
    }

    /// The experts of `layer`, with their router and what they share.
    pub(crate) fn moe(&self, layer: usize) -> Result<Moe> {
        let prefix = format!("model.layers.{layer}.mlp");
        Ok(Moe {
            router: self.router(layer)?,
            policy: self.policy(layer)?,
            lossy: self.lossy_rules(),
            experts: self.experts(layer, &prefix)?,
            weights_of: self.weights_of(layer),
            shared: self.shared(&prefix)?,
            residual: self.residual(&prefix)?,
        })
    }

    /// Who has whose weights, where experts of `layer` share them.
    fn weights_of(&self, layer: usize) -> Option<Vec<u16>> {
        let moe = &self.config.moe;
        let at = moe.layers.binary_search(&layer).ok()?;
        moe.shared_weights.get(at).cloned()
    }

    fn lossy_rules(&self) -> Option<Box<LossyRules>> {
        let lossy = self.weights.lossy;
        let weighing = Weighing::of(&self.config.moe.router);
        (!lossy.is_none()).then(|| Box::new(LossyRules { lossy, weighing }))
    }

    fn experts(&self, layer: usize, prefix: &str) -> Result<Experts> {
        let moe = &self.config.moe;
        let n_experts = self.config.n_stored_in(layer);
        let before = moe.layers.iter().take_while(|l| **l < layer).count();
        if let Some(store) = &self.weights.store {
            return Ok(Experts::Streamed {
                store: Arc::clone(store),
                layer: before as u16,
                n_experts: match self.weights.lossy.low_bit {
                    None => n_experts,
                    Some(_) => 2 * n_experts,
                },
            });
        }
        if let Some(factors) = &moe.factors {
            let experts = (0..n_experts).map(|expert| {
                let sizes = (factors.rank, factors.rows_of(before, expert));
                self.factored(&format!("{prefix}.experts.{expert}"), sizes)
            });
            return Ok(Experts::Factored(experts.collect::<Result<_>>()?));
        }
        // Checking and quantising is most of the work of loading, and experts are most of the weights.
        let mut slots: Vec<Option<Result<FeedForward>>> = (0..n_experts).map(|_| None).collect();
        let pool = self.weights.compute.pool();
        pool.for_each_chunk(&mut slots, 1, |expert, slot| {
            let prefix = format!("{prefix}.experts.{expert}");
            slot[0] = Some(self.feed_forward(&prefix, moe.intermediate_size, moe.expert_bias));
        });
        let experts: Result<Vec<FeedForward>> = slots.into_iter().flatten().collect();
        Ok(Experts::Resident(experts?))
    }

    /// An expert in factors of `rank`, with `rows` in its gate, up and down matrices.
    fn factored(&self, prefix: &str, (rank, rows): (usize, [usize; 3])) -> Result<FactoredExpert> {
        let (d, width) = (self.config.hidden_size, self.config.moe.intermediate_size);
        let part = |at: usize, [n_out, n_in]: [usize; 2]| -> Result<Factored> {
            let (part, n_rows) = (Factors::PARTS[at], rows[at]);
            let name = |what: &str| format!("{prefix}.{part}.{what}");
            let rows = match n_rows {
                0 => Vec::new(),
                n => self.weights.vector(&name("rows"), n)?,
            };
            let inner = self
                .weights
                .linear(&name("inner"), [rank + n_rows, n_in], false)?;
            let outer = self.weights.linear(&name("outer"), [n_out, rank], false)?;
            Ok(Factored {
                inner: inner.weight,
                outer: outer.weight,
                rows: factored_rows(&self.config.model_type, &name("rows"), rows, n_out)?,
            })
        };
        Ok(FactoredExpert {
            gate_proj: part(0, [width, d])?,
            up_proj: part(1, [width, d])?,
            down_proj: part(2, [d, width])?,
            activation: self.config.activation,
        })
    }

    fn shared(&self, prefix: &str) -> Result<Option<Shared>> {
        let Some(shared) = self.config.moe.shared else {
            return Ok(None);
        };
        let d = self.config.hidden_size;
        let gate = shared.gated.then(|| {
            let name = format!("{prefix}.shared_expert_gate.weight");
            self.weights.values(&name, &[1, d])
        });
        let name = format!("{prefix}.shared_experts");
        Ok(Some(Shared {
            expert: self.feed_forward(&name, shared.intermediate_size, false)?,
            gate: gate.transpose()?,
        }))
    }

    fn residual(&self, prefix: &str) -> Result<Option<Residual>> {
        let Some(residual) = self.config.moe.residual else {
            return Ok(None);
        };
        let coefficient = match residual.learned {
            false => None,
            true => {
                let name = |part| format!("{prefix}.residual_coefficient.{part}");
                let shape = [2, self.config.hidden_size];
                let weight = self.weights.values(&name("weight"), &shape)?;
                let bias = self.weights.vector(&name("bias"), 2)?;
                Some((weight, [bias[0], bias[1]]))
            }
        };
        let name = format!("{prefix}.residual_mlp");
        Ok(Some(Residual {
            mlp: self.feed_forward(&name, residual.intermediate_size, false)?,
            coefficient,
        }))
    }
}

/// `[rows, cols]` to `[cols, rows]`, in f32 unless the values are bf16 or f16, which stay what they are.
pub(crate) fn transpose(
    matrix: &Matrix,
) -> std::result::Result<Matrix, cadre_kernels::MatrixError> {
    let (rows, cols) = (matrix.n_out(), matrix.n_in());
    let mut values = vec![0.0; rows * cols];
    let mut row = vec![0.0; cols];
    for r in 0..rows {
        matrix.row(r, &mut row);
        for (c, value) in row.iter().enumerate() {
            values[c * rows + r] = *value;
        }
    }
    let transposed = Matrix::from_f32(cols, rows, values)?;
    let transposed = match matrix.format() {
        format @ (cadre_kernels::Format::Bf16 | cadre_kernels::Format::F16) => {
            transposed.to_format(format)?
        }
        _ => transposed,
    };
    Ok(match matrix.has_float_activations() {
        true => transposed.with_float_activations(),
        false => transposed,
    })
}
