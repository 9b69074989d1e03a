//! Which model a command works on, and loading it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use cadre_checkpoint::{Checkpoint, Tokenizer};
use cadre_engine::{LoadOptions, Model, Quant, load};
use clap::ValueEnum;

use crate::cli::App;
use crate::embedded;
use crate::failure::Failure;
use crate::output::spinner;

/// The choice of a checkpoint.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CheckpointArg {
    /// Checkpoint: a Hugging Face folder. Without it, the embedded model `nano`.
    #[arg(short, long, value_name = "FOLDER")]
    model: Option<PathBuf>,
}

impl CheckpointArg {
    /// Opens the chosen checkpoint.
    pub(crate) fn open(&self) -> Result<Checkpoint> {
        let Some(path) = &self.model else {
            return embedded::open();
        };
        Checkpoint::open(path).map_err(|error| {
            let error = anyhow::Error::from(error);
            if looks_like_hub_name(path) {
                let hint =
                    "models are not fetched from the hub; download the folder and pass its path";
                return error.context(Failure::new("cannot open the model").hint(hint));
            }
            error
        })
    }
}

/// `org/name`, and nothing there.
fn looks_like_hub_name(path: &Path) -> bool {
    path.is_relative() && path.components().count() == 2 && !path.exists()
}

/// Format of the weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantArg {
    /// As they are stored.
    #[value(name = "none")]
    Stored,
    /// 8 bits in blocks of 32.
    #[value(name = "q8_0")]
    Q8_0,
}

/// How a model is loaded.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) checkpoint: CheckpointArg,
    /// Threads; 0 means all that the system grants.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Quantise the weights while loading.
    #[arg(long, value_name = "FORMAT", default_value = "none")]
    quant: QuantArg,
}

/// A model with its text side.
pub(crate) struct Loaded {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Arc<dyn Model>,
}

impl Loaded {
    /// The tokenizer of the checkpoint.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer()?)
    }
}

impl ModelArgs {
    /// Opens and loads the model, with a spinner while it takes.
    pub(crate) fn load(&self, app: &App) -> Result<Loaded> {
        let checkpoint = self.checkpoint.open()?;
        let progress = spinner(&app.env, format!("loading {}", checkpoint.origin()));
        let options = LoadOptions {
            quant: match self.quant {
                QuantArg::Stored => Quant::AsStored,
                QuantArg::Q8_0 => Quant::Q8_0,
            },
            n_threads: (self.threads > 0).then_some(self.threads),
            ..LoadOptions::default()
        };
        let model = load(&checkpoint, &options)
            .with_context(|| format!("cannot load {}", checkpoint.origin()));
        progress.finish_and_clear();
        Ok(Loaded {
            checkpoint,
            model: model?,
        })
    }
}
