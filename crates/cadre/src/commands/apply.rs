//! `cadre apply`: writes a model as a plan says, a folder as a folder and a GGUF file as a GGUF file, and says what it cost.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::{Checkpoint, Conversion, tensor_specs};
use cadre_engine::Steering;
use cadre_engine::eval::Document;
use cadre_reshape::{Applying, Baked, Report, apply, bake, read_plan, shape_of, sources};
use cadre_routing::plan::Plan;

use super::apply_quality::{QualityArgs, Staged};
use crate::cli::App;
use crate::commands::convert;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Out, bytes};
use crate::steer::from_file;

/// Arguments of `cadre apply`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// The plan, made by `cadre plan`; it may have been edited.
    #[arg(long, value_name = "FILE", required_unless_present = "steer")]
    plan: Option<PathBuf>,
    /// A steering, as --steer of other commands reads it, to write into the model: masked experts are left out, gains become part of
    /// the weights, top_k a number of the configuration, and forced experts a correction, where routers have one. What looks at each token (mute,
    /// damp, bias and others) is refused.
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    steer: Option<PathBuf>,
    /// How much of the steering, see --steer-scale of `cadre run`.
    #[arg(long, value_name = "S", requires = "steer")]
    steer_scale: Option<f32>,
    /// What to write: of a GGUF file a file whose name ends in .gguf, of a folder a folder. It must not exist. When
    /// interrupted, the same command goes on.
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Write what transformers and llama.cpp can load: where layers keep different numbers of experts, fill them up with ones
    /// that are never picked, which is possible where routers have a bias; where experts share weights, write them once for
    /// each, and where they are in factors, multiply these, which saves nothing.
    #[arg(long)]
    compat: bool,
    /// Largest file of a folder or part of a GGUF file, such as 5GB or 500MB. Folders: 5GB. GGUF: no limit.
    #[arg(long, value_name = "SIZE", value_parser = convert::parse_size)]
    max_shard_size: Option<u64>,
    #[command(flatten)]
    quality: QualityArgs,
}

/// A plan and what it is applied to.
struct Work<'a> {
    args: &'a Args,
    plan: &'a Plan,
    checkpoint: &'a Checkpoint,
}

/// Checks the plan, writes, opens what was written, and measures it if that is asked for.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let plan = args.plan.as_deref().map(read_plan).transpose()?;
    let steering = match &args.steer {
        None => Steering::default(),
        Some(path) => from_file(path)?.scaled(args.steer_scale.unwrap_or(1.0))?,
    };
    let checkpoint = args.checkpoint.open(app)?;
    let options = Applying {
        target: convert::target(&args.output, args.max_shard_size),
        pad: args.compat,
    };
    let Baked { plan, conversion } = match plan {
        Some(plan) => Baked {
            conversion: apply(&checkpoint, &plan, options)
                .with_context(|| misfit(args.plan.as_deref(), &checkpoint))?,
            plan,
        },
        None => bake(&checkpoint, &steering, options)?,
    };
    for note in conversion.notes() {
        tracing::warn!("{note}");
    }
    args.quality.check_budget(&conversion, &checkpoint)?;
    let work = Work {
        args,
        plan: &plan,
        checkpoint: &checkpoint,
    };
    if args.quality.is_asked_for() {
        let documents = args.quality.documents(&checkpoint)?;
        return work.measured(app, &conversion, &documents);
    }
    let paths = convert::write(app, &conversion, &args.output)?;
    let made = opened(&paths)?;
    let mut out = Out::new();
    work.say(&mut out, &paths, &made)?;
    out.finish()
}

/// Whose error it is when a plan does not fit.
pub(crate) fn misfit(plan: Option<&Path>, checkpoint: &Checkpoint) -> String {
    let plan = plan.unwrap_or(Path::new("the plan")).display();
    format!("{plan} cannot be applied to {}", checkpoint.origin())
}

impl Work<'_> {
    /// Writes under a hidden name, which becomes the final one only if nothing that was asked for is missed.
    fn measured(
        &self,
        app: &App,
        conversion: &Conversion<'_>,
        documents: &[Document],
    ) -> Result<()> {
        let quality = &self.args.quality;
        let staged = Staged::new(&self.args.output)?;
        let written = convert::write(app, conversion, &staged.path)?;
        let made = opened(&written)?;
        let sources = sources(self.plan, &shape_of(self.checkpoint), self.args.compat);
        let pair = [self.checkpoint, &made];
        let measured = quality.measure(app, pair, &sources, documents);
        if measured.is_err() {
            staged.remove(&written)?;
        }
        let report = quality.report(self.plan, pair, &measured?);
        let files = quality.write(&report, &self.args.output)?;
        if !report.missed.is_empty() {
            staged.remove(&written)?;
            return Err(Failure::check(report.missed.join("; "))
                .hint(format!(
                    "nothing was kept; the report is in {}; keep more experts, or allow more",
                    files[0].display()
                ))
                .into());
        }
        let paths = staged.publish(&written)?;
        let mut out = Out::new();
        self.say(&mut out, &paths, &made)?;
        out.write(&summary(&report, &files))?;
        out.finish()
    }

    fn say(&self, out: &mut Out, paths: &[PathBuf], made: &Checkpoint) -> Result<()> {
        for path in paths {
            out.write(&format!("{}\n", path.display()))?;
        }
        if !made.config().moe.uneven.is_empty() {
            tracing::warn!(
                "layers have different numbers of experts: Cadre runs this, transformers and llama.cpp do not"
            );
        }
        if made.config().moe.factors.is_some() {
            tracing::warn!(
                "experts are in factors: Cadre runs this, transformers and llama.cpp do not (see --compat)"
            );
        }
        if !made.config().moe.shared_weights.is_empty() {
            tracing::warn!(
                "experts share weights: Cadre runs this, transformers and llama.cpp do not (see --compat)"
            );
        }
        out.write(&format!(
            "{} of {} experts, {} of {}\n",
            self.plan.n_kept(),
            self.plan.n_before(),
            bytes(made.data_bytes()),
            bytes(self.checkpoint.data_bytes())
        ))
    }
}

/// What was written must be a checkpoint of its own configuration.
fn opened(paths: &[PathBuf]) -> Result<Checkpoint> {
    let made = Checkpoint::open(paths.first().map_or(Path::new(""), PathBuf::as_path))?;
    made.expect_exactly(&tensor_specs(made.config()))?;
    Ok(made)
}

fn summary(report: &Report, files: &[PathBuf]) -> String {
    let total = &report.total;
    let files: Vec<String> = files
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    format!(
        "perplexity {:.3} to {:.3} ({:+.1} %), KL {:.4} nats per token, same best guess {:.1} %, {} tokens\n{}\n",
        total.perplexity_before,
        total.perplexity_after,
        100.0 * total.increase,
        total.kl,
        100.0 * total.agreement,
        total.tokens,
        files.join("\n")
    )
}
