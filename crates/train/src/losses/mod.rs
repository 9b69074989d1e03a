//! Router losses: one function per loss, without its coefficient, differentiable with respect to the logits.
//!
//! Every loss is a mean over tokens (rows), so that coefficients mean the same at any batch size. Loads are constants:
//! only probabilities carry gradient, which is what makes a loss with loads counted over a whole batch exact.
//! Padding tokens must be left out of the rows and of the loads by the caller.
//! The doc of each loss gives its derivative with respect to `l_tj`; `tests/routing_gradients.rs` holds automatic
//! differentiation to it and to finite differences.

mod distillation;
mod entropy;
mod load_balance;
mod sequence;
mod symmetric_kl;
mod weights;
mod z_loss;

pub use distillation::distillation;
pub use entropy::entropy;
pub use load_balance::{load_balance, null_load_balance};
pub use sequence::sequence_balance;
pub use symmetric_kl::symmetric_kl;
pub use weights::LossWeights;
pub use z_loss::z_loss;

use burn::tensor::{Tensor, TensorData};

/// Numbers without gradient, shaped and typed to meet `like`.
fn constant<const D: usize>(values: Vec<f64>, shape: [usize; D], like: &Tensor<2>) -> Tensor<D> {
    Tensor::from_data(
        TensorData::new(values, shape),
        (&like.device(), like.dtype()),
    )
}
