//! The training side of the routing rules: differentiable weights for the picks that a policy makes.
//!
//! Each rule is two small files with one name: `policies/NAME.rs` in the routing crate works on slices, `NAME.rs` here on
//! tensors. The two must agree: a generated test runs every name listed here on equal logits and compares ids and
//! weights. Projecting hidden states to logits is the layer's business, so that the two can be compared at all.

mod top_k;

pub use top_k::TopK;

use burn::tensor::Tensor;
use cadre_routing::registry::PolicyOptions;
use cadre_routing::{Loads, RoutingError};

/// A routing rule in training.
pub trait Route: Send + Sync + std::fmt::Debug {
    /// The name that recipes use; that of the policy that makes the same picks.
    fn name(&self) -> &'static str;

    /// Length of one row of logits.
    fn n_experts(&self) -> usize;

    /// Picks per token.
    fn top_k(&self) -> usize;

    /// Routes `logits` `[T, n_experts]`.
    ///
    /// # Errors
    /// [`RoutingError::NonFinite`], naming the token, when a logit is NaN or infinite; the caller adds layer and step.
    fn route(&self, logits: Tensor<2>) -> Result<Routed, RoutingError>;
}

/// What a router decided for `T` tokens. Gradient flows through `logits`, `probs` and `weights`.
#[derive(Clone, Debug)]
pub struct Routed {
    /// `[T, E]` as given.
    pub logits: Tensor<2>,
    /// `[T, E]` softmax of the logits, for the losses.
    pub probs: Tensor<2>,
    /// `[T, top_k]` picked experts, row by row, best first. Constants: a pick has no gradient.
    pub ids: Vec<u16>,
    /// `[T, top_k]` combine weights of the picks.
    pub weights: Tensor<2>,
    /// Picks per expert and routing entropy of this call.
    pub loads: Loads,
}

/// Builds a router from its options.
type Build = fn(&PolicyOptions) -> Result<Box<dyn Route>, RoutingError>;

/// Every router: its name (that of its file) and how to build it.
const ROUTERS: &[(&str, Build)] = &[("top_k", |o| {
    Ok(Box::new(TopK::new(o.n_experts, o.top_k, o.norm_topk_prob)?))
})];

/// Builds the router called `name`.
///
/// # Errors
/// [`RoutingError::UnknownPolicy`], which lists the known names, or what the router says about its options.
pub fn build(name: &str, options: &PolicyOptions) -> Result<Box<dyn Route>, RoutingError> {
    match ROUTERS.iter().find(|(known, _)| *known == name) {
        Some((_, build)) => build(options),
        None => Err(RoutingError::UnknownPolicy {
            name: name.to_owned(),
            known: names().collect(),
        }),
    }
}

/// Names of all routers, in the order of the list.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROUTERS.iter().map(|(name, _)| *name)
}
