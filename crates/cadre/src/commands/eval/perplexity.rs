//! `cadre eval perplexity`: how well a model predicts text, per domain.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cadre_checkpoint::EncodeOptions;
use cadre_engine::SessionOptions;
use cadre_engine::eval::{self, Perplexity, Score, Windows};
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::data;
use crate::failure::Failure;
use crate::lossy::Said;
use crate::model::{Loaded, ModelArgs};
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
    /// Predict the first token, too, from the token that begins (or else ends) a text, and let the last window reach back; also tell
    /// perplexities per word and byte. These are lm_eval's (`loglikelihood_rolling`), with windows of its `max_length` less 2.
    #[arg(long, conflicts_with = "stride")]
    rolling: bool,
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
    #[serde(flatten)]
    rolling: Option<Rolling>,
}

/// In lm_eval's words.
#[derive(Debug, Serialize)]
struct Rolling {
    word_perplexity: f64,
    byte_perplexity: f64,
    bits_per_byte: f64,
}

/// How long texts are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Length {
    words: u64,
    bytes: u64,
}

impl Length {
    /// Words are what lm_eval counts: one more than there are stretches of white space.
    fn of(text: &str) -> Self {
        // Python counts these four separators as white space, Unicode does not.
        let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
        let stretches = text.split(|c| !is_space(c)).filter(|one| !one.is_empty());
        Self {
            words: 1 + stretches.count() as u64,
            bytes: text.len() as u64,
        }
    }

    fn add(&mut self, other: Self) {
        self.words += other.words;
        self.bytes += other.bytes;
    }
}

/// How long the texts are, in all and by domain.
#[derive(Debug, Default)]
struct Lengths {
    total: Length,
    domains: BTreeMap<String, Length>,
}

impl Lengths {
    fn add(&mut self, document: &data::Document) {
        let length = Length::of(&document.text);
        self.total.add(length);
        let domain = self.domains.entry(document.domain.clone()).or_default();
        domain.add(length);
    }

    fn domain(&self, name: &str) -> Length {
        self.domains.get(name).copied().unwrap_or_default()
    }
}

impl Numbers {
    fn new(score: &Score, length: Option<Length>) -> Self {
        let per = |n: u64| score.nll_sum / n as f64;
        Self {
            tokens: score.n_tokens,
            nll: score.nll(),
            perplexity: score.perplexity(),
            rolling: length.map(|length| Rolling {
                word_perplexity: per(length.words).exp(),
                byte_perplexity: per(length.bytes).exp(),
                bits_per_byte: per(length.bytes) / std::f64::consts::LN_2,
            }),
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
    let mut lengths = args.rolling.then(Lengths::default);
    let first = match args.rolling {
        true => Some(first_token(&loaded)?),
        false => None,
    };
    for document in texts {
        if let Some(lengths) = &mut lengths {
            lengths.add(&document);
        }
        let tokens = match first {
            None => tokenizer.encode(&document.text)?,
            Some(first) => {
                let text = tokenizer.encode_with(&document.text, EncodeOptions::RENDERED)?;
                std::iter::once(first).chain(text).collect()
            }
        };
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
        fills_last: args.rolling,
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
    print(
        (&result, lengths.as_ref()),
        Said::of(loaded.model.info()),
        args.output,
    )?;
    let summary = args
        .model
        .stream
        .summary(&*loaded.model, n_total as usize, start);
    if let Some(summary) = summary {
        say(&summary.to_string());
    }
    Ok(())
}

/// The token that a text's first one is predicted from: what begins a text, or else what ends one, as lm_eval has it.
fn first_token(loaded: &Loaded) -> Result<u32> {
    let tokenizer = loaded.tokenizer()?;
    let chat = loaded.checkpoint.chat(&tokenizer)?;
    let spelled = chat.bos_token.or(chat.eos_token);
    let token = spelled.and_then(|spelled| tokenizer.token_id(&spelled));
    token.context(
        "the model names no token that begins or ends a text, from which --rolling would predict the first one; leave it out",
    )
}

fn print(
    (result, lengths): (&Perplexity, Option<&Lengths>),
    lossy: Said,
    format: Format,
) -> Result<()> {
    let domains = result.domains.iter().map(|(name, score)| {
        let length = lengths.map(|lengths| lengths.domain(name));
        (name.clone(), Numbers::new(score, length))
    });
    let report = Report {
        total: Numbers::new(&result.total, lengths.map(|lengths| lengths.total)),
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
            rolling: _,
        } = numbers;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{name:width$}  {tokens:>9}  {nll:>10.4}  {perplexity:>10.3}"
        );
    }
    if let Some(rolling) = &report.total.rolling {
        let Rolling {
            word_perplexity,
            byte_perplexity,
            bits_per_byte,
        } = rolling;
        let _ = writeln!(
            text,
            "word_perplexity={word_perplexity:.4} byte_perplexity={byte_perplexity:.4} bits_per_byte={bits_per_byte:.4}"
        );
    }
    if let Some(rules) = report.lossy.rules() {
        let _ = writeln!(text, "lossy={rules}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_python_splits_them() {
        for (text, words, bytes) in [
            ("", 1, 0),
            ("one", 1, 3),
            (" one  two\n", 4, 10),
            ("a\u{1c}\u{a0}b", 2, 5),
        ] {
            assert_eq!(Length::of(text), Length { words, bytes }, "{text:?}");
        }
    }
}
