//! `cadre fit`: does a model fit into memory, and how fast will it decode. Reads headers only, also of models on the hub.
//!
//! The two answers are kept apart: all weights count for fitting, those that one token reads for speed.

use std::fmt::Write;

use anyhow::Result;
use cadre_checkpoint::{
    Checkpoint, Dtype, Holding, Mixture, Sizes, TargetDtype, held_sizes, kv_bytes_read,
    model_sizes, tensor_specs,
};
use cadre_engine::dense_bytes;
use cadre_kernels::ThreadPool;
use cadre_kernels::doctor::{bandwidth, default_threads};
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::commands::inspect::check_context;
use crate::demand::{self, Demand};
use crate::failure::Failure;
use crate::forecast::{DiskRate, Streamed};
use crate::machine::Machine;
use crate::memory;
use crate::model::{CheckpointArg, QuantArg};
use crate::output::{Format, Out, bytes, count, harmless, spinner};
use crate::pace::{Pace, Work};
use crate::units::{parse_bytes, parse_rate};

/// Bytes read per pass: several times the last-level cache of common machines.
const PASS: usize = 256 << 20;
const N_PASSES: usize = 5;

/// Quantised files to suggest, the most faithful first.
const FILES: [TargetDtype; 3] = [
    TargetDtype::Is(Dtype::Q8_0),
    TargetDtype::Is(Dtype::Q6K),
    TargetDtype::Mix(Mixture::Q4KM),
];

/// Arguments of `cadre fit`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Memory that may be used, such as 8GiB. By default what this machine has left, limits of its control groups
    /// respected.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    mem_budget: Option<u64>,
    /// Context, in tokens. By default 4096, or the model's limit if that is shorter.
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    #[command(flatten)]
    cache: CacheArgs,
    /// Quantise the weights while loading, as `run` does with the same flag.
    #[arg(long, value_name = "FORMAT", default_value = "none")]
    quant: QuantArg,
    /// Memory bandwidth to assume, such as 40GB/s, instead of measuring this machine's.
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<f64>,
    /// Disk speed to assume, such as 2GB/s, instead of what `cadre doctor` has measured.
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    disk_bandwidth: Option<f64>,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    fits: bool,
    budget_bytes: u64,
    /// `given` or `available`.
    budget_source: &'static str,
    #[serde(flatten)]
    demand: Demand,
    /// What is lacking; 0 if it fits.
    missing_bytes: u64,
    parameters: u64,
    active_parameters: u64,
    /// Weights that decoding one token reads.
    active_bytes_per_token: u64,
    bandwidth_bytes_per_s: f64,
    /// `given` or `measured`.
    bandwidth_source: &'static str,
    /// Decoding at the start of a context, all weights in memory: a bound. By the bytes that a token reads; on the machine
    /// that was measured also by its multiplications and the overhead of its products.
    forecast_tokens_per_s: f64,
    /// The same at the end of the context, where the whole cache is read too.
    forecast_tokens_per_s_full_context: f64,
    /// Reading a long prompt: a bound by its multiplications. Not for a bandwidth that was given.
    forecast_prompt_tokens_per_s: Option<f64>,
    /// With the experts on disk. Only for what does not fit, has experts, and a disk whose speed is known.
    streamed: Option<Streamed>,
    suggestions: Vec<Suggestion>,
}

/// Something that would fit.
#[derive(Debug, Serialize)]
struct Suggestion {
    /// `stream`, `context`, `quant`, `file` or `memory`.
    kind: &'static str,
    /// What to do, for people.
    text: String,
    needed_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_ctx: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<String>,
}

/// Prints the report; an error with exit code 3 when the model does not fit.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let checkpoint = args.checkpoint.open_outline(app)?;
    let config = checkpoint.config();
    checkpoint.expect_exactly(&tensor_specs(config))?;
    check_context(args.ctx_size, config.max_position_embeddings)?;
    let budget = budget(args)?;
    let speed = match args.bandwidth {
        Some(bandwidth) => Speed {
            bandwidth,
            pace: None,
        },
        None => measure(app, &checkpoint, args),
    };
    app.interrupt.check()?;
    let disk = disk_rate(app, args);
    let report = report(&checkpoint, args, budget, (speed, disk));
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&text(&report))?,
    }
    out.finish()?;
    if report.fits {
        return Ok(());
    }
    let message = format!(
        "{} does not fit: it needs {} and {} are there",
        report.model,
        bytes(report.demand.needed_bytes),
        bytes(budget)
    );
    Err(Failure::check(message).into())
}

/// How fast the disk of the model is, if that is known. What was measured says nothing about another machine.
fn disk_rate(app: &App, args: &Args) -> Option<DiskRate> {
    if let Some(bytes_per_second) = args.disk_bandwidth {
        return Some(DiskRate {
            bytes_per_second,
            latency_seconds: 0.0,
            source: "given",
        });
    }
    if args.bandwidth.is_some() {
        return None;
    }
    let machine = Machine::load(&app.env);
    let disk = args
        .checkpoint
        .local_path()
        .and_then(|path| machine.disk_of(path));
    disk.map(|disk| DiskRate {
        bytes_per_second: disk.bytes_per_second,
        latency_seconds: disk.latency_seconds,
        source: "measured",
    })
}

fn budget(args: &Args) -> Result<u64> {
    let budget = args.mem_budget.or_else(memory::available);
    budget.ok_or_else(|| {
        let failure = Failure::usage("this system does not say how much memory is left");
        failure.hint("pass --mem-budget, such as 8GiB").into()
    })
}

/// How fast a machine is.
#[derive(Clone, Copy)]
struct Speed {
    /// Bytes per second that all threads read from memory.
    bandwidth: f64,
    /// `None` for a machine of which only the bandwidth is given.
    pace: Option<Pace>,
}

impl Speed {
    /// Tokens per second of decoding that reads `n_bytes` per token.
    fn decoding(self, work: Work, n_bytes: u64) -> f64 {
        let reading = n_bytes.max(1) as f64 / self.bandwidth;
        1.0 / self.pace.map_or(reading, |pace| pace.decode(work, reading))
    }
}

fn measure(app: &App, checkpoint: &Checkpoint, args: &Args) -> Speed {
    let progress = spinner(&app.env, "measuring memory".to_owned());
    let measured = bandwidth(&ThreadPool::new(default_threads()), PASS, N_PASSES);
    progress.set_message("measuring products");
    let sizes = model_sizes(checkpoint);
    let most = sizes.formats.iter().max_by_key(|(_, size)| size.n_bytes);
    let stored = most.map_or(Dtype::F32, |(format, _)| *format);
    let format = match args.quant {
        QuantArg::Q8_0 if !stored.is_quantized() => Dtype::Q8_0,
        QuantArg::Q8_0 | QuantArg::Stored => stored,
    };
    let pace = Pace::measure(checkpoint.config(), format);
    progress.finish_and_clear();
    Speed {
        bandwidth: measured.median,
        pace: Some(pace),
    }
}

fn report(
    checkpoint: &Checkpoint,
    args: &Args,
    budget: u64,
    (speed, disk): (Speed, Option<DiskRate>),
) -> Report {
    let config = checkpoint.config();
    let sizes = model_sizes(checkpoint);
    let (parameters, work) = (sizes.parameters, Work::new(config, &sizes));
    let held = held_sizes(checkpoint, args.quant.holding());
    let n_ctx = demand::context(config, args.ctx_size);
    let kv = args.cache.formats();
    let demand = Demand::new(config, held.total, n_ctx, kv);
    let fits = demand.needed_bytes <= budget;
    let full = held
        .read_per_token
        .saturating_add(kv_bytes_read(config, kv, n_ctx));
    let decoding = speed.decoding(work, held.read_per_token);
    let streamed = disk.filter(|_| !fits).and_then(|disk| {
        let speeds = (speed.bandwidth, 1.0 / decoding);
        let sizes = (&demand, held, dense_bytes(checkpoint));
        Streamed::new(config, sizes, budget, speeds, disk)
    });
    Report {
        model: checkpoint.origin().to_owned(),
        fits,
        budget_bytes: budget,
        budget_source: match args.mem_budget {
            Some(_) => "given",
            None => "available",
        },
        demand,
        missing_bytes: demand.needed_bytes.saturating_sub(budget),
        parameters: parameters.total,
        active_parameters: parameters.active,
        active_bytes_per_token: held.read_per_token,
        bandwidth_bytes_per_s: speed.bandwidth,
        bandwidth_source: match args.bandwidth {
            Some(_) => "given",
            None => "measured",
        },
        forecast_tokens_per_s: decoding,
        forecast_tokens_per_s_full_context: speed.decoding(work, full),
        forecast_prompt_tokens_per_s: speed.pace.map(|pace| 1.0 / pace.prompt(work)),
        streamed,
        suggestions: if fits {
            Vec::new()
        } else {
            suggestions(checkpoint, args, (demand, held), budget)
        },
    }
}

/// What would fit: a shorter context, smaller weights, more memory.
fn suggestions(
    checkpoint: &Checkpoint,
    args: &Args,
    (demand, held): (Demand, Sizes),
    budget: u64,
) -> Vec<Suggestion> {
    let config = checkpoint.config();
    let kv = args.cache.formats();
    let mut suggestions = Vec::new();
    if let Some(n_ctx) = Demand::longest_context(config, held.total, budget, kv) {
        suggestions.push(Suggestion {
            kind: "context",
            text: format!("a context of up to {n_ctx} tokens: -c {n_ctx}"),
            needed_bytes: Demand::new(config, held.total, n_ctx, kv).needed_bytes,
            n_ctx: Some(n_ctx),
            format: None,
        });
    }
    let mut smaller = |kind, holding, format, advice: String| {
        let weights = held_sizes(checkpoint, holding).total;
        let needed = Demand::new(config, weights, demand.n_ctx, kv).needed_bytes;
        if weights < held.total && needed <= budget {
            suggestions.push(Suggestion {
                kind,
                text: format!("{advice}: weights of {}", bytes(weights)),
                needed_bytes: needed,
                n_ctx: None,
                format: Some(format),
            });
        }
    };
    if args.quant == QuantArg::Stored {
        let advice = "quantising while loading with --quant q8_0".to_owned();
        smaller("quant", Holding::LoadedQ8_0, "q8_0".to_owned(), advice);
    }
    for format in FILES {
        let advice = format!("a file quantised to {}", format.name());
        smaller("file", Holding::File(format), format.name(), advice);
    }
    let missing = demand.needed_bytes.saturating_sub(budget);
    suggestions.push(Suggestion {
        kind: "memory",
        text: format!("{} more memory", bytes(missing)),
        needed_bytes: demand.needed_bytes,
        n_ctx: None,
        format: None,
    });
    suggestions
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Names come out of files. Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<14} {}", harmless(&value));
    };
    let demand = &report.demand;
    line("model", report.model.clone());
    line(
        "parameters",
        format!(
            "{} total decide whether it fits, {} active how fast it is",
            count(report.parameters),
            count(report.active_parameters)
        ),
    );
    let verdict = if report.fits { "yes" } else { "no" };
    line(
        "fits",
        format!(
            "{verdict}: needs {} of {} ({})",
            bytes(demand.needed_bytes),
            bytes(report.budget_bytes),
            report.budget_source
        ),
    );
    line("  weights", bytes(demand.weights_bytes));
    let kv = bytes(demand.kv_bytes);
    line("  cache", format!("{kv} for {} tokens", demand.n_ctx));
    line("  buffers", bytes(demand.scratch_bytes));
    let program = bytes(demand.program_bytes);
    line("  program", format!("{program}, estimated"));
    line(
        "speed",
        format!(
            "at most {:.1} tokens/s decoding, {:.1} at the end of the context, once the weights are in memory",
            report.forecast_tokens_per_s, report.forecast_tokens_per_s_full_context
        ),
    );
    if let Some(prompt) = report.forecast_prompt_tokens_per_s {
        line("  prompt", format!("at most {prompt:.0} tokens/s"));
    }
    line(
        "  reads",
        format!("{} per token", bytes(report.active_bytes_per_token)),
    );
    line(
        "  bandwidth",
        format!(
            "{:.1} GB/s ({})",
            report.bandwidth_bytes_per_s / 1e9,
            report.bandwidth_source
        ),
    );
    if let Some(streamed) = &report.streamed {
        line("streamed", streamed.text());
    }
    for suggestion in &report.suggestions {
        line("would fit", suggestion.text.clone());
    }
    text
}
