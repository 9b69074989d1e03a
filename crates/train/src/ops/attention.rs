//! Causal grouped-query attention with RoPE, one task per sequence; queries and keys are normed (RMSNorm) before it where
//! their norms have elements, and taken as they are where these are `[0]`.
//!
//! Scores live in blocks of query rows that stop at the diagonal. The backward pass rebuilds the
//! probabilities from the saved log-sum-exp (FlashAttention, Dao et al. 2022, arXiv 2205.14135).

use super::Precision;
use super::attention_products::KeyValues;
use super::flex::{Dense, tensor};
use super::math::{dot, exp, exp_sum, max, sum_in_order, vectorised};
use super::rms_norm;
use burn_flex::FlexTensor;
use cadre_kernels::gemm::{Mat, MatMut};
use cadre_kernels::zeros;
use rayon::prelude::*;

/// Query rows per block of scores.
const BLOCK: usize = 64;

/// Sizes and constants of an attention operation.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences in the batch; tokens are numbered sequence by sequence.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// RoPE base.
    pub rope_theta: f64,
    /// Epsilon of the q and k norms.
    pub eps: f32,
    /// What products are made of.
    pub precision: Precision,
}

impl AttentionShape {
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Cosines and sines, `[seq_len, head_dim / 2]` each.
pub(super) struct Rope {
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
}

impl Rope {
    pub(super) fn new(shape: &AttentionShape) -> Self {
        let half = shape.head_dim / 2;
        let angles = (0..shape.seq_len).flat_map(|position| {
            (0..half).map(move |i| {
                let exponent = -2.0 * i as f64 / shape.head_dim as f64;
                position as f64 * shape.rope_theta.powf(exponent)
            })
        });
        let (sin, cos) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        Self { cos, sin }
    }

    /// Rotates one head's vector at `position` (`sign` 1), or rotates it back (`sign` -1).
    #[inline(always)]
    fn rotate(&self, x: &mut [f32], position: usize, sign: f32) {
        let half = x.len() / 2;
        let (cos, sin) = (
            &self.cos[position * half..(position + 1) * half],
            &self.sin[position * half..(position + 1) * half],
        );
        let (a, b) = x.split_at_mut(half);
        for i in 0..half {
            let (x, y, s) = (a[i], b[i], sign * sin[i]);
            a[i] = x * cos[i] - y * s;
            b[i] = y * cos[i] + x * s;
        }
    }
}

/// One head of one sequence: the view `x[l * stride + offset ..][..head_dim]`.
#[derive(Clone, Copy)]
struct Head<'a> {
    x: &'a [f32],
    stride: usize,
    offset: usize,
    dim: usize,
}

impl<'a> Head<'a> {
    fn row(&self, l: usize) -> &'a [f32] {
        let start = l * self.stride + self.offset;
        &self.x[start..start + self.dim]
    }

    fn mat(&self, from: usize, to: usize) -> Mat<'a> {
        let data = &self.x[from * self.stride + self.offset..];
        Mat::strided(data, to - from, self.dim, self.stride)
    }

    /// Norm, rotation and scale of every row.
    fn prepared(&self, w: &[f32], rope: &Rope, eps: f32, scale: f32) -> Vec<f32> {
        let mut out = vec![0.0; self.x.len() / self.stride * self.dim];
        vectorised(
            #[inline(always)]
            || {
                for (l, out) in out.chunks_exact_mut(self.dim).enumerate() {
                    if w.is_empty() {
                        out.copy_from_slice(self.row(l));
                    } else {
                        rms_norm::row(out, self.row(l), w, eps);
                    }
                    rope.rotate(out, l, 1.0);
                    out.iter_mut().for_each(|x| *x *= scale);
                }
            },
        );
        out
    }

    /// Carries the gradient of [`Self::prepared`] (consumed as scratch) back to `dx` and adds to `dw`.
    fn prepared_backward(
        &self,
        dx: &mut [f32],
        dw: &mut [f32],
        mut grad: Vec<f32>,
        (w, rope, eps, scale): (&[f32], &Rope, f32, f32),
    ) {
        vectorised(
            #[inline(always)]
            || {
                for (l, grad) in grad.chunks_exact_mut(self.dim).enumerate() {
                    grad.iter_mut().for_each(|g| *g *= scale);
                    rope.rotate(grad, l, -1.0);
                    let x = self.row(l);
                    let start = l * self.stride + self.offset;
                    let dx = &mut dx[start..start + self.dim];
                    if w.is_empty() {
                        dx.copy_from_slice(grad);
                        continue;
                    }
                    let inverse = 1.0 / (dot(x, x) / self.dim as f32 + eps).sqrt();
                    rms_norm::row_backward(dx, dw, [x, w, grad], inverse);
                }
            },
        );
    }
}

fn check(inputs: &[Dense; 5], shape: &AttentionShape) {
    let n_tokens = shape.batch * shape.seq_len;
    assert!(
        shape.n_heads.is_multiple_of(shape.n_kv_heads),
        "whole groups of heads"
    );
    assert!(shape.head_dim.is_multiple_of(2), "RoPE rotates pairs");
    assert_eq!(inputs[0].dims(), [n_tokens, shape.q_width()], "q");
    assert_eq!(inputs[1].dims(), [n_tokens, shape.kv_width()], "k");
    assert_eq!(inputs[2].dims(), [n_tokens, shape.kv_width()], "v");
    for (norm, name) in [(&inputs[3], "q_norm"), (&inputs[4], "k_norm")] {
        let [width] = norm.dims();
        assert!([0, shape.head_dim].contains(&width), "{name}");
    }
}

/// Returns the output `[T, n_heads * head_dim]` and the log-sum-exp `[batch, n_heads, seq_len]`.
pub(super) fn forward(inputs: &[Dense; 5], shape: AttentionShape) -> [FlexTensor; 2] {
    check(inputs, &shape);
    let [q, k, v, q_norm, k_norm] = inputs.each_ref().map(Dense::values);
    let (seq, dim) = (shape.seq_len, shape.head_dim);
    let (qw, kvw) = (shape.q_width(), shape.kv_width());
    let rope = Rope::new(&shape);
    let mut y = zeros(shape.batch * seq * qw);
    let mut lse = vec![0.0; shape.batch * shape.n_heads * seq];
    y.par_chunks_mut(seq * qw)
        .zip(lse.par_chunks_mut(shape.n_heads * seq))
        .enumerate()
        .for_each(|(b, (y, lse))| {
            let mut scores = vec![0.0; BLOCK * seq];
            for kv in 0..shape.n_kv_heads {
                let of = |x, stride, head| head_of(x, b, seq, stride, head, dim);
                let k_hat = of(k, kvw, kv).prepared(k_norm, &rope, shape.eps, 1.0);
                let v = of(v, kvw, kv).mat(0, seq);
                let keys = KeyValues::new(shape.precision, &k_hat, v, false);
                for head in kv * shape.group()..(kv + 1) * shape.group() {
                    let q_hat = of(q, qw, head).prepared(q_norm, &rope, shape.eps, shape.scale());
                    for from in (0..seq).step_by(BLOCK) {
                        let to = (from + BLOCK).min(seq);
                        let p = &mut scores[..(to - from) * to];
                        let q = Mat::new(&q_hat[from * dim..to * dim], to - from, dim);
                        keys.scores(p, q, to);
                        let lse = &mut lse[head * seq + from..head * seq + to];
                        vectorised(
                            #[inline(always)]
                            || softmax_causal(p, lse, from, to),
                        );
                        let into = &mut y[from * qw + head * dim..];
                        let into = MatMut::strided(into, to - from, dim, qw);
                        keys.values(into, Mat::new(p, to - from, to));
                    }
                }
            }
        });
    [
        tensor(y, [shape.batch * seq, qw]),
        tensor(lse, [shape.batch, shape.n_heads, seq]),
    ]
}

fn head_of(x: &[f32], b: usize, seq: usize, stride: usize, head: usize, dim: usize) -> Head<'_> {
    Head {
        x: &x[b * seq * stride..(b + 1) * seq * stride],
        stride,
        offset: head * dim,
        dim,
    }
}

/// Row `i` attends to keys `0..=from + i`; the rest becomes zero.
#[inline(always)]
fn softmax_causal(scores: &mut [f32], lse: &mut [f32], from: usize, to: usize) {
    for (i, (row, lse)) in scores.chunks_exact_mut(to).zip(lse).enumerate() {
        let (row, future) = row.split_at_mut(from + i + 1);
        future.fill(0.0);
        let top = max(row);
        let sum = exp_sum(row, top);
        let inverse = 1.0 / sum;
        row.iter_mut().for_each(|p| *p *= inverse);
        *lse = top + sum.ln();
    }
}

/// Gradients with respect to q, k, v, q_norm and k_norm.
pub(super) fn backward(
    inputs: &[Dense; 5],
    [y, lse]: &[Dense; 2],
    shape: AttentionShape,
    dy: &Dense,
) -> [FlexTensor; 5] {
    let seq = shape.seq_len;
    let (qw, kvw) = (shape.q_width(), shape.kv_width());
    let norms = [3, 4].map(|norm| inputs[norm].values().len());
    let n_tokens = shape.batch * seq;
    let rope = Rope::new(&shape);
    let mut dq = zeros(n_tokens * qw);
    let mut dk = zeros(n_tokens * kvw);
    let mut dv = zeros(n_tokens * kvw);
    let (dq_norms, dk_norms): (Vec<_>, Vec<_>) = dq
        .par_chunks_mut(seq * qw)
        .zip(dk.par_chunks_mut(seq * kvw))
        .zip(dv.par_chunks_mut(seq * kvw))
        .enumerate()
        .map(|(b, ((dq, dk), dv))| {
            let sequence = Sequence {
                inputs: inputs.each_ref().map(Dense::values),
                y: y.values(),
                dy: dy.values(),
                lse: &lse.values()[b * shape.n_heads * seq..(b + 1) * shape.n_heads * seq],
                rope: &rope,
                shape,
                b,
            };
            sequence.backward(dq, dk, dv)
        })
        .unzip();
    [
        tensor(dq, [n_tokens, qw]),
        tensor(dk, [n_tokens, kvw]),
        tensor(dv, [n_tokens, kvw]),
        tensor(sum_in_order(dq_norms, norms[0]), [norms[0]]),
        tensor(sum_in_order(dk_norms, norms[1]), [norms[1]]),
    ]
}

/// What the backward task of one sequence reads.
struct Sequence<'a> {
    inputs: [&'a [f32]; 5],
    y: &'a [f32],
    dy: &'a [f32],
    lse: &'a [f32],
    rope: &'a Rope,
    shape: AttentionShape,
    b: usize,
}

impl<'a> Sequence<'a> {
    fn head(&self, x: &'a [f32], stride: usize, head: usize) -> Head<'a> {
        head_of(
            x,
            self.b,
            self.shape.seq_len,
            stride,
            head,
            self.shape.head_dim,
        )
    }

    /// Fills the sequence's input gradients; returns its share of the norm gradients.
    fn backward(&self, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let AttentionShape {
            seq_len,
            head_dim,
            eps,
            ..
        } = self.shape;
        let [q, k, _, q_norm, k_norm] = self.inputs;
        let mut dq_norm = vec![0.0; q_norm.len()];
        let mut dk_norm = vec![0.0; k_norm.len()];
        for kv in 0..self.shape.n_kv_heads {
            let k = self.head(k, self.shape.kv_width(), kv);
            let k_hat = k.prepared(k_norm, self.rope, eps, 1.0);
            let v = self.head(self.inputs[2], self.shape.kv_width(), kv);
            let keys = KeyValues::new(self.shape.precision, &k_hat, v.mat(0, seq_len), true);
            let mut dk_hat = vec![0.0; seq_len * head_dim];
            for head in kv * self.shape.group()..(kv + 1) * self.shape.group() {
                let q = self.head(q, self.shape.q_width(), head);
                let scale = self.shape.scale();
                let q_hat = q.prepared(q_norm, self.rope, eps, scale);
                let dq_hat = self.head_backward(head, &q_hat, &keys, (&mut dk_hat, dv));
                q.prepared_backward(dq, &mut dq_norm, dq_hat, (q_norm, self.rope, eps, scale));
            }
            k.prepared_backward(dk, &mut dk_norm, dk_hat, (k_norm, self.rope, eps, 1.0));
        }
        (dq_norm, dk_norm)
    }

    /// One query head: adds to `dk_hat` and `dv`, returns the gradient of the prepared queries.
    fn head_backward(
        &self,
        head: usize,
        q_hat: &[f32],
        keys: &KeyValues<'_>,
        (dk_hat, dv): (&mut [f32], &mut [f32]),
    ) -> Vec<f32> {
        let AttentionShape {
            seq_len: seq,
            head_dim: dim,
            ..
        } = self.shape;
        let (qw, kvw) = (self.shape.q_width(), self.shape.kv_width());
        let kv = head / self.shape.group();
        let (y, dy) = (self.head(self.y, qw, head), self.head(self.dy, qw, head));
        let mut dq_hat = vec![0.0; seq * dim];
        let mut probs = vec![0.0; BLOCK * seq];
        let mut dscores = vec![0.0; BLOCK * seq];
        for from in (0..seq).step_by(BLOCK) {
            let to = (from + BLOCK).min(seq);
            let n = to - from;
            let p = &mut probs[..n * to];
            let ds = &mut dscores[..n * to];
            let q_rows = Mat::new(&q_hat[from * dim..to * dim], n, dim);
            keys.scores(p, q_rows, to);
            let dy_rows = dy.mat(from, to);
            keys.dprobs(ds, dy_rows, to);
            vectorised(
                #[inline(always)]
                || {
                    let rows = p.chunks_exact_mut(to).zip(ds.chunks_exact_mut(to));
                    for (i, (p, ds)) in rows.enumerate() {
                        let row = from + i;
                        let delta = dot(y.row(row), dy.row(row));
                        score_backward(p, ds, row + 1, self.lse[head * seq + row], delta);
                    }
                },
            );
            let (p, ds) = (Mat::new(p, n, to), Mat::new(ds, n, to));
            let into = MatMut::strided(&mut dv[kv * dim..], to, dim, kvw);
            keys.add_transposed(into, p, dy_rows);
            let into = MatMut::new(&mut dk_hat[..to * dim], to, dim);
            keys.add_transposed(into, ds, q_rows);
            keys.dq(&mut dq_hat[from * dim..to * dim], ds);
        }
        dq_hat
    }
}

/// Turns one row of scores into probabilities, and `dP` into `dS = P (dP - delta)`.
#[inline(always)]
fn score_backward(scores: &mut [f32], dprobs: &mut [f32], n_keys: usize, lse: f32, delta: f32) {
    let (scores, future) = scores.split_at_mut(n_keys);
    let (dprobs, dfuture) = dprobs.split_at_mut(n_keys);
    future.fill(0.0);
    dfuture.fill(0.0);
    for (s, d) in scores.iter_mut().zip(dprobs) {
        let p = exp(*s - lse);
        *s = p;
        *d = p * (*d - delta);
    }
}
