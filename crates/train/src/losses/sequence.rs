//! Sequence-wise balance loss for sigmoid routers: a light hand against extreme imbalance inside one sequence.
//!
//! Paper: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437.
//! Differs from paper: `f` is divided by the picks that were counted, which equals k L when no pick was dropped.

use super::constant;
use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use cadre_routing::Loads;

/// `mean_seq sum_i f_i P_i`, where `f_i = E count_i / sum count` over one sequence and `P_i` is the mean over the sequence
/// of `s_i / sum_j s_j` with `s = sigmoid(l)`.
///
/// `logits_te` is `[n_sequences * L, E]`, sequence by sequence; `loads` has one entry per sequence, counted with the
/// scores without bias. Derivative: `1 / T (f_j - sum_i f_i s'_i) / (sum s) s_j (1 - s_j)`.
///
/// # Panics
/// When the rows are not whole sequences, or a load has another number of experts.
#[must_use]
pub fn sequence_balance(logits_te: Tensor<2>, loads: &[Loads]) -> Tensor<1> {
    let [n_tokens, n_experts] = logits_te.dims();
    let n_sequences = loads.len();
    let whole = n_sequences > 0 && n_tokens.is_multiple_of(n_sequences);
    assert!(
        whole,
        "{n_tokens} tokens are not {n_sequences} sequences of equal length"
    );
    let f = loads.iter().flat_map(|loads| {
        assert_eq!(
            loads.counts().len(),
            n_experts,
            "loads and logits must have the same experts"
        );
        let picks = loads.counts().iter().sum::<u64>().max(1);
        loads
            .counts()
            .iter()
            .map(move |&count| (count * n_experts as u64) as f64 / picks as f64)
    });
    let f_b1e = constant(f.collect(), [n_sequences, 1, n_experts], &logits_te);
    let s_te = sigmoid(logits_te);
    let share_te = s_te.clone() / s_te.sum_dim(1);
    let mean_b1e = share_te
        .reshape([n_sequences, n_tokens / n_sequences, n_experts])
        .mean_dim(1);
    (mean_b1e * f_b1e).sum().div_scalar(n_sequences as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn even_sequences_give_1_and_several_are_averaged() {
        let mut even = Loads::new(2);
        even.add_ids(&[0, 1], 1).unwrap();
        let mut skewed = Loads::new(2);
        skewed.add_ids(&[0, 0], 1).unwrap();
        let value = |logits: Vec<f32>, loads: &[Loads]| {
            let rows = logits.len() / 2;
            let flat = Tensor::<1>::from_floats(logits.as_slice(), &Device::flex());
            sequence_balance(flat.reshape([rows, 2]), loads).into_scalar::<f32>()
        };
        assert!((value(vec![0.5; 4], std::slice::from_ref(&even)) - 1.0).abs() < 1e-6);
        // sigmoid(+-ln 3) = 3/4, 1/4: P = (3/4, 1/4), f = (2, 0), loss 1.5; averaged with the even one: 1.25.
        let (a, b) = (3f32.ln(), -3f32.ln());
        assert!((value(vec![a, b, a, b, 0.0, 0.0, 0.0, 0.0], &[skewed, even]) - 1.25).abs() < 1e-6);
    }
}
