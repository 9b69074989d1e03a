//! The list of routing policies by name: one line each, and the one place that builds a policy from options.

use serde::{Deserialize, Serialize};

use crate::policies::TopK;
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
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            n_experts: 0,
            top_k: 1,
            norm_topk_prob: true,
        }
    }
}

/// Builds a policy from its options.
type Build = fn(&PolicyOptions) -> Result<Box<dyn Policy>, RoutingError>;

/// Every policy: its name (that of its file) and how to build it.
const POLICIES: &[(&str, Build)] = &[("top_k", |o| {
    Ok(Box::new(TopK::new(o.n_experts, o.top_k, o.norm_topk_prob)?))
})];

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
    fn an_unknown_name_lists_the_known_ones() {
        let text = build("topk", &PolicyOptions::default())
            .unwrap_err()
            .to_string();
        assert!(text.contains("'topk'") && text.contains("top_k"), "{text}");
    }
}
