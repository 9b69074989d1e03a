//! The operations as compositions of Burn's own, for devices that the fused ones do not run on.
//!
//! One seam: every public function of `ops` asks [`wanted`] about its input and comes here when the tensor is not on the
//! CPU. Gradients are Burn's. Nothing is tiled: the logits of all tokens and the scores of all positions exist at once.
//! `Precision` and `Recompute::Experts` say nothing here, and a recipe that sets them beside a device is refused.
//! The tests run whole models both ways on the CPU.

use super::attention::Rope;
use super::{AttentionShape, Dispatch};
use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// What a score that must not count is lowered by; its probability is exactly 0.
const NEVER: f32 = -1e30;

/// Whether tensors on `device` are computed here.
pub(super) fn wanted(device: &Device) -> bool {
    #[cfg(test)]
    if tests::FORCED.get() {
        return true;
    }
    *device != Device::flex()
}

/// Token ids or positions as an index tensor.
fn index(values: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// Numbers without gradient.
fn constant<const D: usize>(values: Vec<f32>, dims: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, dims), device)
}

pub(super) fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    x.matmul(w.transpose())
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, w: Tensor<1>, eps: f32) -> Tensor<D> {
    let mean = x.clone().square().mean_dim(D - 1);
    x / mean.add_scalar(eps).sqrt() * w.unsqueeze()
}

pub(super) fn embedding(w: Tensor<2>, ids: &[u32]) -> Tensor<2> {
    let ids = index(ids, &w.device());
    w.select(0, ids)
}

/// `x [B, L, heads, dim]`, rotated by position.
fn rotate(x: Tensor<4>, [cos, sin]: &[Tensor<4>; 2]) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let upper = a.clone() * cos.clone() - b.clone() * sin.clone();
    let lower = b * cos.clone() + a * sin.clone();
    Tensor::cat(vec![upper, lower], 3)
}

pub(super) fn attention(
    [q, k, v]: [Tensor<2>; 3],
    [q_norm, k_norm]: [Tensor<1>; 2],
    shape: AttentionShape,
) -> Tensor<2> {
    let AttentionShape {
        batch,
        seq_len,
        n_heads,
        n_kv_heads,
        head_dim,
        eps,
        ..
    } = shape;
    let device = q.device();
    let rope = Rope::new(&shape);
    let angles =
        [rope.cos, rope.sin].map(|values| constant(values, [1, seq_len, 1, head_dim / 2], &device));
    let heads = |x: Tensor<2>, n: usize| x.reshape([batch, seq_len, n, head_dim]);
    let group = n_heads / n_kv_heads;
    // Every query head beside the key/value head of its group. Where a group is one head nothing is repeated: the gradient
    // of repeating once is wrong in Burn 0.22.1 on other devices than the CPU (tests/card.rs).
    let spread = |x: Tensor<4>| {
        let x = x.swap_dims(1, 2);
        if group == 1 {
            return x;
        }
        let x: Tensor<5> = x.unsqueeze_dim(2);
        x.repeat_dim(2, group)
            .reshape([batch, n_heads, seq_len, head_dim])
    };
    let normed = |x: Tensor<4>, norm: Tensor<1>| match norm.dims() {
        [0] => x,
        _ => rms_norm(x, norm, eps),
    };
    let q = rotate(normed(heads(q, n_heads), q_norm), &angles).swap_dims(1, 2);
    let k = spread(rotate(normed(heads(k, n_kv_heads), k_norm), &angles));
    let v = spread(heads(v, n_kv_heads));
    let later = |i: usize| i % seq_len > i / seq_len;
    let mask = (0..seq_len * seq_len).map(|i| if later(i) { NEVER } else { 0.0 });
    let mask = mask.collect();
    let mask = constant(mask, [1, 1, seq_len, seq_len], &device);
    let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar(shape.scale()) + mask;
    let mixed = softmax(scores, 3).matmul(v).swap_dims(1, 2);
    mixed.reshape([batch * seq_len, n_heads * head_dim])
}

pub(super) fn experts(
    x: Tensor<2>,
    [gate_up, down]: [Tensor<3>; 2],
    weights: Tensor<1>,
    dispatch: &Dispatch,
) -> Tensor<2> {
    let device = x.device();
    let [_, rows, d] = gate_up.dims();
    let mut outputs = Vec::new();
    for e in (0..dispatch.n_experts()).filter(|&e| !dispatch.range(e).is_empty()) {
        let tokens = index(&dispatch.tokens()[dispatch.range(e)], &device);
        let w = gate_up.clone().narrow(0, e, 1).reshape([rows, d]);
        let both = linear(x.clone().select(0, tokens), w);
        let (gate, up) = (
            both.clone().narrow(1, 0, rows / 2),
            both.narrow(1, rows / 2, rows / 2),
        );
        let w = down.clone().narrow(0, e, 1).reshape([d, rows / 2]);
        outputs.push(linear(silu(gate) * up, w));
    }
    if outputs.is_empty() {
        return x.mul_scalar(0.0);
    }
    let weights = weights.select(0, index(dispatch.pairs(), &device));
    let weighted = Tensor::cat(outputs, 0) * weights.unsqueeze_dim(1);
    let zeros = Tensor::zeros(x.dims(), &device);
    let tokens = index(dispatch.tokens(), &device);
    zeros.select_assign(0, tokens, weighted, IndexingUpdateOp::Add)
}

pub(super) fn cross_entropy(x: Tensor<2>, w: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    let targets = index(targets, &x.device()).unsqueeze_dim(1);
    let chosen = log_softmax(linear(x, w), 1).gather(1, targets);
    chosen.mean().neg()
}

#[cfg(test)]
mod tests {
    use crate::data;
    use crate::init::Init;
    use crate::lm::{LanguageModel, Pass};
    use crate::optimizer::{AdamW, GradientSum};
    use crate::recipe::Recipe;
    use burn::tensor::{Device, Tensor};
    use std::cell::Cell;
    use std::path::Path;

    thread_local! {
        /// Whether this thread's tests compute here what the CPU would do with the fused operations.
        pub(super) static FORCED: Cell<bool> = const { Cell::new(false) };
    }

    const TINY: &str = r#"
        name = "tiny"
        [model]
        vocab_size = 60
        hidden_size = 16
        n_layers = 3
        n_heads = 4
        n_kv_heads = 2
        head_dim = 6
        n_experts = 5
        moe_intermediate_size = 9
        intermediate_size = 12
        mlp_only_layers = [1]
        max_position_embeddings = 64
        initializer_range = 0.3
        KEYS
        [train]
        steps = 4
        batch_size = 3
        seq_len = 9
        lr = 1e-2
        [output]
        dir = "runs/tiny"
        ROUTER
    "#;

    /// Losses of four steps.
    fn losses(recipe: &Recipe, plain: bool) -> Vec<f64> {
        FORCED.set(plain);
        let architecture = recipe.architecture().unwrap();
        let init = Init {
            seed: 5,
            std: recipe.model.initializer_range,
            device: Device::flex().autodiff(),
        };
        let mut model = LanguageModel::init(&architecture, &init);
        let mut optimizer = AdamW::new(recipe.optimizer);
        let mut found = Vec::new();
        for step in 1..=4 {
            let pass = Pass {
                step,
                training: true,
                ..Pass::default()
            };
            let batch = data::random_batch(recipe, step, 0);
            let parts = model.losses(&architecture, &batch, &pass).unwrap();
            let value = |x: Tensor<1>| f64::from(x.into_scalar::<f32>());
            let loss = parts.cross_entropy + parts.balance * 0.1 + parts.z * 0.1;
            let mut sum = GradientSum::default();
            sum.add(&model, &mut loss.backward(), 1.0).unwrap();
            found.extend([value(loss), sum.norm()]);
            model = optimizer.step(model, sum, 1e-2, 1.0);
        }
        FORCED.set(false);
        found
    }

    #[test]
    fn whole_models_train_alike_both_ways() {
        for (keys, router) in [
            ("top_k = 2", ""),
            (
                "top_k = 2\ntie_word_embeddings = true\nrecurrent_router = 6",
                "",
            ),
            (
                "top_k = 2\nattention_experts = { n_experts = 2, top_k = 1 }",
                "",
            ),
            (
                "top_k = 2\nshared_intermediate_size = 7\nresidual = 'learned'",
                "[router]\nname = 'null_experts'\nn_null = 3",
            ),
            (
                "",
                "[router]\nname = 'switch'\ncapacity = { factor = 0.5, min = 1 }",
            ),
            ("", "[router]\nname = 'top_p'\ntop_p = 0.6"),
            ("top_k = 2\nqk_norm = false", ""),
            (
                "top_k = 2\ndecoupled_router = { hidden_size = 8, n_heads = 2, head_dim = 4, intermediate_size = 8 }",
                "",
            ),
        ] {
            let text = TINY.replace("KEYS", keys).replace("ROUTER", router);
            let recipe = Recipe::parse(Path::new("tiny.toml"), &text).unwrap();
            let (fused, plain) = (losses(&recipe, false), losses(&recipe, true));
            assert!(fused != plain, "{keys} {router}: the same path twice");
            for (i, (a, b)) in fused.iter().zip(&plain).enumerate() {
                let off = (a - b).abs() / a.abs();
                assert!(off < 2e-4, "{keys} {router}: number {i} is {b}, not {a}");
            }
        }
    }
}
