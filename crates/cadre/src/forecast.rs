//! The forecast for a model that is larger than its budget: how fast it decodes with its experts on disk.

use cadre_checkpoint::{ModelConfig, Sizes};
use cadre_store::forecast::{LOCALITY, Machine, Work, decoding};
use serde::Serialize;

use crate::demand::Demand;
use crate::output::bytes;

/// Memory that experts are read into before they are put in their places: about what `cadre_store` takes.
fn staging(held: Sizes, budget: u64) -> u64 {
    let least = 4 * held.one_expert;
    (least + (32 << 20)).min(budget / 8).max(least)
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
    /// Share of the experts of a token that are there, with routing as uneven as that of a trained model.
    hit_rate: f64,
    /// The same if all experts are as likely at any time.
    even_hit_rate: f64,
    /// What a token reads from disk.
    disk_bytes_per_token: u64,
    disk_bytes_per_s: f64,
    disk_source: &'static str,
    forecast_tokens_per_s: f64,
    /// The same if all experts are as likely at any time.
    even_forecast_tokens_per_s: f64,
    /// Disk speed by the bytes that a token misses.
    bound_tokens_per_s: f64,
}

impl Streamed {
    /// Of a model whose weights take `held`, `dense` of them for what every token uses, in `budget` bytes, at the start of a context. `decode_seconds` is what a token
    /// takes with everything in memory. `None` if the model has no experts, or the budget does not hold the rest.
    pub(crate) fn new(
        config: &ModelConfig,
        (demand, held, dense): (&Demand, Sizes, u64),
        budget: u64,
        (memory, decode_seconds): (f64, f64),
        disk: DiskRate,
    ) -> Option<Self> {
        let moe = &config.moe;
        let picked: usize = moe.layers.iter().map(|layer| config.picks_in(*layer)).sum();
        let one_token = picked as u64 * held.one_expert;
        // The program itself is beside the budget, as it is for `cadre run --mem-budget`.
        let parts = [
            dense,
            demand.kv_bytes,
            demand.scratch_bytes,
            staging(held, budget),
        ];
        let resident = parts.into_iter().fold(0, u64::saturating_add);
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
            n_picked: picked.div_ceil(moe.layers.len().max(1)),
            locality: LOCALITY,
        };
        let machine = Machine {
            memory,
            disk: disk.bytes_per_second,
            latency: disk.latency_seconds,
        };
        let forecast = decoding(&work, &machine, cache_bytes);
        let even = decoding(
            &Work {
                locality: 0.0,
                ..work
            },
            &machine,
            cache_bytes,
        );
        Some(Self {
            cache_bytes: cache_bytes.min(held.experts),
            hit_rate: forecast.hit_rate,
            even_hit_rate: even.hit_rate,
            disk_bytes_per_token: forecast.disk_bytes,
            disk_bytes_per_s: disk.bytes_per_second,
            disk_source: disk.source,
            forecast_tokens_per_s: forecast.tokens_per_second,
            even_forecast_tokens_per_s: even.tokens_per_second,
            bound_tokens_per_s: forecast.bound_tokens_per_second,
        })
    }

    /// What it means, for people.
    pub(crate) fn text(&self) -> String {
        format!(
            "about {:.1} tokens/s decoding with a cache of {} for experts: {:.0} % hits with routing as uneven as in \
             trained models, and {} per token from a disk of {:.2} GB/s ({}); {:.1} if all experts are as likely",
            self.forecast_tokens_per_s,
            bytes(self.cache_bytes),
            100.0 * self.hit_rate,
            bytes(self.disk_bytes_per_token),
            self.disk_bytes_per_s / 1e9,
            self.disk_source,
            self.even_forecast_tokens_per_s
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
        let dense = held.total - held.experts;
        let at = |budget| {
            let sizes = (&demand, held, dense);
            Streamed::new(config, sizes, budget, (1e10, 1e-3), disk)
        };
        let base = dense + demand.kv_bytes + demand.scratch_bytes;
        let budgets = (base..2 * base).step_by(1024);
        let least = budgets
            .clone()
            .find(|budget| at(*budget).is_some())
            .unwrap();
        assert!(least >= base + 4 * held.one_expert, "room to read into");
        let none = at(least).unwrap();
        assert!(none.cache_bytes < 1024 && none.hit_rate < 1e-3);
        let picked = config.moe.layers.len() as u64 * config.moe.top_k as u64;
        assert!(none.disk_bytes_per_token > picked * held.one_expert * 99 / 100);
        // A part of what is more is for reading, too.
        let half = at(least + held.experts / 2).unwrap();
        assert!((half.even_hit_rate - 0.5).abs() < 0.1 && half.hit_rate > half.even_hit_rate);
        assert!(half.forecast_tokens_per_s > none.forecast_tokens_per_s);
        assert!(half.forecast_tokens_per_s < half.bound_tokens_per_s);
        assert!(half.text().contains("% hits"), "{}", half.text());
    }
}
