//! Causal self-attention with grouped queries, in all the variants of the models: biases, norms on queries and keys,
//! sliding windows, sinks, clamps.

use cadre_kernels::{Attend, AttendScratch, Compute, Heads, HeadsMut, MatmulScratch, Span};

use super::{LayerKv, Linear, Norm, RopeAngles, Step};

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

/// Buffers of [`Attention::forward`], for a chunk of tokens.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    /// `[chunk, n_heads * head_dim]`.
    q: Vec<f32>,
    /// `[chunk, n_kv_heads * head_dim]`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Attended values, `[chunk, n_heads * head_dim]`.
    mixed: Vec<f32>,
    attend: AttendScratch,
}

impl AttentionScratch {
    pub(crate) fn new(n_heads: usize, n_kv_heads: usize, head_dim: usize, chunk: usize) -> Self {
        let rows = |n_heads: usize| vec![0.0; chunk * n_heads * head_dim];
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
    /// Bytes of the matrices.
    pub(crate) fn n_bytes(&self) -> usize {
        let linears = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        linears.iter().map(|linear| linear.n_bytes()).sum()
    }

    /// `out_td = attention(x_td)`; stores the chunk's keys and values in `kv`.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        (x_td, out_td): (&[f32], &mut [f32]),
        kv: &mut LayerKv,
        (scratch, matmul): (&mut AttentionScratch, &mut MatmulScratch),
    ) {
        let compute = step.compute;
        let AttentionScratch {
            q,
            k,
            v,
            mixed,
            attend,
        } = scratch;
        let q = &mut q[..step.n_tokens * self.n_heads * self.head_dim];
        let k = &mut k[..step.n_tokens * self.n_kv_heads * self.head_dim];
        let v = &mut v[..step.n_tokens * self.n_kv_heads * self.head_dim];
        let mixed = &mut mixed[..q.len()];
        self.q_proj.forward(compute, x_td, q, matmul);
        self.k_proj.forward(compute, x_td, k, matmul);
        self.v_proj.forward(compute, x_td, v, matmul);
        self.norm(compute, q, k);
        if let Some(clip) = self.clip {
            for value in q.iter_mut().chain(k.iter_mut()).chain(v.iter_mut()) {
                *value = value.clamp(-clip, clip);
            }
        }
        self.place(compute, self.n_heads, angles, q);
        self.place(compute, self.n_kv_heads, angles, k);
        self.store(step, k, v, kv);
        self.attend(step, q, kv, mixed, attend);
        self.o_proj.forward(compute, mixed, out_td, matmul);
    }

    fn norm(&self, compute: &Compute, q: &mut [f32], k: &mut [f32]) {
        if let (Some(q_norm), Some(k_norm)) = (&self.q_norm, &self.k_norm) {
            q_norm.forward_in_place(compute, q);
            k_norm.forward_in_place(compute, k);
        }
    }

    /// Rotates every head of every token.
    fn place(&self, compute: &Compute, n_heads: usize, angles: &RopeAngles, x: &mut [f32]) {
        compute.for_each_chunk(x, self.head_dim, 4 * self.head_dim, |i, head| {
            angles.rotate(i / n_heads, head);
        });
    }

    fn store(&self, step: Step<'_>, k: &[f32], v: &[f32], kv: &mut LayerKv) {
        let heads = k
            .chunks_exact(self.head_dim)
            .zip(v.chunks_exact(self.head_dim));
        for (i, (key, value)) in heads.enumerate() {
            let (t, head) = (i / self.n_kv_heads, i % self.n_kv_heads);
            kv.store(head, step.position + t, key, value);
        }
    }

    fn attend(
        &self,
        step: Step<'_>,
        q: &[f32],
        kv: &LayerKv,
        mixed: &mut [f32],
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
        let span = |_| Span {
            kv,
            position: step.position,
            first: 0,
            n_tokens: step.n_tokens,
        };
        let out = HeadsMut {
            values: mixed,
            per_token,
            per_head,
        };
        step.compute.attend(&attend, 1, &span, out, scratch);
    }
}
