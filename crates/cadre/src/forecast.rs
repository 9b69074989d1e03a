//! The forecast for a model that is larger than its budget: how fast it decodes with its experts on disk.

use cadre_checkpoint::{ModelConfig, Sizes};
use cadre_store::forecast::{Machine, Work, decoding};
use serde::Serialize;

use crate::demand::Demand;
use crate::output::bytes;

/// Memory that experts are read into before they are put in their places: what a token needs in one layer, twice.
fn staging(config: &ModelConfig, held: Sizes) -> u64 {
    2 * config.moe.top_k as u64 * held.one_expert
}

/// How a disk is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DiskRate {
    pub(crate) bytes_per_second: f64,
    pub(crate) latency_seconds: f64,
    /// `given` or `measured`.
    pub(crate) source: &'static str,
}

/// Decoding with the experts on disk and a cache of some.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Streamed {
    /// Memory for experts: what the budget leaves beside all else.
    cache_bytes: u64,
    /// Share of the experts of a token that are there, all being as likely.
    hit_rate: f64,
    /// What a token reads from disk.
    disk_bytes_per_token: u64,
    disk_bytes_per_s: f64,
    disk_source: &'static str,
    forecast_tokens_per_s: f64,
    /// Disk speed by the bytes that a token misses.
    bound_tokens_per_s: f64,
}

impl Streamed {
    /// Of a model whose weights take `held`, in `budget` bytes, at the start of a context. `decode_seconds` is what a token
    /// takes with everything in memory. `None` if the model has no experts, or the budget does not hold the rest.
    pub(crate) fn new(
        config: &ModelConfig,
        (demand, held): (&Demand, Sizes),
        budget: u64,
        (memory, decode_seconds): (f64, f64),
        disk: DiskRate,
    ) -> Option<Self> {
        let moe = &config.moe;
        let one_token = (moe.layers.len() * moe.top_k) as u64 * held.one_expert;
        let resident = demand.needed_bytes - held.experts.min(demand.needed_bytes);
        let resident = resident.saturating_add(staging(config, held));
        let cache_bytes = budget.checked_sub(resident)?;
        if held.experts == 0 {
            return None;
        }
        let work = Work {
            resident_seconds: decode_seconds,
            dense_bytes: held.read_per_token.saturating_sub(one_token),
            expert_bytes: one_token,
            all_expert_bytes: held.experts,
            n_layers: moe.layers.len(),
            n_picked: moe.top_k,
        };
        let machine = Machine {
            memory,
            disk: disk.bytes_per_second,
            latency: disk.latency_seconds,
        };
        let forecast = decoding(&work, &machine, cache_bytes);
        Some(Self {
            cache_bytes: cache_bytes.min(held.experts),
            hit_rate: forecast.hit_rate,
            disk_bytes_per_token: forecast.disk_bytes,
            disk_bytes_per_s: disk.bytes_per_second,
            disk_source: disk.source,
            forecast_tokens_per_s: forecast.tokens_per_second,
            bound_tokens_per_s: forecast.bound_tokens_per_second,
        })
    }

    /// What it means, for people.
    pub(crate) fn text(&self) -> String {
        format!(
            "about {:.1} tokens/s decoding with a cache of {} for experts: {:.0} % hits if all are as likely, and {} per \
             token from a disk of {:.2} GB/s ({})",
            self.forecast_tokens_per_s,
            bytes(self.cache_bytes),
            100.0 * self.hit_rate,
            bytes(self.disk_bytes_per_token),
            self.disk_bytes_per_s / 1e9,
            self.disk_source
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;
    use cadre_checkpoint::{Holding, held_sizes};
    use cadre_engine::KvFormats;

    #[test]
    fn what_the_budget_leaves_is_the_cache() {
        let checkpoint = embedded::open().unwrap();
        let config = checkpoint.config();
        let held = held_sizes(&checkpoint, Holding::Loaded);
        let demand = Demand::new(config, held.total, 128, KvFormats::default());
        let disk = DiskRate {
            bytes_per_second: 1e9,
            latency_seconds: 1e-4,
            source: "given",
        };
        let at = |budget| Streamed::new(config, (&demand, held), budget, (1e10, 1e-3), disk);
        let least = demand.needed_bytes - held.experts + staging(config, held);
        assert!(at(least - 1).is_none());
        let none = at(least).unwrap();
        assert_eq!((none.cache_bytes, none.hit_rate), (0, 0.0));
        let picked = config.moe.layers.len() as u64 * config.moe.top_k as u64;
        assert_eq!(none.disk_bytes_per_token, picked * held.one_expert);
        let half = at(least + held.experts / 2).unwrap();
        assert!((half.hit_rate - 0.5).abs() < 1e-3);
        assert!(half.forecast_tokens_per_s > none.forecast_tokens_per_s);
        assert!(half.forecast_tokens_per_s < half.bound_tokens_per_s);
        assert!(half.text().contains("50 % hits"), "{}", half.text());
    }
}
