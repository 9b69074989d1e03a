//! Grouped-query attention, with norms on queries and keys (Qwen3) or without (Llama).

use crate::init::Init;
use crate::ops::{self, AttentionShape};
use burn::module::{Module, Param};
use burn::tensor::Tensor;
use cadre_checkpoint::{ModelConfig, QkNorm};

/// Parameters; matrices are `[out, in]`.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[n_heads * head_dim, d_model]`
    pub q_proj: Param<Tensor<2>>,
    /// `[n_kv_heads * head_dim, d_model]`
    pub k_proj: Param<Tensor<2>>,
    /// `[n_kv_heads * head_dim, d_model]`
    pub v_proj: Param<Tensor<2>>,
    /// `[d_model, n_heads * head_dim]`
    pub o_proj: Param<Tensor<2>>,
    /// `[head_dim]`, per head, before RoPE; absent where queries are taken as they are
    pub q_norm: Option<Param<Tensor<1>>>,
    /// As `q_norm`, for keys
    pub k_norm: Option<Param<Tensor<1>>>,
    /// Router, `[n_experts, d_model]`; absent where all tokens use all heads
    pub gate: Option<Param<Tensor<2>>>,
}

impl SelfAttention {
    /// Random parameters; `name` is the tensors' prefix, `residual_scale` shrinks the output projection.
    #[must_use]
    pub fn init(config: &ModelConfig, init: &Init, name: &str, residual_scale: f32) -> Self {
        let d = config.hidden_size;
        let q_width = config.n_heads * config.head_dim;
        let kv_width = config.n_kv_heads * config.head_dim;
        let matrix = |part: &str, shape, scale| {
            Param::from_tensor(init.normal(&format!("{name}.{part}"), shape, scale))
        };
        let normed = config.attention.qk_norm == QkNorm::PerHead;
        let norm = || normed.then(|| Param::from_tensor(init.ones(config.head_dim)));
        let experts = config.attention.experts;
        Self {
            q_proj: matrix("q_proj", [q_width, d], 1.0),
            k_proj: matrix("k_proj", [kv_width, d], 1.0),
            v_proj: matrix("v_proj", [kv_width, d], 1.0),
            o_proj: matrix("o_proj", [d, q_width], residual_scale),
            q_norm: norm(),
            k_norm: norm(),
            gate: experts.map(|experts| matrix("gate", [experts.n_experts, d], 1.0)),
        }
    }

    /// `x [T, d_model]` -> `[T, d_model]`, by all heads.
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, shape: AttentionShape) -> Tensor<2> {
        let matrices = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        self.attend(x, matrices.map(|matrix| matrix.val()), shape)
    }

    /// As [`Self::forward`], by the heads of `shape`, whose q, k, v and output projections are given.
    pub(super) fn attend(
        &self,
        x: Tensor<2>,
        [q_proj, k_proj, v_proj, o_proj]: [Tensor<2>; 4],
        shape: AttentionShape,
    ) -> Tensor<2> {
        let norm = |norm: &Option<Param<Tensor<1>>>| match norm {
            Some(norm) => norm.val(),
            None => Tensor::zeros([0], &x.device()),
        };
        let norms = [norm(&self.q_norm), norm(&self.k_norm)];
        let precision = shape.precision;
        let q = precision.linear(x.clone(), q_proj);
        let k = precision.linear(x.clone(), k_proj);
        let v = precision.linear(x, v_proj);
        precision.linear(ops::attention([q, k, v], norms, shape), o_proj)
    }
}
