//! What each expert of a model is for: its share of the picks in each domain, small enough to ship with the model.
//!
//! A profile is made from the statistics of a trace with domains, and answers three questions: which experts are a
//! domain's own, which domain an expert belongs to, and which domains a new text is routed like.

use crate::error::TraceError;
use crate::measures::{mean_distribution, shares};
use crate::stats::Stats;
use serde::{Deserialize, Serialize};

/// Version of the JSON form.
const VERSION: u32 = 1;
/// Share given to experts that a domain never picked, so that no text is impossible.
const FLOOR: f64 = 1e-4;
/// Rounds of expectation-maximisation; the likelihood is concave, so this only has to be enough for two digits.
const ROUNDS: usize = 200;

/// Share of the picks of every layer and domain that each expert got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    version: u32,
    digest: String,
    n_experts: usize,
    domains: Vec<String>,
    layers: Vec<ProfileLayer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileLayer {
    layer: usize,
    /// `[domain][expert]`; each row sums to 1, or to 0 for a domain without picks.
    shares: Vec<Vec<f64>>,
}

/// The experts that stand out in one domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DomainTop {
    /// Name of the domain.
    pub domain: String,
    /// Its experts over all layers, most telling first.
    pub experts: Vec<TopExpert>,
}

/// One expert that stands out in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TopExpert {
    /// Decoder layer.
    pub layer: usize,
    /// Expert of that layer.
    pub expert: usize,
    /// Share of the domain's picks at that layer.
    pub share: f64,
    /// That share divided by the mean over domains (with one domain: by an even share).
    pub lift: f64,
}

impl Profile {
    /// The profile of a trace.
    pub fn from_stats(stats: &Stats) -> Self {
        let layers = stats.layers.iter().map(|layer| ProfileLayer {
            layer: layer.layer,
            shares: layer
                .by_domain
                .iter()
                .map(|counts| shares(counts))
                .collect(),
        });
        Self {
            version: VERSION,
            digest: stats.meta.digest.clone(),
            n_experts: stats.meta.n_experts,
            domains: stats
                .domains
                .iter()
                .map(|domain| domain.name.clone())
                .collect(),
            layers: layers.collect(),
        }
    }

    /// Reads the JSON form.
    ///
    /// # Errors
    /// [`TraceError::BadProfile`] for another version or shares that do not form distributions.
    pub fn from_json(text: &str) -> Result<Self, TraceError> {
        let bad = |problem: String| TraceError::BadProfile { problem };
        let profile: Self = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        if profile.version != VERSION {
            return Err(bad(format!(
                "version {}, expected {VERSION}",
                profile.version
            )));
        }
        for layer in &profile.layers {
            if layer.shares.len() != profile.domains.len() {
                let (found, expected) = (layer.shares.len(), profile.domains.len());
                return Err(bad(format!(
                    "layer {} has {found} domains, expected {expected}",
                    layer.layer
                )));
            }
            for (domain, shares) in profile.domains.iter().zip(&layer.shares) {
                let sum: f64 = shares.iter().sum();
                let distribution = shares.iter().all(|&share| share >= 0.0)
                    && (sum == 0.0 || (sum - 1.0).abs() < 0.01);
                if shares.len() != profile.n_experts || !distribution {
                    return Err(bad(format!(
                        "layer {}, domain {domain}: {} shares with sum {sum}, expected {} with sum 1",
                        layer.layer,
                        shares.len(),
                        profile.n_experts
                    )));
                }
            }
        }
        Ok(profile)
    }

    /// The JSON form, with shares rounded to five digits.
    pub fn to_json(&self) -> String {
        let mut rounded = self.clone();
        for share in rounded
            .layers
            .iter_mut()
            .flat_map(|layer| layer.shares.iter_mut().flatten())
        {
            *share = (*share * 1e5).round() / 1e5;
        }
        serde_json::to_string(&rounded).expect("a profile is plain data")
    }

    /// Refuses the profile of another model.
    ///
    /// # Errors
    /// [`TraceError::OtherModel`] with both digests.
    pub fn check(&self, digest: &str) -> Result<(), TraceError> {
        if self.digest == digest {
            return Ok(());
        }
        Err(TraceError::OtherModel {
            what: "profile",
            found: self.digest.clone(),
            expected: digest.to_string(),
        })
    }

    /// Names of the domains.
    pub fn domains(&self) -> &[String] {
        &self.domains
    }

    /// For each domain the `n` experts, over all layers, that tell it from the others best.
    ///
    /// Experts are ranked by their part of the Kullback-Leibler divergence from the mean domain,
    /// `share ln(lift)`: being picked often and being picked more often than elsewhere both count.
    pub fn top_experts(&self, n: usize) -> Vec<DomainTop> {
        let mut tops = Vec::with_capacity(self.domains.len());
        for (d, domain) in self.domains.iter().enumerate() {
            let mut experts: Vec<TopExpert> = Vec::new();
            for layer in &self.layers {
                let usual = self.usual(layer);
                let picked = layer.shares[d]
                    .iter()
                    .zip(usual)
                    .enumerate()
                    .filter(|(_, (share, _))| **share > 0.0);
                experts.extend(picked.map(|(expert, (&share, usual))| TopExpert {
                    layer: layer.layer,
                    expert,
                    share,
                    lift: share / usual,
                }));
            }
            let telling = |top: &TopExpert| top.share * top.lift.ln();
            experts.sort_by(|a, b| telling(b).total_cmp(&telling(a)));
            experts.truncate(n);
            tops.push(DomainTop {
                domain: domain.clone(),
                experts,
            });
        }
        tops
    }

    /// The domain (as an index) in which an expert is picked most, relative to the others; `None` if it is never
    /// picked, if the layer is not in the profile, or if there is only one domain.
    pub fn home(&self, layer: usize, expert: usize) -> Option<usize> {
        let layer = self.layers.iter().find(|other| other.layer == layer)?;
        let share = |d: usize| layer.shares[d].get(expert).copied().unwrap_or(0.0);
        let best = (0..self.domains.len())
            .max_by(|&a, &b| share(a).total_cmp(&share(b)).then(b.cmp(&a)))?;
        (self.domains.len() > 1 && share(best) > 0.0).then_some(best)
    }

    /// Which domains a text is routed like: the mixture of the domains' histograms under which the picks of `stats`
    /// are most likely, as fractions that sum to 1, in the order of [`Profile::domains`].
    ///
    /// # Errors
    /// [`TraceError::OtherModel`] when the statistics are of another model.
    pub fn mixture(&self, stats: &Stats) -> Result<Vec<f64>, TraceError> {
        self.check(&stats.meta.digest)?;
        let n_domains = self.domains.len();
        let mut observed: Vec<(f64, Vec<f64>)> = Vec::new();
        for layer in &self.layers {
            let Some(seen) = stats.layers.iter().find(|other| other.layer == layer.layer) else {
                continue;
            };
            for (e, &count) in seen
                .load
                .iter()
                .enumerate()
                .filter(|(_, count)| **count > 0)
            {
                let likelihood = layer
                    .shares
                    .iter()
                    .map(|shares| shares.get(e).copied().unwrap_or(0.0).max(FLOOR))
                    .collect();
                observed.push((count as f64, likelihood));
            }
        }
        let total: f64 = observed.iter().map(|(count, _)| count).sum();
        let mut mixture = vec![1.0 / n_domains.max(1) as f64; n_domains];
        if total == 0.0 {
            return Ok(mixture);
        }
        for _ in 0..ROUNDS {
            let mut next = vec![0.0; n_domains];
            for (count, likelihood) in &observed {
                let joint: f64 = mixture
                    .iter()
                    .zip(likelihood)
                    .map(|(part, p)| part * p)
                    .sum();
                for d in 0..n_domains {
                    next[d] += count / total * mixture[d] * likelihood[d] / joint;
                }
            }
            mixture = next;
        }
        Ok(mixture)
    }

    /// What a share is compared with: the mean over domains, or an even share when there is only one.
    fn usual(&self, layer: &ProfileLayer) -> Vec<f64> {
        if self.domains.len() < 2 {
            return vec![1.0 / self.n_experts as f64; self.n_experts];
        }
        mean_distribution(&layer.shares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::StatsOptions;
    use crate::synthetic::{self, Recipe};

    fn profile() -> Profile {
        Profile {
            version: VERSION,
            digest: "sha256:feed".into(),
            n_experts: 4,
            domains: vec!["prose".into(), "code".into()],
            layers: vec![ProfileLayer {
                layer: 1,
                shares: vec![vec![0.5, 0.3, 0.2, 0.0], vec![0.1, 0.3, 0.6, 0.0]],
            }],
        }
    }

    #[test]
    fn experts_that_tell_the_domains_apart_come_first() {
        let tops = profile().top_experts(2);
        assert_eq!(
            (tops[0].experts[0].expert, tops[1].experts[0].expert),
            (0, 2)
        );
        assert_eq!(tops[0].experts[0].layer, 1);
        // 0.5 against a mean of 0.3.
        assert!((tops[0].experts[0].lift - 0.5 / 0.3).abs() < 1e-12);
        assert_eq!(tops[0].experts[1].expert, 1);
    }

    #[test]
    fn experts_have_a_home() {
        let profile = profile();
        assert_eq!(profile.home(1, 0), Some(0));
        assert_eq!(profile.home(1, 1), Some(0), "ties go to the first domain");
        assert_eq!(profile.home(1, 2), Some(1));
        assert_eq!(
            (profile.home(1, 3), profile.home(0, 0), profile.home(1, 99)),
            (None, None, None)
        );
    }

    #[test]
    fn json_round_trips_and_nonsense_is_refused() {
        let profile = profile();
        let json = profile.to_json();
        assert_eq!(Profile::from_json(&json).unwrap(), profile);
        for (from, to) in [
            ("0.5", "0.9"),
            ("\"version\":1", "\"version\":2"),
            ("[\"prose\",", "["),
            ("layers", "x"),
        ] {
            assert!(
                Profile::from_json(&json.replace(from, to)).is_err(),
                "{from}"
            );
        }
        assert!(profile.check("sha256:feed").is_ok());
        assert!(
            profile
                .check("sha256:other")
                .unwrap_err()
                .to_string()
                .contains("sha256:other")
        );
    }

    #[test]
    fn the_mixture_of_a_domain_is_that_domain() {
        let stats_of = |domains| {
            let recipe = Recipe {
                domains,
                tokens_per_domain: 400,
                ..Recipe::default()
            };
            synthetic::stats(&recipe, &StatsOptions::default())
        };
        let both = stats_of(&["prose", "code"]);
        let profile = Profile::from_stats(&both);
        let mixture = profile.mixture(&both).unwrap();
        assert!((mixture.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!((mixture[0] - 0.5).abs() < 0.1, "{mixture:?}");

        let mut one = both.clone();
        for layer in &mut one.layers {
            layer.load = layer.by_domain[1].clone();
        }
        let mixture = profile.mixture(&one).unwrap();
        assert!(mixture[1] > 0.95, "{mixture:?}");
    }
}
