//! How fast a model decodes whose experts do not all fit into memory: arithmetic over sizes and speeds, no measurement.
//!
//! Every token reads the experts that it is sent to. Those that are cached come from memory, the others from disk:
//!
//! ```text
//! miss rate m = (1 - s) / (1 + LOCALITY w)   (s: slots / all experts, w: slots / experts of one token)
//! from disk    M = m T                       (T: bytes of the experts of a token)
//! reading      R = M / disk + layers that miss * latency
//! a token      dense + max(R, cached + missed - last) + last
//! ```
//!
//! Reads of a layer begin when its router has chosen, so the dense part before them hides nothing; the experts that are
//! there are computed meanwhile, and those that come in are computed as they come, but for the last of each layer. What
//! came from disk costs memory more than what was cached: it is also copied into its place.
//!
//! Routing is not even: some experts are popular, and texts stay with theirs for a while. So what a cache finds depends less
//! on the share of the experts that it holds than on how many tokens' worth of them. `LOCALITY` is what the default policy
//! makes of that; 0 would be routing that favours no expert at any time, which is the worst that a model can do.

/// How uneven routing is, as hits of the default policy show it. Measured share of lookups that missed, and what this gives:
/// the recorded routing of a model with 4 of 16 experts (the embedded one, 242,951 tokens) with slots for 0.4, 1, 2 and 3
/// tokens: 76, 50, 23 and 8 %; 61, 34, 15 and 5 %. Decoding with 8 of 128 experts and routing of the same statistics, for
/// 0.5, 2.1, 5.2, 7.7 and 11.5 tokens: 45, 22, 8, 4 and 1 %; 59, 25, 9, 5 and 2 %.
pub const LOCALITY: f64 = 1.2;

/// The copy of an expert into its place reads and writes every byte.
const COPY: f64 = 2.0;

/// What one token of decoding takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Seconds of a token when everything is in memory.
    pub resident_seconds: f64,
    /// Bytes that it reads apart from experts.
    pub dense_bytes: u64,
    /// Bytes of the experts that it is sent to, all layers together.
    pub expert_bytes: u64,
    /// Bytes of all experts.
    pub all_expert_bytes: u64,
    /// Layers that have experts.
    pub n_layers: usize,
    /// Experts that a token is sent to in each.
    pub n_picked: usize,
    /// How uneven routing is: [`LOCALITY`], or 0 for the worst.
    pub locality: f64,
}

/// How fast a machine is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// Bytes per second that memory is read with.
    pub memory: f64,
    /// Bytes per second that the disk is read with, at the requests that are used.
    pub disk: f64,
    /// Seconds until the first byte of a read is there.
    pub latency: f64,
}

/// What decoding will be like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Share of the experts of a token that are in memory.
    pub hit_rate: f64,
    /// Bytes that a token reads from disk.
    pub disk_bytes: u64,
    /// Seconds in which nothing is computed because a read has not ended.
    pub stall_seconds: f64,
    /// The forecast.
    pub tokens_per_second: f64,
    /// Disk speed divided by the bytes missed, or the resident speed where that is less: what no reader, order or overlap
    /// can exceed.
    pub bound_tokens_per_second: f64,
}

/// Decoding with `cache_bytes` of slots.
pub fn decoding(work: &Work, machine: &Machine, cache_bytes: u64) -> Forecast {
    let share = (cache_bytes as f64 / work.all_expert_bytes.max(1) as f64).min(1.0);
    let picked = work.expert_bytes as f64;
    let tokens = cache_bytes as f64 / picked.max(1.0);
    let hit_rate = 1.0 - (1.0 - share) / (1.0 + work.locality * tokens);
    let missed = (1.0 - hit_rate) * picked;
    let n_missing_layers = work.n_layers as f64 * (1.0 - hit_rate.powi(work.n_picked as i32));
    // Computing is as fast per byte as it is with everything in memory, whatever bounds it there.
    let per_byte = work.resident_seconds / (work.dense_bytes + work.expert_bytes).max(1) as f64;
    let per_missed_byte = per_byte + COPY / machine.memory;
    let one_expert = picked / (work.n_layers * work.n_picked).max(1) as f64;
    let last = (n_missing_layers * one_expert).min(missed) * per_missed_byte;

    let dense = work.dense_bytes as f64 * per_byte;
    let computing = (picked - missed) * per_byte + missed * per_missed_byte - last;
    let reading = missed / machine.disk + n_missing_layers * machine.latency;
    let seconds = dense + reading.max(computing) + last;
    let fastest = work.resident_seconds.max(missed / machine.disk);
    Forecast {
        hit_rate,
        disk_bytes: missed.round() as u64,
        stall_seconds: (reading - computing).max(0.0),
        tokens_per_second: 1.0 / seconds,
        bound_tokens_per_second: 1.0 / fastest,
    }
}

/// Experts of a layer that at least one of `n_tokens` is sent to, each token to `n_picked` of `n_experts` that are all as
/// likely: `E (1 - (1 - k / E)^n)`.
pub fn touched(n_experts: usize, n_picked: usize, n_tokens: usize) -> f64 {
    let share = n_picked as f64 / n_experts.max(1) as f64;
    n_experts as f64 * (1.0 - (1.0 - share).powf(n_tokens as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 ms of dense work and 1 ms of experts per token, 10 GB/s either way.
    const WORK: Work = Work {
        resident_seconds: 2e-3,
        dense_bytes: 10_000_000,
        expert_bytes: 10_000_000,
        all_expert_bytes: 100_000_000,
        n_layers: 5,
        n_picked: 2,
        locality: 0.0,
    };
    const MACHINE: Machine = Machine {
        memory: 1e10,
        disk: 1e9,
        latency: 1e-4,
    };

    fn close(found: f64, wanted: f64) -> bool {
        (found / wanted - 1.0).abs() < 1e-9
    }

    #[test]
    fn with_room_for_everything_it_is_the_resident_speed() {
        for cache_bytes in [100_000_000, u64::MAX] {
            let forecast = decoding(&WORK, &MACHINE, cache_bytes);
            assert!(close(forecast.tokens_per_second, 500.0));
            assert!(close(forecast.bound_tokens_per_second, 500.0));
            assert_eq!((forecast.hit_rate, forecast.disk_bytes), (1.0, 0));
            assert_eq!(forecast.stall_seconds, 0.0);
        }
    }

    #[test]
    fn without_a_cache_everything_comes_from_disk() {
        let forecast = decoding(&WORK, &MACHINE, 0);
        assert_eq!((forecast.hit_rate, forecast.disk_bytes), (0.0, 10_000_000));
        // Reading: 10 ms and 5 times 0.1 ms. Of the 3 ms of computing and copying what is missed, the last of two experts
        // of every layer are not hidden: 1.5 ms. The dense part: 1 ms.
        assert!(close(
            1.0 / forecast.tokens_per_second,
            10.5e-3 + 1.5e-3 + 1e-3
        ));
        assert!(close(forecast.stall_seconds, 10.5e-3 - 1.5e-3));
        assert!(close(forecast.bound_tokens_per_second, 100.0));
    }

    #[test]
    fn uneven_routing_hits_more() {
        let work = Work {
            locality: LOCALITY,
            ..WORK
        };
        // A token uses a tenth of the experts.
        let hits = |tenths: u64| decoding(&work, &MACHINE, tenths * 10_000_000).hit_rate;
        assert!(close(hits(1), 1.0 - 0.9 / 2.2));
        assert!(close(hits(5), 1.0 - 0.5 / 7.0));
        assert!(close(hits(10), 1.0));
    }

    #[test]
    fn half_a_cache_misses_half_and_three_of_four_layers() {
        let forecast = decoding(&WORK, &MACHINE, 50_000_000);
        assert_eq!((forecast.hit_rate, forecast.disk_bytes), (0.5, 5_000_000));
        // 5 ms and 3.75 layers of 0.1 ms; one expert of 1 MB in each of 3.75 layers is not hidden: 3.75 MB at 0.3 ns.
        let wanted = 1e-3 + (5e-3 + 3.75e-4) + 3.75e6 * 3e-10;
        assert!(close(1.0 / forecast.tokens_per_second, wanted));
    }

    #[test]
    fn more_room_and_faster_disks_are_never_slower() {
        let speed = |disk, cache| {
            let machine = Machine { disk, ..MACHINE };
            decoding(&WORK, &machine, cache).tokens_per_second
        };
        for disk in [1e8, 1e9, 1e10, 1e11] {
            for step in 0..10 {
                let (less, more) = (step * 10_000_000, (step + 1) * 10_000_000);
                assert!(speed(disk, less) <= speed(disk, more) * (1.0 + 1e-9));
                assert!(speed(disk, less) <= speed(2.0 * disk, less));
            }
        }
    }

    #[test]
    fn prompts_touch_nearly_all_experts() {
        assert!((touched(64, 8, 4) - 26.5).abs() < 0.05);
        assert!((touched(64, 8, 16) - 56.4).abs() < 0.05);
        assert!((touched(128, 8, 64) - 125.9).abs() < 0.1);
        assert_eq!(touched(128, 8, 0), 0.0);
        assert_eq!(touched(0, 0, 9), 0.0);
    }
}
