//! The products of one key/value head, in f32 or of bf16.

use super::Precision;
use cadre_kernels::bf16_gemm::{Bf16Gemm, Left, Panels, Rows};
use cadre_kernels::gemm::{Mat, MatMut, Write, gemm};

/// Keys and values of one head of one sequence, `[seq_len, head_dim]` each, ready to be multiplied. A block of queries
/// sees the first `to` of them.
pub(super) struct KeyValues<'a> {
    k: Mat<'a>,
    v: Mat<'a>,
    dim: usize,
    packed: Option<Packed>,
}

/// What `of` asked for, the rest empty.
struct Packed {
    bf16: Bf16Gemm,
    /// `k^T`.
    k_across: Panels,
    k_down: Panels,
    v_across: Panels,
    v_down: Panels,
}

fn panels(bf16: Bf16Gemm, mat: Mat<'_>) -> Panels {
    let mut panels = Panels::default();
    bf16.panels(&mut panels, mat, None, 1);
    panels
}

fn rows(bf16: Bf16Gemm, mat: Mat<'_>) -> Rows {
    let mut rows = Rows::default();
    bf16.rows(&mut rows, mat, None, 1);
    rows
}

impl<'a> KeyValues<'a> {
    /// Packs what the forward pass needs, or what the backward pass does.
    pub(super) fn new(precision: Precision, k: &'a [f32], v: Mat<'a>, backward: bool) -> Self {
        let [seq_len, dim] = v.dims();
        let k = Mat::new(k, seq_len, dim);
        let packed = precision.bf16().map(|bf16| {
            let only = |wanted: bool, mat| match wanted {
                true => panels(bf16, mat),
                false => Panels::default(),
            };
            Packed {
                bf16,
                k_across: panels(bf16, k.t()),
                k_down: only(backward, k),
                v_across: only(backward, v.t()),
                v_down: only(!backward, v),
            }
        });
        Self { k, v, dim, packed }
    }

    /// `scores [n, to] = q k[..to]^T`.
    pub(super) fn scores(&self, scores: &mut [f32], q: Mat<'_>, to: usize) {
        let into = MatMut::new(scores, q.dims()[0], to);
        match &self.packed {
            None => gemm(into, Write::Set, 1.0, q, self.k.top(to).t(), 1),
            Some(packed) => {
                let (q, k) = (rows(packed.bf16, q), packed.k_across.corner(self.dim, to));
                packed.bf16.multiply(into, Write::Set, Left::rows(&q), k, 1);
            }
        }
    }

    /// `into [n, dim] = probs v[..to]`.
    pub(super) fn values(&self, into: MatMut<'_>, probs: Mat<'_>) {
        let [_, to] = probs.dims();
        match &self.packed {
            None => gemm(into, Write::Set, 1.0, probs, self.v.top(to), 1),
            Some(packed) => {
                let (p, v) = (rows(packed.bf16, probs), packed.v_down.corner(to, self.dim));
                packed.bf16.multiply(into, Write::Set, Left::rows(&p), v, 1);
            }
        }
    }

    /// `dprobs [n, to] = dy v[..to]^T`.
    pub(super) fn dprobs(&self, dprobs: &mut [f32], dy: Mat<'_>, to: usize) {
        let into = MatMut::new(dprobs, dy.dims()[0], to);
        match &self.packed {
            None => gemm(into, Write::Set, 1.0, dy, self.v.top(to).t(), 1),
            Some(packed) => {
                let (dy, v) = (rows(packed.bf16, dy), packed.v_across.corner(self.dim, to));
                packed
                    .bf16
                    .multiply(into, Write::Set, Left::rows(&dy), v, 1);
            }
        }
    }

    /// `dq [n, dim] = dscores k[..to]`.
    pub(super) fn dq(&self, dq: &mut [f32], dscores: Mat<'_>) {
        let [n, to] = dscores.dims();
        let into = MatMut::new(dq, n, self.dim);
        match &self.packed {
            None => gemm(into, Write::Set, 1.0, dscores, self.k.top(to), 1),
            Some(packed) => {
                let (ds, k) = (
                    rows(packed.bf16, dscores),
                    packed.k_down.corner(to, self.dim),
                );
                packed
                    .bf16
                    .multiply(into, Write::Set, Left::rows(&ds), k, 1);
            }
        }
    }

    /// `into [to, dim] += a^T b`, of `a [n, to]` and `b [n, dim]`: gradients of keys and values.
    pub(super) fn add_transposed(&self, into: MatMut<'_>, a: Mat<'_>, b: Mat<'_>) {
        match &self.packed {
            None => gemm(into, Write::Add, 1.0, a.t(), b, 1),
            Some(packed) => {
                let (a, b) = (panels(packed.bf16, a), panels(packed.bf16, b));
                packed
                    .bf16
                    .multiply(into, Write::Add, Left::transposed(&a), &b, 1);
            }
        }
    }
}
