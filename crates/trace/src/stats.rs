//! Everything that is counted in a trace: load, balance, entropy, domains, reuse and cache hits, per layer.
//!
//! [`StatsBuilder`] takes rows one at a time and needs memory for histograms only (plus the picks kept for the cache
//! replay, which are bounded). [`Stats`] is plain serialisable data: it is the document behind `trace show -o json`.

use crate::counts::Counts;
use crate::error::TraceError;
use crate::meta::{Part, TraceMeta};
use crate::profile::{DomainTop, Profile};
use crate::reader::TraceReader;
use crate::replay;
use crate::row::{Row, Step};
use serde::Serialize;
use std::collections::HashSet;
use std::path::Path;

/// Thresholds and limits of the statistics. The defaults are what the commands use.
#[derive(Debug, Clone, PartialEq)]
pub struct StatsOptions {
    /// An expert with a smaller share of a layer's picks is dead. Capped at a quarter of an even share, so that it
    /// keeps its meaning with hundreds of experts.
    pub dead_share: f64,
    /// An expert with a smaller share, but not dead, is cold. Capped at half of an even share.
    pub cold_share: f64,
    /// An expert with at least this many times an even share is hot.
    pub hot_ratio: f64,
    /// How many experts to list per domain.
    pub n_top_experts: usize,
    /// Cache capacities to replay (experts per layer); empty for an eighth, a quarter, a half and three quarters.
    pub capacities: Vec<usize>,
    /// Picks per layer to keep for the cache replay; later ones are counted but not replayed. 0 turns it off.
    pub max_replay_picks: usize,
}

impl Default for StatsOptions {
    fn default() -> Self {
        Self {
            dead_share: 0.001,
            cold_share: 0.005,
            hot_ratio: 2.0,
            n_top_experts: 8,
            capacities: Vec::new(),
            max_replay_picks: 1 << 17,
        }
    }
}

/// The statistics of one trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// The model the trace was recorded from.
    pub meta: TraceMeta,
    /// Tokens that were routed (positions, counted once and not per layer).
    pub n_tokens: u64,
    /// Sequences in the trace.
    pub n_sequences: u64,
    /// Domains in order of first appearance.
    pub domains: Vec<Domain>,
    /// The layers that were recorded, in order.
    pub layers: Vec<LayerStats>,
    /// For each domain, the experts that tell it from the others best.
    pub top_experts: Vec<DomainTop>,
    /// What an LRU and an optimal expert cache would have hit, over all layers, by capacity.
    pub cache: Vec<CacheHits>,
    /// What a reader of the numbers has to know, for example that the trace is short.
    pub notes: Vec<String>,
}

/// One domain of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its tokens.
    pub n_tokens: u64,
}

/// The statistics of one layer. `N` is the number of experts, `D` of domains.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerStats {
    /// Decoder layer.
    pub layer: usize,
    /// Tokens routed here.
    pub n_tokens: u64,
    /// Picks of each expert `[N]`.
    pub load: Vec<u64>,
    /// `load` as fractions of all picks `[N]`.
    pub share: Vec<f64>,
    /// Mean weight of an expert over the tokens that picked it `[N]`; 0 if none did.
    pub mean_weight: Vec<f64>,
    /// Mean output norm of an expert over the tokens that picked it `[N]`, if norms were recorded.
    pub mean_norm: Option<Vec<f64>>,
    /// Standard deviation of the load divided by its mean; 0 is even.
    pub cv: f64,
    /// Largest load divided by the mean load, minus 1; 0 is even.
    pub max_vio: f64,
    /// Entropy of the load divided by `ln N`; 1 is even.
    pub load_entropy: f64,
    /// Mean over tokens of the entropy of `softmax(logits)` divided by `ln N`, if logits were recorded; low means
    /// that the router is decided.
    pub token_entropy: Option<f64>,
    /// Experts that are (nearly) never picked.
    pub dead: Vec<usize>,
    /// Experts that are rarely picked, without the dead.
    pub cold: Vec<usize>,
    /// Experts picked far more than an even share, hottest first.
    pub hot: Vec<usize>,
    /// Fraction of a token's picks that the token before it also picked; `None` without two tokens in a row.
    pub reuse: Option<f64>,
    /// What `reuse` would be if every token picked independently with this layer's shares.
    pub reuse_by_chance: f64,
    /// Picks of each expert in each domain `[D][N]`.
    pub by_domain: Vec<Vec<u64>>,
    /// How different the domains are routed; `None` with fewer than two domains.
    pub specialisation: Option<Specialisation>,
}

/// How much a layer's picks depend on the domain.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Specialisation {
    /// Jensen-Shannon divergence between the domains' histograms as a fraction of the largest possible: 0 when all
    /// domains use the same experts, 1 when no expert serves two.
    pub js_divergence: f64,
    /// Mutual information between the domain and a pick, in bits.
    pub mutual_information: f64,
}

/// Hits of an expert cache of one capacity, summed over layers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CacheHits {
    /// Experts held per layer.
    pub capacity: usize,
    /// Picks replayed.
    pub accesses: u64,
    /// Hits of least-recently-used eviction.
    pub lru_hits: u64,
    /// Hits of Belady's optimum.
    pub belady_hits: u64,
    /// `lru_hits / accesses`.
    pub lru_rate: f64,
    /// `belady_hits / accesses`.
    pub belady_rate: f64,
}

impl Stats {
    /// Counts what a whole trace file says about the experts of `part`, in bounded memory.
    ///
    /// # Errors
    /// Those of [`TraceReader`], and [`TraceError::Empty`].
    pub fn from_file(path: &Path, part: Part, options: &StatsOptions) -> Result<Self, TraceError> {
        let mut reader = TraceReader::open_part(path, part)?;
        let mut builder = StatsBuilder::new(reader.meta(), options)?;
        while let Some(block) = reader.next_block()? {
            block.rows().for_each(|row| builder.add(&row));
        }
        builder.finish()
    }

    /// Share of an expert relative to an even share, in one domain or in all (`None`): 1 is even.
    pub fn relative_share(&self, layer: &LayerStats, domain: Option<usize>, expert: usize) -> f64 {
        let counts = domain
            .and_then(|d| layer.by_domain.get(d))
            .unwrap_or(&layer.load);
        let sum: u64 = counts.iter().sum();
        let count = counts.get(expert).copied().unwrap_or(0);
        if sum == 0 {
            0.0
        } else {
            count as f64 * self.meta.n_experts as f64 / sum as f64
        }
    }
}

/// Counts rows into [`Stats`].
#[derive(Debug, Clone)]
pub struct StatsBuilder {
    meta: TraceMeta,
    options: StatsOptions,
    domains: Vec<String>,
    sequences: HashSet<u32>,
    /// One per decoder layer; untouched ones are left out at the end.
    layers: Vec<Counts>,
}

impl StatsBuilder {
    /// Starts counting rows of the given model.
    ///
    /// # Errors
    /// [`TraceError::BadMeta`] for impossible counts.
    pub fn new(meta: &TraceMeta, options: &StatsOptions) -> Result<Self, TraceError> {
        meta.check()?;
        Ok(Self {
            meta: meta.clone(),
            options: options.clone(),
            domains: Vec::new(),
            sequences: HashSet::new(),
            layers: (0..meta.n_layers)
                .map(|layer| Counts::new(meta, layer))
                .collect(),
        })
    }

    /// Counts the rows of one step.
    ///
    /// # Errors
    /// [`TraceError::Shape`] and [`TraceError::Row`]; nothing is counted then.
    pub fn push(&mut self, step: &Step<'_>) -> Result<(), TraceError> {
        let rows = step.rows(&self.meta)?;
        rows.iter().for_each(|row| self.add(row));
        Ok(())
    }

    /// Counts one row.
    ///
    /// # Errors
    /// [`TraceError::Row`]; nothing is counted then.
    pub fn push_row(&mut self, row: &Row<'_>) -> Result<(), TraceError> {
        row.check(&self.meta)?;
        self.add(row);
        Ok(())
    }

    /// Counts a row that was checked.
    fn add(&mut self, row: &Row<'_>) {
        let domain = self
            .domains
            .iter()
            .position(|name| name == row.domain)
            .unwrap_or_else(|| {
                self.domains.push(row.domain.to_string());
                self.domains.len() - 1
            });
        self.sequences.insert(row.seq);
        let n_experts = self.meta.n_experts;
        self.layers[usize::from(row.layer)].add(
            row,
            domain,
            n_experts,
            self.options.max_replay_picks,
        );
    }

    /// Computes the statistics.
    ///
    /// # Errors
    /// [`TraceError::Empty`] when nothing was pushed.
    pub fn finish(mut self) -> Result<Stats, TraceError> {
        if self.sequences.is_empty() {
            return Err(TraceError::Empty);
        }
        let n_domains = self.domains.len();
        for counts in &mut self.layers {
            counts.grow(n_domains, self.meta.n_experts);
        }
        let recorded = || {
            self.layers
                .iter()
                .enumerate()
                .filter(|(_, counts)| counts.n_tokens() > 0)
        };
        let n_tokens = recorded()
            .map(|(_, counts)| counts.n_tokens())
            .max()
            .unwrap_or(0);
        let domains = self.domains.iter().enumerate().map(|(d, name)| Domain {
            name: name.clone(),
            n_tokens: recorded()
                .map(|(_, counts)| counts.tokens_by_domain[d])
                .max()
                .unwrap_or(0),
        });
        let mut stats = Stats {
            n_tokens,
            n_sequences: self.sequences.len() as u64,
            domains: domains.collect(),
            layers: recorded()
                .map(|(layer, counts)| counts.stats(layer, &self.meta, &self.options))
                .collect(),
            top_experts: Vec::new(),
            cache: self.cache(),
            notes: Vec::new(),
            meta: self.meta.clone(),
        };
        stats.top_experts = Profile::from_stats(&stats).top_experts(self.options.n_top_experts);
        stats.notes = self.notes(&stats);
        Ok(stats)
    }

    fn capacities(&self) -> Vec<usize> {
        let n = self.meta.n_experts;
        let mut capacities = match &self.options.capacities[..] {
            [] => [1, 2, 4, 6]
                .map(|eighths| (n * eighths).div_ceil(8))
                .to_vec(),
            given => given.iter().map(|&capacity| capacity.min(n)).collect(),
        };
        capacities.sort_unstable();
        capacities.dedup();
        capacities
    }

    fn cache(&self) -> Vec<CacheHits> {
        let capacities = self.capacities();
        let mut sums = vec![(0_u64, 0_u64); capacities.len()];
        let mut accesses = 0;
        for counts in &self.layers {
            let lru = replay::lru_hits(&counts.accesses, self.meta.n_experts);
            let next_uses = replay::next_uses(&counts.accesses);
            accesses += counts.accesses.len() as u64;
            for (sum, &capacity) in sums.iter_mut().zip(&capacities) {
                sum.0 += lru[capacity];
                sum.1 += replay::belady_hits_with(&counts.accesses, &next_uses, capacity);
            }
        }
        if accesses == 0 {
            return Vec::new();
        }
        let hits = capacities
            .iter()
            .zip(sums)
            .map(|(&capacity, (lru_hits, belady_hits))| CacheHits {
                capacity,
                accesses,
                lru_hits,
                belady_hits,
                lru_rate: lru_hits as f64 / accesses as f64,
                belady_rate: belady_hits as f64 / accesses as f64,
            });
        hits.collect()
    }

    fn notes(&self, stats: &Stats) -> Vec<String> {
        let mut notes = Vec::new();
        let picks = stats
            .layers
            .iter()
            .map(|layer| layer.load.iter().sum::<u64>())
            .min()
            .unwrap_or(0);
        let per_expert = picks as f64 / self.meta.n_experts as f64;
        if per_expert < 50.0 {
            notes.push(format!(
                "only {per_expert:.1} picks per expert: dead, cold and specialisation are guesses; trace more text"
            ));
        }
        if self.layers.iter().any(|counts| counts.truncated) {
            let kept = self.options.max_replay_picks;
            notes.push(format!(
                "the cache replay covers the first {kept} picks of each layer"
            ));
        }
        if stats
            .layers
            .iter()
            .any(|layer| layer.n_tokens != stats.n_tokens)
        {
            notes.push("not every layer routed every token".to_string());
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Columns;
    use crate::synthetic::{self, Recipe};
    use crate::writer::TraceWriter;

    fn meta(n_experts: usize) -> TraceMeta {
        TraceMeta {
            n_layers: 1,
            n_experts,
            top_k: 2,
            ..synthetic::meta()
        }
    }

    /// Statistics of one layer from (seq, domain, picks) per token; positions count up within a sequence.
    fn count(n_experts: usize, tokens: &[(u32, &str, &[u16])]) -> Stats {
        let mut builder = StatsBuilder::new(&meta(n_experts), &StatsOptions::default()).unwrap();
        let (mut last_seq, mut pos) = (u32::MAX, 0);
        for &(seq, domain, experts) in tokens {
            pos = if seq == last_seq { pos + 1 } else { 0 };
            last_seq = seq;
            let weights = vec![0.5; experts.len()];
            let row = Row {
                seq,
                pos,
                token: 0,
                domain,
                layer: 0,
                experts,
                weights: &weights,
                logits: None,
                norms: None,
            };
            builder.push_row(&row).unwrap();
        }
        builder.finish().unwrap()
    }

    #[test]
    fn load_balance_and_reuse_by_hand() {
        let stats = count(
            4,
            &[
                (0, "a", &[0, 1]),
                (0, "a", &[1, 2]),
                (0, "a", &[1, 2]),
                (1, "a", &[1, 2]),
            ],
        );
        let layer = &stats.layers[0];
        assert_eq!((stats.n_tokens, stats.n_sequences), (4, 2));
        assert_eq!(layer.load, [1, 4, 3, 0]);
        assert_eq!(layer.share, [0.125, 0.5, 0.375, 0.0]);
        assert_eq!(layer.max_vio, 1.0);
        assert_eq!(layer.mean_weight, [0.5, 0.5, 0.5, 0.0]);
        // Two tokens follow another of their sequence: 1 of 2, then 2 of 2 picks repeat.
        assert_eq!(layer.reuse, Some(0.75));
        assert!((layer.reuse_by_chance - 2.0 * (1.0 + 16.0 + 9.0) / 64.0).abs() < 1e-12);
        assert_eq!(
            (layer.dead.as_slice(), layer.hot.as_slice()),
            (&[3][..], &[1][..])
        );
        assert_eq!((layer.token_entropy, layer.specialisation), (None, None));
    }

    #[test]
    fn a_small_layer_with_null_experts_is_measured_by_its_own_ids() {
        // Layer 0: one expert and one null one; layer 1 has four ids.
        let meta = TraceMeta {
            n_layers: 2,
            layer_experts: vec![2, 4],
            n_null: 1,
            ..meta(4)
        };
        let mut builder = StatsBuilder::new(&meta, &StatsOptions::default()).unwrap();
        for (pos, experts) in [&[0_u16, 1][..], &[1, 0]].into_iter().enumerate() {
            let row = Row {
                seq: 0,
                pos: pos as u32,
                token: 0,
                domain: "a",
                layer: 0,
                experts,
                weights: &[0.5, 0.5],
                logits: Some(&[1.0, 1.0]),
                norms: None,
            };
            builder.push_row(&row).unwrap();
        }
        let stats = builder.finish().unwrap();
        let layer = &stats.layers[0];
        assert_eq!(
            layer.load,
            [2, 2, 0, 0],
            "as long as that of the largest layer"
        );
        assert_eq!(
            (layer.cv, layer.max_vio, layer.load_entropy),
            (0.0, 0.0, 1.0)
        );
        assert!((layer.token_entropy.unwrap() - 1.0).abs() < 1e-6);
        assert!(layer.dead.is_empty() && layer.cold.is_empty());
        let accesses = stats.cache.iter().map(|hits| hits.accesses).max();
        assert_eq!(accesses, Some(2), "nothing is read for null experts");
    }

    #[test]
    fn domains_that_share_no_expert_are_fully_specialised() {
        let stats = count(
            4,
            &[(0, "a", &[0, 1]), (1, "b", &[2, 3]), (2, "a", &[1, 0])],
        );
        let layer = &stats.layers[0];
        assert_eq!(layer.by_domain, [[2, 2, 0, 0], [0, 0, 1, 1]]);
        assert!((layer.specialisation.unwrap().js_divergence - 1.0).abs() < 1e-12);
        let names: Vec<(&str, u64)> = stats
            .domains
            .iter()
            .map(|d| (d.name.as_str(), d.n_tokens))
            .collect();
        assert_eq!(names, [("a", 2), ("b", 1)]);
        assert_eq!(stats.top_experts[1].experts[0].lift, 2.0);
        assert_eq!(stats.relative_share(layer, Some(0), 0), 2.0);
    }

    #[test]
    fn dead_and_cold_follow_the_shares() {
        // 2000 picks of 4 experts: 1 is under 0.1 %, 5 is under 0.5 %.
        let mut tokens: Vec<(u32, &str, &[u16])> = vec![(0, "a", &[0]); 1994];
        tokens.extend([(0, "a", &[1][..]); 1]);
        tokens.extend([(0, "a", &[2][..]); 5]);
        let layer = &count(4, &tokens).layers[0];
        assert_eq!(
            (layer.dead.as_slice(), layer.cold.as_slice()),
            (&[1, 3][..], &[2][..])
        );

        // With 1000 evenly used experts a share of 0.1 % is normal, so nothing is dead or cold.
        let ids: Vec<u16> = (0..1000).collect();
        let tokens: Vec<(u32, &str, &[u16])> = ids.chunks(2).map(|pair| (0, "a", pair)).collect();
        let layer = &count(1000, &tokens).layers[0];
        assert!(layer.dead.is_empty() && layer.cold.is_empty() && layer.hot.is_empty());
    }

    #[test]
    fn the_cache_replay_sees_the_golden_trace() {
        let accesses: [[u16; 1]; 16] =
            [0, 1, 2, 0, 3, 1, 4, 0, 2, 1, 3, 0, 4, 2, 1, 0].map(|e| [e]);
        let tokens: Vec<(u32, &str, &[u16])> =
            accesses.iter().map(|pick| (0, "a", &pick[..])).collect();
        let stats = count(5, &tokens);
        let hits: Vec<(usize, u64, u64)> = stats
            .cache
            .iter()
            .map(|point| (point.capacity, point.lru_hits, point.belady_hits))
            .collect();
        assert_eq!(hits, [(1, 0, 0), (2, 0, 4), (3, 1, 7), (4, 6, 9)]);
        assert!(
            stats.notes[0].contains("3.2 picks per expert"),
            "{:?}",
            stats.notes
        );
    }

    #[test]
    fn the_replay_is_bounded_and_says_so() {
        let options = StatsOptions {
            max_replay_picks: 3,
            capacities: vec![9, 2, 9],
            ..StatsOptions::default()
        };
        let stats = synthetic::stats(&Recipe::default(), &options);
        assert_eq!(
            stats
                .cache
                .iter()
                .map(|point| point.capacity)
                .collect::<Vec<_>>(),
            [2, 4]
        );
        assert_eq!(
            stats.cache[0].accesses, 6,
            "three picks in each of two layers"
        );
        assert!(
            stats
                .notes
                .iter()
                .any(|note| note.contains("first 3 picks"))
        );
        let options = StatsOptions {
            max_replay_picks: 0,
            ..StatsOptions::default()
        };
        assert!(
            synthetic::stats(&Recipe::default(), &options)
                .cache
                .is_empty()
        );
    }

    #[test]
    fn a_file_counts_like_its_rows() {
        let columns = Columns {
            logits: true,
            norms: true,
        };
        let recipe = Recipe {
            columns,
            ..Recipe::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let mut writer = TraceWriter::create(&path, &recipe.meta, columns).unwrap();
        for row in synthetic::rows(&recipe) {
            writer.push_row(&row.view()).unwrap();
        }
        writer.finish().unwrap();
        let stats = Stats::from_file(&path, Part::FeedForward, &StatsOptions::default()).unwrap();
        assert_eq!(stats, synthetic::stats(&recipe, &StatsOptions::default()));
        let entropy = stats.layers[0].token_entropy.unwrap();
        assert!(entropy > 0.0 && entropy < 1.0);
        // The synthetic norm of expert e is e + 0.5.
        assert_eq!(stats.layers[0].mean_norm.as_ref().unwrap()[1], 1.5);
    }

    #[test]
    fn an_empty_trace_is_an_error() {
        let builder = StatsBuilder::new(&meta(4), &StatsOptions::default()).unwrap();
        assert!(matches!(builder.finish(), Err(TraceError::Empty)));
    }

    #[test]
    fn layers_without_rows_are_left_out() {
        let recipe = Recipe {
            meta: TraceMeta {
                n_layers: 3,
                ..synthetic::meta()
            },
            ..Recipe::default()
        };
        let mut builder = StatsBuilder::new(&recipe.meta, &StatsOptions::default()).unwrap();
        for row in synthetic::rows(&recipe) {
            if row.view().layer != 0 {
                builder.push_row(&row.view()).unwrap();
            }
        }
        let stats = builder.finish().unwrap();
        assert_eq!(
            stats
                .layers
                .iter()
                .map(|layer| layer.layer)
                .collect::<Vec<_>>(),
            [1, 2]
        );
    }
}
