//! Between Flex tensors and f32 slices, and the kernels of the Flex backend.

use super::{
    AttentionShape, Dispatch, Fused, Kernels, Numerics, Precision, attention, cross_entropy,
    embedding, experts, linear, rms_norm,
};
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, TensorData};
use burn_flex::FlexTensor;
use std::sync::Arc;

/// A tensor whose values lie in order, ready to be read as one slice.
pub(crate) struct Dense(FlexTensor);

impl Dense {
    pub(crate) fn of(tensor: &FlexTensor) -> Self {
        assert_eq!(tensor.dtype(), DType::F32, "training runs in f32");
        let plain = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        Self(if plain {
            tensor.clone()
        } else {
            tensor.to_contiguous()
        })
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.0.storage::<f32>()[..self.0.layout().num_elements()]
    }

    pub(crate) fn dims<const D: usize>(&self) -> [usize; D] {
        self.0.layout().shape().dims::<D>()
    }
}

pub(crate) fn tensor<const D: usize>(values: Vec<f32>, dims: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, dims))
}

impl Fused for Flex {
    fn project(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        linear::forward(&Dense::of(&x), &Dense::of(&w), precision)
    }

    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        rms_norm::forward(&Dense::of(&x), &Dense::of(&w), eps)
    }

    fn embed(w: FloatTensor<Self>, ids: Arc<Vec<u32>>) -> FloatTensor<Self> {
        embedding::forward(&Dense::of(&w), &ids)
    }

    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        q_norm: FloatTensor<Self>,
        k_norm: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let [y, _] = Self::attend_forward(&[q, k, v, q_norm, k_norm], shape);
        y
    }

    fn experts(
        x: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        dispatch: Arc<Dispatch>,
        numerics: Numerics,
    ) -> FloatTensor<Self> {
        let [y, _] = Self::experts_forward(&[x, gate_up, down, weights], &dispatch, numerics);
        y
    }

    fn cross_entropy(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: Arc<Vec<u32>>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        cross_entropy::loss(&Dense::of(&x), &Dense::of(&w), &targets, precision)
    }
}

impl Kernels for Flex {
    fn project_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        precision: Precision,
    ) -> [FloatTensor<Self>; 2] {
        linear::backward(&Dense::of(&x), &Dense::of(&w), &Dense::of(&dy), precision)
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2] {
        rms_norm::backward(&Dense::of(&x), &Dense::of(&w), eps, &Dense::of(&dy))
    }

    fn embed_backward(dy: FloatTensor<Self>, ids: &[u32], shape: [usize; 2]) -> FloatTensor<Self> {
        embedding::backward(&Dense::of(&dy), ids, shape)
    }

    fn attend_forward(
        inputs: &[FloatTensor<Self>; 5],
        shape: AttentionShape,
    ) -> [FloatTensor<Self>; 2] {
        attention::forward(&inputs.each_ref().map(Dense::of), shape)
    }

    fn attend_backward(
        inputs: &[FloatTensor<Self>; 5],
        saved: &[FloatTensor<Self>; 2],
        shape: AttentionShape,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 5] {
        attention::backward(
            &inputs.each_ref().map(Dense::of),
            &saved.each_ref().map(Dense::of),
            shape,
            &Dense::of(&dy),
        )
    }

    fn experts_forward(
        inputs: &[FloatTensor<Self>; 4],
        dispatch: &Dispatch,
        numerics: Numerics,
    ) -> [FloatTensor<Self>; 2] {
        experts::forward(&inputs.each_ref().map(Dense::of), dispatch, numerics)
    }

    fn experts_backward(
        inputs: &[FloatTensor<Self>; 4],
        saved: FloatTensor<Self>,
        dispatch: &Dispatch,
        numerics: Numerics,
        dy: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 4] {
        experts::backward(
            &inputs.each_ref().map(Dense::of),
            &Dense::of(&saved),
            (dispatch, numerics),
            &Dense::of(&dy),
        )
    }

    fn times(x: FloatTensor<Self>, by: FloatTensor<Self>) -> FloatTensor<Self> {
        let by = Dense::of(&by).values()[0];
        // The usual case; a pass over a large gradient less.
        if by == 1.0 {
            return x;
        }
        let dims: [usize; 2] = x.layout().shape().dims();
        let mut values = Dense::of(&x).values().to_vec();
        values.iter_mut().for_each(|x| *x *= by);
        tensor(values, dims)
    }

    fn cross_entropy_with_gradients(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: &[u32],
        precision: Precision,
    ) -> [FloatTensor<Self>; 3] {
        cross_entropy::with_gradients(&Dense::of(&x), &Dense::of(&w), targets, precision)
    }
}
