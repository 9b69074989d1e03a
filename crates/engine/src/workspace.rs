//! The workspace: memory that a forward pass writes and forgets.

use std::sync::Arc;

use cadre_kernels::MatmulScratch;
use cadre_routing::Steered;

use crate::batch::{Sequence, Span};
use crate::blocks::{
    AttentionExpertsScratch, AttentionScratch, DecoupledScratch, LatentScratch, MoeScratch,
    RopeAngles,
};
use crate::error::{EngineError, Result};
use crate::session::SessionShape;

/// Scratch memory of a forward pass: allocated once, for any mix of sequences up to its capacity.
///
/// Nothing in it outlives a pass but the logits that the pass returned. Its size grows with the capacity only, not with
/// the context. At the shape of Qwen3-30B-A3B (hidden 2048, 128 experts of width 768, top-8) a capacity of 512 tokens
/// takes 81 MiB: 32 for what the picked experts make of their rows, 12 for the inner values of the experts, 8 for
/// quantised inputs of products, 18 for attention, 12 for the stream. A row of logits per
/// wanted token (0.6 MiB) comes on top when it is first asked for. What no pass has used yet is not resident.
#[derive(Debug)]
pub struct Workspace {
    pub(crate) shape: SessionShape,
    capacity: usize,
    /// Rows of each sequence of the pass; the wanted ones once it is trimmed.
    pub(crate) spans: Vec<Span>,
    /// How each sequence of the pass is steered.
    pub(crate) steering: Vec<Option<Arc<Steered>>>,
    /// Whether the pass has at most one token of each sequence.
    pub(crate) decodes: bool,
    /// Tokens of the pass.
    pub(crate) tokens: Vec<u32>,
    /// Residual stream, `[rows, d_model]`.
    pub(crate) hidden: Vec<f32>,
    /// Input of a block, `[rows, d_model]`.
    pub(crate) normed: Vec<f32>,
    /// Rows of `normed` that the head made logits of in the last pass.
    pub(crate) n_headed: usize,
    /// Output of a block, `[rows, d_model]`.
    pub(crate) block_out: Vec<f32>,
    /// Rotary angles of the rows, one per rotation of the model.
    pub(crate) angles: Vec<RopeAngles>,
    pub(crate) attention: AnyAttentionScratch,
    pub(crate) moe: MoeScratch,
    /// Of a router that runs before the model.
    pub(crate) decoupled: Option<Box<DecoupledScratch>>,
    pub(crate) matmul: MatmulScratch,
    /// Grows to the rows that are asked for.
    pub(crate) logits: Vec<f32>,
}

/// Buffers of whichever attention the model has.
#[derive(Debug)]
pub(crate) enum AnyAttentionScratch {
    Grouped(AttentionScratch),
    Latent(LatentScratch),
    Experts(Box<AttentionExpertsScratch>),
}

impl AnyAttentionScratch {
    fn new(shape: &SessionShape, capacity: usize) -> Self {
        match (&shape.mla, shape.kv.n_experts) {
            (Some(mla), _) => Self::Latent(LatentScratch::new(shape.n_heads, mla, capacity)),
            (None, 1..) => Self::Experts(Box::new(AttentionExpertsScratch::new(shape, capacity))),
            (None, 0) => Self::Grouped(AttentionScratch::new(
                shape.n_heads,
                shape.kv.n_kv_heads,
                shape.kv.key_dim,
                capacity,
            )),
        }
    }
}

impl Workspace {
    /// For up to `capacity` tokens in one pass, all sequences together.
    pub(crate) fn new(shape: SessionShape, capacity: usize) -> Result<Self> {
        if capacity == 0 {
            return Err(EngineError::BadOption {
                name: "capacity of a workspace",
                value: "0".to_owned(),
                expected: "at least 1 token".to_owned(),
            });
        }
        let rows = || vec![0.0; capacity * shape.d_model];
        let moe = MoeScratch::new(&shape.moe, shape.d_dense, capacity);
        let widest = shape
            .d_model
            .max(shape.attention_width())
            .max(shape.d_dense)
            .max(shape.decoupled.map_or(0, |router| router.widest()));
        Ok(Self {
            capacity,
            spans: Vec::new(),
            steering: Vec::new(),
            decodes: false,
            tokens: Vec::with_capacity(capacity),
            hidden: rows(),
            normed: rows(),
            n_headed: 0,
            block_out: rows(),
            angles: (0..shape.n_ropes).map(|_| RopeAngles::default()).collect(),
            attention: AnyAttentionScratch::new(&shape, capacity),
            matmul: MatmulScratch::with_capacity((capacity * widest).max(moe.largest_input())),
            moe,
            decoupled: shape
                .decoupled
                .map(|router| Box::new(DecoupledScratch::new(&router, capacity))),
            logits: Vec::new(),
            shape,
        })
    }

    /// What the head made the logits of the last pass of: the normed output of the last layer, a row per row of logits,
    /// `[n_wanted, d_model]`.
    #[must_use]
    pub fn hidden(&self) -> &[f32] {
        &self.normed[..self.n_headed * self.shape.d_model]
    }

    /// Tokens that one pass can read, all sequences together.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn reserve_logits(&mut self, n_values: usize) {
        if self.logits.len() < n_values {
            self.logits.resize(n_values, 0.0);
        }
    }

    /// Lays out the rows of `batch`, one sequence after the other.
    pub(crate) fn begin(&mut self, batch: &[Sequence<'_>]) {
        self.spans.clear();
        self.steering.clear();
        self.tokens.clear();
        self.decodes = batch.iter().all(|sequence| sequence.tokens.len() <= 1);
        for sequence in batch {
            self.spans.push(sequence.span(self.tokens.len()));
            self.steering.push(sequence.session.steering.clone());
            self.tokens.extend_from_slice(sequence.tokens);
        }
        self.moe.router.begin(self.tokens.len());
    }

    /// Moves the rows whose logits are wanted to the front of the stream, of its normed form, of the angles and of what
    /// routers remember; the others are forgotten. Does nothing the second time.
    pub(crate) fn trim(&mut self, batch: &[Sequence<'_>]) {
        let d = self.shape.d_model;
        let mut to = 0;
        for (span, sequence) in self.spans.iter_mut().zip(batch) {
            let n = sequence.n_logits();
            let from = span.end() - n;
            if from != to {
                let rows = from * d..(from + n) * d;
                self.hidden.copy_within(rows.clone(), to * d);
                self.normed.copy_within(rows, to * d);
                for angles in &mut self.angles {
                    angles.move_rows(from..from + n, to);
                }
                self.moe.router.move_rows(from..from + n, to);
            }
            *span = span.last(n, to);
            to += n;
        }
    }
}
