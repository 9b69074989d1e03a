//! Router z-loss: bounds the size of the logits, which no loss on probabilities can see.
//!
//! Paper: ST-MoE: Designing Stable and Transferable Sparse Expert Models, Zoph et al., 2022, arXiv 2202.08906.
//! Differs from paper: nothing.

use burn::tensor::Tensor;

/// `mean_t (log sum_j exp l_tj)^2` of `logits_te` `[T, E]`.
///
/// Derivative: `2 / T lse_t p_j`.
#[must_use]
pub fn z_loss(logits_te: Tensor<2>) -> Tensor<1> {
    // The maximum is shifted out for range only; as a constant it cancels in the gradient too.
    let max_t1 = logits_te.clone().detach().max_dim(1);
    let lse_t1 = (logits_te - max_t1.clone()).exp().sum_dim(1).log() + max_t1;
    lse_t1.square().mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn equal_logits_give_ln_n_and_large_ones_do_not_overflow() {
        let z = |row: [f32; 4]| {
            z_loss(Tensor::from_floats([row], &Device::flex())).into_scalar::<f32>()
        };
        assert!((z([0.0; 4]) - 4f32.ln().powi(2)).abs() < 1e-6);
        assert!((z([1000.0, 0.0, 0.0, 0.0]) - 1e6).abs() < 1.0);
    }
}
