//! `cadre split`: parts the neurons of a dense model's feed-forwards among experts, or gives every domain those it uses most.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, Tokenizer};
use cadre_engine::{LoadOptions, Logits, Model, Observer, Session, SessionOptions, load};
use cadre_reshape::{
    Activity, ActivityRecorder, Importance, PartitionBy, SplitOptions, domain_experts, split,
};
use clap::ValueEnum;

use crate::cli::App;
use crate::data::{self, Document};
use crate::dense::OutputArgs;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{bar, note};

/// Tokens of a text that are read at once; longer documents become several.
const WINDOW: usize = 1024;

/// Arguments of `cadre split`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Experts of every layer; with `--by domains` there is one for each domain.
    #[arg(long, value_name = "N", required_unless_present = "width")]
    experts: Option<usize>,
    /// Experts per token. Without it all of them, which computes what the dense model does.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Neurons of a shared expert, which every token uses.
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared: usize,
    /// Which neurons go together.
    #[arg(long, value_name = "HOW", default_value = "contiguous")]
    by: By,
    /// With `--by domains`: neurons of every expert.
    #[arg(long, value_name = "N", conflicts_with_all = ["experts", "top_k", "shared"])]
    width: Option<usize>,
    /// Text for `--by activity` and `--by domains`: JSON lines with `text` and `domain`, or plain text; may be given several
    /// times.
    #[arg(long, value_name = "FILE", required_if_eq_any([("by", "activity"), ("by", "domains")]))]
    data: Vec<PathBuf>,
    /// Tokens of it that are looked at, of every domain with `--by domains`.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
    /// Threads; 0 means all that the system grants.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Seed of random partitions, and of where clusters begin.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    /// As they lie in the file.
    Contiguous,
    /// At random.
    Random,
    /// Those that are active on the same tokens.
    Activity,
    /// For every domain of the text those that it uses most; a neuron may be in several experts (Read-ME).
    Domains,
}

/// Watches the model if that is asked for, parts and writes.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let looks = matches!(args.by, By::Activity | By::Domains);
    if !looks && !args.data.is_empty() {
        let text = "--data is looked at with `--by activity` and `--by domains` only";
        return Err(Failure::usage(text).into());
    }
    if (args.by == By::Domains) != args.width.is_some() {
        let text = "--width goes with `--by domains`, which needs it";
        return Err(Failure::usage(text).into());
    }
    let checkpoint = args.checkpoint.open(app)?;
    if let Some(width) = args.width {
        let seen = domains(app, args, &checkpoint)?;
        let (made, _) = domain_experts(&checkpoint, &seen, width)?;
        return args.output.write(app, &checkpoint, &made, None);
    }
    let by = match args.by {
        By::Random => PartitionBy::Random,
        By::Activity => PartitionBy::Activity(activity(app, args, &checkpoint)?),
        By::Contiguous | By::Domains => PartitionBy::Contiguous,
    };
    let n_experts = args.experts.unwrap_or(0);
    let options = SplitOptions {
        n_experts,
        top_k: args.top_k.unwrap_or(n_experts),
        n_shared: args.shared,
        by,
        seed: args.seed,
    };
    let (made, _) = split(&checkpoint, &options)?;
    args.output.write(app, &checkpoint, &made, None)
}

/// A model that reads text.
struct Reader {
    model: Arc<dyn Model>,
    tokenizer: Tokenizer,
    session: Session,
    /// Tokens that are read at once.
    window: usize,
}

impl Reader {
    fn new(args: &Args, checkpoint: &Checkpoint) -> Result<Self> {
        let options = LoadOptions {
            n_threads: (args.threads > 0).then_some(args.threads),
            ..LoadOptions::default()
        };
        let model = load(checkpoint, &options)?;
        let window = WINDOW.min(model.info().max_context);
        let session = model.session(&SessionOptions {
            n_ctx: Some(window),
            ..SessionOptions::default()
        })?;
        Ok(Self {
            tokenizer: checkpoint.tokenizer()?,
            model,
            session,
            window,
        })
    }

    /// Lets `observer` watch the first `n` tokens of `documents`; says after each sequence how long it was. The number of
    /// tokens that there were.
    fn read<O: Observer>(
        &mut self,
        app: &App,
        (documents, n): (&[&Document], usize),
        observer: &mut O,
        after: impl Fn(&mut O, usize),
    ) -> Result<usize> {
        let progress = bar(&app.env, "tokens", n as u64);
        let mut n_done = 0;
        for document in documents {
            for tokens in self.tokenizer.encode(&document.text)?.chunks(self.window) {
                let tokens = &tokens[..tokens.len().min(n - n_done)];
                if tokens.is_empty() {
                    break;
                }
                self.session.rewind(0);
                for chunk in tokens.chunks(self.session.chunk()) {
                    app.interrupt.check()?;
                    self.model
                        .forward(&mut self.session, chunk, Logits::None, observer)?;
                }
                after(observer, tokens.len());
                n_done += tokens.len();
                progress.set_position(n_done as u64);
            }
        }
        progress.finish_and_clear();
        Ok(n_done)
    }
}

fn documents(args: &Args) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in &args.data {
        documents.extend(data::read(path)?);
    }
    Ok(documents)
}

/// Which neurons are active on which tokens.
fn activity(app: &App, args: &Args, checkpoint: &Checkpoint) -> Result<Activity> {
    let documents = documents(args)?;
    let all: Vec<&Document> = documents.iter().collect();
    let _guard = app.interrupt.guard();
    let mut recorder = ActivityRecorder::new(args.tokens);
    let after = |recorder: &mut ActivityRecorder, n| recorder.end_sequence(n);
    let n = Reader::new(args, checkpoint)?.read(app, (&all, args.tokens), &mut recorder, after)?;
    warn_of_little("the text", n, args.tokens);
    Ok(recorder.finish())
}

/// How much every domain of the text uses every neuron; domains in the order in which they come.
fn domains(app: &App, args: &Args, checkpoint: &Checkpoint) -> Result<Vec<Importance>> {
    let documents = documents(args)?;
    let mut names: Vec<&str> = Vec::new();
    for document in &documents {
        if !names.contains(&&*document.domain) {
            names.push(&document.domain);
        }
    }
    let _guard = app.interrupt.guard();
    let mut reader = Reader::new(args, checkpoint)?;
    let mut seen = Vec::with_capacity(names.len());
    for (expert, name) in names.iter().enumerate() {
        let own = documents.iter().filter(|document| document.domain == *name);
        let own: Vec<&Document> = own.collect();
        let mut importance = Importance::default();
        let n = reader.read(app, (&own, args.tokens), &mut importance, |_, _| ())?;
        warn_of_little(&format!("the domain {name}"), n, args.tokens);
        note(&app.env, &format!("expert {expert}: {name}, {n} tokens"));
        seen.push(importance);
    }
    Ok(seen)
}

fn warn_of_little(what: &str, n: usize, wanted: usize) {
    if n < wanted {
        tracing::warn!("{what} has {n} tokens of the {wanted} that were to be looked at");
    }
}
