//! From tensors to the experts of attention: every expert gets its heads' rows of the projections, and their columns of
//! the output projection.

use std::ops::Range;

use cadre_checkpoint::{AttentionExperts as Sizes, QkNorm};
use cadre_kernels::Matrix;
use cadre_routing::policies::Union;

use crate::blocks::{Attention, AttentionExperts, Linear, Norm, Rope};
use crate::builder::{Builder, transpose};
use crate::error::{EngineError, Result};
use crate::weights::weight_error;

impl Builder<'_> {
    /// Attention of `layer` in experts of these sizes.
    pub(crate) fn attention_experts(&self, layer: usize, sizes: Sizes) -> Result<AttentionExperts> {
        let (config, n) = (self.config, sizes.n_experts);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let d = config.hidden_size;
        let (q_dim, kv_dim) = (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        );
        let whole = |part: &str, shape: [usize; 2]| self.weights.stored(&name(part), &shape, shape);
        let (q, o) = (whole("q_proj", [q_dim, d])?, whole("o_proj", [d, q_dim])?);
        let (k, v) = (whole("k_proj", [kv_dim, d])?, whole("v_proj", [kv_dim, d])?);
        let expert = |index: usize| -> Result<Attention> {
            let (of_q, of_kv) = (share(q_dim, (index, n)), share(kv_dim, (index, n)));
            let o = columns(&o, of_q.clone());
            let o = o.map_err(|source| weight_error(&name("o_proj"), source))?;
            Ok(Attention {
                n_heads: config.n_heads / n,
                n_kv_heads: config.n_kv_heads / n,
                head_dim: config.head_dim,
                q_proj: self.piece(&name("q_proj"), q.rows(of_q))?,
                k_proj: self.piece(&name("k_proj"), k.rows(of_kv.clone()))?,
                v_proj: self.piece(&name("v_proj"), v.rows(of_kv))?,
                o_proj: self.piece(&name("o_proj"), o)?,
                q_norm: self.head_norm(layer, "q_norm")?,
                k_norm: self.head_norm(layer, "k_norm")?,
                clip: config.attention.clip_qkv.map(|clip| clip as f32),
                scale: config.attention.scale as f32,
                sinks: None,
                window: None,
            })
        };
        let policy = Union::new(n, sizes.top_k, 1.0, sizes.eps as f32);
        let policy = policy.map_err(|source| EngineError::Routing {
            layer,
            position: 0,
            source,
        })?;
        Ok(AttentionExperts {
            gate: Linear {
                weight: self.weights.matrix_f32(&name("gate"), [n, d])?,
                bias: None,
            },
            policy: Box::new(policy),
            experts: (0..n).map(expert).collect::<Result<_>>()?,
            rope: Rope::new(&config.rope),
        })
    }

    /// A part of the matrix `name`, where it is to be multiplied.
    fn piece(&self, name: &str, part: Matrix) -> Result<Linear> {
        let weight = self.weights.placed(self.weights.wanted(name, part)?);
        Ok(Linear { weight, bias: None })
    }

    /// The norm that all heads of queries or keys share, if they are normed.
    fn head_norm(&self, layer: usize, part: &str) -> Result<Option<Norm>> {
        let normed = self.config.attention.qk_norm == QkNorm::PerHead;
        let name = format!("model.layers.{layer}.self_attn.{part}");
        normed
            .then(|| self.inner_norm(&name, self.config.head_dim))
            .transpose()
    }
}

/// The `index`-th of `n` equal parts of `0..len`.
fn share(len: usize, (index, n): (usize, usize)) -> Range<usize> {
    let part = len / n;
    index * part..(index + 1) * part
}

/// Some columns of a matrix as one of their own.
fn columns(
    matrix: &Matrix,
    range: Range<usize>,
) -> std::result::Result<Matrix, cadre_kernels::MatrixError> {
    transpose(&transpose(matrix)?.rows(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_whole_and_columns_are_columns() {
        let parts: Vec<_> = (0..3).map(|index| share(6, (index, 3))).collect();
        assert_eq!(parts, [0..2, 2..4, 4..6]);
        let matrix = Matrix::from_f32(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let right = columns(&matrix, 1..3).unwrap();
        let mut row = [0.0; 2];
        right.row(1, &mut row);
        assert_eq!((right.n_out(), row), (2, [5.0, 6.0]));
    }
}
