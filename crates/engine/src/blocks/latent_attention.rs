//! Multi-head latent attention: keys and values of all heads come from one small latent per token.
//!
//! Paper: DeepSeek-V2, DeepSeek-AI, 2024, arXiv 2405.04434, in its absorbed form: what would expand the latent into
//! keys is applied to the query instead, and what would expand it into values is applied to the attended latent, so the
//! cache holds the latent and one rotary key per token, whatever the number of heads.

use cadre_checkpoint::MlaConfig;
use cadre_kernels::{Attend, AttendScratch, Grouped, Heads, HeadsMut, MatmulScratch, Matrix};

use super::{Linear, Norm, RopeAngles, Step};
use crate::batch::Sequence;

/// The weights of one layer's attention.
#[derive(Debug)]
pub(crate) struct LatentAttention {
    pub(crate) n_heads: usize,
    pub(crate) mla: MlaConfig,
    pub(crate) q: QueryProjection,
    /// `[latent + rope, d]`.
    pub(crate) kv_a_proj: Linear,
    pub(crate) kv_a_norm: Norm,
    /// Per head, from the position-free part of its query to the latent, `[latent, nope]`.
    pub(crate) k_b: Vec<Matrix>,
    /// Per head, from the attended latent to its values, `[v, latent]`.
    pub(crate) v_b: Vec<Matrix>,
    pub(crate) o_proj: Linear,
    /// Factor on the scores.
    pub(crate) scale: f32,
}

/// How queries are made.
#[derive(Debug)]
pub(crate) enum QueryProjection {
    /// By one matrix.
    Direct(Linear),
    /// Through a normed bottleneck.
    LowRank {
        q_a_proj: Linear,
        q_a_norm: Norm,
        q_b_proj: Linear,
    },
}

/// Buffers of [`LatentAttention`], for the rows of a pass.
#[derive(Debug)]
pub(crate) struct LatentScratch {
    /// `[rows, q_lora_rank]`.
    q_a: Vec<f32>,
    /// `[rows, n_heads * (nope + rope)]`.
    q: Vec<f32>,
    /// `[rows, latent + rope]`.
    kv_a: Vec<f32>,
    /// Position-free parts by head, `[n_heads, rows, nope]`.
    q_nope: Vec<f32>,
    /// Rotary parts by head, `[n_heads, rows, rope]`.
    q_rope: Vec<f32>,
    /// Queries on the latent, and attended latents, `[n_heads, rows, latent]` each.
    q_latent: Vec<f32>,
    mixed: Vec<f32>,
    /// `[n_heads, rows, v]`.
    values: Vec<f32>,
    /// `[rows, n_heads * v]`.
    joined: Vec<f32>,
    offsets: Vec<usize>,
    attend: AttendScratch,
}

impl LatentScratch {
    pub(crate) fn new(n_heads: usize, mla: &MlaConfig, capacity: usize) -> Self {
        let (nope, rope) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim);
        let per_head = |width: usize| vec![0.0; n_heads * capacity * width];
        Self {
            q_a: vec![0.0; capacity * mla.q_lora_rank.unwrap_or(0)],
            q: per_head(nope + rope),
            kv_a: vec![0.0; capacity * (mla.kv_lora_rank + rope)],
            q_nope: per_head(nope),
            q_rope: per_head(rope),
            q_latent: per_head(mla.kv_lora_rank),
            mixed: per_head(mla.kv_lora_rank),
            values: per_head(mla.v_head_dim),
            joined: per_head(mla.v_head_dim),
            offsets: Vec::with_capacity(n_heads + 1),
            attend: AttendScratch::default(),
        }
    }
}

impl LatentAttention {
    /// Adds its matrices to `all`.
    pub(crate) fn matrices<'a>(&'a self, all: &mut Vec<&'a Matrix>) {
        match &self.q {
            QueryProjection::Direct(linear) => linear.matrices(all),
            QueryProjection::LowRank {
                q_a_proj, q_b_proj, ..
            } => {
                q_a_proj.matrices(all);
                q_b_proj.matrices(all);
            }
        }
        self.kv_a_proj.matrices(all);
        self.o_proj.matrices(all);
        all.extend(self.k_b.iter().chain(&self.v_b));
    }

    /// Stores latent and rotary key of every row of `x_td`.
    pub(crate) fn remember(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        x_td: &[f32],
        batch: &mut [Sequence<'_>],
        (scratch, matmul): (&mut LatentScratch, &mut MatmulScratch),
    ) {
        let (compute, width) = (step.compute, self.kv_a_proj.n_out());
        let latent = self.mla.kv_lora_rank;
        let kv_a = &mut scratch.kv_a[..step.n_rows() * width];
        self.kv_a_proj.forward(compute, x_td, kv_a, matmul);
        compute.for_each_chunk(kv_a, width, 4 * width, |row, kv_a| {
            let (latent, key) = kv_a.split_at_mut(latent);
            self.kv_a_norm.row(compute, latent);
            angles.rotate(row, key);
        });
        for (span, sequence) in step.spans.iter().zip(batch) {
            let kv = &mut sequence.session.kv.layers[step.layer];
            let rows = &kv_a[span.first_row * width..span.end() * width];
            for (t, row) in rows.chunks_exact(width).enumerate() {
                let (latent, key) = row.split_at(latent);
                kv.store(0, span.position + t, key, latent);
            }
        }
    }

    /// `out_td = attention(x_td)`, for rows whose latents and rotary keys are stored.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        (x_td, out_td): (&[f32], &mut [f32]),
        batch: &[Sequence<'_>],
        (scratch, matmul): (&mut LatentScratch, &mut MatmulScratch),
    ) {
        let (n, compute) = (step.n_rows(), step.compute);
        let (latent, v_dim) = (self.mla.kv_lora_rank, self.mla.v_head_dim);
        self.queries(step, angles, x_td, (scratch, matmul));
        scratch.offsets.clear();
        scratch
            .offsets
            .extend((0..=self.n_heads).map(|head| head * n));
        let rows = self.n_heads * n;
        let by_head = |x| Grouped {
            offsets: &scratch.offsets,
            x,
            index: None,
            is_same: false,
        };
        compute.grouped_matmul(
            by_head(&scratch.q_nope[..rows * self.mla.qk_nope_head_dim]),
            &|head| &self.k_b[head],
            &mut scratch.q_latent[..rows * latent],
            matmul,
        );
        self.attend(step, batch, scratch);
        let by_head = Grouped {
            offsets: &scratch.offsets,
            x: &scratch.mixed[..rows * latent],
            index: None,
            is_same: false,
        };
        compute.grouped_matmul(
            by_head,
            &|head| &self.v_b[head],
            &mut scratch.values[..rows * v_dim],
            matmul,
        );
        let LatentScratch { values, joined, .. } = scratch;
        let joined = &mut joined[..rows * v_dim];
        let width = self.n_heads * v_dim;
        compute.for_each_chunk(joined, width, width, |row, out| {
            for (head, out) in out.chunks_exact_mut(v_dim).enumerate() {
                out.copy_from_slice(&values[(head * n + row) * v_dim..][..v_dim]);
            }
        });
        self.o_proj.forward(compute, joined, out_td, matmul);
    }

    /// Fills `q_nope` and `q_rope`, the latter rotated.
    fn queries(
        &self,
        step: Step<'_>,
        angles: &RopeAngles,
        x_td: &[f32],
        (scratch, matmul): (&mut LatentScratch, &mut MatmulScratch),
    ) {
        let (n, compute) = (step.n_rows(), step.compute);
        let (nope, rope) = (self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim);
        let width = nope + rope;
        let rows = n * self.n_heads;
        let q = &mut scratch.q[..rows * width];
        match &self.q {
            QueryProjection::Direct(linear) => linear.forward(compute, x_td, q, matmul),
            QueryProjection::LowRank {
                q_a_proj,
                q_a_norm,
                q_b_proj,
            } => {
                let q_a = &mut scratch.q_a[..n * q_a_proj.n_out()];
                q_a_proj.forward(compute, x_td, q_a, matmul);
                q_a_norm.forward_in_place(compute, q_a);
                q_b_proj.forward(compute, q_a, q, matmul);
            }
        }
        // Row `head * n + t` of the parts is head `head` of row `t`.
        let q = &*q;
        let head_of = |row: usize| &q[(row % n * self.n_heads + row / n) * width..][..width];
        compute.for_each_chunk(
            &mut scratch.q_nope[..rows * nope],
            nope,
            nope,
            |row, plain| {
                plain.copy_from_slice(&head_of(row)[..nope]);
            },
        );
        compute.for_each_chunk(
            &mut scratch.q_rope[..rows * rope],
            rope,
            4 * rope,
            |row, placed| {
                placed.copy_from_slice(&head_of(row)[nope..]);
                angles.rotate(row % n, placed);
            },
        );
    }

    /// Every row over what its own sequence holds; the rows of all sequences share the threads.
    fn attend(&self, step: Step<'_>, batch: &[Sequence<'_>], scratch: &mut LatentScratch) {
        let n = step.n_rows();
        let (latent, rope) = (self.mla.kv_lora_rank, self.mla.qk_rope_head_dim);
        let LatentScratch {
            q_rope,
            q_latent,
            mixed,
            attend: scratch,
            ..
        } = scratch;
        let by_head = |values, width| Heads {
            values,
            per_token: width,
            per_head: n * width,
        };
        let attend = Attend {
            n_heads: self.n_heads,
            on_keys: by_head(q_rope, rope),
            on_values: Some(by_head(q_latent, latent)),
            scale: self.scale,
            sinks: None,
            window: None,
        };
        let out = HeadsMut {
            values: mixed,
            per_token: latent,
            per_head: n * latent,
        };
        let span = |i| step.stored(batch, i);
        step.compute
            .attend(&attend, step.spans.len(), &span, out, scratch);
    }
}
