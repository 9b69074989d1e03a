//! Sequence-wise balance loss: a light hand against extreme imbalance inside one sequence.
//!
//! Paper: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, equations 17 to 20; with softmax scores the expert-level
//! balance loss of DeepSeek-V2, 2024, arXiv 2405.04434.
//! Differs from paper: `f` is divided by the picks that were counted, which equals k L when no pick was dropped.

use super::{by_sequence, grouped};
use burn::tensor::Tensor;
use cadre_routing::Routing;

/// `mean_seq sum_i f_i P_i`, where `f_i = E count_i / sum count` over one sequence and `P_i` is the mean of column i of
/// `probs_te` over it; 1 when a sequence's picks or probabilities are even.
///
/// `probs_te` is `[n_sequences * L, E]`, sequence by sequence: softmax of the logits, or `s_i / sum_j s_j` of sigmoid
/// scores. `routing` has the picks that the scores make without a bias.
/// Derivative: `1 / T (dP / dl) f`, with softmax `1 / T p_j (f_j - sum_i f_i p_i)`, with sigmoid
/// `1 / T (f_j - sum_i f_i p_i) / (sum s) s_j (1 - s_j)`.
///
/// # Panics
/// When the tokens are not whole sequences, or a pick is not below E.
#[must_use]
pub fn sequence_balance(probs_te: Tensor<2>, routing: &Routing, n_sequences: usize) -> Tensor<1> {
    let n_experts = probs_te.dims()[1];
    grouped(
        probs_te,
        shares(routing, n_sequences, n_experts, n_experts),
        n_sequences,
    )
}

/// Picks of each sequence and group of experts over those of an even sequence.
pub(super) fn shares(
    routing: &Routing,
    n_sequences: usize,
    n_experts: usize,
    n_groups: usize,
) -> Vec<f64> {
    let mut shares = vec![0.0; n_sequences * n_groups];
    let per_group = n_experts / n_groups;
    for (sequence, ids) in by_sequence(routing, n_sequences) {
        for &id in ids {
            shares[sequence * n_groups + usize::from(id) / per_group] += 1.0;
        }
    }
    for shares in shares.chunks_exact_mut(n_groups) {
        let picks = shares.iter().sum::<f64>().max(1.0);
        shares
            .iter_mut()
            .for_each(|x| *x *= n_groups as f64 / picks);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn even_sequences_give_1_and_several_are_averaged() {
        let value = |probs: Vec<f32>, ids: &[u16], n_sequences: usize| {
            let flat = Tensor::<1>::from_floats(probs.as_slice(), &Device::flex());
            let mut routing = Routing::new();
            ids.iter().for_each(|&id| routing.push_token(&[id], &[1.0]));
            let probs = flat.reshape([ids.len(), 2]);
            sequence_balance(probs, &routing, n_sequences).into_scalar::<f32>()
        };
        assert!((value(vec![0.5; 4], &[0, 1], 1) - 1.0).abs() < 1e-6);
        // P = (3/4, 1/4), f = (2, 0): 1.5; averaged with an even one: 1.25.
        let probs = vec![0.75, 0.25, 0.75, 0.25, 0.5, 0.5, 0.5, 0.5];
        assert!((value(probs, &[0, 0, 0, 1], 2) - 1.25).abs() < 1e-6);
    }
}
