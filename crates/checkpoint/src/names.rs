//! Tensor names: which tensors an architecture has, and how stacked expert tensors are split.

mod qwen3_moe;

use crate::config::ModelConfig;

pub(crate) use qwen3_moe::split_fused;

/// Names and shapes of all tensors of the architecture, in the order of the forward pass.
///
/// Matrices are `[out, in]`. With tied embeddings there is no `lm_head.weight`.
#[must_use]
pub fn tensor_specs(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    qwen3_moe::tensor_specs(config)
}
