//! `cadre doctor`: what this machine can do, what Cadre will choose, and why.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use cadre_kernels::doctor::{bandwidth, cpu, peaks};
use cadre_kernels::{Compute, Kernels, ThreadPool};
use serde::Serialize;

use crate::cli::App;
use crate::disk;
use crate::machine::Machine;
use crate::model::CheckpointArg;
use crate::output::{Format, Out, bytes, spinner};

/// Bytes read per pass: several times the last-level cache of common machines.
const PASS: usize = 256 << 20;
const N_PASSES: usize = 7;

/// Arguments of `cadre doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Measure reading from the disk of this file or folder, instead of that of the model. Reads the largest file there; if
    /// none is large enough, writes one of 512 MiB and removes it.
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    arch: &'static str,
    features: Vec<Feature>,
    kernels_available: Vec<&'static str>,
    kernels_chosen: &'static str,
    threads: usize,
    memory_bytes: Option<u64>,
    memory_bandwidth: Vec<Bandwidth>,
    peaks: Peaks,
    disk: Option<disk::Measured>,
    model: Model,
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

/// Reading memory, bytes per second.
#[derive(Debug, Serialize)]
struct Bandwidth {
    threads: usize,
    median: f64,
    best: f64,
}

/// What the multipliers do at their best with all threads: operations per second, a product and a sum being two.
#[derive(Debug, Serialize)]
struct Peaks {
    threads: usize,
    /// Of 8-bit integers; absent where the kernels have no such instruction.
    int8: Option<f64>,
    /// Of bf16; likewise.
    bf16: Option<f64>,
}

impl Peaks {
    fn measure(threads: usize) -> Self {
        let measured = peaks(&Compute::new(Kernels::detect(), threads));
        Self {
            threads,
            int8: measured.int8,
            bf16: measured.bf16,
        }
    }

    fn text(&self) -> String {
        let known = [
            (self.int8, "GOP/s of 8-bit integers"),
            (self.bf16, "GFLOP/s of bf16"),
        ];
        let known: Vec<String> = known
            .iter()
            .filter_map(|(rate, of)| Some(format!("{:.0} {of}", (*rate)? / 1e9)))
            .collect();
        match known.is_empty() {
            true => "no instruction for 8-bit integers or bf16 is used".to_owned(),
            false => format!("{} with {} thread(s)", known.join(", "), self.threads),
        }
    }
}

/// What the measurements mean for a model held in memory.
#[derive(Debug, Serialize)]
struct Model {
    name: String,
    read_bytes_per_token: u64,
    /// Decoding cannot be faster than this: bandwidth divided by bytes read per token.
    bound_tokens_per_second: f64,
}

/// Measures and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let checkpoint = args.checkpoint.open(app)?;
    let progress = spinner(&app.env, "measuring memory".to_owned());
    let cpu = cpu();
    let mut n_threads = vec![1];
    if cpu.n_threads > 1 {
        n_threads.push(cpu.n_threads);
    }
    let memory_bandwidth: Vec<Bandwidth> = n_threads
        .into_iter()
        .map(|threads| {
            let measured = bandwidth(&ThreadPool::new(threads), PASS, N_PASSES);
            Bandwidth {
                threads,
                median: measured.median,
                best: measured.best,
            }
        })
        .collect();
    progress.set_message("measuring the multipliers");
    let peaks = Peaks::measure(cpu.n_threads);
    progress.set_message("measuring the disk");
    // Ctrl-C waits for the measurement, which removes its file.
    let guard = app.interrupt.guard();
    let disk = disk(app, args)?;
    drop(guard);
    progress.finish_and_clear();
    app.interrupt.check()?;
    let read_bytes_per_token = super::inspect::read_bytes_per_token(&checkpoint);
    let best = memory_bandwidth
        .iter()
        .map(|one| one.median)
        .fold(0.0, f64::max);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        arch: cpu.arch,
        features: cpu
            .features
            .iter()
            .map(|&(name, present)| Feature { name, present })
            .collect(),
        kernels_available: cpu.available.iter().map(|isa| isa.name()).collect(),
        kernels_chosen: cpu.chosen.name(),
        threads: cpu.n_threads,
        memory_bytes: memory_bytes(),
        memory_bandwidth,
        peaks,
        disk,
        model: Model {
            name: checkpoint.origin().to_owned(),
            read_bytes_per_token,
            bound_tokens_per_second: best / read_bytes_per_token.max(1) as f64,
        },
    };
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&text(&report))?,
    }
    out.finish()
}

/// Measures the disk that was named, or that of the model if it has one, and remembers it for `fit`.
fn disk(app: &App, args: &Args) -> Result<Option<disk::Measured>> {
    let path = match &args.disk {
        Some(path) => Some(path.clone()),
        // A small model lies in memory, and nothing is written beside it without being asked for.
        None => args
            .checkpoint
            .path(app)?
            .filter(|path| disk::is_large(path)),
    };
    let Some(path) = path else {
        return Ok(None);
    };
    let measured = disk::measure(&path)?;
    if let Some((device, disk)) = measured.remembered() {
        // `fit` can do without it.
        if let Err(error) = Machine::remember(&app.env, device, disk) {
            tracing::warn!("the speed of the disk is not remembered: {error:#}");
        }
    }
    Ok(Some(measured))
}

/// Memory of the machine, where the system says it in a file.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<14} {value}");
    };
    let features: Vec<_> = report
        .features
        .iter()
        .map(|one| format!("{}{}", if one.present { "+" } else { "-" }, one.name))
        .collect();
    line("cadre", report.version.to_owned());
    line(
        "processor",
        format!("{} {}", report.arch, features.join(" ")),
    );
    line(
        "kernels",
        format!(
            "{} (the last of those that this processor runs: {})",
            report.kernels_chosen,
            report.kernels_available.join(", ")
        ),
    );
    line(
        "threads",
        format!(
            "{} (all that the system grants; -t to change)",
            report.threads
        ),
    );
    line(
        "memory",
        report
            .memory_bytes
            .map_or_else(|| "unknown".to_owned(), bytes),
    );
    for one in &report.memory_bandwidth {
        let rates = format!("{:.1} GB/s, best {:.1}", one.median / 1e9, one.best / 1e9);
        line("reading", format!("{rates} with {} thread(s)", one.threads));
    }
    line("multiplying", report.peaks.text());
    match &report.disk {
        Some(disk) => {
            line("disk", disk.speed_text());
            line("  reads", disk.choice_text());
        }
        None => line(
            "disk",
            "not measured; pass --disk PATH or -m MODEL".to_owned(),
        ),
    }
    let model = &report.model;
    line(
        "model",
        format!(
            "{}: reads {} per token, so at most {:.0} tokens/s from memory",
            model.name,
            bytes(model.read_bytes_per_token),
            model.bound_tokens_per_second
        ),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_said_as_far_as_they_are_known() {
        let said = |int8, bf16| {
            Peaks {
                threads: 2,
                int8,
                bf16,
            }
            .text()
        };
        assert_eq!(
            said(Some(1.2e12), Some(4.564e11)),
            "1200 GOP/s of 8-bit integers, 456 GFLOP/s of bf16 with 2 thread(s)"
        );
        assert_eq!(
            said(Some(1e9), None),
            "1 GOP/s of 8-bit integers with 2 thread(s)"
        );
        assert!(said(None, None).starts_with("no instruction"));
    }
}
