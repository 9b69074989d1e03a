//! Tensor names of `qwen3_moe`: one matrix per expert, as the published checkpoints have them.
//!
//! Programs that dump live transformers 5 weights write all experts of a layer in two tensors,
//! `mlp.experts.gate_up_proj` `[E, 2I, H]` (gate rows first) and `mlp.experts.down_proj`
//! `[E, H, I]`. Both are row-major, so every expert's matrix is a contiguous piece and reading
//! them under the per-expert names copies nothing.

use crate::config::ModelConfig;

/// See [`crate::tensor_specs`].
pub(super) fn tensor_specs(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let embedding = vec![config.vocab_size, hidden];
    let mut specs = vec![("model.embed_tokens.weight".to_owned(), embedding.clone())];
    for layer in 0..config.n_layers {
        push_layer(&mut specs, config, layer);
    }
    specs.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        specs.push(("lm_head.weight".to_owned(), embedding));
    }
    specs
}

fn push_layer(specs: &mut Vec<(String, Vec<usize>)>, config: &ModelConfig, layer: usize) {
    let hidden = config.hidden_size;
    let q_dim = config.n_heads * config.head_dim;
    let kv_dim = config.n_kv_heads * config.head_dim;
    let mut push = |name: &str, shape: &[usize]| {
        specs.push((
            format!("model.layers.{layer}.{name}.weight"),
            shape.to_vec(),
        ));
    };
    push("input_layernorm", &[hidden]);
    push("self_attn.q_proj", &[q_dim, hidden]);
    push("self_attn.k_proj", &[kv_dim, hidden]);
    push("self_attn.v_proj", &[kv_dim, hidden]);
    push("self_attn.o_proj", &[hidden, q_dim]);
    push("self_attn.q_norm", &[config.head_dim]);
    push("self_attn.k_norm", &[config.head_dim]);
    push("post_attention_layernorm", &[hidden]);
    let mut feed_forward = |prefix: &str, width: usize| {
        push(&format!("{prefix}.gate_proj"), &[width, hidden]);
        push(&format!("{prefix}.up_proj"), &[width, hidden]);
        push(&format!("{prefix}.down_proj"), &[hidden, width]);
    };
    if !config.is_moe_layer(layer) {
        feed_forward("mlp", config.intermediate_size);
        return;
    }
    for expert in 0..config.n_experts {
        feed_forward(
            &format!("mlp.experts.{expert}"),
            config.moe_intermediate_size,
        );
    }
    push("mlp.gate", &[config.n_experts, hidden]);
}

/// Names, shapes and value offsets of the pieces of a stacked expert tensor; `None` when `name`
/// is not one, or when its shape is not three-dimensional with an even number of gate/up rows.
pub(crate) fn split_fused(name: &str, shape: &[usize]) -> Option<Vec<(String, [usize; 2], usize)>> {
    let (prefix, kind) = name.rsplit_once('.')?;
    if !prefix.ends_with(".mlp.experts") {
        return None;
    }
    let &[n_experts, rows, cols] = shape else {
        return None;
    };
    let projections: &[&str] = match kind {
        "gate_up_proj" if rows.is_multiple_of(2) => &["gate_proj", "up_proj"],
        "down_proj" => &["down_proj"],
        _ => return None,
    };
    let piece_rows = rows / projections.len();
    let piece = piece_rows * cols;
    let mut pieces = Vec::with_capacity(n_experts * projections.len());
    for expert in 0..n_experts {
        for (position, projection) in projections.iter().enumerate() {
            let name = format!("{prefix}.{expert}.{projection}.weight");
            let offset = expert * rows * cols + position * piece;
            pieces.push((name, [piece_rows, cols], offset));
        }
    }
    Some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacked_tensors_split_at_the_right_values() {
        let pieces = split_fused("model.layers.1.mlp.experts.gate_up_proj", &[2, 4, 3]).unwrap();
        let expected = [
            (
                "model.layers.1.mlp.experts.0.gate_proj.weight".to_owned(),
                [2, 3],
                0,
            ),
            (
                "model.layers.1.mlp.experts.0.up_proj.weight".to_owned(),
                [2, 3],
                6,
            ),
            (
                "model.layers.1.mlp.experts.1.gate_proj.weight".to_owned(),
                [2, 3],
                12,
            ),
            (
                "model.layers.1.mlp.experts.1.up_proj.weight".to_owned(),
                [2, 3],
                18,
            ),
        ];
        assert_eq!(pieces, expected);
        let pieces = split_fused("model.layers.0.mlp.experts.down_proj", &[2, 3, 2]).unwrap();
        assert_eq!(
            pieces[1],
            (
                "model.layers.0.mlp.experts.1.down_proj.weight".into(),
                [3, 2],
                6
            )
        );
    }

    #[test]
    fn ordinary_tensors_are_left_alone() {
        assert!(split_fused("model.layers.0.mlp.experts.3.down_proj.weight", &[4, 2]).is_none());
        assert!(split_fused("model.layers.0.mlp.experts.gate_up_proj", &[2, 3, 3]).is_none());
        assert!(split_fused("model.norm.weight", &[4]).is_none());
    }
}
