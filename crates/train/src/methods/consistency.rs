//! Consistency: two passes over a batch with independent draws of experts have to predict the same.
//!
//! Paper: Taming Sparsely Activated Transformer with Stochastic Experts (THOR), Zuo et al., 2021, arXiv 2110.04260.
//! Rule: `L = L1 + L2 + a mean_t symKL(p1, p2)` where L1 and L2 are the losses of the two passes; gradient reaches both.
//! Recipe: `losses.consistency = a`; 0 turns it off and runs one pass. Meant for `router.name = "uniform"`, whose draws
//! differ by pass; any router with noise does, too.
//! State: none; the passes of micro-batch m are 2 m and 2 m + 1 of the step, and draws are named by them.
//! Cost: twice the step. With one expert and no noise the passes are equal: consistency 0, and twice the gradient.
//! Differs from paper: no dropout (Cadre has none), no label smoothing. Check: tests/methods.rs.

use crate::losses::symmetric_kl;
use crate::ops;
use burn::tensor::Tensor;

/// Disagreement of two passes, from their hidden states `[T, d_model]` and the head `[vocab, d_model]`; mean over tokens.
#[must_use]
pub fn consistency(first: Tensor<2>, second: Tensor<2>, head: Tensor<2>) -> Tensor<1> {
    symmetric_kl(ops::linear(first, head.clone()), ops::linear(second, head))
}
