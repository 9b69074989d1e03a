//! What the server counts and measures, and how monitoring systems read it.
//!
//! Names are vLLM's where they mean the same, in the text format of Prometheus. Nothing here grows with what clients send:
//! every label has a fixed set of values.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cadre_engine::StoreStats;

use crate::schedule::LayerUse;

/// Seconds, for what a person waits for before anything happens.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between two tokens.
const BETWEEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Seconds of whole requests.
const WHOLE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens.
const LENGTHS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];
/// Share that the newest job has in the mean time of jobs.
const NEWEST: f64 = 0.1;

/// Numbers about everything that happened since the start.
#[derive(Debug)]
pub(crate) struct Metrics {
    numbers: Mutex<Numbers>,
}

#[derive(Debug)]
struct Numbers {
    n_running: usize,
    n_waiting: usize,
    kv_share: f64,
    /// Bytes of keys and values that are taken, and that may be.
    kv_bytes: (usize, usize),
    preemptions: u64,
    steps: Steps,
    prompt_tokens: u64,
    cached_tokens: u64,
    new_tokens: u64,
    ended: BTreeMap<Ended, u64>,
    answers: BTreeMap<(&'static str, u16), u64>,
    first_token: Histogram,
    between: Histogram,
    queue: Histogram,
    whole: Histogram,
    prompt_lengths: Histogram,
    new_lengths: Histogram,
    pass_tokens: Histogram,
    pass_seconds: f64,
    experts: Vec<LayerUse>,
    /// Of a job, lately.
    job_seconds: f64,
}

/// Steps that took some of those that generated.
#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    n: u64,
    tokens: u64,
    /// Different experts of each step, all layers together.
    experts: u64,
    longest_wait: usize,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ended {
    /// By a stop token or string.
    Stop,
    /// As long as it may be.
    Length,
    /// Its client went away.
    Cancelled,
    /// By an error.
    Failed,
}

impl Ended {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Cancelled, Self::Failed];

    /// vLLM's word for it.
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "abort",
            Self::Failed => "error",
        }
    }
}

/// Counts of values, by upper bound.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// Values up to each bound and above the one before.
    counts: Vec<u64>,
    sum: f64,
    n: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len()],
            sum: 0.0,
            n: 0,
        }
    }

    fn add(&mut self, value: f64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        self.sum += value;
        self.n += 1;
    }
}

/// The clock of one job.
#[derive(Debug)]
pub(crate) struct JobClock {
    asked: Instant,
    /// When the last token was drawn.
    last: Option<Instant>,
    metrics: Arc<Metrics>,
}

impl JobClock {
    /// Of a job that was asked for then.
    pub(crate) fn new(asked: Instant, metrics: Arc<Metrics>) -> Self {
        Self {
            asked,
            last: None,
            metrics,
        }
    }

    /// It has a slot, where so many tokens of its prompt were known.
    pub(crate) fn started(&self, n_prompt: usize, n_cached: usize) {
        let waited = self.asked.elapsed();
        let mut numbers = self.metrics.numbers();
        numbers.queue.add(waited.as_secs_f64());
        numbers.prompt_lengths.add(n_prompt as f64);
        numbers.prompt_tokens += n_prompt as u64;
        numbers.cached_tokens += n_cached as u64;
    }

    /// A token was drawn.
    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        let mut numbers = self.metrics.numbers();
        numbers.new_tokens += 1;
        match self.last {
            None => numbers.first_token.add((now - self.asked).as_secs_f64()),
            Some(last) => numbers.between.add((now - last).as_secs_f64()),
        }
        drop(numbers);
        self.last = Some(now);
    }

    /// It has ended after so many tokens.
    pub(crate) fn ended(&self, why: Ended, n_new: usize) {
        let seconds = self.asked.elapsed().as_secs_f64();
        let mut numbers = self.metrics.numbers();
        *numbers.ended.entry(why).or_default() += 1;
        numbers.whole.add(seconds);
        numbers.new_lengths.add(n_new as f64);
        let before = match numbers.whole.n {
            1 => seconds,
            _ => numbers.job_seconds,
        };
        numbers.job_seconds = (1.0 - NEWEST) * before + NEWEST * seconds;
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let numbers = Numbers {
            n_running: 0,
            n_waiting: 0,
            kv_share: 0.0,
            kv_bytes: (0, 0),
            preemptions: 0,
            steps: Steps::default(),
            prompt_tokens: 0,
            cached_tokens: 0,
            new_tokens: 0,
            ended: Ended::ALL.into_iter().map(|why| (why, 0)).collect(),
            answers: BTreeMap::new(),
            first_token: Histogram::new(FIRST_TOKEN),
            between: Histogram::new(BETWEEN),
            queue: Histogram::new(FIRST_TOKEN),
            whole: Histogram::new(WHOLE),
            prompt_lengths: Histogram::new(LENGTHS),
            new_lengths: Histogram::new(LENGTHS),
            pass_tokens: Histogram::new(LENGTHS),
            pass_seconds: 0.0,
            experts: Vec::new(),
            job_seconds: 0.0,
        };
        Self {
            numbers: Mutex::new(numbers),
        }
    }
}

impl Metrics {
    /// Numbers stay useful when somebody panicked while changing one.
    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Jobs that run and wait now, and the share of all positions for keys and values that the running ones have filled.
    pub(crate) fn jobs(&self, n_running: usize, n_waiting: usize, kv_share: f64) {
        let mut numbers = self.numbers();
        (numbers.n_running, numbers.n_waiting) = (n_running, n_waiting);
        numbers.kv_share = kv_share;
    }

    /// Bytes of keys and values, of running jobs and of what is kept for others, and the most that may be.
    pub(crate) fn kv(&self, taken: usize, limit: usize) {
        self.numbers().kv_bytes = (taken, limit);
    }

    /// A job gave its keys and values up for others.
    pub(crate) fn preempted(&self) {
        self.numbers().preemptions += 1;
    }

    /// A step took one token of so many sequences, for so many different experts in all layers; the one that had waited most had done
    /// so for so many steps.
    pub(crate) fn step(&self, (n_tokens, n_experts, waited): (usize, usize, usize)) {
        let mut numbers = self.numbers();
        let steps = &mut numbers.steps;
        steps.n += 1;
        steps.tokens += n_tokens as u64;
        steps.experts += n_experts as u64;
        steps.longest_wait = steps.longest_wait.max(waited);
    }

    /// A pass of so many tokens was computed.
    pub(crate) fn pass(&self, n_tokens: usize, took: Duration) {
        let mut numbers = self.numbers();
        numbers.pass_tokens.add(n_tokens as f64);
        numbers.pass_seconds += took.as_secs_f64();
    }

    /// How experts were used so far, in the passes that are counted.
    pub(crate) fn experts(&self, layers: Vec<LayerUse>) {
        self.numbers().experts = layers;
    }

    /// A request was answered. Both parts are from fixed sets.
    pub(crate) fn answered(&self, endpoint: &'static str, status: u16) {
        *self
            .numbers()
            .answers
            .entry((endpoint, status))
            .or_default() += 1;
    }

    /// Seconds that a job takes, lately.
    pub(crate) fn job_seconds(&self) -> f64 {
        self.numbers().job_seconds
    }

    /// Everything, as Prometheus reads it; `store` is about a model that is streamed.
    pub(crate) fn text(&self, model: &str, store: Option<&StoreStats>) -> String {
        let numbers = self.numbers();
        let mut page = Page::new(model);
        page.gauge("vllm:num_requests_running", numbers.n_running as f64);
        page.gauge("vllm:num_requests_waiting", numbers.n_waiting as f64);
        page.gauge("vllm:kv_cache_usage_perc", numbers.kv_share);
        page.gauge("cadre:kv_bytes", numbers.kv_bytes.0 as f64);
        page.gauge("cadre:kv_bytes_limit", numbers.kv_bytes.1 as f64);
        page.counter("vllm:num_preemptions_total", numbers.preemptions as f64);
        page.counter("vllm:prompt_tokens_total", numbers.prompt_tokens as f64);
        page.counter("vllm:generation_tokens_total", numbers.new_tokens as f64);
        page.counter(
            "vllm:prefix_cache_queries_total",
            numbers.prompt_tokens as f64,
        );
        page.counter("vllm:prefix_cache_hits_total", numbers.cached_tokens as f64);
        page.kind("vllm:request_success_total", "counter");
        for (why, n) in &numbers.ended {
            page.line(
                "vllm:request_success_total",
                &[("finished_reason", why.name())],
                *n as f64,
            );
        }
        for (name, histogram) in [
            ("vllm:time_to_first_token_seconds", &numbers.first_token),
            ("vllm:inter_token_latency_seconds", &numbers.between),
            ("vllm:e2e_request_latency_seconds", &numbers.whole),
            ("vllm:request_queue_time_seconds", &numbers.queue),
            ("vllm:request_prompt_tokens", &numbers.prompt_lengths),
            ("vllm:request_generation_tokens", &numbers.new_lengths),
            ("vllm:iteration_tokens_total", &numbers.pass_tokens),
        ] {
            page.histogram(name, histogram);
        }
        page.counter("cadre:pass_seconds_total", numbers.pass_seconds);
        let steps = numbers.steps;
        page.counter("cadre:steps_total", steps.n as f64);
        page.counter("cadre:step_tokens_total", steps.tokens as f64);
        page.counter("cadre:step_experts_total", steps.experts as f64);
        page.gauge("cadre:step_longest_wait", steps.longest_wait as f64);
        page.experts(&numbers.experts);
        page.kind("http_requests_total", "counter");
        for ((endpoint, status), n) in &numbers.answers {
            let status = status.to_string();
            let labels = [("handler", *endpoint), ("status", status.as_str())];
            page.line("http_requests_total", &labels, *n as f64);
        }
        if let Some(store) = store {
            page.counter("cadre:expert_lookups_total", store.lookups as f64);
            page.counter("cadre:expert_cache_hits_total", store.hits as f64);
            page.counter("cadre:expert_reads_total", store.reads as f64);
            page.counter("cadre:expert_bytes_read_total", store.bytes_read as f64);
            page.counter(
                "cadre:expert_stall_seconds_total",
                store.stall.as_secs_f64(),
            );
        }
        if let Some(bytes) = resident_bytes() {
            page.gauge("process_resident_memory_bytes", bytes as f64);
        }
        page.text
    }
}

/// Memory that this process has, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The text as it grows.
struct Page {
    text: String,
    /// The label that everything has.
    model: String,
}

impl Page {
    fn new(model: &str) -> Self {
        Self {
            text: String::new(),
            model: escaped(model),
        }
    }

    fn kind(&mut self, name: &str, kind: &str) {
        self.text += &format!("# TYPE {name} {kind}\n");
    }

    fn gauge(&mut self, name: &str, value: f64) {
        self.kind(name, "gauge");
        self.line(name, &[], value);
    }

    fn counter(&mut self, name: &str, value: f64) {
        self.kind(name, "counter");
        self.line(name, &[], value);
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let mut line = format!("{name}{{model_name=\"{}\"", self.model);
        for (label, text) in labels {
            // Writing to a string does not fail.
            let _ = write!(line, ",{label}=\"{text}\"");
        }
        self.text += &format!("{line}}} {value}\n");
    }

    /// A few numbers per layer, however many experts it has.
    fn experts(&mut self, layers: &[LayerUse]) {
        type Value = fn(&LayerUse) -> f64;
        let columns: [(&str, &str, Value); 5] = [
            ("cadre:moe_tokens_total", "counter", |layer| {
                layer.n_tokens as f64
            }),
            ("cadre:moe_picks_total", "counter", |layer| {
                layer.n_picks as f64
            }),
            ("cadre:moe_max_violation", "gauge", |layer| {
                layer.max_violation
            }),
            ("cadre:moe_load_entropy", "gauge", |layer| layer.entropy),
            ("cadre:moe_unused_experts", "gauge", |layer| {
                layer.n_unused as f64
            }),
        ];
        for (name, kind, value) in columns {
            self.kind(name, kind);
            for layer in layers {
                let index = layer.layer.to_string();
                self.line(name, &[("layer", &index)], value(layer));
            }
        }
    }

    fn histogram(&mut self, name: &str, histogram: &Histogram) {
        self.kind(name, "histogram");
        let bucket = format!("{name}_bucket");
        let mut n = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            n += count;
            self.line(&bucket, &[("le", &bound.to_string())], n as f64);
        }
        self.line(&bucket, &[("le", "+Inf")], histogram.n as f64);
        self.line(&format!("{name}_sum"), &[], histogram.sum);
        self.line(&format!("{name}_count"), &[], histogram.n as f64);
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_up_to_their_bounds() {
        let mut histogram = Histogram::new(&[1.0, 2.0, 5.0]);
        for value in [0.5, 1.0, 1.5, 7.0] {
            histogram.add(value);
        }
        let mut page = Page::new("a\"b");
        page.histogram("x", &histogram);
        let expected = "# TYPE x histogram\n\
            x_bucket{model_name=\"a\\\"b\",le=\"1\"} 2\n\
            x_bucket{model_name=\"a\\\"b\",le=\"2\"} 3\n\
            x_bucket{model_name=\"a\\\"b\",le=\"5\"} 3\n\
            x_bucket{model_name=\"a\\\"b\",le=\"+Inf\"} 4\n\
            x_sum{model_name=\"a\\\"b\"} 10\n\
            x_count{model_name=\"a\\\"b\"} 4\n";
        assert_eq!(page.text, expected);
    }

    #[test]
    fn a_job_is_counted_once_in_everything() {
        let metrics = Arc::new(Metrics::default());
        let mut clock = JobClock::new(Instant::now(), Arc::clone(&metrics));
        clock.started(10, 4);
        clock.token();
        clock.token();
        clock.ended(Ended::Stop, 2);
        metrics.answered("chat", 200);
        let text = metrics.text("m", None);
        for line in [
            "vllm:prompt_tokens_total{model_name=\"m\"} 10",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 4",
            "vllm:generation_tokens_total{model_name=\"m\"} 2",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"stop\"} 1",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"abort\"} 0",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 1",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 1",
            "http_requests_total{model_name=\"m\",handler=\"chat\",status=\"200\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("cadre:expert"));
    }
}
