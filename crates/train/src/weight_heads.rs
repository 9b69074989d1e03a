//! Combine weights of the picked experts, and through them the router's gradient: one function per head.
//!
//! The picks are constants. What a head decides is how the gradient of a weight reaches the logits: with `g_e` the
//! derivative of the loss with respect to the weight of pick e, the doc of each head gives `d loss / d l_j` for one
//! token, and the tests hold automatic differentiation to it.
//!
//! Legend: T tokens, E experts, k picks per token (`S` is the set of a token's picks); logits `[T, E]`, picks and
//! weights `[T, k]`, best first.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Int, Tensor, TensorData};

/// The picks `ids` (`[T, top_k]`, row by row) as an index tensor on the device of `logits_te`.
///
/// # Panics
/// When `ids` is not whole rows of `top_k`.
#[must_use]
pub fn picks(ids: &[u16], top_k: usize, logits_te: &Tensor<2>) -> Tensor<2, Int> {
    assert!(
        top_k > 0 && ids.len().is_multiple_of(top_k),
        "{} ids are not rows of {top_k}",
        ids.len()
    );
    let values: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let data = TensorData::new(values, [ids.len() / top_k, top_k]);
    Tensor::from_data(data, &logits_te.device())
}

/// Head A, raw softmax: `w_e = scale p_e`.
///
/// `scale p_j (g_j - sum_S g_e p_e)`, with `g_j = 0` outside of S: experts that were not picked learn as well.
#[must_use]
pub fn raw_softmax(logits_te: Tensor<2>, picks_tk: Tensor<2, Int>, scale: f64) -> Tensor<2> {
    softmax(logits_te, 1).gather(1, picks_tk).mul_scalar(scale)
}

/// Head B, renormalised: `w_e = p_e / sum_S p`, computed as the softmax over the picked logits.
///
/// `w_j (g_j - sum_S g_e w_e)` for j in S, 0 outside. With one pick the weight is always 1 and the gradient always 0.
#[must_use]
pub fn renormalised(logits_te: Tensor<2>, picks_tk: Tensor<2, Int>) -> Tensor<2> {
    softmax(logits_te.gather(1, picks_tk), 1)
}

/// Head C, renormalised sigmoid: `w_e = scale s_e / sum_S s` with `s = sigmoid(l)`.
///
/// `scale / sum_S s (g_j - sum_S g_e s_e / sum_S s) s_j (1 - s_j)` for j in S, 0 outside.
#[must_use]
pub fn sigmoid_renormalised(
    logits_te: Tensor<2>,
    picks_tk: Tensor<2, Int>,
    scale: f64,
) -> Tensor<2> {
    let s_tk = sigmoid(logits_te.gather(1, picks_tk));
    // As on the inference side: sigmoids that all underflow give weight 0 and not NaN.
    let sum_t1 = s_tk.clone().sum_dim(1).add_scalar(1e-20);
    (s_tk / sum_t1).mul_scalar(scale)
}

/// Head D, constant: `w_e = 1`. No gradient.
#[must_use]
pub fn constant(logits_te: &Tensor<2>, picks_tk: &Tensor<2, Int>) -> Tensor<2> {
    let [n_tokens, top_k] = picks_tk.dims();
    Tensor::ones([n_tokens, top_k], (&logits_te.device(), logits_te.dtype()))
}

/// Head E, plain sum with one scalar per token: `w_e = M / (M + eps)` with `M = sum_S p`.
///
/// `eps / (M + eps)^2 (sum_S g_e) p_j (1[j in S] - M)`.
#[must_use]
pub fn token_scalar(logits_te: Tensor<2>, picks_tk: Tensor<2, Int>, eps: f64) -> Tensor<2> {
    let dims = picks_tk.dims();
    let mass_t1 = softmax(logits_te, 1).gather(1, picks_tk).sum_dim(1);
    (mass_t1.clone() / mass_t1.add_scalar(eps)).expand(dims)
}

/// Head A with temperature and noise: `w_e = y_e` with `y = softmax((l + noise) / temperature)`.
///
/// `y_j / temperature (g_j - sum_S g_e y_e)`. The noise `[T, E]` is a constant that the caller keeps, so that a
/// recomputed forward pass sees the same one; see [`gumbel`].
#[must_use]
pub fn tempered_softmax(
    logits_te: Tensor<2>,
    noise_te: Tensor<2>,
    picks_tk: Tensor<2, Int>,
    temperature: f64,
) -> Tensor<2> {
    raw_softmax(
        (logits_te + noise_te).div_scalar(temperature),
        picks_tk,
        1.0,
    )
}

/// Gumbel noise from uniform numbers in (0, 1): `-log(-log u)`.
#[must_use]
pub fn gumbel(uniform_te: Tensor<2>) -> Tensor<2> {
    uniform_te.log().neg().log().neg()
}

/// Straight-through: `w_e = p_e / p_e` with the denominator held constant; the value is 1, the gradient is not 0.
///
/// With one pick e: `g_e (1[j = e] - p_j)`; with several, the sum of that over S.
#[must_use]
pub fn straight_through(logits_te: Tensor<2>, picks_tk: Tensor<2, Int>) -> Tensor<2> {
    let p_tk = softmax(logits_te, 1).gather(1, picks_tk);
    p_tk.clone() / p_tk.detach()
}
