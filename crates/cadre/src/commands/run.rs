//! `cadre run`: generates text, and on request shows its experts.

use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cadre_engine::{Finish, GenerateOptions, SessionOptions};
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::contrast::{ContrastArgs, Sessions};
use crate::experts::{ExpertView, ExpertWatch, Shown};
use crate::failure::Failure;
use crate::live::Live;
use crate::lossy::Said;
use crate::model::{ModelArgs, Seats};
use crate::output::{Format, Out, note, say};
use crate::sampling::SamplingArgs;
use crate::streaming::Summary;

/// Arguments of `cadre run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue.
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// File with the text to continue. Without -p and -f it is read from standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Most tokens to generate.
    #[arg(
        short = 'n',
        long = "predict",
        visible_alias = "n-predict",
        value_name = "N"
    )]
    #[arg(default_value_t = 200)]
    n_predict: usize,
    /// Longest prompt and answer together, in tokens; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    contrast: ContrastArgs,
    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Colour every token by its leading expert, and print what the experts did.
    #[arg(long)]
    experts: bool,
    /// Layer whose experts colour the text; by default the one that tells domains apart best.
    #[arg(long, value_name = "LAYER", requires = "experts")]
    layer: Option<usize>,
    /// Print only the new text, not the prompt before it.
    #[arg(long)]
    no_echo: bool,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    finish: &'static str,
    seed: u64,
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
    lossy: Said,
    #[serde(skip_serializing_if = "Option::is_none")]
    streaming: Option<Summary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<&'a Shown>,
}

/// Generates and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let prompt = read_prompt(app, args)?;
    let sampling = args.sampling.options()?;
    let options = SessionOptions {
        n_ctx: (args.ctx_size > 0).then_some(args.ctx_size),
        kv: args.cache.formats(),
        ..SessionOptions::default()
    };
    let n_sessions = args.contrast.n_sessions();
    let loaded = args.model.load_for(app, Seats::new(options, n_sessions))?;
    let tokenizer = loaded.tokenizer()?;
    let ids = tokenizer.encode(&prompt)?;
    let mut sessions = Sessions::new(&*loaded.model, &options, &args.contrast)?;
    let n_ctx = sessions.first().n_ctx();
    check_room(&ids, n_ctx, loaded.model.info().max_context)?;
    let view = match args.experts {
        true => Some(ExpertView::new(app, &loaded, args.layer)?),
        false => None,
    };
    let watch = view
        .as_ref()
        .map(|view| Ok::<_, anyhow::Error>((view, view.watch(&ids)?)));

    // From here on Ctrl-C is polled, so that colours end and what was written stays readable.
    let guard = app.interrupt.guard();
    let out = (args.output == Format::Text).then(Out::new);
    let mut live = Live::new(&tokenizer, &args.stop, app, out, watch.transpose()?);
    live.follow(&ids);
    if !args.no_echo {
        live.echo(&ids)?;
    }
    let generating = GenerateOptions {
        max_new_tokens: args.n_predict,
        stop_tokens: loaded.stop_tokens(&tokenizer)?,
        sampling,
    };
    let start = Instant::now();
    let generated = sessions.generate(&*loaded.model, &ids, &generating, &mut live)?;
    let transcript = live.finish()?;
    drop(guard);
    app.interrupt.check()?;

    let n_tokens = ids.len() + generated.tokens.len();
    let streaming = args.model.stream.summary(&*loaded.model, n_tokens, start);
    let rates = transcript.clock.rates(ids.len(), generated.tokens.len());
    // Nothing was routed when nothing was asked for.
    let watch = transcript.experts.filter(|_| args.n_predict > 0);
    let stats = watch.map(ExpertWatch::finish).transpose()?;
    let mut out = Out::new();
    if args.output == Format::Json {
        out.json(&Report {
            model: loaded.checkpoint.origin(),
            prompt: &prompt,
            text: &transcript.text,
            prompt_tokens: &ids,
            tokens: &generated.tokens,
            finish: finish_name(generated.finish, transcript.stopped),
            seed: sampling.seed,
            prompt_tokens_per_second: rates.prompt,
            tokens_per_second: rates.new,
            lossy: Said::of(loaded.model.info()).and(args.contrast.said()),
            streaming: streaming.clone(),
            experts: stats.as_ref(),
        })?;
    } else if let (Some(view), Some(stats)) = (&view, &stats) {
        out.write(&view.summary(stats)?)?;
    }
    out.finish()?;
    note(&app.env, &format!("{rates}; seed {}", sampling.seed));
    if let Some(streaming) = streaming.filter(|_| args.output == Format::Text) {
        say(&streaming.to_string());
    }
    Ok(())
}

fn finish_name(finish: Finish, stop_string: bool) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::StopToken(_) => "stop_token",
        Finish::ContextFull => "context_full",
        Finish::Stopped if stop_string => "stop_string",
        Finish::Stopped => "interrupted",
    }
}

/// The prompt from -p, -f or standard input; never empty.
fn read_prompt(app: &App, args: &Args) -> Result<String> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path);
            without_line_end(
                text.with_context(|| format!("cannot read the prompt file {}", path.display()))?,
            )
        }
        (None, None) if app.env.stdin_is_terminal => {
            let hint = "pass -p TEXT or -f FILE, or pipe text in";
            return Err(Failure::usage("there is no prompt").hint(hint).into());
        }
        (None, None) => {
            let mut text = String::new();
            let read = std::io::stdin().read_to_string(&mut text);
            read.context("cannot read the prompt from standard input")?;
            without_line_end(text)
        }
    };
    if prompt.is_empty() {
        let hint = "give the model something to continue, such as -p \"Once upon a time\"";
        return Err(Failure::usage("the prompt is empty").hint(hint).into());
    }
    Ok(prompt)
}

/// Editors and `echo` end files with a line break that nobody means as part of the prompt.
fn without_line_end(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
    }
    if text.ends_with('\r') {
        text.pop();
    }
    text
}

/// Refuses a prompt that leaves no room for even one new token.
fn check_room(prompt: &[u32], n_ctx: usize, limit: usize) -> Result<()> {
    if prompt.len() <= n_ctx {
        return Ok(());
    }
    let n_tokens = prompt.len();
    let message = format!("the prompt has {n_tokens} tokens, but the context holds {n_ctx}");
    let hint = if n_tokens <= limit {
        format!("pass -c {limit}, the limit of the model, or shorten the prompt")
    } else {
        format!("shorten the prompt; {limit} tokens is the limit of the model")
    };
    Err(Failure::new(message).hint(hint).into())
}
