//! The `[router]` table of recipes: a name, and options of which each router has its own.

use super::{Decay, DenseToSparseOptions, Per, Route, Second, build, options_of};
use cadre_routing::RoutingError;
use cadre_routing::filters::{Capacity, DropOrder};
use cadre_routing::policies::{GroupLimitedOptions, GroupScore, ScoreFn, Stage};
use serde::{Deserialize, Serialize};

/// Keys that every router has.
const COMMON: &[&str] = &["name", "allow_non_causal", "capacity", "drop_order"];

/// `[router]` of a recipe. A key that no router has, and a key that the named router does not have, are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterOptions {
    /// Which rule.
    pub name: String,
    /// Whether a rule by which a token's experts depend on later tokens, or on other sequences, may train a language
    /// model. Such a model has seen during training what it does not see when it generates.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_non_causal: bool,
    /// top_2: how the second expert is chosen in training; absent: `plain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<Second>,
    /// top_p: probability mass to collect; absent: 0.4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// null_experts: zero-cost experts; absent: as many as real ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_null: Option<usize>,
    /// group_limited: groups of consecutive experts; absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_groups: Option<usize>,
    /// group_limited: groups that stay in the race; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_groups: Option<usize>,
    /// group_limited: `softmax` (absent) or `sigmoid`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<ScoreFn>,
    /// group_limited: `max` (absent with softmax) or `sum_of_best_two` (absent with sigmoid).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_score: Option<GroupScore>,
    /// group_limited: factor on the weights; absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// sparse_mixer: half the relative width of the threshold; absent: 0.01. union: added to the mass of a token's picks
    /// in its scalar `M / (M + eps)`; absent: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f32>,
    /// expert_choice: mean experts per token; absent: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_factor: Option<f32>,
    /// union: share of a sequence's tokens that each expert keeps; absent: 1, all that took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f32>,
    /// dense_to_sparse: first temperature; absent: 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// dense_to_sparse: last temperature; absent: 0.3, or `temperature` if that is lower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_temperature: Option<f32>,
    /// dense_to_sparse: steps between the two; absent: 0, the first is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// dense_to_sparse: `exponential` (absent) or `linear`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<Decay>,
    /// dense_to_sparse: smallest gate value that is let through; absent: 0.001.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    /// dense_to_sparse: first step with exactly one expert; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard_from: Option<u64>,
    /// dense_to_sparse: Gumbel noise in training; absent: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise: Option<bool>,
    /// dense_to_sparse: evaluation with the gate of the step; absent: false, the best expert alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_eval: Option<bool>,
    /// uniform: what shares a draw in training, `pass` (absent) or `token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per: Option<Per>,
    /// uniform: seed of the draws in evaluation and inference; absent: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Every router: how many pairs an expert takes in training; absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// Every router with `capacity`: who gets a slot first; absent: `position`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_order: Option<Order>,
}

impl Default for RouterOptions {
    fn default() -> Self {
        Self {
            name: "top_k".to_owned(),
            allow_non_causal: false,
            second: None,
            top_p: None,
            n_null: None,
            n_groups: None,
            keep_groups: None,
            score: None,
            group_score: None,
            scale: None,
            eps: None,
            capacity_factor: None,
            keep: None,
            temperature: None,
            min_temperature: None,
            decay_steps: None,
            decay: None,
            threshold: None,
            hard_from: None,
            noise: None,
            dense_eval: None,
            per: None,
            seed: None,
            capacity: None,
            drop_order: None,
        }
    }
}

/// Who gets an expert's slots first, as in [`DropOrder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Earlier tokens (Switch).
    Position,
    /// First picks before second ones (GShard).
    ChoiceThenPosition,
    /// Tokens by their largest weight (V-MoE).
    Priority,
    /// Pairs by weight.
    Weight,
    /// Drawn anew in every step (DeepSpeed).
    Random,
}

impl Order {
    /// The order, with the seed that a random one is drawn from.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> DropOrder {
        match self {
            Self::Position => DropOrder::Position,
            Self::ChoiceThenPosition => DropOrder::ChoiceThenPosition,
            Self::Priority => DropOrder::Priority,
            Self::Weight => DropOrder::Weight,
            Self::Random => DropOrder::Random(seed),
        }
    }
}

/// What a router is told by `[model]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterSizes {
    /// Experts of the layer that exist as weights.
    pub n_experts: usize,
    /// Picks per token.
    pub top_k: usize,
    /// Whether the weights of a token's picks are divided by their sum.
    pub norm_topk_prob: bool,
}

impl RouterOptions {
    /// The options of the router called `name`, all at their defaults.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// The router of one layer.
    ///
    /// # Errors
    /// An unknown name, or options that the router cannot work with.
    pub fn build(&self, sizes: RouterSizes) -> Result<Box<dyn Route>, RoutingError> {
        build(&self.name, sizes, self)
    }

    /// The capacity filter, if there is one.
    #[must_use]
    pub fn capacity(&self) -> Option<(Capacity, Order)> {
        let order = self.drop_order.unwrap_or(Order::Position);
        self.capacity.map(|capacity| (capacity, order))
    }

    /// Picks per token that a recipe with `model.top_k = top_k` means: rules with a number of their own have it also
    /// where the recipe says nothing (0).
    #[must_use]
    pub fn top_k(&self, top_k: usize) -> usize {
        match self.name.as_str() {
            _ if top_k > 0 => top_k,
            "top_2" | "sparse_mixer" => 2,
            "switch" | "uniform" | "top_p" | "expert_choice" | "dense_to_sparse" => 1,
            _ => top_k,
        }
    }

    /// Refuses options that the named router does not have.
    ///
    /// # Errors
    /// One sentence that names the key and lists the router's options.
    pub fn check(&self) -> Result<(), String> {
        let options = options_of(&self.name).map_err(|e| format!("`router.name`: {e}"))?;
        let value = serde_json::to_value(self).expect("options are plain data");
        let known = |key: &str| COMMON.contains(&key) || options.contains(&key);
        let mut given = value.as_object().into_iter().flatten();
        if let Some((foreign, _)) = given.find(|(key, _)| !known(key)) {
            let own = match options {
                [] => "none of its own".to_owned(),
                some => some.join(", "),
            };
            return Err(format!(
                "`router.{foreign}` is not an option of router `{}`, which has {own}",
                self.name
            ));
        }
        match self.capacity {
            None if self.drop_order.is_some() => Err(
                "`router.drop_order` needs `router.capacity`, without which nothing is dropped"
                    .to_owned(),
            ),
            Some(c) if !(c.factor.is_finite() && c.factor > 0.0) => Err(format!(
                "`router.capacity.factor` = {}, expected more than 0",
                c.factor
            )),
            _ => Ok(()),
        }
    }

    /// Temperature and stage of the dense-to-sparse gate at `step`, where evaluation uses the gate.
    pub(crate) fn gate(&self, step: u64) -> Option<(f32, Stage)> {
        let options = self.dense_to_sparse();
        options.dense_eval.then(|| options.at(step))
    }

    pub(super) fn second(&self) -> Second {
        self.second.unwrap_or(Second::Plain)
    }

    pub(crate) fn top_p(&self) -> f32 {
        self.top_p.unwrap_or(0.4)
    }

    pub(super) fn n_null(&self, n_experts: usize) -> usize {
        self.n_null.unwrap_or(n_experts)
    }

    /// Null experts beside `n_experts` real ones; 0 for rules that have none.
    pub(crate) fn null_experts(&self, n_experts: usize) -> usize {
        match self.name.as_str() {
            "null_experts" => self.n_null(n_experts),
            _ => 0,
        }
    }

    pub(crate) fn eps(&self) -> f32 {
        self.eps.unwrap_or(0.01)
    }

    pub(super) fn capacity_factor(&self) -> f32 {
        self.capacity_factor.unwrap_or(2.0)
    }

    pub(super) fn per(&self) -> Per {
        self.per.unwrap_or(Per::Pass)
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    pub(crate) fn group_limited(&self, sizes: RouterSizes) -> GroupLimitedOptions {
        let score = self.score.unwrap_or(ScoreFn::Softmax);
        let n_groups = self.n_groups.unwrap_or(1);
        GroupLimitedOptions {
            n_experts: sizes.n_experts,
            top_k: sizes.top_k,
            n_groups,
            keep_groups: self.keep_groups.unwrap_or(n_groups),
            score,
            group_score: self.group_score.unwrap_or(match score {
                ScoreFn::Softmax => GroupScore::Max,
                ScoreFn::Sigmoid => GroupScore::SumOfBestTwo,
            }),
            norm_topk_prob: sizes.norm_topk_prob,
            scale: self.scale.unwrap_or(1.0),
        }
    }

    pub(crate) fn dense_to_sparse(&self) -> DenseToSparseOptions {
        let temperature = self.temperature.unwrap_or(2.0);
        DenseToSparseOptions {
            temperature,
            min_temperature: self.min_temperature.unwrap_or(temperature.min(0.3)),
            decay_steps: self.decay_steps.unwrap_or(0),
            decay: self.decay.unwrap_or(Decay::Exponential),
            threshold: self.threshold.unwrap_or(1e-3),
            hard_from: self.hard_from,
            noise: self.noise.unwrap_or(true),
            dense_eval: self.dense_eval.unwrap_or(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_options_are_named_with_the_routers_own() {
        let options = RouterOptions {
            top_p: Some(0.5),
            ..RouterOptions::named("null_experts")
        };
        let text = options.check().unwrap_err();
        assert!(
            text.contains("router.top_p") && text.contains("n_null"),
            "{text}"
        );
        let text = RouterOptions::named("topk").check().unwrap_err();
        assert!(
            text.contains("'topk'") && text.contains("group_limited"),
            "{text}"
        );
        let options = RouterOptions {
            drop_order: Some(Order::Random),
            ..RouterOptions::default()
        };
        assert!(options.check().unwrap_err().contains("router.capacity"));
    }

    /// Every option belongs to a router, and every option that a router lists exists.
    #[test]
    fn options_and_routers_know_each_other() {
        let given: std::collections::BTreeSet<&str> = super::super::names()
            .flat_map(|name| options_of(name).unwrap().iter().copied())
            .collect();
        for option in &given {
            let one = format!("{option} = {{}}").parse::<toml::Table>().unwrap();
            let error = one.try_into::<RouterOptions>().unwrap_err().to_string();
            assert!(!error.contains("unknown field"), "{option}: {error}");
        }
        let every = RouterOptions {
            second: Some(Second::Plain),
            top_p: Some(1.0),
            n_null: Some(1),
            n_groups: Some(1),
            keep_groups: Some(1),
            score: Some(ScoreFn::Softmax),
            group_score: Some(GroupScore::Max),
            scale: Some(1.0),
            eps: Some(1.0),
            capacity_factor: Some(1.0),
            keep: Some(1.0),
            temperature: Some(1.0),
            min_temperature: Some(1.0),
            decay_steps: Some(1),
            decay: Some(Decay::Linear),
            threshold: Some(1.0),
            hard_from: Some(1),
            noise: Some(true),
            dense_eval: Some(true),
            per: Some(Per::Pass),
            seed: Some(1),
            capacity: Some(Capacity::default()),
            drop_order: Some(Order::Random),
            allow_non_causal: true,
            name: String::new(),
        };
        for key in serde_json::to_value(every)
            .unwrap()
            .as_object()
            .unwrap()
            .keys()
        {
            let listed = COMMON.contains(&key.as_str()) || given.contains(key.as_str());
            assert!(listed, "{key} belongs to no router");
        }
    }
}
