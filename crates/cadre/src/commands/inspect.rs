//! `cadre inspect`: what is in a checkpoint, and how much of it one token uses.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, CheckpointError, ModelConfig, tensor_specs};
use serde::Serialize;

use crate::cli::App;
use crate::model::CheckpointArg;
use crate::output::{Format, Out, bytes, count};

/// Arguments of `cadre inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    architecture: String,
    digest: String,
    n_layers: usize,
    n_moe_layers: usize,
    n_experts: usize,
    top_k: usize,
    hidden_size: usize,
    expert_width: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
    tokenizer_vocab_size: Option<usize>,
    context: usize,
    tied_embeddings: bool,
    norm_topk_prob: bool,
    parameters: Sizes,
    bytes: Sizes,
    /// Key and value cache of one token in f32.
    kv_bytes_per_token: u64,
    /// Tensors of each number format.
    dtypes: BTreeMap<String, usize>,
}

/// A quantity, split by what a token touches.
#[derive(Debug, Default, Serialize)]
struct Sizes {
    /// Everything.
    total: u64,
    /// What one token uses: everything but the experts that it is not sent to.
    active: u64,
    /// What one token reads: as `active`, with one row of an input embedding that is not also the
    /// output head.
    read_per_token: u64,
    /// All experts.
    experts: u64,
    /// One expert of one layer.
    one_expert: u64,
}

/// Prints the report.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let checkpoint = args.checkpoint.open(app)?;
    checkpoint.expect_exactly(&tensor_specs(checkpoint.config()))?;
    let report = report(&checkpoint)?;
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&text(&report))?,
    }
    out.finish()
}

fn report(checkpoint: &Checkpoint) -> Result<Report> {
    let config = checkpoint.config();
    let (mut parameters, mut n_bytes) = (Sizes::default(), Sizes::default());
    let mut dtypes = BTreeMap::new();
    for name in checkpoint.tensor_names() {
        let view = checkpoint.tensor(name)?;
        *dtypes.entry(view.dtype.to_string()).or_default() += 1;
        add(&mut parameters, config, name, view.len() as u64);
        add(&mut n_bytes, config, name, view.bytes.len() as u64);
    }
    parameters.finish(config);
    n_bytes.finish(config);
    let kv_values = config.n_layers * config.kv_width();
    Ok(Report {
        model: checkpoint.origin().to_owned(),
        architecture: config.model_type.clone(),
        digest: checkpoint.digest().to_owned(),
        n_layers: config.n_layers,
        n_moe_layers: config.moe_layers().len(),
        n_experts: config.moe.n_experts,
        top_k: config.moe.top_k,
        hidden_size: config.hidden_size,
        expert_width: config.moe.intermediate_size,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        vocab_size: config.vocab_size,
        tokenizer_vocab_size: tokenizer_vocab_size(checkpoint)?,
        context: config.max_position_embeddings,
        tied_embeddings: config.tie_word_embeddings,
        norm_topk_prob: config.moe.norm_topk_prob(),
        parameters,
        bytes: n_bytes,
        kv_bytes_per_token: 4 * kv_values as u64,
        dtypes,
    })
}

/// `None` without a tokenizer, which is fine here; a damaged one is not.
fn tokenizer_vocab_size(checkpoint: &Checkpoint) -> Result<Option<usize>> {
    match checkpoint.tokenizer() {
        Ok(tokenizer) => Ok(Some(tokenizer.vocab_size())),
        Err(CheckpointError::MissingFile { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Counts one tensor, experts apart.
fn add(sizes: &mut Sizes, config: &ModelConfig, name: &str, size: u64) {
    sizes.total += size;
    if name.contains(".mlp.experts.") {
        sizes.experts += size;
        return;
    }
    sizes.active += size;
    let is_table = name == "model.embed_tokens.weight" && !config.tie_word_embeddings;
    sizes.read_per_token += if is_table {
        size / config.vocab_size as u64
    } else {
        size
    };
}

impl Sizes {
    /// Adds the picked experts once all tensors are counted.
    fn finish(&mut self, config: &ModelConfig) {
        let n_experts = (config.moe_layers().len() * config.moe.n_experts) as u64;
        if n_experts == 0 {
            return;
        }
        self.one_expert = self.experts / n_experts;
        let picked = self.experts / config.moe.n_experts as u64 * config.moe.top_k as u64;
        self.active += picked;
        self.read_per_token += picked;
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<14} {value}");
    };
    let (parameters, sizes) = (&report.parameters, &report.bytes);
    let dtypes: Vec<_> = report
        .dtypes
        .iter()
        .map(|(name, n)| format!("{n} {name}"))
        .collect();
    let tokenizer = match report.tokenizer_vocab_size {
        Some(size) => format!("{size} tokens"),
        None => "none".to_owned(),
    };
    line("model", report.model.clone());
    line("architecture", report.architecture.clone());
    line(
        "layers",
        format!(
            "{}, {} of them with experts",
            report.n_layers, report.n_moe_layers
        ),
    );
    line(
        "experts",
        format!(
            "{} per layer, {} per token, width {} of {}",
            report.n_experts, report.top_k, report.expert_width, report.hidden_size
        ),
    );
    line(
        "attention",
        format!(
            "{} query heads, {} key/value heads, width {}",
            report.n_heads, report.n_kv_heads, report.head_dim
        ),
    );
    line("context", format!("{} tokens", report.context));
    line(
        "vocabulary",
        format!("{}, tokenizer {tokenizer}", report.vocab_size),
    );
    line(
        "parameters",
        format!(
            "{} total, {} active per token ({:.1} %), {} in experts",
            count(parameters.total),
            count(parameters.active),
            100.0 * parameters.active as f64 / parameters.total.max(1) as f64,
            count(parameters.experts)
        ),
    );
    line(
        "bytes",
        format!(
            "{} total, {} read per token, {} per expert",
            bytes(sizes.total),
            bytes(sizes.read_per_token),
            bytes(sizes.one_expert)
        ),
    );
    line(
        "KV cache",
        format!("{} per token (f32)", bytes(report.kv_bytes_per_token)),
    );
    line("tensors", dtypes.join(", "));
    line("digest", report.digest.clone());
    text
}

/// Bytes of weights that decoding one token reads.
pub(crate) fn read_bytes_per_token(checkpoint: &Checkpoint) -> Result<u64> {
    Ok(report(checkpoint)?.bytes.read_per_token)
}
