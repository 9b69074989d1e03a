//! Lossy knobs: which picks of the router a pass may leave out or replace. All are off by default.

use std::fmt;

use cadre_checkpoint::{ModelConfig, RouterConfig, Score};
use cadre_routing::Steering;

use crate::error::{EngineError, Result};

/// What of the model's routing is not followed, for speed; by default it is followed to the letter.
///
/// The rules are applied in the order of the fields, after what [`crate::Model::steer`] has made of the picks. Where a model's router scales the weights of a token's picks to a
/// fixed sum, what the rules leave is scaled to the sum that the picks had; where it does not, weights stay what they
/// are. A token whose picks no rule changes is computed exactly as without.
///
/// All of them ask which experts are in memory. They need [`crate::StreamOptions`], apply to passes of at most one
/// token per sequence (prompts touch nearly every expert anyhow), and make results depend on what was read before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lossy {
    /// Cache-aware routing, see [`PreferCached`].
    pub prefer_cached: Option<PreferCached>,
    /// Leaves out a pick that is not in memory and whose share of its token's weight is below this `/ k`, with `k` the
    /// token's picks; never the one of most weight.
    pub drop_cold: Option<f32>,
    /// Computes a pick that is not in memory, and whose share of its token's weight is below this `/ k`, by a copy of the
    /// expert in fewer bits ([`crate::load_with_low_bit`]), which takes less to read; never the one of most weight.
    pub low_bit: Option<f32>,
}

/// Cache-aware routing (arXiv 2412.00099): keeps a token's first picks, and replaces others that are not in memory by
/// the next best that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreferCached {
    /// So many picks stay, the best ones.
    pub keep: usize,
    /// The others come from so many: the model's picks, and then its other experts by router logit.
    pub among: usize,
}

/// Few picks, of which each one is much.
const FEW_PICKS: usize = 4;

impl Lossy {
    /// Whether the model's routing is followed.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Tokens of a text to read at once where the pass is what is measured or recorded, instead of `usual`: one, where
    /// rules apply to such passes only.
    #[must_use]
    pub fn chunk(&self, usual: usize) -> usize {
        if self.is_none() { usual } else { 1 }
    }

    /// Refuses what cannot be done with this model, and warns of what can.
    pub(crate) fn check(&self, config: &ModelConfig, is_streamed: bool) -> Result<()> {
        if self.is_none() {
            return Ok(());
        }
        let moe = &config.moe;
        let refuse = |name, value: String, expected: String| {
            Err(EngineError::BadOption {
                name,
                value,
                expected,
            })
        };
        let is_within = |n: usize, least: usize, most: usize| (least..=most).contains(&n);
        if moe.n_experts == 0 {
            let expected = "none, for a model without experts".to_owned();
            return refuse("lossy routing", self.to_string(), expected);
        }
        if matches!(
            moe.router,
            RouterConfig::NullExperts
                | RouterConfig::Uniform { .. }
                | RouterConfig::Union { .. }
                | RouterConfig::DenseToSparse { .. }
        ) {
            let expected = format!("none, for the router `{}`", moe.router.name());
            return refuse("lossy routing", self.to_string(), expected);
        }
        if !moe.shared_weights.is_empty() {
            let expected = "none, for a model whose experts share weights".to_owned();
            return refuse("lossy routing", self.to_string(), expected);
        }
        if !is_streamed {
            let expected = "no rule about experts in memory, for a model whose experts all are";
            return refuse("lossy routing", self.to_string(), expected.to_owned());
        }
        let k = moe.top_k;
        if let Some(PreferCached { keep, among }) = self.prefer_cached {
            if !is_within(keep, 1, k) || !is_within(among, k, moe.n_experts) {
                let expected = format!("1 to {k} that stay, among {k} to {}", moe.n_experts);
                let value = format!("{keep},{among}");
                return refuse("preference for experts in memory", value, expected);
            }
            if matches!(moe.router, RouterConfig::SparseMixer { .. }) {
                let expected = "none, for a router that weighs each pick by itself".to_owned();
                let name = "preference for experts in memory";
                return refuse(name, format!("{keep},{among}"), expected);
            }
        }
        for (name, share) in [
            ("dropping of cold experts", self.drop_cold),
            ("cold experts in fewer bits", self.low_bit),
        ] {
            let is_one = |share: f32| share.is_finite() && share >= 0.0;
            if let Some(share) = share.filter(|share| !is_one(*share)) {
                return refuse(name, share.to_string(), "a number from 0".to_owned());
            }
        }
        // Copies have the ids after the last expert's.
        if self.low_bit.is_some() && moe.n_experts > usize::from(u16::MAX) / 2 {
            let expected = format!("at most {} experts", u16::MAX / 2);
            return refuse(
                "cold experts in fewer bits",
                moe.n_experts.to_string(),
                expected,
            );
        }
        self.warn(k);
        Ok(())
    }

    /// Refuses to steer what a rule about memory would undo.
    pub(crate) fn check_steering(&self, steering: &Steering) -> Result<()> {
        let Steering {
            mask, force, bias, ..
        } = steering;
        let chooses = [mask, force].iter().any(|one| !one.is_empty()) || !bias.is_empty();
        let (rule, expected) =
            if self.prefer_cached.is_some() && (chooses || steering.ranks.is_some()) {
                let expected =
                    "no preference for experts in memory beside it, which chooses by logits alone";
                ("prefer-cached", expected)
            } else if self.drop_cold.is_some() && !force.is_empty() {
                (
                    "drop-cold",
                    "no dropping of cold experts beside forced ones",
                )
            } else {
                return Ok(());
            };
        Err(EngineError::BadOption {
            name: "steering",
            value: format!("{steering} with {rule}"),
            expected: expected.to_owned(),
        })
    }

    fn warn(&self, k: usize) {
        let history = "; they depend on what was read before and cannot be repeated";
        let few = match self.drop_cold {
            Some(_) if k <= FEW_PICKS => "; with so few picks per token each dropped one is much",
            _ => "",
        };
        tracing::warn!("results are not the model's own: lossy {self}{history}{few}");
    }
}

/// `no`, or the rules as in `prefer-cached=2,12 drop-cold=0.75`.
impl fmt::Display for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("no");
        }
        let prefer = self
            .prefer_cached
            .map(|PreferCached { keep, among }| format!("prefer-cached={keep},{among}"));
        let rules = [
            prefer,
            self.drop_cold.map(|share| format!("drop-cold={share}")),
            self.low_bit.map(|share| format!("low-bit={share}")),
        ];
        let rules: Vec<String> = rules.into_iter().flatten().collect();
        f.write_str(&rules.join(" "))
    }
}

/// How weights come from logits, as far as the rules must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weighing {
    /// Whether the weights of a token's picks have a fixed sum.
    pub(crate) has_fixed_sum: bool,
    /// What weights are proportional to.
    pub(crate) score: Score,
}

impl Weighing {
    pub(crate) fn of(router: &RouterConfig) -> Self {
        match router {
            RouterConfig::TopK { norm } => Self {
                has_fixed_sum: *norm,
                score: Score::Softmax,
            },
            RouterConfig::Top2 => Self {
                has_fixed_sum: true,
                score: Score::Softmax,
            },
            // Of these, the last four have no lossy rules.
            RouterConfig::SparseMixer { .. }
            | RouterConfig::Switch
            | RouterConfig::TopP { .. }
            | RouterConfig::DenseToSparse { .. }
            | RouterConfig::NullExperts
            | RouterConfig::Union { .. }
            | RouterConfig::Uniform { .. } => Self {
                has_fixed_sum: false,
                score: Score::Softmax,
            },
            RouterConfig::GroupLimited { norm, score, .. } => Self {
                has_fixed_sum: *norm,
                score: *score,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_on() {
        assert_eq!(Lossy::default().to_string(), "no");
        let all = Lossy {
            prefer_cached: Some(PreferCached { keep: 2, among: 12 }),
            drop_cold: Some(0.75),
            low_bit: Some(1.0),
        };
        assert_eq!(
            all.to_string(),
            "prefer-cached=2,12 drop-cold=0.75 low-bit=1"
        );
        assert!(!all.is_none());
    }
}
