//! The training side of the routing rules: differentiable weights for the picks that a policy makes.
//!
//! Each rule is two small files with one name: `policies/NAME.rs` in the routing crate works on slices, `NAME.rs` here on
//! tensors. The two must agree: a generated test runs every name listed here on equal logits and compares ids and
//! weights. Projecting hidden states to logits is the layer's business, so that the two can be compared at all.

mod options;
mod top_k;

pub use options::{RouterOptions, RouterSizes};
pub use top_k::TopK;

use crate::init::stream;
use crate::losses;
use burn::tensor::Tensor;
use cadre_routing::{Loads, Policy, Routing, RoutingError};
use rand_chacha::ChaCha8Rng;

/// A routing rule in training.
pub trait Route: Send + Sync + std::fmt::Debug {
    /// The name that recipes use; that of the policy that makes the same picks.
    fn name(&self) -> &'static str;

    /// Length of one row of logits, null experts included.
    fn n_experts(&self) -> usize;

    /// Number of experts that exist as weights; ids from here on are null experts.
    fn n_real_experts(&self) -> usize {
        self.n_experts()
    }

    /// Whether the routing of a token is independent of the tokens after it.
    fn causal(&self) -> bool;

    /// Whether the routing of a token is independent of the other sequences of the batch.
    fn batch_invariant(&self) -> bool;

    /// Routes `logits` `[T, n_experts]`. The same logits and context give the same result.
    ///
    /// # Errors
    /// [`RoutingError::NonFinite`], naming the token, when a logit is NaN or infinite; the caller adds layer and step.
    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError>;

    /// The load-balance loss that the rule trains with, 1 when perfectly even. `loads` may have been counted over more
    /// tokens than `routed`; `legacy_scale` multiplies by the mean picks per token.
    fn balance(&self, routed: &Routed, loads: &Loads, legacy_scale: bool) -> Tensor<1> {
        losses::load_balance(routed.probs.clone(), loads, legacy_scale)
    }
}

/// Where in a run a router is called: everything random and everything scheduled is a function of this, so that a
/// recomputed or resumed step sees the same.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteContext<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step, from 1; 0 outside of a run.
    pub step: u64,
    /// Decoder layer.
    pub layer: usize,
    /// Forward pass within the step: micro-batches, and repeated passes over one.
    pub pass: usize,
    /// Whether this is a training pass: noise, random experts and dropping belong to training.
    pub training: bool,
    /// Tokens per sequence; 0 when the rows are one sequence.
    pub seq_len: usize,
    /// Selection-only bias `[n_experts]`, for rules that have one.
    pub bias: Option<&'a [f32]>,
}

impl RouteContext<'_> {
    /// A random stream of its own for `what` in this seed, step, layer and pass.
    #[must_use]
    pub fn stream(&self, what: &str) -> ChaCha8Rng {
        let Self {
            step, layer, pass, ..
        } = self;
        stream(self.seed, &format!("{what}.{step}.{layer}.{pass}"))
    }
}

/// What a router decided for `T` tokens. Gradient flows through `logits`, `probs` and `weights`.
#[derive(Clone, Debug)]
pub struct Routed {
    /// `[T, E]` as given.
    pub logits: Tensor<2>,
    /// `[T, E]` softmax of the logits (or what the rule balances instead), for the losses.
    pub probs: Tensor<2>,
    /// The picks, null picks included; constants: a pick has no gradient.
    pub routing: Routing,
    /// `[pairs]` combine weights in the order of `routing`.
    pub weights: Tensor<1>,
    /// Picks per expert and routing entropy of this call, before any dropping.
    pub loads: Loads,
}

/// The picks that `policy` makes on the values of `logits`, and their loads.
fn picked(policy: &dyn Policy, logits: &Tensor<2>) -> Result<(Routing, Loads), RoutingError> {
    let values = values(logits);
    let mut routing = Routing::new();
    policy.route(&values, &mut routing)?;
    let loads = counted(&routing, policy.n_experts(), &values)?;
    Ok((routing, loads))
}

/// The values of `[T, E]` logits, row by row.
fn values(logits: &Tensor<2>) -> Vec<f32> {
    logits
        .try_to_vec_as::<f32>()
        .expect("router logits can be read back from their device")
}

/// Loads of a routing and entropy of its logits.
fn counted(routing: &Routing, n_experts: usize, logits: &[f32]) -> Result<Loads, RoutingError> {
    let mut loads = Loads::new(n_experts);
    loads.add_routing(routing)?;
    loads.add_logits(logits)?;
    Ok(loads)
}

/// Builds a router from its sizes and options.
type Build = fn(RouterSizes, &RouterOptions) -> Result<Box<dyn Route>, RoutingError>;

/// Every router: its name (that of its file), the options that it has, and how to build it.
const ROUTERS: &[(&str, &[&str], Build)] = &[("top_k", &[], |s, _| {
    Ok(Box::new(TopK::new(s.n_experts, s.top_k, s.norm_topk_prob)?))
})];

/// Builds the router called `name`.
///
/// # Errors
/// [`RoutingError::UnknownPolicy`], which lists the known names, or what the router says about its options.
pub fn build(
    name: &str,
    sizes: RouterSizes,
    options: &RouterOptions,
) -> Result<Box<dyn Route>, RoutingError> {
    let (_, _, build) = entry(name)?;
    build(sizes, options)
}

/// Names of the options that the router called `name` has in recipes.
///
/// # Errors
/// [`RoutingError::UnknownPolicy`], which lists the known names.
pub fn options_of(name: &str) -> Result<&'static [&'static str], RoutingError> {
    entry(name).map(|(_, options, _)| *options)
}

fn entry(
    name: &str,
) -> Result<&'static (&'static str, &'static [&'static str], Build), RoutingError> {
    let known = ROUTERS.iter().find(|(known, ..)| *known == name);
    known.ok_or_else(|| RoutingError::UnknownPolicy {
        name: name.to_owned(),
        known: names().collect(),
    })
}

/// Names of all routers, in the order of the list.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROUTERS.iter().map(|(name, ..)| *name)
}
