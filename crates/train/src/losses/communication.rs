//! Communication balance loss: every device is sent as many tokens as the others, however many of its experts they take.
//!
//! Paper: DeepSeek-V2, 2024, arXiv 2405.04434, equations 29 to 31.
//! Differs from paper: nothing.

use super::{by_sequence, grouped};
use burn::tensor::Tensor;
use cadre_routing::Routing;

/// `mean_seq sum_i f''_i P''_i` over `n_devices` devices, each with as many experts, in the order of their ids.
///
/// `f''_i = D / (M L)` times the tokens of the sequence that have a pick on device i, with `M = limit` devices that a
/// token may use; `P''_i` is the sum over the device's experts j of `P_j`, the mean of column j of `probs_te` over the
/// sequence. 1 when every token uses M devices and devices have even tokens or probabilities.
/// `probs_te` is `[n_sequences * L, E]`, sequence by sequence, `routing` its picks. Derivative with softmax:
/// `1 / T p_j (f''_device(j) - sum_i f''_device(i) p_i)`.
///
/// # Panics
/// As [`super::device_balance`], and for a limit of 0.
#[must_use]
pub fn communication_balance(
    probs_te: Tensor<2>,
    routing: &Routing,
    n_sequences: usize,
    [n_devices, limit]: [usize; 2],
) -> Tensor<1> {
    assert!(limit > 0, "a token may use some device");
    let per_device = probs_te.dims()[1] / n_devices;
    let seq_len = routing.n_tokens() / n_sequences.max(1);
    let one = n_devices as f64 / (limit * seq_len) as f64;
    let mut f = vec![0.0; n_sequences * n_devices];
    let mut devices = Vec::new();
    for (sequence, ids) in by_sequence(routing, n_sequences) {
        devices.clear();
        devices.extend(ids.iter().map(|&id| usize::from(id) / per_device));
        devices.sort_unstable();
        devices.dedup();
        devices
            .iter()
            .for_each(|device| f[sequence * n_devices + device] += one);
    }
    grouped(probs_te, f, n_sequences)
}
