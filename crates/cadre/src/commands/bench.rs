//! `cadre bench`: speed of reading prompts and of generating, with llama-bench's flags and keys.

use std::time::Duration;

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, Dtype, held_sizes, model_sizes};
use cadre_engine::{LoadOptions, Model, SessionOptions, StoreOptions, StreamOptions, dense_bytes};
use cadre_kernels::doctor::{bandwidth, peaks, reading};
use cadre_store::probe::{self, Plan};
use cadre_store::reader::{OpenFile, best};
use clap::ValueEnum;

use crate::bench::{
    Around, Lists, Machine, Record, Runner, Setting, Streaming, Test, csv, markdown, median,
    most_used, rss_bytes,
};
use crate::cache::CacheArgs;
use crate::cli::App;
use crate::failure::Failure;
use crate::lossy::{LossyArgs, Said};
use crate::model::{CheckpointArg, QuantArg, Seats, load_from};
use crate::output::{Out, spinner};
use crate::steer::SteerArgs;
use crate::streaming::StreamArgs;

/// Bytes read per pass: several times the last-level cache of common machines.
const PASS: usize = 256 << 20;
const N_PASSES: usize = 3;
/// More bytes than this are not read to measure memory.
const LARGE: usize = 4 << 30;
/// How long the disk is measured before and after a repetition.
const DISK_TIME: Duration = Duration::from_millis(300);
/// Tokens of the first warm-up: enough for every expert of most models to be met, so that its pages are there.
const WARM_UP: usize = 512;

/// Arguments of `cadre bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Tokens of a prompt; 0 for no such test. Several values make several tests, here and below.
    #[arg(
        short = 'p',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "512"
    )]
    n_prompt: Vec<usize>,
    /// Tokens to generate; 0 for no such test.
    #[arg(
        short = 'n',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "128"
    )]
    n_gen: Vec<usize>,
    /// Tokens that the context holds before, which are not measured.
    #[arg(
        short = 'd',
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "0"
    )]
    n_depth: Vec<usize>,
    /// Sequences that generate together, one token of each at a time; rates count the tokens of all.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    seqs: Vec<usize>,
    /// Repetitions of each test.
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Threads; 0 means all that the system grants.
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "0"
    )]
    threads: Vec<usize>,
    /// Tokens of a prompt that are processed together.
    #[arg(short, long, value_name = "N", default_value_t = SessionOptions::default().chunk)]
    batch_size: usize,
    #[command(flatten)]
    cache: CacheArgs,
    /// Quantise the weights while loading.
    #[arg(long, value_name = "FORMAT", default_value = "none")]
    quant: QuantArg,
    /// Compute with the weights where the file has them.
    #[arg(long, conflicts_with = "mem_budget")]
    no_repack: bool,
    #[command(flatten)]
    stream: StreamArgs,
    #[command(flatten)]
    lossy: LossyArgs,
    #[command(flatten)]
    steer: SteerArgs,
    /// Start measuring at once.
    #[arg(long)]
    no_warmup: bool,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
}

/// Form of the result on standard output, as llama-bench calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// A Markdown table.
    Md,
    /// One list of records.
    Json,
    /// One record a line.
    Jsonl,
    /// Comma separated, without samples.
    Csv,
}

/// Measures and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let lists = Lists {
        prompts: &args.n_prompt,
        generated: &args.n_gen,
        depths: &args.n_depth,
        seqs: &args.seqs,
    };
    let tests = lists.tests();
    if tests.is_empty() {
        return Err(Failure::usage("there is nothing to measure")
            .hint("give -p or -n a number above 0")
            .into());
    }
    let checkpoint = args.checkpoint.open(app)?;
    let limit = checkpoint.config().max_position_embeddings;
    if let Some(test) = tests.iter().find(|test| test.n_ctx() > limit) {
        let message = format!(
            "{test} takes {} tokens of context, and the model has {limit}",
            test.n_ctx()
        );
        return Err(Failure::usage(message)
            .hint("give -p, -n and -d smaller numbers")
            .into());
    }
    let mut records = Vec::new();
    for &threads in &args.threads {
        records.extend(measure(app, args, &checkpoint, (threads, &tests))?);
    }
    print(&records, args.output)
}

/// All tests with one number of threads.
fn measure(
    app: &App,
    args: &Args,
    checkpoint: &Checkpoint,
    (threads, tests): (usize, &[Test]),
) -> Result<Vec<Record>> {
    let progress = spinner(&app.env, format!("loading {}", checkpoint.origin()));
    let setting = Setting {
        chunk: args.batch_size,
        kv: args.cache.formats(),
    };
    let stream = args.stream.options(checkpoint, largest(tests, setting))?;
    let options = LoadOptions {
        quant: args.quant.quant(),
        n_threads: (threads > 0).then_some(threads),
        in_place: args.no_repack,
        lossy: args.lossy.options(stream.is_some()),
        steering: args.steer.steering(checkpoint)?,
        stream,
        ..LoadOptions::default()
    };
    let low_bit = args
        .checkpoint
        .low_bit(app, &args.lossy, stream.is_some())?;
    let model = load_from((checkpoint, low_bit.as_ref()), &options, &|_| {})?;
    let pool = model.compute().pool();
    let held = held_sizes(checkpoint, args.quant.holding());
    let disk = stream
        .map(|stream| Disk::open(checkpoint, &*model, stream))
        .transpose()?;
    let machine = Machine {
        type_k: setting.kv.keys.name(),
        type_v: setting.kv.values.name(),
        n_batch: args.batch_size,
        n_ubatch: args.batch_size,
        n_threads: pool.n_threads(),
        ..Machine::new(checkpoint, model.info(), held.total)
    };
    let weights = weights_per_token(checkpoint, &*model);
    let runner = |test| Runner::new(&*model, checkpoint.config(), held, (test, setting));
    if !args.no_warmup || args.stream.preload {
        model.preload(&|_| {})?;
    }
    if !args.no_warmup {
        progress.set_message("warming up");
        let n_prompt = WARM_UP.min(checkpoint.config().max_position_embeddings);
        let lists = Lists {
            prompts: &[n_prompt],
            generated: &[],
            depths: &[0],
            seqs: &[],
        };
        for test in lists.tests() {
            runner(test)?.sample()?;
        }
    }
    let peak = peak(checkpoint, &*model);
    // The buffer that bandwidth is measured with is never among these.
    let mut peak_rss_bytes = rss_bytes();
    let mut records = Vec::new();
    for (at, &test) in tests.iter().enumerate() {
        let mut runner = runner(test)?;
        let mut samples = Vec::new();
        // Other users of the memory come and go, so that it is measured around every repetition.
        let mut bandwidths = vec![read_weights(&*model)];
        let mut disks = Vec::new();
        for repetition in 0..args.repetitions {
            app.interrupt.check()?;
            progress.set_message(format!(
                "{test} ({} of {}), {} of {} times",
                at + 1,
                tests.len(),
                repetition + 1,
                args.repetitions
            ));
            disks.extend(disk.as_ref().and_then(Disk::measure));
            samples.push(runner.sample()?);
            disks.extend(disk.as_ref().and_then(Disk::measure));
            peak_rss_bytes = peak_rss_bytes.max(rss_bytes());
            bandwidths.push(read_weights(&*model));
        }
        let around = Around {
            bandwidth: median(&bandwidths),
            weights,
            peak,
            peak_rss_bytes,
            lossy: Said::of(model.info()),
            streaming: disk.as_ref().map(|disk| Streaming {
                weights_budget_bytes: disk.budget,
                experts_bytes: disk.experts_bytes,
                disk: (!disks.is_empty()).then(|| median(&disks)),
            }),
        };
        records.push(Record::new(&machine, test, &samples, around));
    }
    progress.finish_and_clear();
    Ok(records)
}

/// The sessions of the test that takes most memory.
fn largest(tests: &[Test], setting: Setting) -> Seats {
    let most = tests.iter().max_by_key(|test| test.n_ctx() * test.n_seqs);
    let (n_ctx, n_seqs) = most.map_or((1, 1), |test| (test.n_ctx(), test.n_seqs));
    let session = SessionOptions {
        n_ctx: Some(n_ctx.max(WARM_UP)),
        chunk: setting.chunk,
        kv: setting.kv,
    };
    Seats::new(session, n_seqs)
}

/// The disk that experts are read from.
struct Disk {
    file: OpenFile,
    store: StoreOptions,
    budget: u64,
    experts_bytes: u64,
}

impl Disk {
    fn open(checkpoint: &Checkpoint, model: &dyn Model, stream: StreamOptions) -> Result<Self> {
        // The largest file holds the most experts.
        let files = checkpoint.files();
        let size = |path: &&std::path::Path| std::fs::metadata(path).map_or(0, |file| file.len());
        let Some(largest) = files.into_iter().max_by_key(size) else {
            return Err(Failure::new("the checkpoint is in no file").into());
        };
        let dense = dense_bytes(checkpoint);
        Ok(Self {
            file: OpenFile::open(largest)?,
            store: stream.store,
            budget: stream.budget,
            experts_bytes: model.info().weight_bytes.saturating_sub(dense),
        })
    }

    /// Bytes per second of reading random places as experts are read; `None` for a file too short to tell.
    fn measure(&self) -> Option<f64> {
        let StoreOptions {
            lanes,
            request_bytes,
            reader,
            ..
        } = self.store;
        let plan = Plan {
            lanes: vec![lanes],
            request_bytes: vec![request_bytes],
            time: DISK_TIME,
            most: DISK_TIME,
        };
        let reader = |lanes| reader.open(lanes).unwrap_or_else(|_| best(lanes).0);
        let measured = probe::measure(&self.file, &plan, reader);
        let measured =
            measured.inspect_err(|error| tracing::info!(%error, "the disk is not measured"));
        Some(measured.ok()?.bytes_per_second)
    }
}

/// Bytes per second of reading the weights where they lie: memory is not equally fast everywhere. A model that the
/// last-level cache may hold is held against memory all the same.
fn read_weights(model: &dyn Model) -> f64 {
    let pool = model.compute().pool();
    let matrices = model.matrices();
    let total: usize = matrices.iter().map(|matrix| matrix.bytes().len()).sum();
    if total < PASS {
        return bandwidth(pool, PASS, N_PASSES).median;
    }
    // An even part of a large model.
    let pieces: Vec<_> = matrices.iter().map(|matrix| matrix.bytes()).collect();
    let pieces: Vec<_> = pieces.into_iter().step_by((total / LARGE).max(1)).collect();
    reading(pool, &pieces)
}

/// Operations per second that the multipliers could do at best with weights like the model's.
fn peak(checkpoint: &Checkpoint, model: &dyn Model) -> Option<f64> {
    let peaks = peaks(model.compute());
    match most_used(checkpoint)? {
        Dtype::Bf16 if checkpoint.is_gguf() => peaks.bf16,
        format if format.is_quantized() && checkpoint.is_gguf() => peaks.int8,
        _ => None,
    }
}

/// Weights that a token is multiplied by, and of them those of the head.
fn weights_per_token(checkpoint: &Checkpoint, model: &dyn Model) -> (u64, u64) {
    let info = model.info();
    let head = (info.vocab_size * info.d_model) as u64;
    (
        model_sizes(checkpoint).parameters.read_per_token.max(head),
        head,
    )
}

fn print(records: &[Record], form: Form) -> Result<()> {
    let mut out = Out::new();
    match form {
        Form::Md => out.write(&markdown(records))?,
        Form::Json => out.json(&records)?,
        Form::Jsonl => {
            for record in records {
                out.json(record)?;
            }
        }
        Form::Csv => out.write(&csv(records)?)?,
    }
    out.finish()
}
