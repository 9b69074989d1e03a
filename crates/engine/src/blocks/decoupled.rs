//! The router that runs before the model: a small decoder over token ids whose logits all layers pick by (Read-ME, arXiv
//! 2410.19123).
//!
//! It has caches of its own in every session, behind those of the model's layers, so that a session is rewound, cut into
//! chunks and batched with others as any other is. Everything in it is f32.

use cadre_kernels::{Compute, MatmulScratch, Matrix};

use super::{
    Attention, AttentionScratch, Embedding, FeedForward, FeedForwardScratch, Norm, Rope,
    RopeAngles, Step,
};
use crate::batch::Sequence;
use crate::error::Result;

/// The network.
#[derive(Debug)]
pub(crate) struct DecoupledRouter {
    /// `[vocab, d]`.
    pub(crate) table: Embedding,
    pub(crate) layers: Vec<RouterLayer>,
    pub(crate) norm: Norm,
    /// `[n_logits, d]`.
    pub(crate) head: Matrix,
    pub(crate) rope: Rope,
    /// Index of its first layer's cache in a session.
    pub(crate) first_cache: usize,
}

/// One of its layers.
#[derive(Debug)]
pub(crate) struct RouterLayer {
    pub(crate) attention_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) ffn_norm: Norm,
    pub(crate) ffn: FeedForward,
}

/// Sizes that sessions and workspaces are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecoupledShape {
    /// Width of the stream.
    pub(crate) d: usize,
    pub(crate) n_layers: usize,
    pub(crate) n_heads: usize,
    pub(crate) head_dim: usize,
    /// Width of a feed-forward.
    pub(crate) d_inner: usize,
    /// Logits of a token.
    pub(crate) n_logits: usize,
}

/// Buffers of [`DecoupledRouter`], for the rows of a pass.
#[derive(Debug)]
pub(crate) struct DecoupledScratch {
    /// `[rows, d]` each.
    hidden: Vec<f32>,
    normed: Vec<f32>,
    block_out: Vec<f32>,
    angles: RopeAngles,
    attention: AttentionScratch,
    ffn: FeedForwardScratch,
}

impl DecoupledShape {
    /// Values of the widest input of a product, per row.
    pub(crate) fn widest(&self) -> usize {
        self.d.max(self.n_heads * self.head_dim).max(self.d_inner)
    }
}

impl DecoupledScratch {
    /// For `capacity` rows.
    pub(crate) fn new(shape: &DecoupledShape, capacity: usize) -> Self {
        let rows = || vec![0.0; capacity * shape.d];
        let (heads, head_dim) = (shape.n_heads, shape.head_dim);
        Self {
            hidden: rows(),
            normed: rows(),
            block_out: rows(),
            angles: RopeAngles::default(),
            attention: AttentionScratch::new(heads, heads, head_dim, capacity),
            ffn: FeedForwardScratch::new(capacity * shape.d_inner),
        }
    }
}

impl DecoupledRouter {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        all.extend(self.table.matrix());
        for layer in &self.layers {
            layer.attention.matrices(all);
            layer.ffn.matrices(all);
        }
        all.push(&self.head);
    }

    /// The logits of every token of the pass, `[rows, n_logits]`. The sessions of `batch` remember the tokens.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        tokens: &[u32],
        batch: &mut [Sequence<'_>],
        logits: &mut [f32],
        (scratch, matmul): (&mut DecoupledScratch, &mut MatmulScratch),
    ) -> Result<()> {
        let compute = step.compute;
        let n = tokens.len() * self.norm.width();
        let hidden = &mut scratch.hidden[..n];
        let normed = &mut scratch.normed[..n];
        let block_out = &mut scratch.block_out[..n];
        self.table.rows(compute, tokens, 1.0, hidden)?;
        let angles = &mut scratch.angles;
        self.rope.angles(compute, step.spans, angles);
        for (index, layer) in self.layers.iter().enumerate() {
            let step = Step {
                layer: self.first_cache + index,
                ..step
            };
            layer.attention_norm.forward(compute, hidden, normed);
            let attention = (&mut scratch.attention, &mut *matmul);
            layer
                .attention
                .remember(step, angles, normed, batch, attention);
            let (rows, attention) = (
                (&*normed, &mut *block_out),
                (&mut scratch.attention, &mut *matmul),
            );
            layer
                .attention
                .forward(step, angles, rows, batch, attention);
            self.join(compute, block_out, hidden);
            layer.ffn_norm.forward(compute, hidden, normed);
            let ffn = (&mut scratch.ffn, &mut *matmul);
            layer.ffn.forward(compute, normed, block_out, ffn);
            self.join(compute, block_out, hidden);
        }
        self.norm.forward(compute, hidden, normed);
        compute.matmul(&self.head, normed, logits, matmul);
        Ok(())
    }

    /// Adds a block's output to the stream.
    fn join(&self, compute: &Compute, out: &[f32], hidden: &mut [f32]) {
        let (d, kernels) = (self.norm.width(), compute.kernels());
        compute.for_each_chunk(hidden, d, d, |row, hidden| {
            kernels.axpy(1.0, &out[row * d..][..d], hidden);
        });
    }
}
