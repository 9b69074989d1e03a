//! `cadre trace`: records which experts every token uses, and shows recordings.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use cadre_checkpoint::Tokenizer;
use cadre_engine::{Logits, Model, Observer, Quant, RoutingEvent, Session, SessionOptions};
use cadre_reshape::{Usage, UsageOptions};
use cadre_trace::{
    Columns, Part, Profile, Recording, Stats, StatsOptions, Step, TraceMeta, Written, html,
    picture, show,
};
use clap::{Subcommand, ValueEnum};
use sha2::{Digest, Sha256};

use crate::cli::App;
use crate::commands::plan::FEW_PICKS;
use crate::commands::trace_replay;
use crate::data::{self, Document};
use crate::experts::{self, Shown};
use crate::failure::Failure;
use crate::model::ModelArgs;
use crate::output::{Format, Out, bar, bytes, note, say};

/// Arguments of `cadre trace`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    record: RecordArgs,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show load, entropy, dead and hot experts of a recording.
    Show(ShowArgs),
    /// Say what caches of experts would have hit and read, by policy and budget.
    Replay(trace_replay::Args),
}

#[derive(Debug, clap::Args)]
struct RecordArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON lines with `domain` and `text`, or plain text; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Parquet file to write. When interrupted, the same command goes on.
    // Required, which the type cannot say: `trace show` comes without it.
    #[arg(short, long, value_name = "FILE", required = true)]
    output: Option<PathBuf>,
    /// Tokens per sequence; longer documents become several. 0 means what the model allows, up to
    /// 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Also record the router logits of every token.
    #[arg(long)]
    logits: bool,
    /// Also record the output norm of every picked expert.
    #[arg(long)]
    norms: bool,
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// The recording.
    trace: PathBuf,
    /// Whose experts are shown; by default those of the feed-forward, and in text and JSON after them those of the attention.
    #[arg(long, value_name = "PART")]
    part: Option<PartArg>,
    /// Write one self-contained page with a heat map to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a picture of the load per domain to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write what the experts are for to this file; as `profile.json` in a checkpoint, it is shown
    /// by `run --experts`.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// Which experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PartArg {
    /// Those of the feed-forward.
    FeedForward,
    /// Those that the attention is cut into.
    Attention,
}

/// Records or shows.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    match (&args.what, &args.record.output) {
        (Some(What::Show(args)), _) => show_trace(app, args),
        (Some(What::Replay(args)), _) => trace_replay::run(app, args),
        (None, Some(output)) => record(app, &args.record, output),
        (None, None) => Err(Failure::usage("there is no file to write: pass -o FILE").into()),
    }
}

fn record(app: &App, args: &RecordArgs, output: &Path) -> Result<()> {
    refuse_special_file(output)?;
    let mut documents = Vec::new();
    for path in &args.data {
        documents.extend(data::read(path)?);
    }
    let session = SessionOptions {
        n_ctx: (args.ctx_size > 0).then_some(args.ctx_size),
        ..SessionOptions::default()
    };
    let loaded = args.model.load(app, &session)?;
    let info = loaded.model.info();
    if info.moe_layers.is_empty() {
        let whose = match info.attention_experts {
            None => "layers with experts",
            Some(_) => "experts but those of its attention, which are traced beside others only",
        };
        return Err(Failure::new(format!("the model has no {whose}: nothing to trace")).into());
    }
    let sequences = cut(
        &documents,
        &loaded.tokenizer()?,
        args.ctx_size,
        info.max_context,
    )?;
    let n_tokens = sequences.iter().map(|one| one.tokens.len() as u64).sum();

    // From here on Ctrl-C is polled, so that what has been recorded is kept whole.
    let _guard = app.interrupt.guard();
    let columns = Columns {
        logits: args.logits,
        norms: args.norms,
    };
    let meta = experts::meta(&loaded);
    let identity = identity(&meta, (columns, args.model.quant()), &sequences);
    let recording = Recording::begin(output, &meta, columns, &identity)?;
    let n_before = recording.next_sequence();
    if n_before > 0 {
        let text = format!("going on after {n_before} of {} sequences", sequences.len());
        note(&app.env, &text);
    }
    let mut recorder = Recorder {
        recording,
        columns,
        current: None,
        error: None,
    };
    let n_ctx = sequences.iter().map(|one| one.tokens.len()).max();
    let mut session = loaded.model.session(&SessionOptions {
        n_ctx,
        chunk: info.lossy.chunk(SessionOptions::default().chunk),
        ..SessionOptions::default()
    })?;
    let progress = bar(&app.env, "tokens", n_tokens);
    let start = Instant::now();
    for sequence in sequences {
        let n = match sequence.number < n_before {
            true => Ok(sequence.tokens.len() as u64),
            false => recorder.sequence(app, &*loaded.model, &mut session, sequence),
        };
        if n.is_err() && app.interrupt.requested() {
            progress.finish_and_clear();
            let text = format!(
                "{} is not complete; run the same again to go on",
                output.display()
            );
            note(&app.env, &text);
        }
        progress.inc(n?);
    }
    progress.finish_and_clear();
    let Written { n_rows, n_bytes } = recorder.recording.finish()?;
    note(
        &app.env,
        &format!(
            "{}: {n_rows} rows of {n_tokens} tokens ({}), {}",
            output.display(),
            data::summary(&documents),
            bytes(n_bytes)
        ),
    );
    warn_of_thin_experts(output, &meta)?;
    let summary = args
        .model
        .stream
        .summary(&*loaded.model, n_tokens as usize, start);
    if let Some(summary) = summary {
        say(&summary.to_string());
    }
    Ok(())
}

/// What the rows depend on.
fn identity(
    meta: &TraceMeta,
    (columns, quant): (Columns, Quant),
    sequences: &[Sequence],
) -> String {
    let mut hasher = Sha256::new();
    for sequence in sequences {
        hasher.update((sequence.domain.len() as u64).to_le_bytes());
        hasher.update(&sequence.domain);
        hasher.update((sequence.tokens.len() as u64).to_le_bytes());
        for token in &sequence.tokens {
            hasher.update(token.to_le_bytes());
        }
    }
    let digest = hasher.finalize();
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{meta:?} {columns:?} {quant:?} {digest}\n")
}

/// Says which experts the text has hardly used, so that nobody decides about them by it.
fn warn_of_thin_experts(output: &Path, meta: &TraceMeta) -> Result<()> {
    // Of changed routing no choice is made.
    if meta.lossy.is_some() {
        return Ok(());
    }
    let usage = Usage::read(output, &UsageOptions::default())?;
    if let Some(warning) = usage.coverage(FEW_PICKS).warning() {
        tracing::warn!("{warning}");
    }
    Ok(())
}

/// A finished trace is renamed over its target, which must not be a device or a pipe.
fn refuse_special_file(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            let message = format!("{} is not a regular file", path.display());
            Err(Failure::new(message)
                .hint("pass the name of a file to write")
                .into())
        }
        _ => Ok(()),
    }
}

/// One sequence to trace.
struct Sequence {
    number: u32,
    domain: String,
    tokens: Vec<u32>,
}

/// Tokenises, and cuts documents that are longer than the context.
fn cut(
    documents: &[Document],
    tokenizer: &Tokenizer,
    ctx_size: usize,
    limit: usize,
) -> Result<Vec<Sequence>> {
    let window = if ctx_size > 0 {
        ctx_size
    } else {
        limit.min(4096)
    };
    let mut sequences = Vec::new();
    for document in documents {
        for tokens in tokenizer.encode(&document.text)?.chunks(window) {
            let number = u32::try_from(sequences.len()).context("too many sequences")?;
            let domain = document.domain.clone();
            sequences.push(Sequence {
                number,
                domain,
                tokens: tokens.to_vec(),
            });
        }
    }
    Ok(sequences)
}

/// Passes what it observes on to the file.
struct Recorder {
    recording: Recording,
    columns: Columns,
    current: Option<Sequence>,
    error: Option<anyhow::Error>,
}

impl Recorder {
    /// Records one sequence; returns its tokens.
    fn sequence(
        &mut self,
        app: &App,
        model: &dyn Model,
        session: &mut Session,
        sequence: Sequence,
    ) -> Result<u64> {
        session.rewind(0);
        let tokens = sequence.tokens.clone();
        self.current = Some(sequence);
        for chunk in tokens.chunks(session.chunk()) {
            app.interrupt.check()?;
            model.forward(session, chunk, Logits::None, self)?;
            if let Some(error) = self.error.take() {
                return Err(error);
            }
        }
        self.recording.end_sequence()?;
        Ok(tokens.len() as u64)
    }

    fn push(&mut self, part: Part, event: &RoutingEvent<'_>) -> Result<()> {
        let Some(sequence) = &self.current else {
            return Ok(());
        };
        let first = event.first_position;
        let step = Step {
            seq: sequence.number,
            first_pos: u32::try_from(first).context("the sequence is too long to trace")?,
            tokens: &sequence.tokens[first..first + event.routing.n_tokens()],
            domain: &sequence.domain,
            layer: event.layer,
            routing: event.routing,
            logits: self.columns.logits.then_some(event.logits),
            norms: self.columns.norms.then_some(event.norms),
        };
        self.recording.push(part, &step)?;
        Ok(())
    }

    fn observe(&mut self, part: Part, event: &RoutingEvent<'_>) {
        if self.error.is_none()
            && let Err(error) = self.push(part, event)
        {
            self.error = Some(error);
        }
    }
}

impl Observer for Recorder {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        self.observe(Part::FeedForward, event);
    }

    fn attention_routed(&mut self, event: &RoutingEvent<'_>) {
        self.observe(Part::Attention, event);
    }

    fn wants_norms(&self) -> bool {
        self.columns.norms
    }
}

fn show_trace(app: &App, args: &ShowArgs) -> Result<()> {
    if args.part == Some(PartArg::Attention) && args.profile.is_some() {
        let message = "--profile is of the experts of the feed-forward";
        return Err(Failure::usage(message)
            .hint("leave out `--part attention`")
            .into());
    }
    let read = |part| Stats::from_file(&args.trace, part, &StatsOptions::default());
    let stats = read(match args.part {
        None | Some(PartArg::FeedForward) => Part::FeedForward,
        Some(PartArg::Attention) => Part::Attention,
    })?;
    let both = args.part.is_none() && stats.meta.attention.is_some();
    let attention = both.then(|| read(Part::Attention)).transpose()?;
    let title = args.trace.file_stem().unwrap_or_default().to_string_lossy();
    let mut files = Vec::new();
    if let Some(path) = &args.html {
        files.push((path, html::page(&stats, &title)));
    }
    if let Some(path) = &args.svg {
        let order = picture::ExpertOrder::HomeDomain;
        let options = picture::SvgOptions {
            order,
            ..picture::SvgOptions::default()
        };
        files.push((path, picture::domain_svg(&stats, &options)));
    }
    if let Some(path) = &args.profile {
        files.push((path, Profile::from_stats(&stats).to_json()));
    }
    for (path, text) in files {
        write_file(path, &text)?;
        note(&app.env, &format!("wrote {}", path.display()));
    }
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&Shown {
            stats,
            attention_experts: attention,
        })?,
        Format::Text => {
            let colour = app.color.on_stdout(&app.env);
            let options = show::TextOptions {
                colour,
                max_width: app.env.width.max(80),
            };
            out.write(&show::text(&stats, &options))?;
            if let Some(attention) = &attention {
                out.write("\nExperts of the attention\n\n")?;
                out.write(&show::text(attention, &options))?;
            }
        }
    }
    out.finish()
}

/// Writes a whole file or nothing.
pub(crate) fn write_file(path: &Path, text: &str) -> Result<()> {
    refuse_special_file(path)?;
    let shown = path.display();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let temporary = folder.join(format!(
        ".{}.partial-{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let written = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It may not exist; the first error is the one to tell.
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {shown}"))
}
