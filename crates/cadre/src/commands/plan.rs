//! `cadre plan`: decides from a recording what becomes of a model's experts, and shows such decisions.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_reshape::{
    Amount, LayerSummary, MergeMethod, MergeOptions, Method, PruneOptions, ReshapeError, Scope,
    Similarity, Sizes, Usage, UsageOptions, merge, plan_json, plan_summary, plan_text, prune,
    read_plan, same_model, shape_of, shape_of_trace,
};
use cadre_routing::plan::{ModelShape, Plan, PlanFactor};
use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use crate::cli::App;
use crate::commands::apply::misfit;
use crate::commands::trace::write_file;
use crate::commands::{plan_bits, plan_steer};
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Format, Out, bytes, note};
use crate::units::parse_bytes;

/// An expert that was picked less often has hardly been seen.
pub(crate) const FEW_PICKS: u64 = 32;

/// Arguments of `cadre plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Drop experts.
    Prune(PruneArgs),
    /// Merge experts into the most used ones.
    Merge(MergeArgs),
    /// Merge experts, and write the matrices of all as products of thin ones plus a few rows.
    Factor(FactorArgs),
    /// Choose a number format for every expert: the fewest bits with which the text is still read well enough.
    Bits(Box<plan_bits::Args>),
    /// Find the experts that tell two sets of prompts apart, and write a steering of them.
    Steer(Box<plan_steer::Args>),
    /// Show which experts a plan keeps.
    Show(ShowArgs),
}

#[derive(Debug, clap::Args)]
struct PruneArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Which experts go: frequency (the least picked), router-mass (those with the least weight in all), reap (those that
    /// add least where they are picked; needs a trace with --norms), uncurl (of experts with similar logits all but one;
    /// needs one with --logits), random.
    #[arg(long, value_name = "METHOD", default_value = "router-mass", value_parser = Method::parse)]
    method: Method,
    /// Seed of the method random.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// What makes experts alike for the method uncurl: cosine or pearson, of their router logits.
    #[arg(long, value_name = "WHAT", default_value = "cosine", value_parser = Similarity::parse)]
    similarity: Similarity,
}

#[derive(Debug, clap::Args)]
struct MergeArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// How experts are averaged: m-smoe (by how often they are picked, neurons aligned), mean (all the same, as they are),
    /// ties (what most differences from the mean agree in). The trace must have been recorded with --logits.
    #[arg(long, value_name = "METHOD", default_value = "m-smoe", value_parser = MergeMethod::parse)]
    method: MergeMethod,
    /// What makes experts alike: cosine or pearson, of their router logits.
    #[arg(long, value_name = "WHAT", default_value = "cosine", value_parser = Similarity::parse)]
    similarity: Similarity,
    /// Which rows of the routers stay: all (every expert is picked as before, and those that were merged share weights:
    /// Cadre runs this, other programs only after `cadre apply --compat`, which writes shared weights once for each), or one
    /// for each merged expert, that of the most used one.
    #[arg(long, value_name = "ROWS", default_value = "all")]
    rows: RowsArg,
    /// Bring the neurons of merged experts into the order of the first, or do not; without it, as the method does.
    #[arg(long, value_name = "BOOL")]
    align: Option<bool>,
}

#[derive(Debug, clap::Args)]
struct FactorArgs {
    #[command(flatten)]
    merge: MergeArgs,
    /// Width of the products. A matrix of OUT x IN takes RANK x (OUT + IN) numbers.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_rank)]
    rank: usize,
    /// The part of the rows of a matrix that is kept of what its product misses, from 0 to 1.
    #[arg(long, value_name = "PART", default_value_t = 0.1, value_parser = parse_rest)]
    rest: f32,
}

#[derive(Debug, clap::Args)]
struct CommonArgs {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Recording of the model on the text that it is to be good at, made by `cadre trace`.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "imatrix",
        conflicts_with = "imatrix"
    )]
    trace: Option<PathBuf>,
    /// The recording is of this checkpoint, which is the same model as -m in another format, such as the GGUF file that was
    /// made of a folder. Sizes and values of both are compared.
    #[arg(long, value_name = "MODEL", requires = "model", requires = "trace")]
    same_model: Option<PathBuf>,
    /// In place of a recording, an importance matrix of llama.cpp (GGUF) for the model (-m): it counts picks, which is all
    /// that the method frequency needs.
    #[arg(
        long,
        value_name = "FILE",
        requires = "model",
        conflicts_with = "domains"
    )]
    imatrix: Option<PathBuf>,
    /// Only this domain of the recording; may be given several times.
    #[arg(long = "domain", value_name = "NAME")]
    domains: Vec<String>,
    /// The part of the experts that stays, such as 0.5.
    #[arg(
        long,
        value_name = "PART",
        required_unless_present = "budget",
        conflicts_with = "budget"
    )]
    keep: Option<f64>,
    /// Keep as many experts as make weights of this size, such as 6GiB; asks the model (-m) for its sizes.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    budget: Option<u64>,
    /// Among which experts the choice is made. With global, layers keep different numbers: Cadre runs such models, other
    /// programs do not (see `cadre apply --compat`).
    #[arg(long, value_name = "SCOPE", default_value = "layer")]
    scope: ScopeArg,
    /// File to write the plan to.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RowsArg {
    /// Those of all experts.
    All,
    /// One for each merged expert.
    One,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScopeArg {
    /// All layers keep the same number.
    Layer,
    /// The best of the whole model.
    Global,
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// The plan.
    plan: PathBuf,
    /// With -m: check that the plan fits this model.
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `plan show -o json`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    method: &'a str,
    digest: &'a str,
    architecture: &'a str,
    experts: usize,
    kept: usize,
    layers: Vec<LayerSummary>,
}

/// Decides or shows.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    match &args.what {
        What::Prune(args) => {
            if args.common.imatrix.is_some() && args.method != Method::Frequency {
                let text = "an importance matrix counts picks: use --method frequency with it";
                return Err(Failure::usage(text).into());
            }
            let similarity = args.method.wants_similarity();
            let (shape, usage, amount) = args.common.read(app, similarity)?;
            let options = PruneOptions {
                amount,
                scope: args.common.scope(),
                seed: args.seed,
                similarity: args.similarity,
            };
            let plan = prune(&shape, &usage, args.method, &options);
            args.common.write(app, plan)
        }
        What::Merge(args) => {
            let plan = args.plan(app)?;
            args.common.write(app, plan)
        }
        What::Factor(args) => {
            let plan = args.merge.plan(app)?.map(|plan| Plan {
                method: format!("{} and factors", plan.method),
                factor: Some(PlanFactor {
                    rank: args.rank,
                    rest: args.rest,
                }),
                ..plan
            });
            args.merge.common.write(app, plan)
        }
        What::Bits(args) => plan_bits::run(app, args),
        What::Steer(args) => plan_steer::run(app, args),
        What::Show(args) => show(app, args),
    }
}

impl MergeArgs {
    /// The merge that is asked for.
    fn plan(&self, app: &App) -> Result<cadre_reshape::Result<Plan>> {
        let (shape, usage, amount) = self.common.read(app, true)?;
        let options = MergeOptions {
            amount,
            scope: self.common.scope(),
            similarity: self.similarity,
            keep_rows: matches!(self.rows, RowsArg::All),
            align: self.align,
        };
        Ok(merge(&shape, &usage, self.method, &options))
    }
}

impl CommonArgs {
    fn scope(&self) -> Scope {
        match self.scope {
            ScopeArg::Layer => Scope::Layer,
            ScopeArg::Global => Scope::Global,
        }
    }

    /// What the plan must fit, what is known of its experts, and how much is to stay.
    fn read(&self, app: &App, similarity: bool) -> Result<(ModelShape, Usage, Amount)> {
        let needs_model = self.checkpoint.is_given() || self.budget.is_some();
        let checkpoint = needs_model.then(|| self.checkpoint.open(app)).transpose()?;
        let mut usage = self.usage(checkpoint.as_ref(), similarity)?;
        if let (Some(other), Some(checkpoint)) = (&self.same_model, &checkpoint) {
            self.take_over(app, other, checkpoint, &mut usage)?;
        }
        if let Some(warning) = usage.coverage(FEW_PICKS).warning() {
            tracing::warn!("{warning}");
        }
        let shape = match &checkpoint {
            Some(checkpoint) => shape_of(checkpoint),
            None => shape_of_trace(&usage)?,
        };
        let amount = match (self.budget, &checkpoint, self.keep) {
            (Some(budget), Some(checkpoint), _) => Amount::Bytes {
                budget,
                sizes: Sizes::of(checkpoint),
            },
            (_, _, keep) => Amount::Share(keep.unwrap_or(1.0)),
        };
        Ok((shape, usage, amount))
    }

    /// Makes a recording of `other` one of `checkpoint`, if they are the same model.
    fn take_over(
        &self,
        app: &App,
        other: &Path,
        checkpoint: &Checkpoint,
        usage: &mut Usage,
    ) -> Result<()> {
        let recorded = self.checkpoint.beside(other).open(app)?;
        if usage.meta.digest != recorded.digest() {
            return Err(Failure::new(format!(
                "{} was not recorded from {}",
                usage.origin,
                recorded.origin()
            ))
            .hint("--same-model names the checkpoint that was recorded")
            .into());
        }
        let same = same_model(&recorded, checkpoint)?;
        tracing::warn!(
            "a recording of {} is used for {}: {} values of {} tensors are the same but for {:.2} % of their size",
            recorded.origin(),
            checkpoint.origin(),
            same.n_values,
            same.n_tensors,
            100.0 * same.worst
        );
        usage.meta.digest = checkpoint.digest().to_owned();
        Ok(())
    }

    /// What the recording, or what stands for one, says of the experts.
    fn usage(&self, checkpoint: Option<&Checkpoint>, similarity: bool) -> Result<Usage> {
        let options = UsageOptions {
            domains: self.domains.clone(),
            similarity,
        };
        match (&self.trace, &self.imatrix, checkpoint) {
            (Some(trace), _, _) => Ok(Usage::read(trace, &options)?),
            (None, Some(imatrix), Some(checkpoint)) => {
                Ok(Usage::from_imatrix(imatrix, &shape_of(checkpoint))?)
            }
            _ => Err(Failure::usage("pass --trace FILE").into()),
        }
    }

    fn write(&self, app: &App, plan: cadre_reshape::Result<Plan>) -> Result<()> {
        let plan = plan.map_err(explained)?;
        write_file(&self.output, &plan_json(&plan))?;
        note(&app.env, &format!("wrote {}", self.output.display()));
        let mut out = Out::new();
        out.write(&plan_text(&plan))?;
        out.finish()
    }
}

/// What does not fit is a check that failed.
fn explained(error: ReshapeError) -> anyhow::Error {
    match error {
        ReshapeError::DoesNotFit { needed, budget } => Failure::check(format!(
            "the model takes {} with the fewest experts that its routers can pick from, more than the budget of {}",
            bytes(needed),
            bytes(budget)
        ))
        .into(),
        error => error.into(),
    }
}

fn parse_rank(text: &str) -> Result<usize, String> {
    let rank = text.parse().ok().filter(|rank| *rank > 0);
    rank.ok_or_else(|| format!("`{text}` is no rank; expected a number from 1, such as 32"))
}

fn parse_rest(text: &str) -> Result<f32, String> {
    let rest = text.parse().ok();
    rest.filter(|rest| (0.0..=1.0).contains(rest))
        .ok_or_else(|| format!("`{text}` is no part; expected a number from 0 to 1, such as 0.1"))
}

fn show(app: &App, args: &ShowArgs) -> Result<()> {
    let plan = read_plan(&args.plan)?;
    if args.checkpoint.is_given() {
        let checkpoint = args.checkpoint.open(app)?;
        plan.check(&shape_of(&checkpoint))
            .with_context(|| misfit(Some(&args.plan), &checkpoint))?;
    }
    let mut out = Out::new();
    match args.output {
        Format::Text => out.write(&plan_text(&plan))?,
        Format::Json => out.json(&Report {
            method: &plan.method,
            digest: &plan.model.digest,
            architecture: &plan.model.architecture,
            experts: plan.n_before(),
            kept: plan.n_kept(),
            layers: plan_summary(&plan),
        })?,
    }
    out.finish()
}
