//! `cadre pull`: downloads a model from the hub into its cache, and prints the path.

use anyhow::Result;

use crate::cli::App;
use crate::failure::Failure;
use crate::hub::{self, HubRef};
use crate::output::Out;

/// Arguments of `cadre pull`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Model on the hub. With QUANT its GGUF file of that type (or of that name), such as Q4_K_M;
    /// without, its safetensors.
    #[arg(value_name = "ORG/NAME[@REVISION][:QUANT]")]
    model: String,
    /// Only look into the cache. So does HF_HUB_OFFLINE=1.
    #[arg(long)]
    offline: bool,
}

/// Downloads and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let wanted = HubRef::parse(&args.model).ok_or_else(|| {
        Failure::usage(format!("`{}` is not the name of a hub model", args.model))
            .hint("such as org/name, org/name:Q4_K_M or org/name@REVISION")
    })?;
    let path = hub::fetch(app, &wanted, args.offline)?;
    let mut out = Out::new();
    out.write(&format!("{}\n", path.display()))?;
    out.finish()
}
