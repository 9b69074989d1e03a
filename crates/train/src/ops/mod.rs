//! Our own differentiable operations: forward and hand-written backward, fused for a CPU.
//!
//! Each file owns one operation: its safe numeric code on slices (`forward`, `backward`), and its place in the
//! autodiff graph. [`Fused`] is what the model calls (through the free functions here, on `Tensor`s);
//! [`Kernels`] is what a Burn backend supplies. Today that is Flex, the CPU backend; on other devices the free functions
//! take Burn's own operations (`plain.rs`).
//! Every operation is held to finite differences in `tests/gradients.rs`.

mod attention;
mod attention_products;
mod cross_entropy;
mod dispatch;
mod embedding;
mod experts;
mod experts_bf16;
mod flex;
mod graph;
mod linear;
mod math;
mod plain;
mod precision;
mod rms_norm;

pub use attention::AttentionShape;
pub use dispatch::Dispatch;
pub(crate) use math::{add_scaled, dot, vectorised};
pub use precision::{Numerics, Precision, Recompute};

use burn::backend::{Backend, Dispatch as Routed, backend_extension, tensor::FloatTensor};
use burn::tensor::Tensor;
use std::sync::Arc;

/// The operations as the autodiff graph sees them.
#[backend_extension(Flex, Autodiff)]
pub trait Fused: Backend {
    /// `y = x w^T`.
    fn project(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
    /// `y = x / rms(x) * w`, over the last axis.
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// Rows of `w` by token id.
    fn embed(w: FloatTensor<Self>, ids: Arc<Vec<u32>>) -> FloatTensor<Self>;
    /// Causal grouped-query attention with RoPE, and norms of queries and keys where these are not empty.
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        q_norm: FloatTensor<Self>,
        k_norm: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;
    /// SwiGLU experts over dispatched tokens, combined with weights.
    fn experts(
        x: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        dispatch: Arc<Dispatch>,
        numerics: Numerics,
    ) -> FloatTensor<Self>;
    /// Mean next-token cross-entropy through the unembedding.
    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// Forward with what the backward needs, and the backward, for one backend without autodiff.
pub trait Kernels: Fused {
    /// Gradients of [`Fused::project`]: `(dx, dw)`.
    fn project_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        precision: Precision,
    ) -> [FloatTensor<Self>; 2];
    /// Gradients of [`Fused::rms_norm`]: `(dx, dw)`.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
    /// Gradient of [`Fused::embed`] with respect to `w`, whose shape is `[rows, cols]`.
    fn embed_backward(dy: FloatTensor<Self>, ids: &[u32], shape: [usize; 2]) -> FloatTensor<Self>;
    /// Attention output and the log-sum-exp of every score row.
    fn attend_forward(
        inputs: &[FloatTensor<Self>; 5],
        shape: AttentionShape,
    ) -> [FloatTensor<Self>; 2];
    /// Gradients of [`Fused::attend`] in the order of its inputs. `saved` is the forward's result.
    fn attend_backward(
        inputs: &[FloatTensor<Self>; 5],
        saved: &[FloatTensor<Self>; 2],
        shape: AttentionShape,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 5];
    /// Expert output and the gate/up products of every dispatched pair, which are empty when they are to be computed
    /// again.
    fn experts_forward(
        inputs: &[FloatTensor<Self>; 4],
        dispatch: &Dispatch,
        numerics: Numerics,
    ) -> [FloatTensor<Self>; 2];
    /// Gradients of [`Fused::experts`] in the order of its inputs. `saved` is the gate/up products.
    fn experts_backward(
        inputs: &[FloatTensor<Self>; 4],
        saved: FloatTensor<Self>,
        dispatch: &Dispatch,
        numerics: Numerics,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 4];
    /// `x` times the one value of `by`.
    fn times(x: FloatTensor<Self>, by: FloatTensor<Self>) -> FloatTensor<Self>;
    /// Loss and, for a loss gradient of one, `(dx, dw)`: the logits are never stored.
    fn cross_entropy_with_gradients(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: &[u32],
        precision: Precision,
    ) -> [FloatTensor<Self>; 3];
}

/// `y [T, out] = x [T, in] w[out, in]^T`, in f32; see [`Precision::linear`].
#[must_use]
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    Precision::F32.linear(x, w)
}

/// RMSNorm of `x [T, D]` over its last axis with weight `w [D]`.
#[must_use]
pub fn rms_norm(x: Tensor<2>, w: Tensor<1>, eps: f32) -> Tensor<2> {
    if plain::wanted(&x.device()) {
        return plain::rms_norm(x, w, eps);
    }
    Tensor::from_dispatch(Routed::rms_norm(x.into_dispatch(), w.into_dispatch(), eps))
}

/// `y [T, D]`: row `ids[t]` of `w [V, D]`.
///
/// # Panics
/// If an id is not below `V`.
#[must_use]
pub fn embedding(w: Tensor<2>, ids: Arc<Vec<u32>>) -> Tensor<2> {
    if plain::wanted(&w.device()) {
        return plain::embedding(w, &ids);
    }
    Tensor::from_dispatch(Routed::embed(w.into_dispatch(), ids))
}

/// Causal grouped-query attention; q, k and v are `[T, heads * head_dim]`, the norms `[head_dim]`, or `[0]` for none.
#[must_use]
pub fn attention(
    [q, k, v]: [Tensor<2>; 3],
    [q_norm, k_norm]: [Tensor<1>; 2],
    shape: AttentionShape,
) -> Tensor<2> {
    if plain::wanted(&q.device()) {
        return plain::attention([q, k, v], [q_norm, k_norm], shape);
    }
    Tensor::from_dispatch(Routed::attend(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        q_norm.into_dispatch(),
        k_norm.into_dispatch(),
        shape,
    ))
}

/// [`Numerics::experts`] in f32.
#[must_use]
pub fn experts(
    x: Tensor<2>,
    gate_up: Tensor<3>,
    down: Tensor<3>,
    weights: Tensor<1>,
    dispatch: Arc<Dispatch>,
) -> Tensor<2> {
    Numerics::default().experts(x, gate_up, down, weights, dispatch)
}

/// [`Precision::cross_entropy`] in f32.
#[must_use]
pub fn cross_entropy(x: Tensor<2>, w: Tensor<2>, targets: Arc<Vec<u32>>) -> Tensor<1> {
    Precision::F32.cross_entropy(x, w, targets)
}

impl Precision {
    /// `y [T, out] = x [T, in] w[out, in]^T`.
    #[must_use]
    pub fn linear(self, x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
        if plain::wanted(&x.device()) {
            return plain::linear(x, w);
        }
        Tensor::from_dispatch(Routed::project(x.into_dispatch(), w.into_dispatch(), self))
    }

    /// Mean over tokens of `-log softmax(x w^T)[target]`: `x [T, D]`, `w [V, D]`, nats, shape `[1]`.
    #[must_use]
    pub fn cross_entropy(self, x: Tensor<2>, w: Tensor<2>, targets: Arc<Vec<u32>>) -> Tensor<1> {
        if plain::wanted(&x.device()) {
            return plain::cross_entropy(x, w, &targets);
        }
        Tensor::from_dispatch(Routed::cross_entropy(
            x.into_dispatch(),
            w.into_dispatch(),
            targets,
            self,
        ))
    }
}

impl Numerics {
    /// `y_t = sum_p weights[p] E_{expert of p}(x_t)` over the pairs p of token t, with
    /// `E_e(x) = down_e (silu(gate_e x) * up_e x)`.
    ///
    /// `x [T, D]`, `gate_up [E, 2 I, D]` (gate rows first), `down [E, D, I]`, `weights [pairs]`; which pairs there are
    /// says `dispatch`. A token without a pair gets zeros.
    #[must_use]
    pub fn experts(
        self,
        x: Tensor<2>,
        gate_up: Tensor<3>,
        down: Tensor<3>,
        weights: Tensor<1>,
        dispatch: Arc<Dispatch>,
    ) -> Tensor<2> {
        if plain::wanted(&x.device()) {
            return plain::experts(x, [gate_up, down], weights, &dispatch);
        }
        Tensor::from_dispatch(Routed::experts(
            x.into_dispatch(),
            gate_up.into_dispatch(),
            down.into_dispatch(),
            weights.into_dispatch(),
            dispatch,
            self,
        ))
    }
}
