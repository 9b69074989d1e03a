//! Causal self-attention with grouped queries, a norm on each query and key head, and rotary positions.

use cadre_kernels::{Compute, Kernels, MatmulScratch, Matrix};

use super::{KvShape, LayerKv, RmsNorm, RopeAngles, Step};

/// Keys that are scored together. Their scores live on the stack, and the cut depends on positions
/// only, so that a token's result does not depend on how the tokens before it came in.
const KEY_BLOCK: usize = 64;

/// The weights of one layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) q_proj: Matrix,
    pub(crate) k_proj: Matrix,
    pub(crate) v_proj: Matrix,
    pub(crate) o_proj: Matrix,
    pub(crate) q_norm: RmsNorm,
    pub(crate) k_norm: RmsNorm,
}

/// Buffers of [`Attention::forward`], for a chunk of tokens.
#[derive(Debug)]
pub(crate) struct AttentionScratch {
    /// Rotary angles of the chunk, filled once for all layers.
    pub(crate) angles: RopeAngles,
    /// `[chunk, n_heads * head_dim]`.
    q: Vec<f32>,
    /// `[chunk, n_kv_heads * head_dim]`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Attended values, `[chunk, n_heads * head_dim]`.
    mixed: Vec<f32>,
}

impl AttentionScratch {
    pub(crate) fn new(n_heads: usize, kv: &KvShape, chunk: usize) -> Self {
        let rows = |n_heads: usize| vec![0.0; chunk * n_heads * kv.head_dim];
        Self {
            angles: RopeAngles::with_capacity(chunk, kv.head_dim),
            q: rows(n_heads),
            k: rows(kv.n_kv_heads),
            v: rows(kv.n_kv_heads),
            mixed: rows(n_heads),
        }
    }
}

impl Attention {
    /// Bytes of the matrices.
    pub(crate) fn n_bytes(&self) -> usize {
        let matrices = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj];
        matrices.iter().map(|matrix| matrix.n_bytes()).sum()
    }

    /// `out_td = attention(x_td)`; stores the chunk's keys and values in `kv`.
    pub(crate) fn forward(
        &self,
        step: Step<'_>,
        x_td: &[f32],
        out_td: &mut [f32],
        kv: &mut LayerKv,
        (scratch, matmul): (&mut AttentionScratch, &mut MatmulScratch),
    ) {
        let compute = step.compute;
        let AttentionScratch {
            angles,
            q,
            k,
            v,
            mixed,
        } = scratch;
        let q = &mut q[..step.n_tokens * self.n_heads * self.head_dim];
        let k = &mut k[..step.n_tokens * self.n_kv_heads * self.head_dim];
        let v = &mut v[..step.n_tokens * self.n_kv_heads * self.head_dim];
        let mixed = &mut mixed[..q.len()];
        compute.matmul(&self.q_proj, x_td, q, matmul);
        compute.matmul(&self.k_proj, x_td, k, matmul);
        compute.matmul(&self.v_proj, x_td, v, matmul);
        self.place(compute, &self.q_norm, self.n_heads, angles, q);
        self.place(compute, &self.k_norm, self.n_kv_heads, angles, k);
        self.store(step, k, v, kv);
        self.attend(step, q, kv, mixed);
        compute.matmul(&self.o_proj, mixed, out_td, matmul);
    }

    /// Norms and rotates every head of every token.
    fn place(
        &self,
        compute: &Compute,
        norm: &RmsNorm,
        n_heads: usize,
        angles: &RopeAngles,
        x: &mut [f32],
    ) {
        compute.for_each_chunk(x, self.head_dim, 8 * self.head_dim, |i, head| {
            norm.forward_row(compute, head);
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

    fn attend(&self, step: Step<'_>, q: &[f32], kv: &LayerKv, mixed: &mut [f32]) {
        let group = self.n_heads / self.n_kv_heads;
        let work = 2 * (step.position + step.n_tokens) * self.head_dim;
        let kernels = step.compute.kernels();
        step.compute
            .for_each_chunk(mixed, self.head_dim, work, |i, out| {
                let (t, head) = (i / self.n_heads, i % self.n_heads);
                let query = &q[i * self.head_dim..][..self.head_dim];
                attend_one(
                    kernels,
                    query,
                    kv,
                    (head / group, step.position + t + 1),
                    out,
                );
            });
    }
}

/// `out = softmax(query . keys / sqrt(head_dim)) . values` over the first `n_keys` positions of a head.
///
/// Blocks of keys with a running maximum: earlier sums are scaled down when a larger score turns up.
fn attend_one(
    kernels: Kernels,
    query: &[f32],
    kv: &LayerKv,
    (head, n_keys): (usize, usize),
    out: &mut [f32],
) {
    let scale = 1.0 / (query.len() as f32).sqrt();
    let mut scores = [0.0f32; KEY_BLOCK];
    let mut highest = f32::NEG_INFINITY;
    let mut total = 0.0f32;
    out.fill(0.0);
    for from in (0..n_keys).step_by(KEY_BLOCK) {
        let to = n_keys.min(from + KEY_BLOCK);
        let (keys, values) = kv.rows(head, from, to);
        let scores = &mut scores[..to - from];
        kernels.matvec(keys, query, scores);
        for score in scores.iter_mut() {
            *score *= scale;
        }
        let new_highest = highest.max(kernels.max(scores));
        if new_highest > highest && from > 0 {
            let shrink = (highest - new_highest).exp();
            total *= shrink;
            for value in out.iter_mut() {
                *value *= shrink;
            }
        }
        highest = new_highest;
        total += kernels.exp_sum(scores, highest);
        kernels.add_weighted_rows(scores, values, out);
    }
    let inverse = 1.0 / total;
    for value in out {
        *value *= inverse;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_keys_agree_with_one_softmax() {
        let shape = KvShape {
            n_layers: 1,
            n_kv_heads: 1,
            head_dim: 3,
        };
        for n_keys in [1, 5, 64, 65, 200] {
            let mut kv = LayerKv::new(&shape, n_keys);
            // The largest score comes last, so every block rescales.
            let row = |j: usize, s: f32| [j as f32 * 0.02 * s, (j as f32).sin(), s];
            for j in 0..n_keys {
                kv.store(0, j, &row(j, 1.0), &row(j, -1.0));
            }
            let query = [1.5f32, 0.5, -1.0];
            let dot = |j| {
                row(j, 1.0)
                    .iter()
                    .zip(query)
                    .map(|(a, b)| f64::from(a * b))
                    .sum::<f64>()
            };
            let weights: Vec<f64> = (0..n_keys).map(|j| (dot(j) / 3f64.sqrt()).exp()).collect();
            let mut out = [0.0; 3];
            attend_one(Kernels::detect(), &query, &kv, (0, n_keys), &mut out);
            for (c, got) in out.iter().enumerate() {
                let sum: f64 = (0..n_keys)
                    .map(|j| weights[j] * f64::from(row(j, -1.0)[c]))
                    .sum();
                let expected = (sum / weights.iter().sum::<f64>()) as f32;
                assert!(
                    (got - expected).abs() < 1e-5,
                    "{n_keys} keys: {got} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_nan_key_is_not_hidden() {
        let shape = KvShape {
            n_layers: 1,
            n_kv_heads: 1,
            head_dim: 2,
        };
        let mut kv = LayerKv::new(&shape, 100);
        kv.store(0, 3, &[f32::NAN, 0.0], &[1.0, 1.0]);
        let mut out = [0.0; 2];
        attend_one(Kernels::detect(), &[1.0, 1.0], &kv, (0, 100), &mut out);
        assert!(out.iter().all(|v| v.is_nan()), "{out:?}");
    }
}
