//! The list of routing policies by name: one line each, and the one place that builds a policy from options.

use serde::{Deserialize, Serialize};

use crate::policies::{
    DenseToSparse, ExpertChoice, GroupLimited, GroupLimitedOptions, GroupScore, NullExperts,
    ScoreFn, SparseMixer, Stage, Switch, Top2, TopK, TopP, Uniform, Union,
};
use crate::{Policy, RoutingError};

/// Options of all policies; each reads the ones it has and ignores the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyOptions {
    /// Length of one row of logits (experts, null experts included).
    pub n_experts: usize,
    /// Picks per token.
    pub top_k: usize,
    /// Whether the weights of a token are made to sum to 1.
    pub norm_topk_prob: bool,
    /// How many of the experts, counted from the end, are null experts.
    pub n_null: usize,
    /// Probability mass that top-p collects.
    pub top_p: f32,
    /// Mean experts per token of expert choice.
    pub capacity_factor: f32,
    /// Number of expert groups.
    pub n_groups: usize,
    /// Groups that stay in the race.
    pub keep_groups: usize,
    /// How group-limited routing scores logits.
    pub score: ScoreFn,
    /// How groups are compared.
    pub group_score: GroupScore,
    /// Selection-only bias, `[n_experts]`.
    pub bias: Option<Vec<f32>>,
    /// Factor on every weight of group-limited routing.
    pub scale: f32,
    /// Temperature of the dense-to-sparse gate.
    pub temperature: f32,
    /// Smallest gate value that the dense-to-sparse gate lets through.
    pub threshold: f32,
    /// Half the relative width of the threshold of SparseMixer; what is added to the mass in a union's scalar.
    pub eps: f32,
    /// Stage of the dense-to-sparse gate.
    pub stage: Stage,
    /// Share of the tokens that each expert of a union keeps.
    pub keep: f32,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            n_experts: 0,
            top_k: 1,
            norm_topk_prob: true,
            n_null: 0,
            top_p: 0.4,
            capacity_factor: 2.0,
            n_groups: 1,
            keep_groups: 1,
            score: ScoreFn::Softmax,
            group_score: GroupScore::Max,
            bias: None,
            scale: 1.0,
            temperature: 1.0,
            threshold: 1e-3,
            eps: 0.01,
            stage: Stage::Soft,
            keep: 1.0,
        }
    }
}

/// Builds a policy from its options.
type Build = fn(&PolicyOptions) -> Result<Box<dyn Policy>, RoutingError>;

/// Every policy: its name (that of its file) and how to build it.
const POLICIES: &[(&str, Build)] = &[
    ("top_k", |o| {
        Ok(Box::new(TopK::new(o.n_experts, o.top_k, o.norm_topk_prob)?))
    }),
    ("switch", |o| Ok(Box::new(Switch::new(o.n_experts)?))),
    ("top_2", |o| Ok(Box::new(Top2::new(o.n_experts)?))),
    ("top_p", |o| Ok(Box::new(TopP::new(o.n_experts, o.top_p)?))),
    ("null_experts", |o| {
        Ok(Box::new(NullExperts::new(o.n_experts, o.n_null, o.top_k)?))
    }),
    ("group_limited", group_limited),
    ("sparse_mixer", |o| {
        Ok(Box::new(SparseMixer::new(o.n_experts, o.eps)?))
    }),
    ("expert_choice", |o| {
        Ok(Box::new(ExpertChoice::new(o.n_experts, o.capacity_factor)?))
    }),
    ("dense_to_sparse", |o| {
        Ok(Box::new(DenseToSparse::new(
            o.n_experts,
            o.temperature,
            o.threshold,
            o.stage,
        )?))
    }),
    ("uniform", |o| {
        Ok(Box::new(Uniform::new(o.n_experts, o.top_k)?))
    }),
    ("union", |o| {
        Ok(Box::new(Union::new(o.n_experts, o.top_k, o.keep, o.eps)?))
    }),
];

/// Group-limited routing has more options than fit on a line.
fn group_limited(o: &PolicyOptions) -> Result<Box<dyn Policy>, RoutingError> {
    let options = GroupLimitedOptions {
        n_experts: o.n_experts,
        top_k: o.top_k,
        n_groups: o.n_groups,
        keep_groups: o.keep_groups,
        score: o.score,
        group_score: o.group_score,
        norm_topk_prob: o.norm_topk_prob,
        scale: o.scale,
    };
    Ok(Box::new(GroupLimited::new(options, o.bias.clone())?))
}

/// Builds the policy called `name`.
///
/// # Errors
/// [`RoutingError::UnknownPolicy`], which lists the known names, or what the policy says about its options.
pub fn build(name: &str, options: &PolicyOptions) -> Result<Box<dyn Policy>, RoutingError> {
    match POLICIES.iter().find(|(known, _)| *known == name) {
        Some((_, build)) => build(options),
        None => Err(RoutingError::UnknownPolicy {
            name: name.to_owned(),
            known: names().collect(),
        }),
    }
}

/// Names of all policies, in the order of the list.
pub fn names() -> impl Iterator<Item = &'static str> {
    POLICIES.iter().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Routing;

    #[test]
    fn every_policy_carries_its_registered_name() {
        let options = PolicyOptions {
            n_experts: 8,
            top_k: 2,
            ..PolicyOptions::default()
        };
        for name in names() {
            assert_eq!(build(name, &options).unwrap().name(), name);
        }
    }

    #[test]
    fn every_policy_keeps_what_it_declares() {
        let options = PolicyOptions {
            n_experts: 8,
            top_k: 2,
            ..PolicyOptions::default()
        };
        let logits: Vec<f32> = (0..48u16).map(|i| f32::from(i * 37 % 23) / 7.0).collect();
        for policy in names().map(|name| build(name, &options).unwrap()) {
            let (mut all, mut part) = (Routing::new(), Routing::new());
            policy.route(&logits, &mut all).unwrap();
            assert_eq!(all.n_tokens(), 6);
            assert!(
                all.iter().all(|(ids, _)| ids.len() <= policy.max_picks()),
                "{}",
                policy.name()
            );
            assert!(
                all.experts()
                    .iter()
                    .all(|&id| usize::from(id) < policy.n_experts()),
                "{}",
                policy.name()
            );
            // Causal: a prefix is routed as in the whole. Batch-invariant: any token is routed as when alone.
            policy.route(&logits[..24], &mut part).unwrap();
            let same_prefix = (0..3).all(|t| part.token(t) == all.token(t));
            assert!(same_prefix || !policy.causal(), "{}", policy.name());
            let alone =
                |t: usize, one: &mut Routing| policy.route(&logits[t * 8..(t + 1) * 8], one);
            let same_alone =
                (0..6).all(|t| alone(t, &mut part).is_ok() && part.token(0) == all.token(t));
            assert_eq!(same_alone, policy.batch_invariant(), "{}", policy.name());
            assert!(
                policy.route(&[f32::NAN; 8], &mut part).is_err() && part.n_tokens() == 0,
                "{}",
                policy.name()
            );
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let text = build("topk", &PolicyOptions::default())
            .unwrap_err()
            .to_string();
        assert!(text.contains("'topk'") && text.contains("top_k"), "{text}");
    }
}
