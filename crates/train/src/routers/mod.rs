//! The training side of the routing rules: differentiable weights for the picks that a policy makes.
//!
//! Each rule is two small files with one name: `policies/NAME.rs` in the routing crate works on slices, `NAME.rs` here on
//! tensors. The two must agree: a generated test runs every name listed here on equal logits and compares ids and
//! weights. Projecting hidden states to logits is the layer's business, so that the two can be compared at all.

mod dense_to_sparse;
mod expert_choice;
mod group_limited;
mod null_experts;
mod options;
mod sparse_mixer;
mod switch;
mod top_2;
mod top_k;
mod top_p;
mod uniform;
mod union;

pub use dense_to_sparse::{Decay, DenseToSparse, DenseToSparseOptions};
pub use expert_choice::ExpertChoice;
pub use group_limited::GroupLimited;
pub use null_experts::NullExperts;
pub use options::{Order, RouterOptions, RouterSizes};
pub use sparse_mixer::SparseMixer;
pub use switch::Switch;
pub use top_2::{Second, Top2};
pub use top_k::TopK;
pub use top_p::TopP;
pub use uniform::{Per, Uniform};
pub use union::Union;

use crate::device::read;
use crate::init::stream;
use crate::losses;
use crate::weight_heads::Picks;
use burn::tensor::Tensor;
use burn::tensor::activation::softmax;
use cadre_routing::{Loads, Policy, Routing, RoutingError};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// A routing rule in training.
pub trait Route: Send + Sync + std::fmt::Debug {
    /// The policy of the same name, which makes the same picks outside of training.
    fn policy(&self) -> &dyn Policy;

    /// The name that recipes use.
    fn name(&self) -> &'static str {
        self.policy().name()
    }

    /// Length of one row of logits, null experts included.
    fn n_experts(&self) -> usize {
        self.policy().n_experts()
    }

    /// Number of experts that exist as weights; ids from here on are null experts.
    fn n_real_experts(&self) -> usize {
        self.policy().n_real_experts()
    }

    /// Whether the routing of a token is independent of the tokens after it.
    fn causal(&self) -> bool {
        self.policy().causal()
    }

    /// Whether the routing of a token is independent of the other sequences of the batch.
    fn batch_invariant(&self) -> bool {
        self.policy().batch_invariant()
    }

    /// Whether the rule has a selection-only bias, which [`RouteContext::bias`] gives it.
    fn takes_bias(&self) -> bool {
        false
    }

    /// Whether the rule looks at its logits; a layer of one that does not has no router matrix and gives zeros.
    fn has_gate(&self) -> bool {
        true
    }

    /// Groups of experts with ids that follow each other, and how many of them a token may use: `[1, 1]` for rules that
    /// know none.
    fn groups(&self) -> [usize; 2] {
        [1, 1]
    }

    /// Routes `logits` `[T, n_experts]`. The same logits and context give the same result.
    ///
    /// # Errors
    /// [`RoutingError::NonFinite`], naming the token, when a logit is NaN or infinite; the caller adds layer and step.
    fn route(&self, logits: Tensor<2>, context: &RouteContext<'_>) -> Result<Routed, RoutingError>;

    /// The picks that the scores make without a selection-only bias.
    ///
    /// # Errors
    /// As [`Route::route`], which has seen the same logits.
    fn unbiased(&self, routed: &Routed) -> Result<Routing, RoutingError> {
        Ok(routed.routing.clone())
    }

    /// The picks that the balance loss of the rule counts: all of them, unless the rule says otherwise.
    fn balance_loads(&self, routed: &Routed) -> Loads {
        routed.loads.clone()
    }

    /// The load-balance loss that the rule trains with, 1 when perfectly even. `loads` are those of
    /// [`Route::balance_loads`], perhaps of more tokens than `routed` has; `legacy_scale` multiplies by the mean picks per token.
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
    let values = values(logits)?;
    let mut routing = Routing::new();
    policy.route(&values, &mut routing)?;
    let loads = counted(&routing, policy.n_experts(), &values)?;
    Ok((routing, loads))
}

/// Turns logits and picks into one weight per pick, times a factor; one of [`weight_heads`].
type Head = fn(Tensor<2>, &Picks, f64) -> Tensor<1>;

/// Routing by the picks of `policy` on the logits alone, weighted by `head`.
fn routed(policy: &dyn Policy, logits: Tensor<2>, head: Head) -> Result<Routed, RoutingError> {
    let (routing, loads) = picked(policy, &logits)?;
    let picks = Picks::of(&routing, policy.n_real_experts(), &logits);
    Ok(Routed {
        weights: head(logits.clone(), &picks, 1.0),
        probs: softmax(logits.clone(), 1),
        logits,
        routing,
        loads,
    })
}

/// The values of `[T, E]` logits, row by row.
fn values(logits: &Tensor<2>) -> Result<Vec<f32>, RoutingError> {
    read(logits.clone())
}

/// Loads of a routing and entropy of its logits.
fn counted(routing: &Routing, n_experts: usize, logits: &[f32]) -> Result<Loads, RoutingError> {
    let mut loads = Loads::new(n_experts);
    loads.add_routing(routing)?;
    loads.add_logits(logits)?;
    Ok(loads)
}

/// `n` values of Gumbel noise, `-log(-log u)`.
fn gumbel(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    // u is kept away from 0 and 1, where the noise is infinite.
    let draw = |rng: &mut ChaCha8Rng| rng.random::<f64>().clamp(1e-12, 1.0 - 1e-12);
    (0..n).map(|_| -(-draw(rng).ln()).ln() as f32).collect()
}

/// Builds a router from its sizes and options.
type Build = fn(RouterSizes, &RouterOptions) -> Result<Box<dyn Route>, RoutingError>;

/// Every router: its name (that of its file), the options that it has, and how to build it.
const ROUTERS: &[(&str, &[&str], Build)] = &[
    ("top_k", &[], |s, _| {
        Ok(Box::new(TopK::new(s.n_experts, s.top_k, s.norm_topk_prob)?))
    }),
    ("switch", &[], |s, _| {
        only(
            "switch",
            "model.top_k",
            s.top_k,
            1,
            "1: Switch picks one expert",
        )?;
        Ok(Box::new(Switch::new(s.n_experts)?))
    }),
    ("top_2", &["second"], |s, o| {
        only(
            "top_2",
            "model.top_k",
            s.top_k,
            2,
            "2: the rule picks two experts",
        )?;
        Ok(Box::new(Top2::new(s.n_experts, o.second())?))
    }),
    ("top_p", &["top_p"], |s, o| {
        Ok(Box::new(TopP::new(s.n_experts, o.top_p())?))
    }),
    ("null_experts", &["n_null"], |s, o| {
        Ok(Box::new(NullExperts::new(
            s.n_experts,
            o.n_null(s.n_experts),
            s.top_k,
        )?))
    }),
    (
        "group_limited",
        &["n_groups", "keep_groups", "score", "group_score", "scale"],
        |s, o| Ok(Box::new(GroupLimited::new(o.group_limited(s))?)),
    ),
    ("sparse_mixer", &["eps"], |s, o| {
        only(
            "sparse_mixer",
            "model.top_k",
            s.top_k,
            2,
            "2: the rule picks two experts",
        )?;
        Ok(Box::new(SparseMixer::new(s.n_experts, o.eps())?))
    }),
    ("expert_choice", &["capacity_factor"], |s, o| {
        Ok(Box::new(ExpertChoice::new(
            s.n_experts,
            o.capacity_factor(),
        )?))
    }),
    (
        "dense_to_sparse",
        &[
            "temperature",
            "min_temperature",
            "decay_steps",
            "decay",
            "threshold",
            "hard_from",
            "noise",
            "dense_eval",
        ],
        |s, o| {
            Ok(Box::new(DenseToSparse::new(
                s.n_experts,
                o.dense_to_sparse(),
            )?))
        },
    ),
    ("union", &["keep", "eps"], |s, o| {
        let (keep, eps) = (o.keep.unwrap_or(1.0), o.eps.unwrap_or(1.0));
        Ok(Box::new(Union::new(s.n_experts, s.top_k, keep, eps)?))
    }),
    ("uniform", &["per", "seed"], |s, o| {
        Ok(Box::new(Uniform::new(
            s.n_experts,
            s.top_k,
            o.per(),
            o.seed(),
        )?))
    }),
];

/// Refuses a number of picks that the rule does not have.
fn only(
    policy: &'static str,
    option: &'static str,
    value: usize,
    wanted: usize,
    expected: &'static str,
) -> Result<(), RoutingError> {
    if value == wanted {
        return Ok(());
    }
    Err(RoutingError::BadOption {
        policy,
        option,
        value: value.to_string(),
        expected,
    })
}

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
