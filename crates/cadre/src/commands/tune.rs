//! `cadre tune --recover`: lets the routers and experts of a pruned or merged model follow the model that it came from.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cadre_train::log::{EvalRecord, evaluations};
use cadre_train::methods::start::Part;
use cadre_train::recipe::{Recipe, Source};
use cadre_train::recover::Recovery;
use cadre_train::trainer;
use clap::ValueEnum;
use serde_json::json;

use crate::cli::App;
use crate::commands::train;
use crate::failure::Failure;
use crate::output::{Format, Out};

/// Arguments of `cadre tune`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tune what surgery has left: routers and experts move, everything else stays.
    #[arg(long, required = true)]
    recover: bool,
    /// Hugging Face folder of the pruned or merged model.
    #[arg(short, long, value_name = "FOLDER")]
    model: PathBuf,
    /// Folder of the model that it came from, whose predictions it follows. Without it, it learns from the text alone.
    #[arg(long, value_name = "FOLDER")]
    teacher: Option<PathBuf>,
    /// JSON lines with `text` to learn from; may be given several times, each a domain.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// JSON lines that are never learned from, one for each --data: their loss is told before and after.
    #[arg(long, value_name = "FILE", required = true)]
    heldout: Vec<PathBuf>,
    /// Folder of the run: the model is `model` in it, beside log, snapshots and recipe. When interrupted, the same command
    /// goes on.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Steps of the optimizer.
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: u64,
    /// Sequences per step.
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,
    /// Tokens per sequence.
    #[arg(long, value_name = "N", default_value_t = 256)]
    seq_len: usize,
    /// Highest learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 1e-4)]
    lr: f64,
    /// How much the teacher counts beside the text.
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        requires = "teacher"
    )]
    beta: f32,
    /// Divides the logits of both before they are compared, and the comparison counts its square more.
    #[arg(long, value_name = "T", default_value_t = 1.0, requires = "teacher")]
    temperature: f64,
    /// Part of the rows of experts in factors that is left at the end: the least important go one after the other, by the
    /// gradients. The model has more of them (`cadre plan factor --rest 1`).
    #[arg(long, value_name = "PART")]
    rest: Option<f64>,
    /// What does not move, beside all that is neither router nor expert.
    #[arg(long, value_name = "PART")]
    freeze: Option<Freeze>,
    /// Seed of the order of the text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Deletes what an earlier run left in the folder, but for its model, and starts over.
    #[arg(long)]
    fresh: bool,
    /// Threads; 0 takes one per core.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Form of the result.
    #[arg(long, value_name = "FORM", default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Freeze {
    /// Routers: only experts move.
    Router,
    /// Experts: only routers move.
    Experts,
}

/// Makes the recipe, follows it, and tells what it was good for.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    if args.data.len() != args.heldout.len() {
        let text = format!(
            "{} --data and {} --heldout: every text needs both",
            args.data.len(),
            args.heldout.len()
        );
        return Err(Failure::usage(text).into());
    }
    let mut freeze = vec![Part::Dense];
    freeze.extend(args.freeze.map(|part| match part {
        Freeze::Router => Part::Router,
        Freeze::Experts => Part::Experts,
    }));
    let recovery = Recovery {
        model: args.model.clone(),
        teacher: args.teacher.clone(),
        sources: sources(args)?,
        output: args.output.clone(),
        freeze,
        steps: args.steps,
        batch_size: args.batch_size,
        seq_len: args.seq_len,
        lr: args.lr,
        beta: args.beta,
        temperature: args.temperature,
        rest: args.rest,
        eval_tokens: 16_384,
        seed: args.seed,
    };
    let recipe = recovery.recipe()?;
    train::start_threads(args.threads)?;
    if args.fresh {
        trainer::forget(&recipe)?;
    }
    let (model, after) = train::watched(app, &recipe)?;
    let model = model?;
    let log = evaluations(&recipe.output.dir.join("log.jsonl"))?;
    let before = log.iter().find(|record| record.step == 0);
    report(&recipe, before, &after, (&model, args.format))
}

/// A domain for every text, named as its file.
fn sources(args: &Args) -> Result<Vec<Source>> {
    let mut sources: Vec<Source> = Vec::new();
    for (train, heldout) in args.data.iter().zip(&args.heldout) {
        let stem = train.file_stem().unwrap_or_default().to_string_lossy();
        let domain = stem.split('.').next().unwrap_or_default().to_owned();
        if sources.iter().any(|source| source.domain == domain) {
            let text = format!(
                "two texts are named {domain}: domains are told apart by the names of their files"
            );
            return Err(Failure::usage(text).into());
        }
        sources.push(Source {
            domain,
            train: train.clone(),
            heldout: heldout.clone(),
            weight: 1.0,
        });
    }
    Ok(sources)
}

/// Prints the loss of every domain before and after.
fn report(
    recipe: &Recipe,
    before: Option<&EvalRecord>,
    after: &EvalRecord,
    (model, form): (&Path, Format),
) -> Result<()> {
    let mut out = Out::new();
    match form {
        Format::Json => out.json(&json!({
            "model": model,
            "steps": recipe.train.steps,
            "before": before.map(|record| &record.eval),
            "after": after.eval,
        }))?,
        Format::Text => {
            let mut text = format!(
                "{:<12} {:>8} {:>10} {:>10}\n",
                "held out", "tokens", "nll before", "nll after"
            );
            for (domain, score) in &after.eval {
                let first = before.and_then(|record| record.eval.get(domain));
                let first =
                    first.map_or_else(|| "-".to_owned(), |score| format!("{:.4}", score.nll));
                let _ = writeln!(
                    text,
                    "{domain:<12} {:>8} {first:>10} {:>10.4}",
                    score.tokens, score.nll
                );
            }
            out.write(&text)?;
            out.write(&format!("{}\n", model.display()))?;
        }
    }
    out.finish()
}
