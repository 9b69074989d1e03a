//! What `cadre apply` does with `--data`: the output is measured beside the model before, reported, and kept only within the
//! limits that were given.

use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use cadre_checkpoint::{Checkpoint, Conversion, kv_bytes_per_token, scratch_bytes};
use cadre_engine::eval::Document;
use cadre_engine::{LoadOptions, Model, SessionOptions, StreamOptions};
use cadre_reshape::{Limits, Quality, Report, Sources, measure};
use cadre_routing::plan::Plan;

use crate::cli::App;
use crate::commands::trace::write_file;
use crate::data;
use crate::failure::Failure;
use crate::model::load_from;
use crate::output::{bar, bytes, bytes_bar};
use crate::units::parse_bytes;

/// Most tokens that a window of text has unless another number is asked for.
const WINDOW: usize = 4096;

/// How the output is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct QualityArgs {
    /// Measure the output beside the model before, on this text, which should not have been in the recording: JSON lines with
    /// `domain` and `text`, or plain text; may be given several times. Both models are in memory then.
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Write the report to files whose names begin with this; without it, with the name of the output and `.quality`.
    #[arg(long, value_name = "PATH", requires = "data")]
    report: Option<PathBuf>,
    /// Keep the output only if its predictions diverge from those before by at most so many nats per token; else exit code 3.
    #[arg(long, value_name = "NATS", requires = "data")]
    max_kl: Option<f64>,
    /// Keep the output only if the perplexity rises by at most this part, such as 0.05, over all text and in every domain;
    /// else exit code 3.
    #[arg(long, value_name = "PART", requires = "data")]
    max_ppl_increase: Option<f64>,
    /// Tokens that the models see at most; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0, requires = "data")]
    ctx_size: usize,
    /// Threads for measuring; 0 means all that the system grants.
    #[arg(short, long, value_name = "N", default_value_t = 0, requires = "data")]
    threads: usize,
    /// Memory that writing may take, and while measuring both models together, such as 8GiB; experts are then read from the
    /// disk. What cannot be done with so little is refused before anything is written; exit code 3.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    mem_budget: Option<u64>,
}

/// Where an output waits to be measured.
pub(crate) struct Staged {
    target: PathBuf,
    /// What the target's name begins with, and what stands for it meanwhile.
    stem: String,
    hidden: String,
    /// The hidden name.
    pub(crate) path: PathBuf,
}

impl QualityArgs {
    /// Whether anything is to be measured.
    pub(crate) fn is_asked_for(&self) -> bool {
        !self.data.is_empty()
    }

    /// Refuses a budget that does not hold what `conversion` takes while it is written, or a model that is measured.
    pub(crate) fn check_budget(
        &self,
        conversion: &Conversion<'_>,
        checkpoint: &Checkpoint,
    ) -> Result<()> {
        let Some(budget) = self.mem_budget else {
            return Ok(());
        };
        let needed = conversion.memory();
        if budget < needed {
            let text = format!(
                "writing the output takes up to {} of memory, more than the budget of {}",
                bytes(needed),
                bytes(budget)
            );
            return Err(Failure::check(text)
                .hint(format!(
                    "allow --mem-budget {} or more; nothing was written",
                    needed.div_ceil(1 << 20).to_string() + "MiB"
                ))
                .into());
        }
        if self.is_asked_for() {
            let session = self.session(checkpoint);
            streamed((budget / 2, "half of the budget"), checkpoint, &session)?;
        }
        Ok(())
    }

    /// How both models are run.
    fn session(&self, before: &Checkpoint) -> SessionOptions {
        SessionOptions {
            n_ctx: Some(window(self.ctx_size, before)),
            ..SessionOptions::default()
        }
    }

    /// The text as tokens: read before anything is written, so that a wrong name costs nothing.
    pub(crate) fn documents(&self, checkpoint: &Checkpoint) -> Result<Vec<Document>> {
        tokenized(&self.data, checkpoint)
    }

    /// Runs both models over `documents`.
    pub(crate) fn measure(
        &self,
        app: &App,
        [before, after]: [&Checkpoint; 2],
        sources: &Sources,
        documents: &[Document],
    ) -> Result<Quality> {
        let window = window(self.ctx_size, before);
        let session = self.session(before);
        let models = [
            self.load(app, before, &session)?,
            self.load(app, after, &session)?,
        ];
        let n_total = documents
            .iter()
            .map(|one| one.tokens.len().saturating_sub(1) as u64)
            .sum();
        let _guard = app.interrupt.guard();
        let progress = bar(&app.env, "tokens", n_total);
        let quality = measure(
            [&*models[0], &*models[1]],
            sources,
            documents,
            window,
            &mut |done, _| {
                progress.set_position(done);
                match app.interrupt.requested() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            },
        );
        progress.finish_and_clear();
        app.interrupt.check()?;
        Ok(quality?)
    }

    fn load(
        &self,
        app: &App,
        checkpoint: &Checkpoint,
        session: &SessionOptions,
    ) -> Result<Arc<dyn Model>> {
        let half = self.mem_budget.map(|budget| budget / 2);
        let stream = half
            .map(|half| streamed((half, "half of the budget"), checkpoint, session))
            .transpose()?;
        let options = LoadOptions {
            n_threads: (self.threads > 0).then_some(self.threads),
            stream,
            ..LoadOptions::default()
        };
        let what = format!("loading {}", checkpoint.origin());
        let bar = bytes_bar(&app.env, checkpoint.data_bytes(), what);
        let model = load_from((checkpoint, None), &options, &|n| bar.inc(n));
        bar.finish_and_clear();
        model
    }

    /// The report, with what exceeds the limits.
    pub(crate) fn report(
        &self,
        plan: &Plan,
        checkpoints: [&Checkpoint; 2],
        quality: &Quality,
    ) -> Report {
        let limits = Limits {
            kl: self.max_kl,
            increase: self.max_ppl_increase,
        };
        Report::new(plan, checkpoints, quality, limits)
    }

    /// Writes the three files of `report`; their names.
    pub(crate) fn write(&self, report: &Report, output: &Path) -> Result<Vec<PathBuf>> {
        let prefix = match &self.report {
            Some(prefix) => prefix.clone(),
            None => {
                let mut name = output.with_file_name(stem(output)).into_os_string();
                name.push(".quality");
                PathBuf::from(name)
            }
        };
        let json = serde_json::to_string_pretty(report).context("cannot write the report")?;
        let files = [
            ("md", report.markdown()),
            ("json", json + "\n"),
            ("html", report.html()),
        ];
        let mut paths = Vec::new();
        for (extension, text) in files {
            let mut name: OsString = prefix.clone().into_os_string();
            name.push(format!(".{extension}"));
            let path = PathBuf::from(name);
            write_file(&path, &text)?;
            paths.push(path);
        }
        Ok(paths)
    }
}

/// Documents of files as tokens; there must be something to predict.
pub(crate) fn tokenized(paths: &[PathBuf], checkpoint: &Checkpoint) -> Result<Vec<Document>> {
    let tokenizer = checkpoint.tokenizer()?;
    let mut documents = Vec::new();
    for path in paths {
        for one in data::read(path)? {
            let tokens = tokenizer.encode(&one.text)?;
            let domain = one.domain;
            documents.push(Document { domain, tokens });
        }
    }
    if documents.iter().all(|one| one.tokens.len() < 2) {
        return Err(Failure::new("the data holds nothing to predict")
            .hint("a document needs at least two tokens")
            .into());
    }
    Ok(documents)
}

/// Tokens of a window: `asked`, or what the model allows up to a limit where that is 0.
pub(crate) fn window(asked: usize, checkpoint: &Checkpoint) -> usize {
    match asked {
        0 => checkpoint.config().max_position_embeddings.min(WINDOW),
        n => n,
    }
}

/// How a model is read from the disk that may take `budget`, its buffers included. `part` says what the budget is one of.
pub(crate) fn streamed(
    (budget, part): (u64, &str),
    checkpoint: &Checkpoint,
    session: &SessionOptions,
) -> Result<StreamOptions> {
    let config = checkpoint.config();
    let n_ctx = session.context(config.max_position_embeddings);
    let beside = kv_bytes_per_token(config, session.kv).saturating_mul(n_ctx as u64)
        + scratch_bytes(config, n_ctx, session.chunk);
    let Some(weights) = budget.checked_sub(beside) else {
        let text = format!(
            "{part}, {}, does not hold the buffers of a model ({})",
            bytes(budget),
            bytes(beside)
        );
        let failure = Failure::new(text).hint("raise --mem-budget, or lower -c");
        return Err(failure.into());
    };
    Ok(StreamOptions::new(weights))
}

impl Staged {
    /// A hidden name beside `target`. What an interrupted run left there is removed.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        if target.exists() && !is_empty_folder(target) {
            let text = format!("cannot write {}: it exists already", target.display());
            let hint = "remove it or choose another name";
            return Err(Failure::new(text).hint(hint).into());
        }
        let stem = stem(target);
        let hidden = format!(".{stem}.unchecked");
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let staged = Self {
            path: target.with_file_name(name.replacen(&stem, &hidden, 1)),
            target: target.to_owned(),
            stem,
            hidden,
        };
        staged.remove(std::slice::from_ref(&staged.path))?;
        Ok(staged)
    }

    /// Gives what was written its names.
    pub(crate) fn publish(&self, written: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for from in written {
            let name = from.file_name().unwrap_or_default().to_string_lossy();
            let to = from.with_file_name(name.replacen(&self.hidden, &self.stem, 1));
            if is_empty_folder(&to) {
                fs::remove_dir(&to).with_context(|| format!("cannot replace {}", to.display()))?;
            }
            if to.exists() {
                let text = format!("{} exists already; it was not replaced", to.display());
                return Err(Failure::new(text).into());
            }
            fs::rename(from, &to).with_context(|| {
                format!("cannot give {} its name {}", from.display(), to.display())
            })?;
            paths.push(to);
        }
        tracing::debug!(target = %self.target.display(), "published");
        Ok(paths)
    }

    /// Removes what was written.
    pub(crate) fn remove(&self, written: &[PathBuf]) -> Result<()> {
        for path in written.iter().filter(|path| path.exists()) {
            let removed = match path.is_dir() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }
}

/// The name of an output without `.gguf`.
fn stem(output: &Path) -> String {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}
