//! Load metrics: how evenly the experts are used. One implementation for the trainer, the engine and traces.
//!
//! Legend: `c_e` picks of expert e, `m` their mean over the experts.
//! `MaxVio = max_e c_e / m - 1` (0 is perfectly even), `CV = std_e(c_e) / m` with the population standard deviation,
//! a dead expert has `c_e = 0`.

use serde::{Deserialize, Serialize};

use crate::policy::check_logits;
use crate::scores::Softmax;
use crate::{Routing, RoutingError};

/// Running counts of one router. Add batches, then ask for the [`LoadSummary`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loads {
    counts: Vec<u64>,
    n_tokens: u64,
    /// Sum over tokens of (picks per token)^2, for its standard deviation.
    squared_picks: u64,
    entropy_sum: f64,
    entropy_tokens: u64,
    /// Picks that a capacity filter dropped; they are part of `counts`.
    #[serde(default)]
    dropped: u64,
}

/// The figures that are logged per layer. Entropy is in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadSummary {
    /// Tokens that were counted.
    pub n_tokens: u64,
    /// Standard deviation of the counts over their mean.
    pub cv: f64,
    /// Largest count over the mean count, minus 1.
    pub max_vio: f64,
    /// Number of experts that no token picked.
    pub n_dead: usize,
    /// Mean picks per token.
    pub mean_picks: f64,
    /// Standard deviation of the picks per token.
    pub std_picks: f64,
    /// Mean over tokens of the entropy of softmax(logits); absent when no logits were added.
    pub mean_entropy: Option<f64>,
    /// Share of the picks that a capacity filter dropped.
    pub dropped: f64,
}

impl Loads {
    /// No tokens yet, `n_experts` experts.
    #[must_use]
    pub fn new(n_experts: usize) -> Self {
        Self {
            counts: vec![0; n_experts],
            n_tokens: 0,
            squared_picks: 0,
            entropy_sum: 0.0,
            entropy_tokens: 0,
            dropped: 0,
        }
    }

    /// Counts every pick of `routing`.
    ///
    /// # Errors
    /// [`RoutingError::BadRouting`] when an id is not below the number of experts; nothing is counted then.
    pub fn add_routing(&mut self, routing: &Routing) -> Result<(), RoutingError> {
        self.check_ids(routing.experts())?;
        for (ids, _) in routing.iter() {
            self.add_token(ids);
        }
        Ok(())
    }

    /// Counts picks laid out as `[T, top_k]`, as the trainer has them.
    ///
    /// # Errors
    /// [`RoutingError::BadRouting`] when the ids are not whole rows or one is not below the number of experts;
    /// nothing is counted then.
    pub fn add_ids(&mut self, ids: &[u16], top_k: usize) -> Result<(), RoutingError> {
        if top_k == 0 || !ids.len().is_multiple_of(top_k) {
            let reason = format!(
                "{} expert ids are not whole rows of top_k = {top_k}",
                ids.len()
            );
            return Err(RoutingError::BadRouting { reason });
        }
        self.check_ids(ids)?;
        ids.chunks_exact(top_k).for_each(|row| self.add_token(row));
        Ok(())
    }

    /// Adds the entropy of softmax over each row of `logits` (`[T, n_experts]`).
    ///
    /// # Errors
    /// As [`crate::Policy::route`]: wrong length or non-finite values.
    pub fn add_logits(&mut self, logits: &[f32]) -> Result<(), RoutingError> {
        let n_experts = self.counts.len();
        check_logits(logits, n_experts)?;
        for row in logits.chunks_exact(n_experts) {
            self.entropy_sum += f64::from(Softmax::of(row).entropy(row));
            self.entropy_tokens += 1;
        }
        Ok(())
    }

    /// Counts picks, already counted by [`Loads::add_routing`], that a capacity filter dropped.
    pub fn add_dropped(&mut self, n_picks: u64) {
        self.dropped += n_picks;
    }

    /// Adds what another counter of the same router has seen.
    ///
    /// # Errors
    /// [`RoutingError::BadRouting`] when the numbers of experts differ.
    pub fn merge(&mut self, other: &Self) -> Result<(), RoutingError> {
        if self.counts.len() != other.counts.len() {
            let reason = format!(
                "loads of {} and of {} experts",
                self.counts.len(),
                other.counts.len()
            );
            return Err(RoutingError::BadRouting { reason });
        }
        self.counts
            .iter_mut()
            .zip(&other.counts)
            .for_each(|(a, b)| *a += b);
        self.n_tokens += other.n_tokens;
        self.squared_picks += other.squared_picks;
        self.entropy_sum += other.entropy_sum;
        self.entropy_tokens += other.entropy_tokens;
        self.dropped += other.dropped;
        Ok(())
    }

    /// Picks per expert, `[n_experts]`.
    #[must_use]
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Tokens counted so far.
    #[must_use]
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// The figures, or `None` when nothing was picked yet (they would all be 0 / 0).
    #[must_use]
    pub fn summary(&self) -> Option<LoadSummary> {
        let picks: u64 = self.counts.iter().sum();
        if picks == 0 {
            return None;
        }
        let n_experts = self.counts.len() as f64;
        let mean = picks as f64 / n_experts;
        let variance = self
            .counts
            .iter()
            .map(|&c| (c as f64 - mean).powi(2))
            .sum::<f64>()
            / n_experts;
        let max = self.counts.iter().copied().max().unwrap_or(0) as f64;
        let mean_picks = picks as f64 / self.n_tokens as f64;
        let picks_variance =
            self.squared_picks as f64 / self.n_tokens as f64 - mean_picks * mean_picks;
        Some(LoadSummary {
            n_tokens: self.n_tokens,
            cv: variance.sqrt() / mean,
            max_vio: max / mean - 1.0,
            n_dead: self.counts.iter().filter(|&&c| c == 0).count(),
            mean_picks,
            std_picks: picks_variance.max(0.0).sqrt(),
            mean_entropy: (self.entropy_tokens > 0)
                .then(|| self.entropy_sum / self.entropy_tokens as f64),
            dropped: self.dropped as f64 / picks as f64,
        })
    }

    fn check_ids(&self, ids: &[u16]) -> Result<(), RoutingError> {
        let n_experts = self.counts.len();
        match ids.iter().find(|&&id| usize::from(id) >= n_experts) {
            None => Ok(()),
            Some(id) => {
                let reason = format!("expert id {id} is not below n_experts = {n_experts}");
                Err(RoutingError::BadRouting { reason })
            }
        }
    }

    fn add_token(&mut self, ids: &[u16]) {
        ids.iter().for_each(|&id| self.counts[usize::from(id)] += 1);
        self.n_tokens += 1;
        self.squared_picks += (ids.len() as u64).pow(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_checked_load() {
        let mut loads = Loads::new(4);
        assert_eq!(loads.summary(), None);
        loads.add_ids(&[0, 1, 0, 2, 0, 1], 2).unwrap();
        // Counts 3 2 1 0: mean 1.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25.
        assert_eq!(loads.counts(), [3, 2, 1, 0]);
        let summary = loads.summary().unwrap();
        assert!((summary.cv - 1.25f64.sqrt() / 1.5).abs() < 1e-12);
        assert!((summary.max_vio - 1.0).abs() < 1e-12);
        assert_eq!((summary.n_dead, summary.n_tokens), (1, 3));
        assert_eq!(
            (summary.mean_picks, summary.std_picks, summary.mean_entropy),
            (2.0, 0.0, None)
        );
    }

    #[test]
    fn ragged_picks_and_entropy() {
        let mut routing = Routing::new();
        routing.push_token(&[0], &[1.0]);
        routing.push_token(&[0, 1, 1], &[0.5, 0.3, 0.2]);
        let mut loads = Loads::new(2);
        loads.add_routing(&routing).unwrap();
        loads.add_logits(&[1.0, 1.0, 0.0, 90.0]).unwrap();
        let summary = loads.summary().unwrap();
        assert_eq!(
            (
                summary.cv,
                summary.max_vio,
                summary.mean_picks,
                summary.std_picks
            ),
            (0.0, 0.0, 2.0, 1.0)
        );
        assert!((summary.mean_entropy.unwrap() - 2f64.ln() / 2.0).abs() < 1e-6);
    }

    #[test]
    fn merging_equals_counting_together() {
        let (mut a, mut b, mut both) = (Loads::new(3), Loads::new(3), Loads::new(3));
        a.add_ids(&[0, 1], 1).unwrap();
        b.add_ids(&[2, 1], 2).unwrap();
        both.add_ids(&[0, 1], 1).unwrap();
        both.add_ids(&[2, 1], 2).unwrap();
        b.add_dropped(1);
        both.add_dropped(1);
        a.merge(&b).unwrap();
        assert_eq!(a, both);
        assert_eq!(a.summary().unwrap().dropped, 0.25);
        assert!(a.merge(&Loads::new(2)).is_err());
    }

    #[test]
    fn foreign_ids_are_named_and_not_counted() {
        let mut loads = Loads::new(2);
        assert!(
            loads
                .add_ids(&[0, 7], 1)
                .unwrap_err()
                .to_string()
                .contains("expert id 7")
        );
        assert!(loads.add_ids(&[0, 1, 0], 2).is_err());
        assert_eq!(loads.counts(), [0, 0]);
    }
}
