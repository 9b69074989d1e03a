//! Which model a command works on, and loading it.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use cadre_checkpoint::{Checkpoint, Holding, Tokenizer};
use cadre_engine::{
    LoadOptions, Model, Progress, Quant, SessionOptions, dense_bytes, load_watched,
    load_with_low_bit,
};
use clap::ValueEnum;
use tempfile::TempDir;

use crate::cli::App;
use crate::embedded;
use crate::hub::{self, HubRef};
use crate::lossy::LossyArgs;
use crate::output::{bytes_bar, spinner};
use crate::steer::SteerArgs;
use crate::streaming::StreamArgs;

/// The choice of a checkpoint.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CheckpointArg {
    /// Checkpoint: a Hugging Face folder, a .gguf file (any part of a split one), or
    /// `org/name@REVISION:QUANT` (both optional) on the Hugging Face hub. Without it, the embedded model `nano`.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Use only hub models that are in the cache already. So does HF_HUB_OFFLINE=1.
    #[arg(long)]
    offline: bool,
}

impl CheckpointArg {
    /// The model that lends its experts in fewer bits, found in the same way, if one is asked for.
    pub(crate) fn low_bit(
        &self,
        app: &App,
        lossy: &LossyArgs,
        is_streamed: bool,
    ) -> Result<Option<Checkpoint>> {
        let Some(model) = lossy.low_bit(is_streamed) else {
            return Ok(None);
        };
        self.beside(model).open(app).map(Some)
    }

    /// Another model, found in the same way.
    pub(crate) fn beside(&self, model: &Path) -> Self {
        Self {
            model: Some(model.to_owned()),
            offline: self.offline,
        }
    }

    /// Whether a checkpoint was named.
    pub(crate) fn is_given(&self) -> bool {
        self.model.is_some()
    }

    /// What it is called in short: the name of its file or folder, or of a hub model with its owner.
    pub(crate) fn short_name(&self) -> String {
        let Some(path) = &self.model else {
            return "nano".to_owned();
        };
        if hub_name(path).is_some() {
            return path.display().to_string();
        }
        let path = path.canonicalize().unwrap_or_else(|_| path.clone());
        let name = match path.extension() {
            Some(extension) if extension == "gguf" => path.file_stem(),
            _ => path.file_name(),
        };
        name.map_or_else(
            || "model".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// Opens the chosen checkpoint, after downloading what is missing of a hub model.
    pub(crate) fn open(&self, app: &App) -> Result<Checkpoint> {
        match self.path(app)? {
            Some(path) => Ok(Checkpoint::open(&path)?),
            None => embedded::open(),
        }
    }

    /// The path that was given, if something is there.
    pub(crate) fn local_path(&self) -> Option<&Path> {
        self.model.as_deref().filter(|path| path.exists())
    }

    /// Where the chosen checkpoint is, after downloading what is missing of a hub model; `None` for the embedded one.
    pub(crate) fn path(&self, app: &App) -> Result<Option<PathBuf>> {
        let Some(path) = &self.model else {
            return Ok(None);
        };
        let path = match hub_name(path) {
            Some(wanted) => {
                hub::fetch(app, &wanted, self.offline).with_context(|| not_got(&wanted))?
            }
            None => path.clone(),
        };
        Ok(Some(path))
    }

    /// Opens the chosen checkpoint for its headers: of a hub model that is not in the cache, no weights are downloaded.
    pub(crate) fn open_outline(&self, app: &App) -> Result<Outlined> {
        let Some(wanted) = self.model.as_deref().and_then(hub_name) else {
            return Ok(Outlined {
                checkpoint: self.open(app)?,
                _folder: None,
            });
        };
        let (folder, path) =
            hub::fetch_outline(app, &wanted, self.offline).with_context(|| not_got(&wanted))?;
        let mut checkpoint = Checkpoint::open(&path)?;
        if folder.is_some() {
            checkpoint = checkpoint.with_origin(wanted.to_string());
        }
        Ok(Outlined {
            checkpoint,
            _folder: folder,
        })
    }
}

fn not_got(wanted: &HubRef) -> String {
    format!("cannot get `{wanted}`, which is no path here and so a hub model")
}

/// A checkpoint whose weights may be missing: headers, configuration and text are there.
pub(crate) struct Outlined {
    checkpoint: Checkpoint,
    /// Where its files are; must live as long as they are read.
    _folder: Option<TempDir>,
}

impl Deref for Outlined {
    type Target = Checkpoint;

    fn deref(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

/// The hub model that is meant, if it is one: what exists here always wins.
fn hub_name(path: &Path) -> Option<HubRef> {
    if path.exists() {
        return None;
    }
    HubRef::parse(path.to_str()?)
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

impl QuantArg {
    /// The same, for sizes.
    pub(crate) fn holding(self) -> Holding {
        match self {
            Self::Stored => Holding::Loaded,
            Self::Q8_0 => Holding::LoadedQ8_0,
        }
    }

    /// The same, for loading.
    pub(crate) fn quant(self) -> Quant {
        match self {
            Self::Stored => Quant::AsStored,
            Self::Q8_0 => Quant::Q8_0,
        }
    }
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
    /// Compute with the weights where the file has them, instead of copying them into an order that memory is read
    /// fastest in: starts at once, needs no memory of its own, and is slower. The same results.
    #[arg(long, conflicts_with = "mem_budget")]
    no_repack: bool,
    #[command(flatten)]
    pub(crate) stream: StreamArgs,
    #[command(flatten)]
    lossy: LossyArgs,
    #[command(flatten)]
    steer: SteerArgs,
}

/// The sessions that a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seats {
    pub(crate) options: SessionOptions,
    pub(crate) n: usize,
    /// The most bytes of keys and values of all of them, where there is less for them than they would take.
    pub(crate) kv_memory: Option<u64>,
}

impl Seats {
    pub(crate) fn new(options: SessionOptions, n: usize) -> Self {
        Self {
            options,
            n,
            kv_memory: None,
        }
    }
}

/// A model with its text side.
pub(crate) struct Loaded {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) model: Arc<dyn Model>,
}

impl Loaded {
    /// The tokens that end a text, from all the places that name them.
    pub(crate) fn stop_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let named = self.checkpoint.chat(tokenizer)?.stop_tokens;
        Ok(named.into_iter().map(|token| token.id).collect())
    }

    /// The tokenizer of the checkpoint.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.checkpoint.tokenizer()?)
    }
}

/// Loads a model, with experts in fewer bits beside its own where there are any.
pub(crate) fn load_from(
    (checkpoint, low_bit): (&Checkpoint, Option<&Checkpoint>),
    options: &LoadOptions,
    progress: &Progress<'_>,
) -> Result<Arc<dyn Model>> {
    let model = match low_bit {
        None => load_watched(checkpoint, options, progress),
        Some(low_bit) => load_with_low_bit(checkpoint, low_bit, options, progress),
    };
    model.with_context(|| format!("cannot load {}", checkpoint.origin()))
}

impl ModelArgs {
    /// In which format the weights are held.
    pub(crate) fn quant(&self) -> Quant {
        self.quant.quant()
    }

    /// Opens and loads the model for a session like `session`, with a bar while it takes.
    pub(crate) fn load(&self, app: &App, session: &SessionOptions) -> Result<Loaded> {
        self.load_for(app, Seats::new(*session, 1))
    }

    /// As [`ModelArgs::load`], for several sessions.
    pub(crate) fn load_for(&self, app: &App, sessions: Seats) -> Result<Loaded> {
        let checkpoint = self.checkpoint.open(app)?;
        let steering = self.steer.steering(&checkpoint)?;
        let what = format!("loading {}", checkpoint.origin());
        let stream = self.stream.options(&checkpoint, sessions)?;
        let low_bit = self
            .checkpoint
            .low_bit(app, &self.lossy, stream.is_some())?;
        let to_load = match stream {
            None => checkpoint.data_bytes(),
            Some(_) => dense_bytes(&checkpoint),
        };
        let bar = bytes_bar(&app.env, to_load, what);
        let options = LoadOptions {
            quant: self.quant.quant(),
            n_threads: (self.threads > 0).then_some(self.threads),
            in_place: self.no_repack,
            lossy: self.lossy.options(stream.is_some()),
            steering,
            stream,
            ..LoadOptions::default()
        };
        let sources = (&checkpoint, low_bit.as_ref());
        let model = load_from(sources, &options, &|n_bytes| bar.inc(n_bytes));
        bar.finish_and_clear();
        let model = model?;
        if self.stream.preload {
            let progress = spinner(&app.env, "reading experts".to_owned());
            let read = model.preload(&|_| progress.tick());
            progress.finish_and_clear();
            read?;
        }
        Ok(Loaded { checkpoint, model })
    }
}
