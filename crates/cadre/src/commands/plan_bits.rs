//! `cadre plan bits`: the fewest bits for every expert with which a model still reads a text well enough.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::{
    Checkpoint, Conversion, ConvertOptions, ConvertTo, Dtype, QuantizeOptions, TargetDtype,
};
use cadre_engine::eval::Document;
use cadre_engine::{LoadOptions, SessionOptions};
use cadre_reshape::bits::{
    BitsOptions, Chosen, Remembered, Sensitivity, Trials, Unit, choose, plan,
};
use cadre_reshape::{
    Applying, ReshapeError, Usage, UsageOptions, apply, plan_json, plan_text, shape_of,
};
use cadre_routing::plan::{ModelShape, Plan};
use clap::ValueEnum;

use super::apply_quality::{streamed, tokenized, window};
use super::convert;
use super::plan_bits_work::{Unfinished, identity};
use super::trace::write_file;
use crate::cli::App;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Out, bytes, note, spinner};
use crate::units::parse_bytes;

/// Formats that are chosen among where rows are whole super-blocks, and where they are not.
const OF_256: &[Dtype] = &[
    Dtype::Q8_0,
    Dtype::Q6K,
    Dtype::Q5K,
    Dtype::Q4K,
    Dtype::Q3K,
    Dtype::Q2K,
];
const OF_32: &[Dtype] = &[
    Dtype::Q8_0,
    Dtype::Q5_1,
    Dtype::Q5_0,
    Dtype::Q4_1,
    Dtype::Q4_0,
];

/// A GGUF file in one piece.
const ONE_FILE: ConvertTo = ConvertTo::Gguf {
    max_part_bytes: None,
};

/// Arguments of `cadre plan bits`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Text that the model is to be good at: JSON lines with `domain` and `text`, or plain text; may be given several times.
    /// The model reads it once for every expert and about twenty times more, so take as little as says enough.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// The part by which the perplexity of the text may rise.
    #[arg(long, value_name = "PART", default_value_t = 0.02, value_parser = parse_part)]
    max_ppl_increase: f64,
    /// Formats to choose among, such as q8_0,q5_0,q4_0. Without it: q8_0 q6_k q5_k q4_k q3_k q2_k, or where rows are no
    /// multiples of 256 q8_0 q5_1 q5_0 q4_1 q4_0; those with fewer bits than what is stored.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = super::quantize::parse_format)]
    formats: Vec<Dtype>,
    /// What has one format. With layer, llama.cpp loads the result too.
    #[arg(long, value_name = "UNIT", default_value = "expert")]
    unit: UnitArg,
    /// In place of one measurement per expert: a recording with --norms of the same kind of text. An expert is taken to be
    /// as sensitive as its weighted outputs are large, times the part of its weights that the format changes.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Tokens that the model sees at most; 0 means what it allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Threads; 0 means all that the system grants.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Memory that the model may take while measuring, such as 8GiB; experts are then read from the disk.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    mem_budget: Option<u64>,
    /// File to write the plan to. Until it is done, the model is beside it in every format, in a hidden folder. When interrupted,
    /// the same command goes on.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum UnitArg {
    /// Each expert.
    Expert,
    /// All experts of a layer.
    Layer,
}

/// Chooses and writes the plan.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let checkpoint = args.checkpoint.open(app)?;
    let shape = shape_of(&checkpoint);
    if shape.layers.is_empty() {
        let text = format!("{} has no layers with experts", checkpoint.origin());
        return Err(Failure::new(text).into());
    }
    let formats = args.formats(&checkpoint)?;
    // A recording that does not fit is refused before the model is written.
    let sensitivity = args.sensitivity(&shape)?;
    let documents = tokenized(&args.data, &checkpoint)?;
    let window = window(args.ctx_size, &checkpoint);
    let names = names(&formats);
    let identity = identity(&checkpoint, &names, (&documents, window));
    let work = Unfinished::begin(&args.output, &identity)?;
    let text = (&documents[..], window);
    let chosen = match args.measure(app, (&checkpoint, &formats), text, (sensitivity, &work)) {
        Ok(chosen) => chosen,
        Err(error) if app.interrupt.requested() => {
            let text = format!(
                "{} is not complete; run the same again to go on",
                args.output.display()
            );
            note(&app.env, &text);
            return Err(error);
        }
        Err(error) => {
            work.remove()?;
            return Err(error);
        }
    };
    let n_tokens: usize = documents.iter().map(|one| one.tokens.len()).sum();
    let written: Vec<Dtype> = formats
        .iter()
        .map(|one| one.unwrap_or(Dtype::F32))
        .collect();
    let plan = plan(
        &shape,
        &chosen,
        &written,
        args.notes(&chosen, &names, n_tokens),
    );
    write_file(&args.output, &plan_json(&plan))?;
    work.remove()?;
    note(&app.env, &format!("wrote {}", args.output.display()));
    let mut out = Out::new();
    out.write(&said(&checkpoint, (&chosen, &plan), &names, n_tokens)?)?;
    out.finish()
}

impl Args {
    /// Writes the model in every format and searches, or goes on with both.
    fn measure(
        &self,
        app: &App,
        (checkpoint, formats): (&Checkpoint, &[Option<Dtype>]),
        (documents, window): (&[Document], usize),
        (sensitivity, work): (Sensitivity, &Unfinished),
    ) -> Result<Chosen> {
        let shape = shape_of(checkpoint);
        let mut paths = Vec::new();
        for format in formats {
            paths.push(write(app, checkpoint, *format, work.folder())?);
        }
        let session = SessionOptions {
            n_ctx: Some(window),
            ..SessionOptions::default()
        };
        let stream = self
            .mem_budget
            .map(|budget| streamed((budget, "the budget"), checkpoint, &session))
            .transpose()?;
        let load = LoadOptions {
            n_threads: (self.threads > 0).then_some(self.threads),
            // Models that read a text once need not be laid out for speed.
            in_place: stream.is_none(),
            stream,
            ..LoadOptions::default()
        };
        let _guard = app.interrupt.guard();
        let bar = spinner(&app.env, "measuring".to_owned());
        let (mut n_trials, mut last) = (0u64, u64::MAX);
        let mut progress = |done: u64| {
            n_trials += u64::from(done <= last);
            last = done;
            bar.set_message(format!("measurement {n_trials}, {done} tokens"));
            match app.interrupt.requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let mut trials = Trials::new(paths, (documents, window), load, &mut progress)?;
        let mut trials = Remembered::open(&work.measurements(), &mut trials)?;
        if trials.n_known() > 0 {
            let text = format!("going on after {} measurements", trials.n_known());
            note(&app.env, &text);
        }
        let options = BitsOptions {
            max_increase: self.max_ppl_increase,
            unit: match self.unit {
                UnitArg::Expert => Unit::Expert,
                UnitArg::Layer => Unit::Layer,
            },
            sensitivity,
        };
        let chosen = choose(&shape, formats.len(), &options, &mut trials);
        bar.finish_and_clear();
        app.interrupt.check()?;
        Ok(chosen?)
    }

    /// Formats by bits, the stored one first as `None`.
    fn formats(&self, checkpoint: &Checkpoint) -> Result<Vec<Option<Dtype>>> {
        let config = checkpoint.config();
        let layer = config.moe.layers.first().copied().unwrap_or(0);
        let name = format!("model.layers.{layer}.mlp.experts.0.gate_proj.weight");
        let stored = checkpoint.tensor_info(&name);
        let stored = bits(stored.map_or(Dtype::F32, |(dtype, _)| dtype));
        let rows = [config.hidden_size, config.moe.intermediate_size];
        let fits = |format: &Dtype| rows.iter().all(|n| n.is_multiple_of(format.block_len()));
        let mut list = match self.formats.is_empty() {
            false => self.formats.clone(),
            true if fits(&Dtype::Q4K) => OF_256.to_vec(),
            true => OF_32.to_vec(),
        };
        if let Some(bad) = list.iter().find(|format| !fits(format)) {
            let text = format!(
                "{bad} does not fit the experts of {}: their rows of {} and {} values are no multiples of {}",
                checkpoint.origin(),
                rows[0],
                rows[1],
                bad.block_len()
            );
            return Err(Failure::new(text)
                .hint("name others with --formats, such as q8_0,q5_0,q4_0")
                .into());
        }
        list.retain(|format| bits(*format) < stored);
        list.sort_by(|a, b| bits(*b).total_cmp(&bits(*a)));
        list.dedup();
        if list.is_empty() {
            let text = format!(
                "no format has fewer bits than what {} stores",
                checkpoint.origin()
            );
            return Err(Failure::new(text).into());
        }
        Ok(std::iter::once(None)
            .chain(list.into_iter().map(Some))
            .collect())
    }

    fn sensitivity(&self, shape: &ModelShape) -> Result<Sensitivity> {
        let Some(path) = &self.trace else {
            return Ok(Sensitivity::Measured);
        };
        let usage = Usage::read(path, &UsageOptions::default())?;
        usage.check(shape)?;
        let outputs = usage.layers.iter().map(|layer| layer.output.clone());
        match outputs.collect::<Option<Vec<_>>>() {
            Some(outputs) => Ok(Sensitivity::Recorded(outputs)),
            None => Err(ReshapeError::TraceLacks {
                origin: path.display().to_string(),
                problem: "has no norms of outputs".to_owned(),
                hint: "record one with `cadre trace --norms`, or leave --trace out to measure every expert".to_owned(),
            }
            .into()),
        }
    }

    fn notes(
        &self,
        chosen: &Chosen,
        names: &[String],
        n_tokens: usize,
    ) -> BTreeMap<String, String> {
        let [high, low] = chosen.between;
        let unit = match self.unit {
            UnitArg::Expert => "expert",
            UnitArg::Layer => "layer",
        };
        [
            ("max-ppl-increase", self.max_ppl_increase.to_string()),
            ("ppl-increase", format!("{:.5}", chosen.increase())),
            ("formats", names.join(",")),
            ("between", format!("{}, {}", names[high], names[low])),
            ("unit", unit.to_owned()),
            ("measurements", chosen.n_trials.to_string()),
            ("tokens", n_tokens.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

/// Bits of a value.
fn bits(format: Dtype) -> f64 {
    8.0 * format.block_bytes() as f64 / format.block_len() as f64
}

fn names(formats: &[Option<Dtype>]) -> Vec<String> {
    let name = |format: &Option<Dtype>| match format {
        None => "as stored".to_owned(),
        Some(format) => format.name().to_lowercase(),
    };
    formats.iter().map(name).collect()
}

/// Writes the model with all experts in one format into `folder`.
fn write(
    app: &App,
    checkpoint: &Checkpoint,
    format: Option<Dtype>,
    folder: &Path,
) -> Result<PathBuf> {
    let config = checkpoint.config();
    let experts = config.moe.layers.iter().flat_map(|layer| {
        let of_layer = 0..config.n_experts_in(*layer);
        of_layer.filter_map(move |expert| Some(((*layer, expert), format?)))
    });
    let options = ConvertOptions {
        target: ONE_FILE,
        dtype: TargetDtype::Keep,
        allow_differences: false,
        quantize: QuantizeOptions {
            experts: experts.collect(),
            ..QuantizeOptions::default()
        },
    };
    let name = format.map_or("stored", Dtype::name).to_lowercase();
    let path = folder.join(format!("{name}.gguf"));
    if path.exists() {
        // It has this name only when it is complete.
        return Ok(path);
    }
    let conversion = Conversion::plan(checkpoint, "model", options)
        .context("formats by expert need a GGUF file")?;
    convert::write(app, &conversion, &path)?;
    Ok(path)
}

/// What was measured and chosen, for people.
fn said(
    checkpoint: &Checkpoint,
    (chosen, plan): (&Chosen, &Plan),
    names: &[String],
    n_tokens: usize,
) -> Result<String> {
    let options = Applying {
        target: ONE_FILE,
        pad: false,
    };
    let size = match plan.has_formats() {
        true => apply(checkpoint, plan, options)?.n_bytes(),
        false => checkpoint.data_bytes(),
    };
    let before = chosen.nll_before.exp();
    let mut text = format!("perplexity {before:.3} over {n_tokens} tokens\n");
    // Writing to a String cannot fail.
    for (name, increase) in names.iter().zip(&chosen.uniform).skip(1) {
        let _ = writeln!(text, "  all experts {name:8} {:+.2} %", 100.0 * increase);
    }
    let [lowered, all] = chosen.lowered;
    let [high, low] = chosen.between;
    let _ = match high == low {
        true => writeln!(text, "{} does for all", names[high]),
        false => writeln!(
            text,
            "{lowered} of {all} bear {}, the others {}",
            names[low], names[high]
        ),
    };
    let _ = writeln!(
        text,
        "perplexity {:.3} ({:+.2} %), {} of {}, {} measurements\n",
        chosen.nll_after.exp(),
        100.0 * chosen.increase(),
        bytes(size),
        bytes(checkpoint.data_bytes()),
        chosen.n_trials
    );
    Ok(text + &plan_text(plan))
}

fn parse_part(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok();
    value
        .filter(|value| value.is_finite() && *value >= 0.0)
        .ok_or_else(|| format!("`{text}` is no part; expected a number from 0, such as 0.02"))
}
