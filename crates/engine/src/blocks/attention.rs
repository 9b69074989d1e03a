//! Causal self-attention with grouped queries, in all the variants of the models: biases, norms on queries and keys,
//! sliding windows, sinks, clamps.

use cadre_kernels::{Attend, AttendScratch, Compute, Heads, HeadsMut, MatmulScratch, Matrix};

use super::{LayerKv, Linear, Norm, RopeAngles, Step};
use crate::batch::Sequence;

/// The weights of one layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) o_proj: Linear,
    /// Norms on queries and keys, before the rotation. Their width says whether they see one head or the projection.
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
    /// Queries, keys and values are clamped to this magnitude.
    pub(crate) clip: Option<f32>,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// A logit per head that adds nothing.
    pub(crate) sinks: Option<Vec<f32>>,
    /// Positions that a token sees, itself included.
    pub(crate) window: Option<usize>,
}

/// Buffers of [`Attention`], for the rows of a pass.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    /// `[rows, n_heads * head_dim]`.
    q: Vec<f32>,
    /// `[rows, n_kv_heads * head_dim]`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Attended values, `[rows, n_heads * head_dim]`.
    mixed: Vec<f32>,
    attend: AttendScratch,
}

impl AttentionScratch {
    pub(crate) fn new(n_heads: usize, n_kv_heads: usize, head_dim: usize, capacity: usize) -> Self {
        let rows = |n_heads: usize| vec![0.0; capacity * n_heads * head_dim];
        Self {
            q: rows(n_heads),
            k: rows(n_kv_heads),
            v: rows(n_kv_heads),
            mixed: rows(n_heads),
            attend: AttendScratch::default(),
        }
    }
}

impl Attention {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        for linear in [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj] {
            linear.matrices(all);
        }
    }

    /// Stores keys and values of every row of `x_td`.
    pub(crate) fn remember(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        x_td: &[f32],
        batch: &mut [Sequence<'_>],
        (scratch, matmul): (&mut AttentionScratch, &mut MatmulScratch),
    ) {
        let compute = step.compute;
        let width = self.n_kv_heads * self.head_dim;
        let k = &mut scratch.k[..step.n_rows() * width];
        let v = &mut scratch.v[..step.n_rows() * width];
        let products = [
            (&self.k_proj.weight, &mut *k),
            (&self.v_proj.weight, &mut *v),
        ];
        compute.matmuls(x_td, products, matmul);
        self.k_proj.add_bias(compute, k);
        self.v_proj.add_bias(compute, v);
        self.place(compute, self.k_norm.as_ref(), angles, (k, width));
        self.clamp(v);
        for (span, sequence) in step.spans.iter().zip(batch) {
            let rows = span.first_row * width..span.end() * width;
            let kv = &mut sequence.session.kv.layers[step.layer];
            self.store(span.position, &k[rows.clone()], &v[rows], kv);
        }
    }

    /// `out_td = attention(x_td)`, for rows whose keys and values are stored.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        (x_td, out_td): (&[f32], &mut [f32]),
        batch: &[Sequence<'_>],
        (scratch, matmul): (&mut AttentionScratch, &mut MatmulScratch),
    ) {
        let width = self.n_heads * self.head_dim;
        let q = &mut scratch.q[..step.n_rows() * width];
        self.q_proj.forward(step.compute, x_td, q, matmul);
        self.place(step.compute, self.q_norm.as_ref(), angles, (q, width));
        let mixed = &mut scratch.mixed[..q.len()];
        self.attend(step, batch, (q, mixed), &mut scratch.attend);
        self.o_proj.forward(step.compute, mixed, out_td, matmul);
    }

    /// Norms, clamps and rotates the heads of every row of `x`, whose rows are `width` wide.
    fn place(
        &self,
        compute: &Compute,
        norm: Option<&Norm>,
        angles: &RopeAngles,
        (x, width): (&mut [f32], usize),
    ) {
        compute.for_each_chunk(x, width, 8 * width, |row, x| {
            if let Some(norm) = norm {
                for part in x.chunks_exact_mut(norm.width()) {
                    norm.row(compute, part);
                }
            }
            self.clamp(x);
            for head in x.chunks_exact_mut(self.head_dim) {
                angles.rotate(row, head);
            }
        });
    }

    fn clamp(&self, values: &mut [f32]) {
        if let Some(clip) = self.clip {
            for value in values {
                *value = value.clamp(-clip, clip);
            }
        }
    }

    /// Stores the rows of one sequence, from `position` on.
    fn store(&self, position: usize, k: &[f32], v: &[f32], kv: &mut LayerKv) {
        let heads = k
            .chunks_exact(self.head_dim)
            .zip(v.chunks_exact(self.head_dim));
        for (i, (key, value)) in heads.enumerate() {
            let (t, head) = (i / self.n_kv_heads, i % self.n_kv_heads);
            kv.store(head, position + t, key, value);
        }
    }

    /// Every row over what its own sequence holds; the rows of all sequences share the threads.
    fn attend(
        &self,
        step: Step<'_>,
        batch: &[Sequence<'_>],
        (q, mixed): (&[f32], &mut [f32]),
        scratch: &mut AttendScratch,
    ) {
        let (per_token, per_head) = (self.n_heads * self.head_dim, self.head_dim);
        let attend = Attend {
            n_heads: self.n_heads,
            on_keys: Heads {
                values: q,
                per_token,
                per_head,
            },
            on_values: None,
            scale: self.scale,
            sinks: self.sinks.as_deref(),
            window: self.window,
        };
        let out = HeadsMut {
            values: mixed,
            per_token,
            per_head,
        };
        let span = |i| step.stored(batch, i);
        step.compute
            .attend(&attend, step.spans.len(), &span, out, scratch);
    }
}
