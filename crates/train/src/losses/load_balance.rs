//! Load-balance loss with one convention: perfectly even is 1.
//!
//! Paper: Switch Transformers, Fedus et al., 2021, arXiv 2101.03961; loads counted over more than the batch at hand:
//! Demons in the Detail, Qiu et al., 2025, arXiv 2501.11873; null experts: AdaMoE, Zeng et al., 2024, arXiv 2406.13233.
//! Differs from paper: implementations disagree by a factor of k; here `f` sums to 1 and `legacy_scale` multiplies it by
//! the mean picks per token, which is what coefficients tuned on Hugging Face's Mixtral or on AdaMoE expect.

use super::constant;
use burn::tensor::Tensor;
use cadre_routing::Loads;

/// `E sum_i f_i P_i`, where `f_i` is expert i's share of the picks in `loads` and `P_i` the mean of column i of
/// `probs_te` (`[T, E]`, softmax of the logits). Even loads or even probabilities give 1, or the mean picks per token
/// with `legacy_scale`.
///
/// `loads` may cover more tokens than `probs_te`: the loads of all workers, or of all micro-batches so far.
/// Derivative: `E / T p_j (f_j - sum_i f_i p_i)`.
///
/// # Panics
/// When `loads` and `probs_te` differ in the number of experts.
#[must_use]
pub fn load_balance(probs_te: Tensor<2>, loads: &Loads, legacy_scale: bool) -> Tensor<1> {
    balance(probs_te, shares(loads, legacy_scale))
}

/// As [`load_balance`], where all null experts (ids from `n_real` on) count as one pool: each has their mean share, so
/// that the loss evens out the real experts and the use of nulls as a whole.
///
/// # Panics
/// When `loads` and `probs_te` differ in the number of experts.
#[must_use]
pub fn null_load_balance(
    probs_te: Tensor<2>,
    loads: &Loads,
    n_real: usize,
    legacy_scale: bool,
) -> Tensor<1> {
    let mut shares = shares(loads, legacy_scale);
    let null = shares.get_mut(n_real..).unwrap_or_default();
    let mean = null.iter().sum::<f64>() / null.len() as f64;
    null.fill(mean);
    balance(probs_te, shares)
}

/// `f`: picks over all picks, or over tokens at the legacy scale. All zero before the first token.
fn shares(loads: &Loads, legacy_scale: bool) -> Vec<f64> {
    let picks: u64 = loads.counts().iter().sum();
    let total = if legacy_scale {
        loads.n_tokens()
    } else {
        picks
    };
    loads
        .counts()
        .iter()
        .map(|&count| count as f64 / total.max(1) as f64)
        .collect()
}

fn balance(probs_te: Tensor<2>, shares: Vec<f64>) -> Tensor<1> {
    let n_experts = probs_te.dims()[1];
    assert_eq!(
        shares.len(),
        n_experts,
        "loads and probabilities must have the same experts"
    );
    let f_1e = constant(shares, [1, n_experts], &probs_te);
    (probs_te.mean_dim(0) * f_1e)
        .sum()
        .mul_scalar(n_experts as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn value(probs: [[f32; 2]; 2], ids: &[u16], top_k: usize, legacy_scale: bool) -> f32 {
        let mut loads = Loads::new(2);
        loads.add_ids(ids, top_k).unwrap();
        load_balance(
            Tensor::from_floats(probs, &Device::flex()),
            &loads,
            legacy_scale,
        )
        .into_scalar()
    }

    #[test]
    fn even_is_one_and_collapse_is_n_experts() {
        assert_eq!(value([[0.5, 0.5], [0.5, 0.5]], &[0, 0], 1, false), 1.0);
        assert_eq!(value([[1.0, 0.0], [0.0, 1.0]], &[0, 1], 1, false), 1.0);
        assert_eq!(value([[1.0, 0.0], [1.0, 0.0]], &[0, 0], 1, false), 2.0);
        assert_eq!(
            value([[0.5, 0.5], [0.5, 0.5]], &[0, 1, 1, 0], 2, false),
            1.0
        );
        assert_eq!(value([[0.5, 0.5], [0.5, 0.5]], &[0, 1, 1, 0], 2, true), 2.0);
    }

    #[test]
    fn without_null_experts_both_forms_agree() {
        let mut loads = Loads::new(2);
        loads.add_ids(&[0, 0, 1], 1).unwrap();
        let probs = || Tensor::<2>::from_floats([[0.7, 0.3]], &Device::flex());
        let plain: f32 = load_balance(probs(), &loads, false).into_scalar();
        let null: f32 = null_load_balance(probs(), &loads, 2, false).into_scalar();
        assert_eq!(plain, null);
    }
}
