//! The record of a test: llama-bench's keys, Cadre's own behind them, and the forms in which records are printed.

use std::fmt::Write;
use std::fs;
use std::time::SystemTime;

use cadre_checkpoint::{Checkpoint, Dtype, model_sizes};
use cadre_engine::{ModelInfo, StoreStats};
use serde::Serialize;

use super::measure::Sample;
use super::plan::Test;
use crate::lossy::Said;
use crate::output::{bytes, count};

/// What is the same in all records of a loaded model.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) build_commit: &'static str,
    pub(crate) build_number: u32,
    pub(crate) cpu_info: String,
    pub(crate) gpu_info: &'static str,
    pub(crate) backends: &'static str,
    pub(crate) model_filename: String,
    pub(crate) model_type: String,
    pub(crate) model_size: u64,
    pub(crate) model_n_params: u64,
    pub(crate) n_batch: usize,
    pub(crate) n_ubatch: usize,
    pub(crate) n_threads: usize,
    pub(crate) type_k: &'static str,
    pub(crate) type_v: &'static str,
    pub(crate) n_gpu_layers: u32,
}

/// One test's result.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) machine: Machine,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    test_time: String,
    avg_ns: u64,
    stddev_ns: u64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
    /// Sequences that were decoded together; the rates count the tokens of all.
    n_seqs: usize,
    /// Of `samples_ts`.
    median_ts: f64,
    /// Reading the weights with the same threads, before and after every repetition; the median.
    bandwidth_bytes_per_s: f64,
    /// Bytes of weights and cache that a generated token needs, mean; shared by sequences decoded together.
    bytes_per_token: Option<f64>,
    /// `bandwidth_bytes_per_s / bytes_per_token`: what memory allows.
    bound_ts: Option<f64>,
    /// `median_ts / bound_ts`.
    bound_share: Option<f64>,
    /// Two operations per weight and token of a prompt, without attention.
    gflops: Option<f64>,
    /// `gflops` as a share of what the multipliers do at their best with such weights (8-bit integers or bf16).
    peak_share: Option<f64>,
    /// The most memory that was resident after loading or after a repetition so far.
    peak_rss_bytes: Option<u64>,
    /// The most that was ever resident, memory that is only there for measuring included (`VmHWM`).
    vm_hwm_bytes: Option<u64>,
    /// Which rules changed the routing.
    lossy: Said,
    /// Of a model that is streamed.
    #[serde(flatten)]
    streamed: Option<Streamed>,
    #[serde(skip)]
    test: Test,
}

/// What a test read from disk; means over its repetitions.
#[derive(Debug, Clone, Serialize)]
struct Streamed {
    /// Memory that weights may take.
    weights_budget_bytes: u64,
    /// Of it, what is for experts.
    experts_bytes: u64,
    /// Share of the wanted experts that were in memory.
    hit_rate: f64,
    samples_hit_rate: Vec<f64>,
    bytes_read_per_token: f64,
    samples_bytes_read_per_token: Vec<f64>,
    /// Reading the file as experts are read, around every repetition; the median.
    disk_bytes_per_s: Option<f64>,
    /// What the disk allows: `disk_bytes_per_s / bytes_read_per_token`.
    disk_bound_ts: Option<f64>,
    /// `median_ts / disk_bound_ts`.
    disk_bound_share: Option<f64>,
    /// Waiting for the disk.
    stall_ns_per_token: f64,
    /// Bringing what was read into the order that kernels read.
    making_ns_per_token: f64,
    evictions_per_token: f64,
    /// Of the experts that were read, those that were asked for before they were wanted.
    read_ahead_share: f64,
    /// Of the experts that were read, those that nobody wanted.
    wasted_share: f64,
}

/// What is known of a streamed model before it is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streaming {
    pub(crate) weights_budget_bytes: u64,
    pub(crate) experts_bytes: u64,
    /// Bytes per second of the disk.
    pub(crate) disk: Option<f64>,
}

impl Streamed {
    fn new(streaming: Streaming, samples: &[Sample], n_tokens: f64, median_ts: f64) -> Self {
        let all = n_tokens * samples.len() as f64;
        let sum = |of: fn(&StoreStats) -> f64| -> f64 {
            samples
                .iter()
                .filter_map(|sample| sample.store.as_ref())
                .map(of)
                .sum()
        };
        let each = |of: &dyn Fn(&StoreStats) -> f64| -> Vec<f64> {
            samples
                .iter()
                .filter_map(|sample| sample.store.as_ref())
                .map(of)
                .collect()
        };
        let bytes_read_per_token = sum(|s| s.bytes_read as f64) / all;
        let disk_bound_ts = streaming
            .disk
            .map(|disk| disk / bytes_read_per_token.max(1.0));
        let reads = sum(|s| s.reads as f64).max(1.0);
        Self {
            weights_budget_bytes: streaming.weights_budget_bytes,
            experts_bytes: streaming.experts_bytes,
            hit_rate: sum(|s| s.hits as f64) / sum(|s| s.lookups as f64).max(1.0),
            bytes_read_per_token,
            samples_hit_rate: each(&|store| store.hit_rate()),
            samples_bytes_read_per_token: each(&|store| store.bytes_read as f64 / n_tokens),
            disk_bytes_per_s: streaming.disk,
            disk_bound_ts,
            disk_bound_share: disk_bound_ts.map(|bound| median_ts / bound),
            stall_ns_per_token: sum(|s| s.stall.as_nanos() as f64) / all,
            making_ns_per_token: sum(|s| s.making.as_nanos() as f64) / all,
            evictions_per_token: sum(|s| s.evictions as f64) / all,
            read_ahead_share: sum(|s| s.read_ahead as f64) / reads,
            wasted_share: sum(|s| s.wasted as f64) / reads,
        }
    }
}

/// What a test is held against.
#[derive(Debug, Clone)]
pub(crate) struct Around {
    /// Bytes per second that memory was read with.
    pub(crate) bandwidth: f64,
    /// Weights that one token is multiplied by, and of them those of the head, which only the last token of a prompt
    /// meets.
    pub(crate) weights: (u64, u64),
    /// Operations per second of the multipliers at their best, where that is known.
    pub(crate) peak: Option<f64>,
    /// The most memory seen.
    pub(crate) peak_rss_bytes: Option<u64>,
    /// Which rules changed the routing.
    pub(crate) lossy: Said,
    /// For a model that is streamed.
    pub(crate) streaming: Option<Streaming>,
}

impl Machine {
    /// What can be said of the build, the processor and the file; the rest is empty.
    pub(crate) fn new(checkpoint: &Checkpoint, info: &ModelInfo, model_size: u64) -> Self {
        Self {
            build_commit: concat!("cadre-", env!("CARGO_PKG_VERSION")),
            build_number: 0,
            cpu_info: cpu_info(),
            gpu_info: "",
            backends: "CPU",
            model_filename: checkpoint.origin().to_owned(),
            model_type: described(checkpoint, info),
            model_size,
            model_n_params: info.n_params,
            n_batch: 0,
            n_ubatch: 0,
            n_threads: 0,
            type_k: "",
            type_v: "",
            n_gpu_layers: 0,
        }
    }
}

impl Record {
    /// From the samples of `test`, at least one.
    pub(crate) fn new(machine: &Machine, test: Test, samples: &[Sample], around: Around) -> Self {
        let Around {
            bandwidth,
            weights: (all, head),
            peak,
            peak_rss_bytes,
            lossy,
            streaming,
        } = around;
        let ns: Vec<f64> = samples.iter().map(|sample| sample.ns as f64).collect();
        let n_tokens = test.n_tokens() as f64;
        let ts: Vec<f64> = ns.iter().map(|ns| 1e9 * n_tokens / ns.max(1.0)).collect();
        let read: u64 = samples.iter().map(|sample| sample.bytes).sum();
        let per_token = read as f64 / (n_tokens * samples.len() as f64);
        let bytes_per_token = (test.n_gen > 0).then_some(per_token);
        let bound_ts = bytes_per_token.map(|bytes| bandwidth / bytes.max(1.0));
        let median_ts = median(&ts);
        let operations = 2.0 * ((all - head) as f64 * n_tokens + head as f64);
        let gflops = (test.n_prompt > 0).then(|| operations / median(&ns).max(1.0));
        Self {
            machine: machine.clone(),
            n_prompt: test.n_prompt,
            n_gen: test.n_gen,
            n_depth: test.n_depth,
            test_time: utc(SystemTime::now()),
            avg_ns: mean(&ns) as u64,
            stddev_ns: deviation(&ns) as u64,
            avg_ts: mean(&ts),
            stddev_ts: deviation(&ts),
            samples_ns: samples.iter().map(|sample| sample.ns).collect(),
            n_seqs: test.n_seqs,
            bandwidth_bytes_per_s: bandwidth,
            bytes_per_token,
            bound_ts,
            bound_share: bound_ts.map(|bound| median_ts / bound),
            gflops,
            peak_share: gflops.zip(peak).map(|(rate, peak)| 1e9 * rate / peak),
            peak_rss_bytes,
            vm_hwm_bytes: status_bytes("VmHWM:"),
            lossy,
            streamed: streaming.map(|s| Streamed::new(s, samples, n_tokens, median_ts)),
            median_ts,
            samples_ts: ts,
            test,
        }
    }
}

/// A table as llama-bench prints it, with the share of the bound.
pub(crate) fn markdown(records: &[Record]) -> String {
    let mut text = String::from(
        "| model | size | params | threads | test | t/s | bound t/s | of the bound | GFLOP/s |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for record in records {
        let machine = &record.machine;
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.2} ± {:.2} | {} | {} | {} |",
            machine.model_type,
            bytes(machine.model_size),
            count(machine.model_n_params),
            machine.n_threads,
            record.test,
            record.avg_ts,
            record.stddev_ts,
            or_none(record.bound_ts.map(|bound| format!("{bound:.1}"))),
            or_none(
                record
                    .bound_share
                    .map(|share| format!("{:.0} %", 100.0 * share))
            ),
            or_none(record.gflops.map(|rate| format!("{rate:.0}"))),
        );
    }
    text
}

/// Comma separated, every cell quoted, without the lists of samples; with a line of names.
pub(crate) fn csv(records: &[Record]) -> serde_json::Result<String> {
    let mut text = String::new();
    for (at, record) in records.iter().enumerate() {
        let value = serde_json::to_value(record)?;
        let fields = value.as_object().into_iter().flatten();
        let fields: Vec<_> = fields.filter(|(_, value)| !value.is_array()).collect();
        let line = |cells: Vec<String>| {
            let cells = cells.iter().map(|cell| cell.replace('"', "\"\""));
            cells.map(|cell| format!("\"{cell}\"")).collect::<Vec<_>>()
        };
        if at == 0 {
            let names = fields.iter().map(|(name, _)| (*name).clone()).collect();
            text += &(line(names).join(",") + "\n");
        }
        let cells = fields.iter().map(|(_, value)| match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Null => String::new(),
            other => other.to_string(),
        });
        text += &(line(cells.collect()).join(",") + "\n");
    }
    Ok(text)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Of a sample of a larger whole; 0 for a single value.
fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// The architecture, and the format that takes most of the bytes, as in `olmoe Q8_0`.
fn described(checkpoint: &Checkpoint, info: &ModelInfo) -> String {
    most_used(checkpoint).map_or(info.model_type.clone(), |format| {
        format!("{} {}", info.model_type, format.name())
    })
}

/// The format that most bytes of the weights have.
pub(crate) fn most_used(checkpoint: &Checkpoint) -> Option<Dtype> {
    let formats = model_sizes(checkpoint).formats;
    let most = formats.iter().max_by_key(|(_, size)| size.n_bytes);
    most.map(|(format, _)| *format)
}

/// The processor's name, where the system says it in a file.
fn cpu_info() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find(|line| line.starts_with("model name"));
    let name = name.and_then(|line| line.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim())
        .to_owned()
}

/// The memory that this process holds now, where the system says it in a file.
pub(crate) fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// A line of this process's status that counts memory.
/// A figure of `/proc/self/status`, such as `VmHWM:`; `None` elsewhere than on Linux.
pub(crate) fn status_bytes(label: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// `2026-01-31T12:00:00Z`.
fn utc(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let seconds = since.map_or(0, |since| since.as_secs());
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    format!(
        "{year:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        month + 1,
        days + 1,
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn machine() -> Machine {
        Machine {
            build_commit: "cadre-0",
            build_number: 0,
            cpu_info: "a \"fast\" one".to_owned(),
            gpu_info: "",
            backends: "CPU",
            model_filename: "x.gguf".to_owned(),
            model_type: "olmoe".to_owned(),
            model_size: 1 << 30,
            model_n_params: 2_000_000,
            n_batch: 256,
            n_ubatch: 256,
            n_threads: 2,
            type_k: "f32",
            type_v: "f32",
            n_gpu_layers: 0,
        }
    }

    fn record(n_prompt: usize, n_gen: usize, samples: &[(u64, u64)]) -> Record {
        let test = Test {
            n_prompt,
            n_gen,
            n_depth: 0,
            n_seqs: 1,
        };
        let samples: Vec<_> = samples
            .iter()
            .map(|&(ns, bytes)| Sample {
                ns,
                bytes,
                store: None,
            })
            .collect();
        let around = Around {
            bandwidth: 1e9,
            weights: (3_000, 1_000),
            peak: Some(1e12),
            peak_rss_bytes: None,
            lossy: Said::default(),
            streaming: None,
        };
        Record::new(&machine(), test, &samples, around)
    }

    #[test]
    fn decoding_is_held_against_its_bytes() {
        // 10 tokens in 1 s and in 2 s, of 50 MB each: 20 tokens/s are possible.
        let record = record(
            0,
            10,
            &[(1_000_000_000, 500_000_000), (2_000_000_000, 500_000_000)],
        );
        assert_eq!(record.samples_ts, [10.0, 5.0]);
        assert_eq!((record.avg_ts, record.median_ts), (7.5, 7.5));
        assert_eq!(record.avg_ns, 1_500_000_000);
        assert!((record.stddev_ts - 12.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(record.bytes_per_token, Some(5e7));
        assert_eq!(
            (record.bound_ts, record.bound_share),
            (Some(20.0), Some(0.375))
        );
        assert_eq!(record.gflops, None);
        assert!(markdown(&[record]).contains("| tg10 | 7.50 ± 3.54 | 20.0 | 38 % | - |"));
    }

    #[test]
    fn prompts_are_counted_in_operations() {
        // 2 * (2000 weights * 100 tokens + 1000 of the head once) = 402,000 in 1 us.
        let record = record(100, 0, &[(1_000, 0)]);
        assert_eq!(record.gflops, Some(402.0));
        assert_eq!(record.peak_share, Some(0.402));
        assert_eq!((record.bound_ts, record.stddev_ts), (None, 0.0));
        assert!(markdown(&[record]).contains("| pp100 |"));
    }

    #[test]
    fn cells_are_quoted() {
        let text = csv(&[record(100, 0, &[(1_000, 0)])]).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("\"build_commit\",\"build_number\",\"cpu_info\""));
        assert!(lines[1].contains("\"a \"\"fast\"\" one\"") && !lines[0].contains("samples"));
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn times_are_utc() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59Z");
    }

    #[test]
    fn an_even_number_of_values_has_its_median_between() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
    }
}
