//! `--mem-budget` and what belongs to it: running a model that is larger than the memory it may take.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, kv_bytes_per_token, scratch_bytes};
use cadre_engine::{
    AheadKind, Model, PolicyKind, ReaderKind, Score, StoreOptions, StoreStats, StreamOptions,
};
use serde::Serialize;

use crate::failure::Failure;
use crate::lossy::Said;
use crate::memory;
use crate::model::Seats;
use crate::output::bytes;
use crate::units::parse_bytes;

/// What `auto` leaves for everything else that runs.
const LEFT_FREE: u64 = 3 << 29;

/// How much memory a model may take, and how it lives with less than it is large.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StreamArgs {
    /// Memory for weights, keys and values, and buffers, such as 6GiB, or `auto` for what the system has left. What every
    /// token uses is loaded, experts are read from the file when they are wanted, and the most useful ones are kept. The
    /// model may be larger than memory; results are the same.
    #[arg(long, value_name = "SIZE", value_parser = Budget::parse)]
    mem_budget: Option<Budget>,
    /// Which experts are kept: duel (lfu or lru, whichever would have hit more of late), lfu, lru, lfru, edgemoe, layer-partition, random.
    #[arg(long, value_name = "POLICY", default_value_t, requires = "mem_budget")]
    cache_policy: PolicyKind,
    /// Who says what is read before it is wanted: gate (the next layer's router, asked early; the default), exact (the router
    /// of models that have one before their layers; the default for these), edgemoe, popularity, previous, off. Guesses are
    /// tried now and then, and kept up only while they help.
    #[arg(long, value_name = "WHO", requires = "mem_budget")]
    read_ahead: Option<AheadKind>,
    /// Read ahead without trying whether it helps.
    #[arg(long, requires = "mem_budget")]
    read_ahead_always: bool,
    /// How files are read: auto, io_uring, pread, sync.
    #[arg(
        long,
        value_name = "READER",
        default_value = "auto",
        requires = "mem_budget"
    )]
    reader: ReaderKind,
    /// Fill the memory that experts may take before the first token, in the order of the file. Worth while where nearly all
    /// of them fit.
    #[arg(long, requires = "mem_budget")]
    pub(crate) preload: bool,
    /// Say at the end what was read from disk and how long that took.
    #[arg(long, requires = "mem_budget")]
    stats: bool,
}

/// A size, or what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Budget {
    Auto,
    Bytes(u64),
}

impl Budget {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            text => parse_bytes(text).map(Self::Bytes),
        }
    }
}

impl StreamArgs {
    /// What `--stats` wants to know of `model`, which has read `n_tokens` since `start`.
    pub(crate) fn summary(
        &self,
        model: &dyn Model,
        n_tokens: usize,
        start: Instant,
    ) -> Option<Summary> {
        let stats = model.store_stats().filter(|_| self.stats)?;
        let scores = model.predictor_scores();
        let summary = Summary::new(&stats, &scores, (n_tokens, start.elapsed()));
        Some(Summary {
            lossy: Said::of(model.info()),
            ..summary
        })
    }

    /// How to load `checkpoint` for `sessions`; `None` to load all of it.
    pub(crate) fn options(
        &self,
        checkpoint: &Checkpoint,
        sessions: Seats,
    ) -> Result<Option<StreamOptions>> {
        let session = sessions.options;
        let config = checkpoint.config();
        let n_ctx = session.context(config.max_position_embeddings);
        let kv = kv_bytes_per_token(config, session.kv).saturating_mul((n_ctx * sessions.n) as u64);
        let kv = kv.min(sessions.kv_memory.unwrap_or(u64::MAX));
        let buffers = scratch_bytes(config, n_ctx, session.chunk);
        let beside = kv.saturating_add(buffers);
        let budget = match self.mem_budget {
            None => return Ok(None),
            Some(Budget::Bytes(budget)) => budget,
            Some(Budget::Auto) => {
                let available = memory::available().ok_or_else(|| {
                    Failure::usage("this system does not say how much memory is left")
                        .hint("pass --mem-budget a size, such as 8GiB")
                })?;
                let budget = available.saturating_sub(LEFT_FREE.min(available / 4));
                if checkpoint.data_bytes().saturating_add(beside) <= budget {
                    return Ok(None);
                }
                budget
            }
        };
        let Some(weights) = budget.checked_sub(beside) else {
            let message = format!(
                "a budget of {} does not hold the cache of {n_ctx} tokens ({}) and buffers ({})",
                bytes(budget),
                bytes(kv),
                bytes(buffers)
            );
            return Err(Failure::new(message)
                .hint("raise --mem-budget, or lower -c; -ctk q8_0 -ctv q8_0 shrink the cache")
                .into());
        };
        Ok(Some(StreamOptions {
            ahead: self.read_ahead,
            store: StoreOptions {
                policy: self.cache_policy,
                adaptive: !self.read_ahead_always,
                scored: self.stats,
                reader: self.reader,
                ..StoreOptions::default()
            },
            ..StreamOptions::new(weights)
        }))
    }
}

/// What `--stats` says of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    n_tokens: usize,
    /// Experts that were wanted, each once per layer and pass.
    lookups: u64,
    hit_rate: f64,
    reads: u64,
    /// Of the reads, those that began before the expert was wanted.
    read_ahead: u64,
    /// Experts that were read ahead and not wanted.
    wasted: u64,
    bytes_read: u64,
    bytes_read_per_token: f64,
    evictions: u64,
    /// Experts that were used once and not kept.
    refused: u64,
    ms_per_token: f64,
    /// Of these, waiting for the disk.
    stall_ms_per_token: f64,
    /// Of these, bringing what was read into the order that kernels read.
    making_ms_per_token: f64,
    /// Share of the picks that each way of guessing foresaw, one layer ahead; `control` is told the truth.
    foreseen: BTreeMap<&'static str, f64>,
    /// Whether results differ from those of the whole model in memory.
    lossy: Said,
}

impl Summary {
    /// Of `n_tokens`, prompt and new ones, that took so long, with the model's own routing.
    fn new(stats: &StoreStats, scores: &[Score], (n_tokens, took): (usize, Duration)) -> Self {
        let per_token = |n: f64| n / n_tokens.max(1) as f64;
        let ms = |time: Duration| per_token(1e3 * time.as_secs_f64());
        Self {
            n_tokens,
            lookups: stats.lookups,
            hit_rate: stats.hit_rate(),
            reads: stats.reads,
            read_ahead: stats.read_ahead,
            wasted: stats.wasted,
            bytes_read: stats.bytes_read,
            bytes_read_per_token: per_token(stats.bytes_read as f64),
            evictions: stats.evictions,
            refused: stats.refused,
            ms_per_token: ms(took),
            stall_ms_per_token: ms(stats.stall),
            making_ms_per_token: ms(stats.making),
            foreseen: scores
                .iter()
                .map(|score| (score.name, score.overall().overlap()))
                .collect(),
            lossy: Said::default(),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "experts  {:.1} % of {} lookups in memory; {} read, {} of them ahead of time, {} in vain",
            100.0 * self.hit_rate,
            self.lookups,
            self.reads,
            self.read_ahead,
            self.wasted
        )?;
        writeln!(
            f,
            "read     {}, {} per token; {} evictions, {} used once and not kept",
            bytes(self.bytes_read),
            bytes(self.bytes_read_per_token as u64),
            self.evictions,
            self.refused
        )?;
        let foreseen = self.foreseen.iter();
        let foreseen: Vec<String> = foreseen
            .map(|(name, share)| format!("{name} {:.0} %", 100.0 * share))
            .collect();
        if !foreseen.is_empty() {
            writeln!(f, "foreseen {}", foreseen.join(", "))?;
        }
        write!(
            f,
            "time     {:.1} ms per token, of it {:.1} waiting for the disk, {:.1} making what was read ready; lossy={}",
            self.ms_per_token, self.stall_ms_per_token, self.making_ms_per_token, self.lossy
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_per_token() {
        let stats = StoreStats {
            lookups: 40,
            hits: 30,
            reads: 10,
            bytes_read: 1000,
            stall: Duration::from_millis(30),
            ..StoreStats::default()
        };
        let summary = Summary::new(&stats, &[], (10, Duration::from_millis(200)));
        assert!((summary.hit_rate - 0.75).abs() < 1e-12);
        assert!((summary.bytes_read_per_token - 100.0).abs() < 1e-9);
        assert!((summary.ms_per_token - 20.0).abs() < 1e-9);
        assert!((summary.stall_ms_per_token - 3.0).abs() < 1e-9);
        let said = summary.to_string();
        assert!(said.ends_with("; lossy=no"), "{said}");
        assert!(
            said.contains("75.0 % of 40") && said.contains("100 B per token"),
            "{said}"
        );
    }

    #[test]
    fn a_budget_is_a_size_or_auto() {
        assert_eq!(Budget::parse("auto"), Ok(Budget::Auto));
        assert_eq!(Budget::parse("2KiB"), Ok(Budget::Bytes(2048)));
        assert!(Budget::parse("lots").is_err());
    }
}
