//! Combine weights of the picked experts, and through them the router's gradient: one function per head.
//!
//! The picks are constants. What a head decides is how the gradient of a weight reaches the logits: with `g_e` the
//! derivative of the loss with respect to the weight of pick e, the doc of each head gives `d loss / d l_j` for one
//! token, and the tests hold automatic differentiation to it.
//!
//! Legend: T tokens, E experts, `S` the set of a token's real picks, `[pairs]` one value per pick in the order of the
//! [`Routing`] (null picks included, whose weight is 0); logits `[T, E]`.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Int, Tensor, TensorData};
use cadre_routing::Routing;

/// Far below any logit, and finite: adding it leaves a probability of exactly 0.
const NEVER: f32 = -1e30;

/// The picks of a batch as index tensors: one row per token, as wide as the widest token.
#[derive(Clone, Debug)]
pub struct Picks {
    /// `[T, W]` picked experts; 0 where a token has fewer picks.
    ids: Tensor<2, Int>,
    /// Absent when every token has W real picks.
    ragged: Option<Ragged>,
}

/// What rows of unequal length need.
#[derive(Clone, Debug)]
struct Ragged {
    /// `[T, W]`, 1 for real picks, 0 for null picks and beyond a token's picks.
    live: Tensor<2>,
    /// `[pairs]` places of the pairs among the `T W` entries.
    places: Tensor<1, Int>,
}

impl Picks {
    /// The picks of `routing`, of which ids from `n_real` on are null experts, on the device of `logits_te`.
    ///
    /// # Panics
    /// When the routing has another number of tokens than `logits_te`.
    #[must_use]
    pub fn of(routing: &Routing, n_real: usize, logits_te: &Tensor<2>) -> Self {
        let n_tokens = routing.n_tokens();
        assert_eq!(n_tokens, logits_te.dims()[0], "one row of logits per token");
        let device = logits_te.device();
        let width = routing.iter().map(|(ids, _)| ids.len()).max();
        let width = width.unwrap_or(0).max(1);
        let is_real = |id: u16| usize::from(id) < n_real;
        let even = routing.n_pairs() == n_tokens * width
            && routing.experts().iter().all(|&id| is_real(id));
        let mut ids = vec![0_i64; n_tokens * width];
        let mut live = vec![0_f32; n_tokens * width];
        let mut places = Vec::with_capacity(routing.n_pairs());
        for (t, (experts, _)) in routing.iter().enumerate() {
            for (slot, &id) in experts.iter().enumerate() {
                let place = t * width + slot;
                ids[place] = i64::from(id);
                live[place] = f32::from(u8::from(is_real(id)));
                places.push(place as i64);
            }
        }
        let dims = [n_tokens, width];
        let ragged = (!even).then(|| {
            let n_pairs = places.len();
            Ragged {
                live: Tensor::from_data(TensorData::new(live, dims), (&device, logits_te.dtype())),
                places: Tensor::from_data(TensorData::new(places, [n_pairs]), &device),
            }
        });
        Self {
            ids: Tensor::from_data(TensorData::new(ids, dims), &device),
            ragged,
        }
    }

    /// The values of the picks, `[T, W]`.
    fn gather(&self, values_te: Tensor<2>) -> Tensor<2> {
        values_te.gather(1, self.ids.clone())
    }

    /// `values_tw` where a pick is real, 0 elsewhere.
    fn mask(&self, values_tw: Tensor<2>) -> Tensor<2> {
        match &self.ragged {
            None => values_tw,
            Some(ragged) => values_tw * ragged.live.clone(),
        }
    }

    /// The entries of `values_tw` that belong to a pair: `[pairs]`, 0 for null picks.
    fn pairs(&self, values_tw: Tensor<2>) -> Tensor<1> {
        let flat = self.mask(values_tw).flatten(0, 1);
        match &self.ragged {
            None => flat,
            Some(ragged) => flat.select(0, ragged.places.clone()),
        }
    }

    /// Softmax over each token's real picks, `[T, W]`; anything finite where a token has none.
    fn softmax(&self, logits_te: Tensor<2>) -> Tensor<2> {
        let picked_tw = self.gather(logits_te);
        match &self.ragged {
            None => softmax(picked_tw, 1),
            Some(ragged) => {
                let dead_tw = ragged.live.clone().neg().add_scalar(1.0);
                softmax(picked_tw + dead_tw.mul_scalar(NEVER), 1)
            }
        }
    }
}

/// Head A, raw softmax: `w_e = scale p_e`.
///
/// `scale p_j (g_j - sum_S g_e p_e)`, with `g_j = 0` outside of S: experts that were not picked learn as well.
#[must_use]
pub fn raw_softmax(logits_te: Tensor<2>, picks: &Picks, scale: f64) -> Tensor<1> {
    let picked_tw = picks.gather(softmax(logits_te, 1));
    picks.pairs(picked_tw.mul_scalar(scale))
}

/// Head B, renormalised: `w_e = scale p_e / sum_S p`, computed as the softmax over the picked logits.
///
/// `scale w_j (g_j - sum_S g_e w_e)` with `w = p / sum_S p` for j in S, 0 outside. With one pick the weight is constant
/// and the gradient always 0.
#[must_use]
pub fn renormalised(logits_te: Tensor<2>, picks: &Picks, scale: f64) -> Tensor<1> {
    let weights = picks.pairs(picks.softmax(logits_te));
    if scale == 1.0 {
        weights
    } else {
        weights.mul_scalar(scale)
    }
}

/// Raw sigmoid: `w_e = scale s_e` with `s = sigmoid(l)`.
///
/// `scale g_j s_j (1 - s_j)` for j in S, 0 outside.
#[must_use]
pub fn raw_sigmoid(logits_te: Tensor<2>, picks: &Picks, scale: f64) -> Tensor<1> {
    picks.pairs(sigmoid(picks.gather(logits_te)).mul_scalar(scale))
}

/// Head C, renormalised sigmoid: `w_e = scale s_e / sum_S s` with `s = sigmoid(l)`.
///
/// `scale / sum_S s (g_j - sum_S g_e s_e / sum_S s) s_j (1 - s_j)` for j in S, 0 outside.
#[must_use]
pub fn sigmoid_renormalised(logits_te: Tensor<2>, picks: &Picks, scale: f64) -> Tensor<1> {
    let s_tw = picks.mask(sigmoid(picks.gather(logits_te)));
    // As on the inference side: sigmoids that all underflow give weight 0 and not NaN.
    let sum_t1 = s_tw.clone().sum_dim(1).add_scalar(1e-20);
    picks.pairs((s_tw / sum_t1).mul_scalar(scale))
}

/// Head D, constant: `w_e = value`. No gradient.
#[must_use]
pub fn constant(logits_te: &Tensor<2>, picks: &Picks, value: f64) -> Tensor<1> {
    let ones_tw = Tensor::ones(picks.ids.dims(), (&logits_te.device(), logits_te.dtype()));
    picks.pairs(ones_tw.mul_scalar(value))
}

/// Head E, plain sum with one scalar per token: `w_e = M / (M + eps)` with `M = sum_S p`.
///
/// `eps / (M + eps)^2 (sum_S g_e) p_j (1[j in S] - M)`.
#[must_use]
pub fn token_scalar(logits_te: Tensor<2>, picks: &Picks, eps: f64) -> Tensor<1> {
    let dims = picks.ids.dims();
    let mass_t1 = picks.mask(picks.gather(softmax(logits_te, 1))).sum_dim(1);
    picks.pairs((mass_t1.clone() / mass_t1.add_scalar(eps)).expand(dims))
}

/// Head A with temperature and noise: `w_e = y_e` with `y = softmax((l + noise) / temperature)`.
///
/// `y_j / temperature (g_j - sum_S g_e y_e)`. The noise `[T, E]` is a constant that the caller keeps, so that a
/// recomputed forward pass sees the same one; see [`gumbel`].
#[must_use]
pub fn tempered_softmax(
    logits_te: Tensor<2>,
    noise_te: Tensor<2>,
    picks: &Picks,
    temperature: f64,
) -> Tensor<1> {
    raw_softmax((logits_te + noise_te).div_scalar(temperature), picks, 1.0)
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
pub fn straight_through(logits_te: Tensor<2>, picks: &Picks) -> Tensor<1> {
    let p_tw = picks.gather(softmax(logits_te, 1));
    picks.pairs(p_tw.clone() / p_tw.detach())
}
