//! `cadre eval perplexity`: how well a model predicts text, per domain.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use cadre_engine::SessionOptions;
use cadre_engine::eval::{self, Perplexity, Score, Windows};
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::data;
use crate::failure::Failure;
use crate::lossy::Said;
use crate::model::ModelArgs;
use crate::output::{Format, Out, bar, say};

/// Arguments of `cadre eval perplexity`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// JSON lines with `domain` and `text`, or plain text; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Tokens that the model sees at most; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Tokens between the starts of two windows; smaller is slower and gives more context. By
    /// default the windows do not overlap.
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`. Numbers without predictions behind them are null.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    total: Numbers,
    domains: BTreeMap<String, Numbers>,
    lossy: Said,
}

#[derive(Debug, Serialize)]
struct Numbers {
    tokens: u64,
    /// Mean nats per token.
    nll: f64,
    perplexity: f64,
}

impl From<&Score> for Numbers {
    fn from(score: &Score) -> Self {
        Self {
            tokens: score.n_tokens,
            nll: score.nll(),
            perplexity: score.perplexity(),
        }
    }
}

/// Measures and prints.
pub(super) fn run(app: &App, args: &Args) -> Result<()> {
    let mut texts = Vec::new();
    for path in &args.data {
        texts.extend(data::read(path)?);
    }
    let session = SessionOptions {
        n_ctx: (args.ctx_size > 0).then_some(args.ctx_size),
        kv: args.cache.formats(),
        ..SessionOptions::default()
    };
    let loaded = args.model.load(app, &session)?;
    let tokenizer = loaded.tokenizer()?;
    let mut documents = Vec::with_capacity(texts.len());
    for document in texts {
        let tokens = tokenizer.encode(&document.text)?;
        documents.push(eval::Document {
            domain: document.domain,
            tokens,
        });
    }
    let limit = loaded.model.info().max_context;
    let window = if args.ctx_size > 0 {
        args.ctx_size
    } else {
        limit.min(4096)
    };
    let windows = Windows {
        window,
        stride: args.stride.unwrap_or(window),
    };

    let guard = app.interrupt.guard();
    let n_total = documents
        .iter()
        .map(|one| one.tokens.len().saturating_sub(1) as u64)
        .sum();
    let progress = bar(&app.env, "tokens", n_total);
    let kv = session.kv;
    let start = Instant::now();
    let result = eval::perplexity(&*loaded.model, &documents, windows, kv, &mut |done, _| {
        progress.set_position(done);
        if app.interrupt.requested() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    progress.finish_and_clear();
    drop(guard);
    app.interrupt.check()?;
    let result = result?;
    if result.total.n_tokens == 0 {
        let hint = "a document needs at least two tokens";
        return Err(Failure::new("the data holds nothing to predict")
            .hint(hint)
            .into());
    }
    print(&result, Said::of(loaded.model.info()), args.output)?;
    let summary = args
        .model
        .stream
        .summary(&*loaded.model, n_total as usize, start);
    if let Some(summary) = summary {
        say(&summary.to_string());
    }
    Ok(())
}

fn print(result: &Perplexity, lossy: Said, format: Format) -> Result<()> {
    let domains = result
        .domains
        .iter()
        .map(|(name, score)| (name.clone(), score.into()));
    let report = Report {
        total: (&result.total).into(),
        domains: domains.collect(),
        lossy,
    };
    let mut out = Out::new();
    match format {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&table(&report))?,
    }
    out.finish()
}

fn table(report: &Report) -> String {
    let names = report.domains.keys().map(|name| name.chars().count());
    let width = names.max().unwrap_or(0).max("domain".len());
    let mut text = format!(
        "{:width$}  {:>9}  {:>10}  {:>10}\n",
        "domain", "tokens", "nats/token", "perplexity"
    );
    let rows = report
        .domains
        .iter()
        .map(|(name, numbers)| (name.as_str(), numbers));
    for (name, numbers) in rows.chain([("all", &report.total)]) {
        let Numbers {
            tokens,
            nll,
            perplexity,
        } = numbers;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{name:width$}  {tokens:>9}  {nll:>10.4}  {perplexity:>10.3}"
        );
    }
    if let Some(rules) = report.lossy.rules() {
        let _ = writeln!(text, "lossy={rules}");
    }
    text
}
