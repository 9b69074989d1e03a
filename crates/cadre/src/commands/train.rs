//! `cadre train`: trains a recipe, draws its curves, compares runs, or measures the trainer's speed.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cadre_train::TrainError;
use cadre_train::log::{EvalRecord, StepRecord, WarningRecord};
use cadre_train::recipe::Recipe;
use cadre_train::trainer::{self, Outcome, Progress};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::bench::status_bytes;
use crate::cli::App;
use crate::commands::train_compare;
use crate::failure::Failure;
use crate::output::{Format, Out, bar, bytes, count};

/// A line this often where there is no terminal for a bar.
const QUIET: Duration = Duration::from_secs(10);

/// Arguments of `cadre train`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Compare runs: a page of curves and tables, or their numbers.
    Compare(train_compare::Args),
}

#[derive(Debug, clap::Args)]
struct TrainArgs {
    /// Recipe (TOML). A run that was stopped goes on from its newest snapshot.
    #[arg(value_name = "RECIPE", required = true)]
    recipes: Vec<PathBuf>,
    /// Overrides a value of the recipe, for example `train.steps=100`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Deletes the run's snapshots and log, and starts over.
    #[arg(long)]
    fresh: bool,
    /// Draws the curves of the recipes' runs to an SVG or PNG file instead of training.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["fresh", "bench"])]
    plot: Option<PathBuf>,
    /// Measures speed on random tokens instead of training; writes no files.
    #[arg(long, conflicts_with = "fresh")]
    bench: bool,
    /// Steps that `--bench` takes.
    #[arg(long, value_name = "N", default_value_t = 7, requires = "bench", value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Token ids that `--bench` takes instead of random ones: little-endian u32, for every step `batch_size` rows of
    /// `seq_len + 1` ids.
    #[arg(long, value_name = "FILE", requires = "bench")]
    tokens: Option<PathBuf>,
    /// Threads; 0 takes one per core.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// Trains, draws or measures.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    match &args.what {
        Some(What::Compare(args)) => train_compare::run(args),
        None => train(app, &args.train),
    }
}

fn train(app: &App, args: &TrainArgs) -> Result<()> {
    let recipes = args
        .recipes
        .iter()
        .map(|path| Recipe::read_with(path, &args.set))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(file) = &args.plot {
        let logs: Vec<_> = recipes
            .iter()
            .map(|recipe| (&*recipe.name, recipe.output.dir.join("log.jsonl")))
            .collect();
        let runs: Vec<_> = logs
            .iter()
            .map(|(name, log)| (*name, log.as_path()))
            .collect();
        return Ok(cadre_train::plot::draw(&runs, file)?);
    }
    let [recipe] = recipes.as_slice() else {
        return Err(
            Failure::usage("several recipes are only for --plot; train them one by one").into(),
        );
    };
    start_threads(args.threads)?;
    if args.bench {
        return bench(recipe, args);
    }
    if args.fresh {
        trainer::forget(recipe)?;
    }
    let (model, eval) = watched(app, recipe)?;
    let model = model.as_ref().map(PathBuf::as_path);
    finished(model, &eval, args.output)
}

/// Starts the threads of the process; 0 takes one per core.
pub(crate) fn start_threads(n: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .build_global()
        .context("cannot start the threads")?;
    cadre_kernels::keep_freed_memory();
    Ok(())
}

/// Trains with a bar. What comes of it: the folder of the model, or why there is none, and its quality. Ctrl-C is an error
/// that has been explained.
pub(crate) fn watched(
    app: &App,
    recipe: &Recipe,
) -> Result<(Result<PathBuf, TrainError>, EvalRecord)> {
    let _guard = app.interrupt.guard();
    let mut watch = Watch::new(app, recipe);
    let outcome = trainer::train(recipe, &mut watch)?;
    watch.bar.finish_and_clear();
    match outcome {
        Outcome::Finished { model, eval } => Ok((model, eval)),
        Outcome::Stopped { step } => {
            watch.say(&format!(
                "stopped after step {step}; the same command goes on from there"
            ));
            Err(Failure::interrupted().into())
        }
    }
}

/// Prints what came of a run; `model` is its folder, or why there is none.
fn finished(
    model: Result<&std::path::Path, &TrainError>,
    eval: &EvalRecord,
    form: Format,
) -> Result<()> {
    let mut out = Out::new();
    match form {
        Format::Json => {
            let mut value = json!({"model": model.ok(), "step": eval.step, "eval": eval.eval});
            if let Err(reason) = model {
                value["not_written"] = json!(reason.to_string());
            }
            out.json(&value)?;
        }
        Format::Text => {
            let mut text = format!(
                "{:<12} {:>8} {:>8} {:>11}\n",
                "held out", "tokens", "nll", "perplexity"
            );
            for (domain, score) in &eval.eval {
                let _ = writeln!(
                    text,
                    "{domain:<12} {:>8} {:>8.4} {:>11.2}",
                    score.tokens, score.nll, score.perplexity
                );
            }
            out.write(&text)?;
            match model {
                Ok(folder) => out.write(&format!("{}\n", folder.display()))?,
                Err(reason) => out.write(&format!("{reason}\n"))?,
            }
        }
    }
    out.finish()
}

fn bench(recipe: &Recipe, args: &TrainArgs) -> Result<()> {
    let records = trainer::bench(recipe, args.steps, args.tokens.as_deref())?;
    let mut samples: Vec<f64> = records.iter().map(|r| r.tokens_per_second).collect();
    let in_order = samples.clone();
    samples.sort_by(f64::total_cmp);
    let median = samples[samples.len() / 2];
    let loss = |record: Option<&StepRecord>| record.map(|r| r.cross_entropy);
    let n_parameters = trainer::n_parameters(recipe)?;
    let precision = recipe.train.precision.here();
    let peak = status_bytes("VmHWM:");
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&json!({
            "tokens_per_second": median,
            "samples": in_order,
            "loss_first": loss(records.first()),
            "loss_last": loss(records.last()),
            "losses": records.iter().map(|r| r.cross_entropy).collect::<Vec<_>>(),
            "parameters": n_parameters,
            "threads": rayon::current_num_threads(),
            "precision": precision,
            "peak_rss_bytes": peak,
        }))?,
        Format::Text => out.write(&format!(
            "{}: {median:.0} tokens/s (median of {} steps), {} parameters, {} threads, products of {}{}\n",
            recipe.name,
            records.len(),
            count(n_parameters as u64),
            rayon::current_num_threads(),
            precision.name(),
            peak.map_or_else(String::new, |n| format!(", at most {} resident", bytes(n))),
        ))?,
    }
    out.finish()
}

/// Shows a run: a bar on a terminal, a line now and then elsewhere; and carries Ctrl-C to it.
struct Watch<'a> {
    app: &'a App,
    bar: ProgressBar,
    total: u64,
    last_line: Instant,
}

impl<'a> Watch<'a> {
    fn new(app: &'a App, recipe: &Recipe) -> Self {
        let bar = bar(&app.env, "", recipe.train.steps);
        let template = "{wide_bar} {pos}/{len} ETA {eta}\n{wide_msg}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self {
            app,
            bar,
            total: recipe.train.steps,
            last_line: Instant::now(),
        }
    }

    /// A line on standard error, above the bar where there is one.
    fn say(&self, line: &str) {
        if self.app.env.stderr_is_terminal {
            self.bar.println(line);
        } else {
            // Progress is not worth failing for.
            let _ =
                std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
        }
    }
}

impl Progress for Watch<'_> {
    fn stage(&mut self, what: &str) {
        self.bar.set_message(what.to_owned());
        if !self.app.env.stderr_is_terminal {
            self.say(what);
        }
    }

    fn begin(&mut self, done: u64, total: u64, refused: &[TrainError]) {
        for error in refused {
            self.say(&format!("warning: {error}; using the one before it"));
        }
        if done > 0 {
            self.say(&format!("going on after step {done} of {total}"));
        }
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    fn step(&mut self, record: &StepRecord) {
        self.bar.set_position(record.step);
        if !self.app.env.stderr_is_terminal && self.last_line.elapsed() >= QUIET {
            self.last_line = Instant::now();
            let eta = self.bar.eta().as_secs();
            self.say(&format!(
                "step {}/{} {} ETA {eta} s",
                record.step,
                self.total,
                line(record)
            ));
        }
        self.bar.set_message(line(record));
    }

    fn warning(&mut self, warning: &WarningRecord) {
        self.say(&format!(
            "warning: step {}: {}",
            warning.step, warning.warning
        ));
    }

    fn scored(&mut self, done: usize, total: usize) {
        let message = format!("held-out text: {done} of {total} tokens");
        if !self.app.env.stderr_is_terminal && self.last_line.elapsed() >= QUIET {
            self.last_line = Instant::now();
            self.say(&message);
        }
        self.bar.set_message(message);
    }

    fn evaluated(&mut self, record: &EvalRecord) {
        let mut line = format!("step {}: held-out perplexity", record.step);
        for (domain, score) in &record.eval {
            let _ = write!(line, " {domain} {:.1}", score.perplexity);
        }
        self.say(&line);
    }

    fn stop(&mut self) -> bool {
        self.app.interrupt.requested()
    }
}

/// Loss and its parts, the worst of the routing, and the speed.
fn line(record: &StepRecord) -> String {
    let mut line = format!("loss {:.3}", record.loss);
    let mut parts: Vec<String> = Vec::new();
    if !record.layers.is_empty() {
        parts.push(format!("balance {:.3}, z {:.2}", record.balance, record.z));
    }
    parts.extend(
        record
            .parts
            .iter()
            .map(|(name, value)| format!("{name} {value:.3}")),
    );
    if !parts.is_empty() {
        let _ = write!(
            line,
            " (text {:.3}, {})",
            record.cross_entropy,
            parts.join(", ")
        );
    }
    let worst = record
        .layers
        .iter()
        .max_by(|a, b| a.max_vio.total_cmp(&b.max_vio));
    if let Some(layer) = worst {
        let n = record.layers.len() as f64;
        let cv = record.layers.iter().map(|l| l.cv).sum::<f64>() / n;
        let _ = write!(
            line,
            " | CV {cv:.2}, MaxVio {:.2} in layer {}",
            layer.max_vio, layer.layer
        );
        let dead: Vec<String> = record
            .layers
            .iter()
            .filter(|l| l.dead > 0)
            .map(|l| format!("{} of {} in layer {}", l.dead, l.experts, l.layer))
            .collect();
        match dead.as_slice() {
            [] => {}
            [only] => {
                let _ = write!(line, ", dead {only}");
            }
            [first, others @ ..] => {
                let _ = write!(line, ", dead {first} and in {} more", others.len());
            }
        }
    }
    let _ = write!(line, " | {:.0} tok/s", record.tokens_per_second);
    for (what, seconds) in [("data", record.data_seconds), ("idle", record.idle_seconds)] {
        let share = (100.0 * seconds / record.seconds).round();
        // Also where no duration is known.
        if share >= 1.0 {
            let _ = write!(line, ", {what} {share} %");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use cadre_train::log::LayerRecord;

    #[test]
    fn the_line_has_parts_balance_and_dead_experts() {
        let layer = |layer, max_vio, dead| LayerRecord {
            layer,
            cv: 0.5,
            max_vio,
            dead,
            entropy: 1.0,
            experts: 8,
            picks: 2.0,
            dropped: 0.0,
            slots: 2.0,
            fullest: 0,
        };
        let mut record = StepRecord {
            loss: 2.5,
            cross_entropy: 2.25,
            balance: 1.5,
            z: 3.0,
            tokens_per_second: 1234.4,
            parts: [("consistency".to_owned(), 0.125)].into(),
            layers: vec![layer(0, 0.5, 0), layer(2, 1.5, 3)],
            ..StepRecord::default()
        };
        assert_eq!(
            line(&record),
            "loss 2.500 (text 2.250, balance 1.500, z 3.00, consistency 0.125) | CV 0.50, MaxVio 1.50 in layer 2, dead 3 of 8 in layer 2 | 1234 tok/s"
        );
        record.seconds = 2.0;
        record.data_seconds = 0.009;
        record.idle_seconds = 0.25;
        assert!(line(&record).ends_with("| 1234 tok/s, idle 13 %"));
        record.data_seconds = 0.02;
        assert!(line(&record).ends_with("| 1234 tok/s, data 1 %, idle 13 %"));
        (record.data_seconds, record.idle_seconds) = (0.0, 0.0);
        record.layers[0].dead = 1;
        assert!(line(&record).contains("dead 1 of 8 in layer 0 and in 1 more"));
        record.layers.clear();
        record.parts.clear();
        assert_eq!(line(&record), "loss 2.500 | 1234 tok/s");
    }
}
