//! Lossy knobs: which picks of the router a pass may leave out or replace. All are off by default.

use std::fmt;

use cadre_checkpoint::{ModelConfig, RouterConfig, Score};

use crate::error::{EngineError, Result};

/// What of the model's routing is not followed, for speed; by default it is followed to the letter.
///
/// The rules are applied in the order of the fields. Where a model's router scales the weights of a token's picks to a
/// fixed sum, what the rules leave is scaled to the sum that the picks had; where it does not, weights stay what they
/// are. A token whose picks no rule changes is computed exactly as without.
///
/// The last three ask which experts are in memory. They need [`crate::StreamOptions`], apply to passes of at most one
/// token per sequence (prompts touch nearly every expert anyhow), and make results depend on what was read before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lossy {
    /// Picks per token in place of the model's; its best ones are kept.
    pub top_k: Option<usize>,
    /// Leaves out picks of little weight.
    pub min_weight: Option<MinWeight>,
    /// Cache-aware routing, see [`PreferCached`].
    pub prefer_cached: Option<PreferCached>,
    /// Leaves out a pick that is not in memory and whose share of its token's weight is below this `/ k`, with `k` the
    /// token's picks; never the one of most weight.
    pub drop_cold: Option<f32>,
    /// Computes a pick that is not in memory, and whose share of its token's weight is below this `/ k`, by a copy of the
    /// expert in fewer bits ([`crate::load_with_low_bit`]), which takes less to read; never the one of most weight.
    pub low_bit: Option<f32>,
}

/// Leaves out picks whose weight is less than a share of the token's largest one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinWeight {
    /// 0 to 1.
    pub share: f32,
    /// So many picks stay, the best ones.
    pub keep: usize,
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

    /// Whether it matters what is in memory.
    #[must_use]
    pub fn asks_cache(&self) -> bool {
        self.prefer_cached.is_some() || self.drop_cold.is_some() || self.low_bit.is_some()
    }

    /// Tokens of a text to read at once where the pass is what is measured or recorded, instead of `usual`: one, where
    /// rules apply to such passes only.
    #[must_use]
    pub fn chunk(&self, usual: usize) -> usize {
        if self.asks_cache() { 1 } else { usual }
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
        if self.asks_cache() && !is_streamed {
            let expected = "no rule about experts in memory, for a model whose experts all are";
            return refuse("lossy routing", self.to_string(), expected.to_owned());
        }
        let k = self.top_k.unwrap_or(moe.top_k);
        if !is_within(k, 1, moe.top_k) {
            let expected = format!("1 to {}, the picks of the model", moe.top_k);
            return refuse("experts per token", k.to_string(), expected);
        }
        if let Some(MinWeight { share, keep }) = self.min_weight {
            if !(0.0..=1.0).contains(&share) {
                return refuse("least weight", share.to_string(), "0 to 1".to_owned());
            }
            if !is_within(keep, 1, k) {
                let expected = format!("1 to {k}, the picks of a token");
                return refuse("least number of experts", keep.to_string(), expected);
            }
        }
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

    fn warn(&self, k: usize) {
        let history = match self.asks_cache() {
            true => "; they depend on what was read before and cannot be repeated",
            false => "",
        };
        let few = match self.drop_cold {
            Some(_) if k <= FEW_PICKS => "; with so few picks per token each dropped one is much",
            _ => "",
        };
        tracing::warn!("results are not the model's own: lossy {self}{history}{few}");
    }
}

/// `no`, or the rules as in `top-k-experts=4 drop-cold=0.75`.
impl fmt::Display for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("no");
        }
        let min_weight = self.min_weight.map(|MinWeight { share, keep }| {
            format!("min-expert-weight={share} min-experts={keep}")
        });
        let prefer = self
            .prefer_cached
            .map(|PreferCached { keep, among }| format!("prefer-cached={keep},{among}"));
        let rules = [
            self.top_k.map(|k| format!("top-k-experts={k}")),
            min_weight,
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
            top_k: Some(4),
            min_weight: Some(MinWeight {
                share: 0.25,
                keep: 2,
            }),
            prefer_cached: Some(PreferCached { keep: 2, among: 12 }),
            drop_cold: Some(0.75),
            low_bit: Some(1.0),
        };
        assert_eq!(
            all.to_string(),
            "top-k-experts=4 min-expert-weight=0.25 min-experts=2 prefer-cached=2,12 drop-cold=0.75 low-bit=1"
        );
        assert!(all.asks_cache() && !all.is_none());
    }
}
