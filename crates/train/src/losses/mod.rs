//! Router losses: one function per loss, without its coefficient, differentiable with respect to the logits.
//!
//! Every loss is a mean over tokens (rows), so that coefficients mean the same at any batch size. Loads are constants:
//! only probabilities carry gradient, which is what makes a loss with loads counted over a whole batch exact.
//! Padding tokens must be left out of the rows and of the loads by the caller.
//! The doc of each loss gives its derivative with respect to `l_tj`; `tests/routing_gradients.rs` holds automatic
//! differentiation to it and to finite differences.

mod communication;
mod device;
mod distillation;
mod entropy;
mod further;
mod load_balance;
mod sequence;
mod symmetric_kl;
mod weights;
mod z_loss;

pub use communication::communication_balance;
pub use device::device_balance;
pub use distillation::distillation;
pub use entropy::entropy;
pub(crate) use further::further;
pub use load_balance::{load_balance, null_load_balance};
pub use sequence::sequence_balance;
pub use symmetric_kl::symmetric_kl;
pub use weights::LossWeights;
pub use z_loss::z_loss;

use burn::tensor::{Tensor, TensorData};
use cadre_routing::Routing;

/// Numbers without gradient, shaped and typed to meet `like`.
fn constant<const D: usize>(values: Vec<f64>, shape: [usize; D], like: &Tensor<2>) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(values, shape),
        (&like.device(), like.dtype()),
    )
}

/// The tokens of `routing`, each with the sequence it belongs to: of `n_sequences` of equal length, one after the other.
fn by_sequence(routing: &Routing, n_sequences: usize) -> impl Iterator<Item = (usize, &[u16])> {
    let n_tokens = routing.n_tokens();
    let whole = n_sequences > 0 && n_tokens.is_multiple_of(n_sequences);
    assert!(
        whole,
        "{n_tokens} tokens are not {n_sequences} sequences of equal length"
    );
    let seq_len = n_tokens / n_sequences;
    let ids = routing.iter().map(|(ids, _)| ids).enumerate();
    ids.map(move |(t, ids)| (t / seq_len, ids))
}

/// `mean_seq sum_g f_g P_g`, where `P_g` is the mean over a sequence of the probability of the experts of group `g`.
///
/// `probs_te` is `[n_sequences * L, E]`; `f` has a number per sequence and group, and groups are experts with ids that
/// follow each other, as many in each.
fn grouped(probs_te: Tensor<2>, f: Vec<f64>, n_sequences: usize) -> Tensor<1> {
    let [n_tokens, n_experts] = probs_te.dims();
    let n_groups = f.len() / n_sequences;
    assert!(
        n_experts.is_multiple_of(n_groups),
        "{n_experts} experts are not {n_groups} groups of equal size"
    );
    let f_bg1 = constant(f, [n_sequences, n_groups, 1], &probs_te);
    let mean_b1e = probs_te
        .reshape([n_sequences, n_tokens / n_sequences, n_experts])
        .mean_dim(1);
    let sum_bg1 = mean_b1e
        .reshape([n_sequences, n_groups, n_experts / n_groups])
        .sum_dim(2);
    (sum_bg1 * f_bg1).sum().div_scalar(n_sequences as f64)
}
