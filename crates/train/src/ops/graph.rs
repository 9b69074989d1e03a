//! Where each operation joins the autodiff graph: what it saves, and which backward kernel it calls.

use super::{AttentionShape, Dispatch, Fused, Kernels, Numerics, Precision};
use burn::backend::Autodiff;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use std::sync::Arc;

/// Declares the backward step of one operation: its state, and how state and output gradient become
/// input gradients.
macro_rules! backward {
    ($name:ident, $n:literal, $state:ty, |$s:ident, $dy:ident| $body:expr) => {
        #[derive(Debug)]
        struct $name;

        impl<B: Kernels> Backward<B, $n> for $name {
            type State = $state;

            fn backward(
                self,
                ops: Ops<Self::State, $n>,
                grads: &mut Gradients,
                _checkpointer: &mut Checkpointer,
            ) {
                let $dy = grads.consume::<B>(&ops.node);
                let $s = ops.state;
                let values: [FloatTensor<B>; $n] = $body;
                for (parent, value) in ops.parents.into_iter().zip(values) {
                    if let Some(node) = parent {
                        grads.register::<B>(node.id, value);
                    }
                }
            }
        }
    };
}

type F<B> = FloatTensor<B>;

backward!(Linear, 2, ([F<B>; 2], Precision), |state, dy| {
    let ([x, w], precision) = state;
    B::project_backward(x, w, dy, precision)
});

backward!(RmsNorm, 2, ([F<B>; 2], f32), |state, dy| {
    let ([x, w], eps) = state;
    B::rms_norm_backward(x, w, eps, dy)
});

backward!(Embedding, 1, (Arc<Vec<u32>>, [usize; 2]), |state, dy| {
    let (ids, shape) = state;
    [B::embed_backward(dy, &ids, shape)]
});

backward!(
    Attention,
    5,
    ([F<B>; 5], [F<B>; 2], AttentionShape),
    |state, dy| {
        let (inputs, saved, shape) = state;
        B::attend_backward(&inputs, &saved, shape, dy)
    }
);

backward!(
    Experts,
    4,
    ([F<B>; 4], F<B>, Arc<Dispatch>, Numerics),
    |state, dy| {
        let (inputs, saved, dispatch, numerics) = state;
        B::experts_backward(&inputs, saved, &dispatch, numerics, dy)
    }
);

backward!(CrossEntropy, 2, [F<B>; 2], |state, dy| {
    state.map(|gradient| B::times(gradient, dy.clone()))
});

impl<B: Kernels, C: CheckpointStrategy> Fused for Autodiff<B, C> {
    fn project(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let prep = Linear.prepare::<C>([x.node(), w.node()]).compute_bound();
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let y = B::project(x.clone(), w.clone(), precision);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish(([x, w], precision), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let prep = RmsNorm.prepare::<C>([x.node(), w.node()]).compute_bound();
        let (x, w) = (x.into_primitive(), w.into_primitive());
        let y = B::rms_norm(x.clone(), w.clone(), eps);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish(([x, w], eps), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn embed(w: FloatTensor<Self>, ids: Arc<Vec<u32>>) -> FloatTensor<Self> {
        let prep = Embedding.prepare::<C>([w.node()]).compute_bound();
        let shape = burn::backend::TensorMetadata::shape(&w).dims::<2>();
        let y = B::embed(w.into_primitive(), ids.clone());
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((ids, shape), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        q_norm: FloatTensor<Self>,
        k_norm: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let inputs = [q, k, v, q_norm, k_norm];
        let nodes = inputs.each_ref().map(|t| t.node());
        let prep = Attention.prepare::<C>(nodes).compute_bound();
        let inputs = inputs.map(|t| t.into_primitive());
        let saved = B::attend_forward(&inputs, shape);
        let y = saved[0].clone();
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, saved, shape), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn experts(
        x: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        dispatch: Arc<Dispatch>,
        numerics: Numerics,
    ) -> FloatTensor<Self> {
        let inputs = [x, gate_up, down, weights];
        let nodes = inputs.each_ref().map(|t| t.node());
        let prep = Experts.prepare::<C>(nodes).compute_bound();
        let inputs = inputs.map(|t| t.into_primitive());
        let [y, saved] = B::experts_forward(&inputs, &dispatch, numerics);
        match prep.stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, saved, dispatch, numerics), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let prep = CrossEntropy
            .prepare::<C>([x.node(), w.node()])
            .compute_bound();
        let (x, w) = (x.into_primitive(), w.into_primitive());
        match prep.stateful() {
            OpsKind::Tracked(prep) => {
                let [loss, dx, dw] = B::cross_entropy_with_gradients(x, w, &targets, precision);
                prep.finish([dx, dw], loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::cross_entropy(x, w, targets, precision)),
        }
    }
}
