//! `cadre serve`: a model behind HTTP, until Ctrl-C.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use cadre_checkpoint::{ChatTemplate, kv_bytes_per_token};
use cadre_engine::{SessionOptions, Steering};
use cadre_serve::{HttpLimits, ServeOptions, Server, StepOptions, StepOrder};
use clap::ValueEnum;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::failure::Failure;
use crate::model::{Loaded, ModelArgs, Seats};
use crate::output::{Out, bytes, say};
use crate::steer;
use crate::units::parse_bytes;

/// Between two looks at whether to end.
const WATCH: Duration = Duration::from_millis(50);

/// Arguments of `cadre serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen at. 127.0.0.1 serves this machine alone, 0.0.0.0 whoever can reach it: set a key then.
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 takes one that is free.
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// Name that requests call the model by; may be given several times. By default the last part of -m.
    #[arg(short, long, value_name = "NAME")]
    alias: Vec<String>,
    /// Longest prompt and answer together, in tokens; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Requests that are computed together. Each has a cache of keys and values of its own. Also spelled -np.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    parallel: usize,
    /// The most memory for keys and values of all requests together, and of prompts that are kept for requests that begin alike. By
    /// default what --parallel full contexts take. With less, more requests than fit share it: some wait.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    kv_memory: Option<u64>,
    /// Of the requests that generate, the most that take part in one pass; by default all do. With --mem-budget a pass then needs fewer experts
    /// from disk, the more so as those go together that share experts; nobody waits for more than three rounds.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    step_requests: Option<usize>,
    /// How they are chosen: experts, those that share most of them, or turns.
    #[arg(
        long,
        value_name = "ORDER",
        default_value = "experts",
        requires = "step_requests"
    )]
    step_order: Order,
    /// A steering that requests may name, of a file as --steer or --plan read; may be given several times.
    #[arg(long, value_name = "NAME=FILE", value_parser = named_file)]
    steer_plan: Vec<(String, PathBuf)>,
    /// Tokens that are computed in one pass, of all requests together.
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    batch_size: usize,
    /// Of these, tokens of prompts in a pass in which others generate: fewer let generated tokens wait less, more read prompts
    /// faster. By default a 64th of what is left of all prompts, at least 8 for a dense model and n_experts / top_k times as many
    /// for one with experts, at most a quarter of --batch-size.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    prompt_batch_size: Option<usize>,
    /// Answers that may wait for their turn; more are refused.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    max_queue: usize,
    /// Largest body of a request.
    #[arg(long, value_name = "SIZE", default_value = "8MiB", value_parser = parse_bytes)]
    max_body: u64,
    /// Key that requests need, as `Authorization: Bearer KEY`; may be given several times. Better in a file or in
    /// CADRE_API_KEY, since everybody on this machine sees the command line.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// File with a key on every line.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Origin whose web pages may use the server, such as `https://app.example`, or `*`; may be given several times.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Chat template (Jinja) to use in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// After Ctrl-C or SIGTERM, seconds for requests that run to come to an end. A second Ctrl-C ends at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    #[command(flatten)]
    cache: CacheArgs,
}

/// How requests are chosen for a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Order {
    /// Those that share experts.
    Experts,
    /// In turns.
    Turns,
}

impl Order {
    fn order(self) -> StepOrder {
        match self {
            Self::Experts => StepOrder::Experts,
            Self::Turns => StepOrder::Turns,
        }
    }
}

/// `NAME=FILE`.
fn named_file(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(file)))
        }
        _ => Err("expected a name and a file, such as calm=steer.json".to_owned()),
    }
}

/// A number of things, of which there must be some.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}

/// Serves until it is told to end.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let address = address(args)?;
    let keys = keys(app, args)?;
    let template = template(args)?;
    let session = SessionOptions {
        n_ctx: (args.ctx_size > 0).then_some(args.ctx_size),
        kv: args.cache.formats(),
        chunk: args.batch_size,
    };
    let names = names(args);
    let sessions = Seats {
        kv_memory: args.kv_memory,
        ..Seats::new(session, args.parallel)
    };
    let loaded = args.model.load_for(app, sessions)?;
    let options = ServeOptions {
        address,
        names,
        keys,
        origins: args.cors_origin.clone(),
        template,
        session,
        parallel: args.parallel,
        kv_memory: args
            .kv_memory
            .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
        steps: args.step_requests.map(|most| StepOptions {
            most,
            order: args.step_order.order(),
        }),
        plans: plans(args, &loaded)?,
        batch: args.batch_size,
        prompt_batch: args.prompt_batch_size,
        queue: args.max_queue,
        http: HttpLimits {
            body_bytes: usize::try_from(args.max_body).unwrap_or(usize::MAX),
            ..HttpLimits::default()
        },
        heeds_sigterm: true,
    };
    // From here on Ctrl-C is polled, so that requests that run may come to an end.
    let guard = app.interrupt.guard();
    let name = options.names[0].clone();
    let server = Server::start(&loaded.checkpoint, loaded.model.clone(), options)?;
    let url = format!("http://{}", server.address());
    let mut out = Out::new();
    out.write(&format!("{url}\n"))?;
    out.finish()?;
    say(&summary(args, &loaded, &session, &name));
    while !app.interrupt.requested() && !server.was_told_to_end() {
        std::thread::sleep(WATCH);
    }
    say("ending; Ctrl-C once more to end at once");
    let in_time = server.end(Duration::from_secs(args.grace));
    drop(guard);
    match in_time {
        true => Ok(()),
        false => Err(Failure::new("requests that ran were broken off")
            .hint("--grace gives them more time")
            .into()),
    }
}

/// What it serves, and what that may take.
fn summary(args: &Args, loaded: &Loaded, session: &SessionOptions, name: &str) -> String {
    let n_ctx = session.context(loaded.model.info().max_context);
    let per_token = kv_bytes_per_token(loaded.checkpoint.config(), session.kv);
    let kv = per_token.saturating_mul((n_ctx * args.parallel) as u64);
    let kv = args.kv_memory.unwrap_or(kv);
    format!(
        "serving `{name}`: {} requests at a time, {n_ctx} tokens each, {} of keys and values at most; Ctrl-C ends",
        args.parallel,
        bytes(kv)
    )
}

/// The steerings that requests may name.
fn plans(args: &Args, loaded: &Loaded) -> Result<Vec<(String, Steering)>> {
    let mut plans: Vec<(String, Steering)> = Vec::new();
    for (name, path) in &args.steer_plan {
        if plans.iter().any(|(known, _)| known == name) {
            return Err(Failure::usage(format!("two plans are named `{name}`")).into());
        }
        plans.push((name.clone(), steer::read(path, &loaded.checkpoint)?));
    }
    Ok(plans)
}

fn address(args: &Args) -> Result<SocketAddr> {
    let host = args.host.trim_matches(['[', ']']);
    let found = (host, args.port).to_socket_addrs();
    let address = found.ok().and_then(|mut addresses| addresses.next());
    address.ok_or_else(|| {
        Failure::usage(format!("there is no address `{}`", args.host))
            .hint("pass --host 127.0.0.1 for this machine alone, 0.0.0.0 for all of its addresses")
            .into()
    })
}

/// Keys from the command line, the file and the environment.
fn keys(app: &App, args: &Args) -> Result<Vec<String>> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("cannot read the keys in {}", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let before = keys.len();
        keys.extend(lines.map(str::to_owned));
        if keys.len() == before {
            let message = format!("{} has no key", path.display());
            return Err(Failure::usage(message)
                .hint("write one on every line")
                .into());
        }
    }
    keys.extend(app.env.api_key.as_ref().map(|key| key.0.clone()));
    match keys.iter().any(|key| key.trim().is_empty()) {
        true => Err(Failure::usage("a key is empty").into()),
        false => Ok(keys),
    }
}

fn template(args: &Args) -> Result<Option<ChatTemplate>> {
    let Some(path) = &args.chat_template_file else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Some(ChatTemplate::parse(
        &path.display().to_string(),
        &text,
    )?))
}

/// What the model is called; never nothing.
fn names(args: &Args) -> Vec<String> {
    match args.alias.is_empty() {
        true => vec![args.model.checkpoint.short_name()],
        false => args.alias.clone(),
    }
}
