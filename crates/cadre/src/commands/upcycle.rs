//! `cadre upcycle`: experts that are copies of a dense model's feed-forwards, or those of several models as a configuration of
//! mergekit-moe says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_engine::{LoadOptions, load};
use cadre_reshape::{MergekitInput, MergekitMoe, UpcycleOptions, upcycle};

use crate::cli::App;
use crate::dense::OutputArgs;
use crate::failure::Failure;
use crate::model::CheckpointArg;

/// Experts where nothing is said.
const EXPERTS: usize = 8;

/// Experts per token where nothing is said.
const TOP_K: usize = 2;

/// Arguments of `cadre upcycle`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// In place of copies of one model (-m): experts from several, as this configuration of mergekit-moe (YAML) says. Models
    /// are paths from here, or on the hub.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "experts", "top_k", "drop"])]
    mergekit: Option<PathBuf>,
    /// With --mergekit: all experts may come from one model, which only makes sense before training.
    #[arg(long, requires = "mergekit")]
    allow_same: bool,
    /// Experts of every layer; 8 without it.
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Experts per token; 2 without it.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// The part of every expert's neurons that begin anew, with the mean and spread of those that they replace
    /// (Drop-Upcycling; 0.5 in its paper). Without it all experts are the same, and the model computes what the dense one does.
    #[arg(long, value_name = "PART")]
    drop: Option<f64>,
    /// Seed of routers and of new neurons.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    output: OutputArgs,
}

/// Copies and writes.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    if let Some(file) = &args.mergekit {
        return merged(app, args, file);
    }
    if !args.checkpoint.is_given() {
        let hint = "pass -m MODEL, or --mergekit FILE";
        return Err(Failure::usage("there is no dense model to copy")
            .hint(hint)
            .into());
    }
    let checkpoint = args.checkpoint.open(app)?;
    let options = UpcycleOptions {
        n_experts: args.experts.unwrap_or(EXPERTS),
        top_k: args.top_k.unwrap_or(TOP_K),
        drop: args.drop.unwrap_or(0.0),
        seed: args.seed,
    };
    let made = upcycle(&checkpoint, &options)?;
    args.output.write(app, &checkpoint, &made, None)
}

/// Experts from several models.
fn merged(app: &App, args: &Args, file: &Path) -> Result<()> {
    let shown = file.display().to_string();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let config = MergekitMoe::parse(&shown, &text)?;
    if args.output.dtype.is_some() && config.says_dtype() {
        let text = format!("--dtype and `dtype` in {shown} both say a format; keep one");
        return Err(Failure::usage(text).into());
    }
    let mut models: BTreeMap<String, Arc<Checkpoint>> = BTreeMap::new();
    for name in config.names() {
        if !models.contains_key(name) {
            let opened = args.checkpoint.beside(Path::new(name)).open(app)?;
            models.insert(name.to_owned(), Arc::new(opened));
        }
    }
    let base = Arc::clone(&models[&config.base_model]);
    let model = config
        .runs_the_base()
        .then(|| load(&base, &LoadOptions::default()))
        .transpose()?;
    let input = MergekitInput {
        base: &base,
        models: &models,
        model: model.as_deref(),
        seed: args.seed,
        allow_same: args.allow_same,
    };
    let (made, warnings) = config.experts_for(&input)?;
    drop(model);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    args.output.write(app, &base, &made, Some(&config))
}
