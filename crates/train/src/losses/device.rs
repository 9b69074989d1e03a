//! Device-level balance loss: even work for the devices that experts lie on, whichever of their experts does it.
//!
//! Paper: DeepSeekMoE, Dai et al., 2024, arXiv 2401.06066, equations 15 to 17; DeepSeek-V2, 2024, arXiv 2405.04434,
//! equations 26 to 28.
//! Differs from paper: `f` is divided by the picks that were counted, which equals K L when no pick was dropped.

use super::grouped;
use super::sequence::shares;
use burn::tensor::Tensor;
use cadre_routing::Routing;

/// `mean_seq sum_i f'_i P'_i` over `n_devices` devices, each with as many experts, in the order of their ids.
///
/// `f'_i` is the mean over the experts j of device i of `f_j = E count_j / sum count`, `P'_i` the sum over them of `P_j`,
/// the mean of column j of `probs_te` over the sequence; 1 when devices have even picks or probabilities.
/// `probs_te` is `[n_sequences * L, E]`, sequence by sequence, `routing` its picks. Derivative with softmax:
/// `1 / T p_j (f'_device(j) - sum_i f'_device(i) p_i)`.
///
/// # Panics
/// When the tokens are not whole sequences, the experts do not divide among the devices, or a pick is not below E.
#[must_use]
pub fn device_balance(
    probs_te: Tensor<2>,
    routing: &Routing,
    n_sequences: usize,
    n_devices: usize,
) -> Tensor<1> {
    let n_experts = probs_te.dims()[1];
    let f = shares(routing, n_sequences, n_experts, n_devices);
    grouped(probs_te, f, n_sequences)
}
