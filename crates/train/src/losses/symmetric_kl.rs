//! Symmetric Kullback-Leibler divergence: agreement of two passes with different experts.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260.
//! Differs from paper: nothing.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;

/// `mean_t 1/2 sum_j (p_j - q_j)(log p_j - log q_j)` of the distributions of two sets of logits `[T, V]`; gradient
/// reaches both.
///
/// Derivative with respect to the logits of p: `1 / (2 T) (p_j (log p_j - log q_j - KL(p, q)) + p_j - q_j)`.
#[must_use]
pub fn symmetric_kl(p_logits: Tensor<2>, q_logits: Tensor<2>) -> Tensor<1> {
    let (log_p, log_q) = (log_softmax(p_logits, 1), log_softmax(q_logits, 1));
    let difference = log_p.clone().exp() - log_q.clone().exp();
    (difference * (log_p - log_q))
        .sum_dim(1)
        .mean()
        .mul_scalar(0.5)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn equal_is_0_and_the_order_does_not_matter() {
        let a = || Tensor::<2>::from_floats([[0.0, 1.0, -2.0]], &Device::flex());
        let b = || Tensor::<2>::from_floats([[1.0, 0.5, 0.0]], &Device::flex());
        assert_eq!(symmetric_kl(a(), a()).into_scalar::<f32>(), 0.0);
        let (ab, ba): (f32, f32) = (
            symmetric_kl(a(), b()).into_scalar(),
            symmetric_kl(b(), a()).into_scalar(),
        );
        assert!(ab > 0.0 && (ab - ba).abs() < 1e-6);
    }
}
