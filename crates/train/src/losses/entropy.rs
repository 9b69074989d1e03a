//! Router entropy: as a penalty it keeps the distribution sharp, so that top-p routing stays cheap.
//!
//! Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv 2403.07652.
//! Differs from paper: nothing.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;

/// `mean_t H_t` with `H = -sum_j p_j log p_j` in nats, of `logits_te` `[T, E]`.
///
/// Derivative: `-1 / T p_j (log p_j + H)`.
#[must_use]
pub fn entropy(logits_te: Tensor<2>) -> Tensor<1> {
    let log_p_te = log_softmax(logits_te, 1);
    (log_p_te.clone().exp() * log_p_te).sum_dim(1).mean().neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn even_is_ln_n_and_certain_is_0() {
        let h = |row: [f32; 4]| {
            entropy(Tensor::from_floats([row], &Device::flex())).into_scalar::<f32>()
        };
        assert!((h([3.0; 4]) - 4f32.ln()).abs() < 1e-6);
        assert!(h([200.0, 0.0, 0.0, 0.0]).abs() < 1e-6);
    }
}
