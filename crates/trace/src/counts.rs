//! The running counts of one layer, and the statistics they become.

use crate::measures;
use crate::meta::TraceMeta;
use crate::row::Row;
use crate::stats::{LayerStats, Specialisation, StatsOptions};
use cadre_routing::Loads;

/// What is gathered for one layer.
#[derive(Debug, Clone)]
pub(crate) struct Counts {
    /// Load and router entropy over all domains.
    loads: Loads,
    /// Per domain; grown when a domain is first seen.
    pub(crate) tokens_by_domain: Vec<u64>,
    by_domain: Vec<Vec<u64>>,
    weight_sums: Vec<f64>,
    norm_sums: Vec<f64>,
    n_with_logits: u64,
    n_with_norms: u64,
    /// Experts that compute something.
    n_real: usize,
    last: Option<LastToken>,
    followed_picks: u64,
    reused_picks: u64,
    pub(crate) accesses: Vec<u16>,
    pub(crate) truncated: bool,
}

#[derive(Debug, Clone)]
struct LastToken {
    seq: u32,
    pos: u32,
    experts: Vec<u16>,
}

impl Counts {
    /// For layer `layer`, whose tables are as long as those of the layer that has most experts.
    pub(crate) fn new(meta: &TraceMeta, layer: usize) -> Self {
        let n_experts = meta.n_experts;
        Self {
            loads: Loads::new(meta.n_experts_in(layer).max(1)),
            n_real: meta.n_real_in(layer),
            tokens_by_domain: Vec::new(),
            by_domain: Vec::new(),
            weight_sums: vec![0.0; n_experts],
            norm_sums: vec![0.0; n_experts],
            n_with_logits: 0,
            n_with_norms: 0,
            last: None,
            followed_picks: 0,
            reused_picks: 0,
            accesses: Vec::new(),
            truncated: false,
        }
    }

    pub(crate) fn n_tokens(&self) -> u64 {
        self.tokens_by_domain.iter().sum()
    }

    pub(crate) fn grow(&mut self, n_domains: usize, n_experts: usize) {
        while self.by_domain.len() < n_domains {
            self.by_domain.push(vec![0; n_experts]);
            self.tokens_by_domain.push(0);
        }
    }

    pub(crate) fn add(
        &mut self,
        row: &Row<'_>,
        domain: usize,
        n_experts: usize,
        max_replay_picks: usize,
    ) {
        self.grow(domain + 1, n_experts);
        self.tokens_by_domain[domain] += 1;
        self.loads
            .add_ids(row.experts, row.experts.len().max(1))
            .expect("the row was checked");
        for (&expert, &weight) in row.experts.iter().zip(row.weights) {
            self.by_domain[domain][usize::from(expert)] += 1;
            self.weight_sums[usize::from(expert)] += f64::from(weight);
        }
        if let Some(norms) = row.norms {
            self.n_with_norms += 1;
            for (&expert, &norm) in row.experts.iter().zip(norms) {
                self.norm_sums[usize::from(expert)] += f64::from(norm);
            }
        }
        if let Some(logits) = row.logits {
            self.n_with_logits += 1;
            self.loads.add_logits(logits).expect("the row was checked");
        }
        self.follow(row);
        // There is nothing to read for a null expert.
        let real = || {
            row.experts
                .iter()
                .filter(|expert| usize::from(**expert) < self.n_real)
        };
        let room = max_replay_picks.saturating_sub(self.accesses.len());
        let n_wanted = real().count();
        let picked: Vec<u16> = real().take(room).copied().collect();
        self.accesses.extend(picked);
        self.truncated |= max_replay_picks > 0 && n_wanted > room;
    }

    /// Counts the picks that the token before also made, and remembers this token.
    fn follow(&mut self, row: &Row<'_>) {
        let last = self.last.get_or_insert_with(|| LastToken {
            seq: row.seq,
            pos: u32::MAX,
            experts: Vec::new(),
        });
        if last.seq == row.seq && last.pos.checked_add(1) == Some(row.pos) {
            self.followed_picks += row.experts.len() as u64;
            self.reused_picks += row
                .experts
                .iter()
                .filter(|expert| last.experts.contains(expert))
                .count() as u64;
        }
        (last.seq, last.pos) = (row.seq, row.pos);
        last.experts.clear();
        last.experts.extend_from_slice(row.experts);
    }

    pub(crate) fn stats(
        &self,
        layer: usize,
        meta: &TraceMeta,
        options: &StatsOptions,
    ) -> LayerStats {
        let n_experts = meta.n_experts_in(layer).max(1);
        let mut load = self.loads.counts().to_vec();
        let summary = self.loads.summary();
        let mut share = measures::shares(&load);
        let load_entropy = measures::normalised_entropy(&share);
        load.resize(meta.n_experts, 0);
        share.resize(meta.n_experts, 0.0);
        let even = 1.0 / n_experts as f64;
        let (dead_below, cold_below) = (
            options.dead_share.min(even / 4.0),
            options.cold_share.min(even / 2.0),
        );
        let chosen = |test: &dyn Fn(f64) -> bool| {
            (0..n_experts)
                .filter(|&e| test(share[e]))
                .collect::<Vec<usize>>()
        };
        let mut hot = chosen(&|s| s >= options.hot_ratio * even && s > even);
        hot.sort_by(|&a, &b| share[b].total_cmp(&share[a]));
        let mean = |sums: &[f64]| {
            let pairs = sums.iter().zip(&load);
            pairs
                .map(|(sum, &count)| if count == 0 { 0.0 } else { sum / count as f64 })
                .collect::<Vec<f64>>()
        };
        let n_tokens = self.n_tokens();
        let picks_per_token = load.iter().sum::<u64>() as f64 / n_tokens as f64;
        let entropy = summary
            .as_ref()
            .filter(|_| self.n_with_logits == n_tokens)
            .and_then(|figures| figures.mean_entropy);
        // With one expert there is nothing to decide: 1, as for `load_entropy`.
        let token_entropy = entropy.map(|nats| {
            if n_experts < 2 {
                1.0
            } else {
                nats / (n_experts as f64).ln()
            }
        });
        LayerStats {
            layer,
            n_tokens,
            mean_weight: mean(&self.weight_sums),
            mean_norm: (self.n_with_norms == n_tokens).then(|| mean(&self.norm_sums)),
            cv: summary.as_ref().map_or(0.0, |figures| figures.cv),
            max_vio: summary.as_ref().map_or(0.0, |figures| figures.max_vio),
            load_entropy,
            token_entropy,
            dead: chosen(&|s| s < dead_below),
            cold: chosen(&|s| s >= dead_below && s < cold_below),
            hot,
            reuse: (self.followed_picks > 0)
                .then(|| self.reused_picks as f64 / self.followed_picks as f64),
            reuse_by_chance: (picks_per_token * share.iter().map(|s| s * s).sum::<f64>()).min(1.0),
            specialisation: self.specialisation(),
            by_domain: self.by_domain.clone(),
            share,
            load,
        }
    }

    fn specialisation(&self) -> Option<Specialisation> {
        let seen = self
            .by_domain
            .iter()
            .filter(|counts| counts.iter().any(|&count| count > 0));
        let distributions: Vec<Vec<f64>> = seen.map(|counts| measures::shares(counts)).collect();
        Some(Specialisation {
            js_divergence: measures::js_divergence(&distributions)?,
            mutual_information: measures::mutual_information(&self.by_domain),
        })
    }
}
