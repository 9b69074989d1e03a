//! `cadre apply`: writes a model as a plan says, a folder as a folder and a GGUF file as a GGUF file.

use std::path::PathBuf;

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, tensor_specs};
use cadre_reshape::{Applying, apply, read_plan};

use crate::cli::App;
use crate::commands::convert;
use crate::model::CheckpointArg;
use crate::output::{Out, bytes};

/// Arguments of `cadre apply`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// The plan, made by `cadre plan`; it may have been edited.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// What to write: of a GGUF file a file whose name ends in .gguf, of a folder a folder. It must not exist. When
    /// interrupted, the same command goes on.
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Where layers keep different numbers of experts, fill them up with ones that are never picked, so that transformers
    /// and llama.cpp can load the result; possible where routers have a bias.
    #[arg(long)]
    compat: bool,
    /// Largest file of a folder or part of a GGUF file, such as 5GB or 500MB. Folders: 5GB. GGUF: no limit.
    #[arg(long, value_name = "SIZE", value_parser = convert::parse_size)]
    max_shard_size: Option<u64>,
}

/// Checks the plan, writes, and opens what was written.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let plan = read_plan(&args.plan)?;
    let checkpoint = args.checkpoint.open(app)?;
    let options = Applying {
        target: convert::target(&args.output, args.max_shard_size),
        pad: args.compat,
    };
    let conversion = apply(&checkpoint, &plan, options)?;
    for note in conversion.notes() {
        tracing::warn!("{note}");
    }
    let paths = convert::write(app, &conversion, &args.output)?;
    let mut out = Out::new();
    for path in &paths {
        out.write(&format!("{}\n", path.display()))?;
    }
    if let Some(path) = paths.first() {
        let made = Checkpoint::open(path)?;
        made.expect_exactly(&tensor_specs(made.config()))?;
        if !made.config().moe.uneven.is_empty() {
            tracing::warn!(
                "layers have different numbers of experts: Cadre runs this, transformers and llama.cpp do not"
            );
        }
        out.write(&format!(
            "{} of {} experts, {} of {}\n",
            plan.n_kept(),
            plan.n_before(),
            bytes(made.data_bytes()),
            bytes(checkpoint.data_bytes())
        ))?;
    }
    out.finish()
}
