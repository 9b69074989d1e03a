//! `cadre inspect`: what is in a checkpoint, and how much of it one token uses. Reads headers only.

use std::collections::BTreeMap;

use anyhow::Result;
use cadre_checkpoint::{
    Checkpoint, DecoupledRouter, FormatSize, Holding, ModelSizes, held_sizes, kv_bytes_per_token,
    model_sizes, tensor_specs,
};
use cadre_engine::KvFormats;
use serde::Serialize;

use crate::cli::App;
use crate::commands::inspect_text;
use crate::demand::{self, Demand};
use crate::describe::{Attention, Rope, Router};
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Format, Out};

/// A `tokenizer.json` up to this size is parsed without being asked for: it takes a few milliseconds.
const SMALL_TOKENIZER: u64 = 1 << 20;

/// Arguments of `cadre inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Context, in tokens, for the memory of a session. By default 4096, or the model's limit if that is shorter.
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Add a table of the layers.
    #[arg(long)]
    layers: bool,
    /// Add the digest that recordings carry. It reads samples of every tensor, which takes long for large models.
    #[arg(long)]
    digest: bool,
    /// Parse the vocabulary even if it is large, for its size and for the stop tokens that only it knows.
    #[arg(long)]
    tokenizer: bool,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    /// `safetensors` or `gguf`.
    pub(crate) container: &'static str,
    pub(crate) architecture: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    pub(crate) n_layers: usize,
    pub(crate) n_moe_layers: usize,
    pub(crate) n_experts: usize,
    pub(crate) top_k: usize,
    /// Whether tokens get different numbers of experts, `top_k` at most.
    pub(crate) n_picks_differ: bool,
    pub(crate) hidden_size: usize,
    pub(crate) expert_width: usize,
    /// Width of the expert that every token uses.
    pub(crate) shared_expert_width: Option<usize>,
    /// Experts per layer that compute nothing, beside the others.
    pub(crate) n_null_experts: usize,
    /// Experts of each layer that has any, where these differ.
    pub(crate) experts_per_layer: Option<Vec<usize>>,
    /// Width of a feed-forward beside the experts.
    pub(crate) residual_width: Option<usize>,
    /// Width of the state that routers hand from layer to layer.
    pub(crate) recurrent_router_width: Option<usize>,
    /// The router that runs before the layers.
    pub(crate) decoupled_router: Option<DecoupledReport>,
    pub(crate) router: Option<Router>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    pub(crate) attention: Attention,
    pub(crate) rope: Rope,
    pub(crate) vocab_size: usize,
    tokenizer_vocab_size: Option<usize>,
    pub(crate) context: usize,
    pub(crate) tied_embeddings: bool,
    norm_topk_prob: bool,
    pub(crate) parameters: Sizes,
    pub(crate) bytes: Sizes,
    /// Key and value cache of one token in f32.
    pub(crate) kv_bytes_per_token: u64,
    /// Memory of the loaded model with one session.
    pub(crate) memory: Demand,
    /// Tensors of each number format.
    dtypes: BTreeMap<&'static str, usize>,
    /// Tensors and bytes of each number format.
    pub(crate) formats: BTreeMap<&'static str, FormatReport>,
    pub(crate) text: TextReport,
    pub(crate) ignored: Vec<Ignored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) layers: Option<Vec<Layer>>,
}

/// A small network over token ids whose logits all layers pick by.
#[derive(Debug, Serialize)]
pub(crate) struct DecoupledReport {
    pub(crate) width: usize,
    pub(crate) n_layers: usize,
    /// Whether every layer of the model has picks of its own.
    pub(crate) per_layer: bool,
}

impl From<DecoupledRouter> for DecoupledReport {
    fn from(router: DecoupledRouter) -> Self {
        Self {
            width: router.hidden_size,
            n_layers: router.n_layers,
            per_layer: router.per_layer,
        }
    }
}

/// A quantity, split by what a token touches.
#[derive(Debug, Serialize)]
pub(crate) struct Sizes {
    pub(crate) total: u64,
    pub(crate) active: u64,
    pub(crate) read_per_token: u64,
    pub(crate) experts: u64,
    pub(crate) one_expert: u64,
}

impl From<cadre_checkpoint::Sizes> for Sizes {
    fn from(sizes: cadre_checkpoint::Sizes) -> Self {
        Self {
            total: sizes.total,
            active: sizes.active,
            read_per_token: sizes.read_per_token,
            experts: sizes.experts,
            one_expert: sizes.one_expert,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct FormatReport {
    pub(crate) tensors: usize,
    pub(crate) bytes: u64,
}

impl From<&FormatSize> for FormatReport {
    fn from(size: &FormatSize) -> Self {
        Self {
            tensors: size.n_tensors,
            bytes: size.n_bytes,
        }
    }
}

/// The text side.
#[derive(Debug, Serialize)]
pub(crate) struct TextReport {
    /// Class in `tokenizer_config.json`, or model and pre-tokenizer of a GGUF file.
    pub(crate) tokenizer: Option<String>,
    /// Size of `tokenizer.json`.
    pub(crate) tokenizer_bytes: Option<u64>,
    pub(crate) vocab_size: Option<usize>,
    pub(crate) chat_templates: Vec<Template>,
    pub(crate) stop_tokens: Vec<Stop>,
    /// Whether the vocabulary was parsed: without, stop tokens that only it knows are missing.
    pub(crate) vocabulary_parsed: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Template {
    pub(crate) name: String,
    pub(crate) source: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Stop {
    pub(crate) id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    pub(crate) sources: Vec<&'static str>,
}

/// A stored tensor that the computation does not use.
#[derive(Debug, Serialize)]
pub(crate) struct Ignored {
    pub(crate) tensor: String,
    pub(crate) reason: &'static str,
}

#[derive(Debug, Serialize)]
pub(crate) struct Layer {
    pub(crate) layer: usize,
    /// Experts; 0 in a dense layer.
    pub(crate) n_experts: usize,
    /// Positions that its attention sees; all when absent.
    pub(crate) window: Option<usize>,
    pub(crate) parameters: u64,
    pub(crate) expert_parameters: u64,
    pub(crate) bytes: u64,
    pub(crate) formats: BTreeMap<&'static str, usize>,
}

/// Prints the report.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    if args.digest {
        // It is over the weights.
        return print(&args.checkpoint.open(app)?, args);
    }
    print(&*args.checkpoint.open_outline(app)?, args)
}

fn print(checkpoint: &Checkpoint, args: &Args) -> Result<()> {
    checkpoint.expect_exactly(&tensor_specs(checkpoint.config()))?;
    let limit = checkpoint.config().max_position_embeddings;
    check_context(args.ctx_size, limit)?;
    let report = report(checkpoint, args)?;
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&inspect_text::text(&report))?,
    }
    out.finish()
}

/// Refuses a context that no session of the model can have.
pub(crate) fn check_context(wanted: Option<usize>, limit: usize) -> Result<()> {
    match wanted {
        Some(n_ctx) if n_ctx == 0 || n_ctx > limit => {
            let message = format!("a context of {n_ctx} tokens is not possible");
            let hint = format!("the model allows 1 to {limit}");
            Err(Failure::usage(message).hint(hint).into())
        }
        _ => Ok(()),
    }
}

fn report(checkpoint: &Checkpoint, args: &Args) -> Result<Report> {
    let config = checkpoint.config();
    let sizes = model_sizes(checkpoint);
    let weights = held_sizes(checkpoint, Holding::Loaded).total;
    let text = text_report(checkpoint, args.tokenizer)?;
    let formats = sizes.formats.iter();
    Ok(Report {
        model: checkpoint.origin().to_owned(),
        container: match checkpoint.gguf() {
            Some(_) => "gguf",
            None => "safetensors",
        },
        architecture: config.model_type.clone(),
        digest: args.digest.then(|| checkpoint.digest().to_owned()),
        n_layers: config.n_layers,
        n_moe_layers: config.moe.layers.len(),
        n_experts: config.moe.n_experts,
        top_k: config.moe.top_k,
        n_picks_differ: config.moe.router.is_ragged(),
        hidden_size: config.hidden_size,
        expert_width: config.moe.intermediate_size,
        shared_expert_width: config.moe.shared.map(|shared| shared.intermediate_size),
        n_null_experts: config.moe.n_null,
        experts_per_layer: (!config.moe.uneven.is_empty()).then(|| config.moe.uneven.clone()),
        residual_width: config.moe.residual.map(|part| part.intermediate_size),
        recurrent_router_width: config.moe.recurrent_router,
        decoupled_router: config.moe.decoupled_router.map(DecoupledReport::from),
        router: Router::new(config),
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        attention: Attention::new(config),
        rope: Rope::new(config),
        vocab_size: config.vocab_size,
        tokenizer_vocab_size: text.vocab_size,
        context: config.max_position_embeddings,
        tied_embeddings: config.tie_word_embeddings,
        norm_topk_prob: config.moe.norm_topk_prob(),
        parameters: sizes.parameters.into(),
        bytes: sizes.bytes.into(),
        kv_bytes_per_token: kv_bytes_per_token(config, KvFormats::default()),
        memory: Demand::new(
            config,
            weights,
            demand::context(config, args.ctx_size),
            KvFormats::default(),
        ),
        dtypes: formats
            .clone()
            .map(|(f, size)| (f.name(), size.n_tensors))
            .collect(),
        formats: formats.map(|(f, size)| (f.name(), size.into())).collect(),
        text,
        ignored: ignored(checkpoint),
        layers: args.layers.then(|| layers(checkpoint, &sizes)),
    })
}

fn ignored(checkpoint: &Checkpoint) -> Vec<Ignored> {
    let one = |(tensor, reason): (&str, _)| Ignored {
        tensor: tensor.to_owned(),
        reason,
    };
    checkpoint.ignored().map(one).collect()
}

fn layers(checkpoint: &Checkpoint, sizes: &ModelSizes) -> Vec<Layer> {
    let config = checkpoint.config();
    let layer = |(layer, size): (usize, &cadre_checkpoint::LayerSize)| Layer {
        layer,
        n_experts: config.n_experts_in(layer),
        window: config.attention.windows.get(layer).copied().flatten(),
        parameters: size.parameters,
        expert_parameters: size.expert_parameters,
        bytes: size.n_bytes,
        formats: size.formats.iter().map(|(f, n)| (f.name(), *n)).collect(),
    };
    sizes.layers.iter().enumerate().map(layer).collect()
}

/// Tokenizer, chat templates and stop tokens. A large vocabulary is parsed only if `parse`; a missing one is fine, a
/// damaged one is not.
fn text_report(checkpoint: &Checkpoint, parse: bool) -> Result<TextReport> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let tokenizer_bytes = checkpoint.file_bytes("tokenizer.json");
    let (kind, n_tokens, exists) = match checkpoint.gguf() {
        Some(gguf) => {
            let kind = gguf.text_opt("tokenizer.ggml.model")?;
            let pre = gguf.text_opt("tokenizer.ggml.pre")?;
            let kind = kind.map(|kind| [kind, pre.unwrap_or_default()].join(" ").trim().to_owned());
            let n_tokens = match gguf.value(TOKENS) {
                Some(cadre_checkpoint::gguf::Value::Array(tokens)) => Some(tokens.len()),
                _ => None,
            };
            (kind, n_tokens, n_tokens.is_some())
        }
        None => (
            tokenizer_class(checkpoint)?,
            None,
            tokenizer_bytes.is_some(),
        ),
    };
    let is_small = tokenizer_bytes.is_some_and(|n_bytes| n_bytes <= SMALL_TOKENIZER);
    let tokenizer = if exists && (parse || is_small) {
        Some(checkpoint.tokenizer()?)
    } else {
        None
    };
    let chat = match &tokenizer {
        Some(tokenizer) => checkpoint.chat(tokenizer)?,
        None => checkpoint.chat_without_tokenizer()?,
    };
    let templates = chat.templates.names().map(|name| Template {
        name: name.to_owned(),
        source: chat.templates.location(name).unwrap_or_default().to_owned(),
    });
    let stop = |stop: &cadre_checkpoint::StopToken| Stop {
        id: stop.id,
        token: tokenizer
            .as_ref()
            .map(|t| t.token_str(stop.id).into_owned()),
        sources: stop.sources.clone(),
    };
    Ok(TextReport {
        tokenizer: kind,
        tokenizer_bytes,
        vocab_size: tokenizer.as_ref().map(|t| t.vocab_size()).or(n_tokens),
        chat_templates: templates.collect(),
        stop_tokens: chat.stop_tokens.iter().map(stop).collect(),
        vocabulary_parsed: tokenizer.is_some(),
    })
}

fn tokenizer_class(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let text = checkpoint.file_text("tokenizer_config.json")?;
    // What is wrong with the file is said where the chat side is read.
    let config: Option<serde_json::Value> = text.and_then(|text| serde_json::from_str(&text).ok());
    let class = config.and_then(|config| Some(config["tokenizer_class"].as_str()?.to_owned()));
    Ok(class)
}

/// Bytes of weights that decoding one token reads.
pub(crate) fn read_bytes_per_token(checkpoint: &Checkpoint) -> u64 {
    model_sizes(checkpoint).bytes.read_per_token
}
