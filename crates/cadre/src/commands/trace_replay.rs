//! `cadre trace replay`: what a cache of experts would have done with a recorded routing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use cadre_checkpoint::Checkpoint;
use cadre_store::policies::HALF_LIFE;
use cadre_store::predictors::{EdgeMoe, Popularity, Predictor, Previous, Score, Scoreboard};
use cadre_store::replay::{ExpertSizes, Outcome, Replay, Tally};
use cadre_store::{ExpertId, Passing, PolicyKind, Recording};
use cadre_trace::{TraceMeta, TraceReader};
use serde::Serialize;

use crate::cli::App;
use crate::commands::trace_replay_text;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Format, Out, bar};
use crate::units::parse_bytes;

/// Arguments of `cadre trace replay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The recording.
    trace: PathBuf,
    /// Room for experts, as shares of all of them (25%) or as sizes (2GiB, with --model).
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values = ["10%", "25%", "50%", "75%"])]
    budgets: Vec<Budget>,
    /// What gives way in a full cache: lru, lfu, lfru, edgemoe, layer-partition, random. By default all of them.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    policies: Vec<PolicyKind>,
    /// Tokens at the start of every sequence that are taken as a prompt, whose experts are read once per layer.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt: usize,
    /// Prompt tokens that go through the model together.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Add a model whose router knows the picks of N tokens before the first of them is computed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    ahead: Option<u64>,
    // Only for the sizes of the experts; without it all are taken as equal.
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// Room for experts.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Budget {
    /// Of all experts, 0 to 1.
    Share(f64),
    Bytes(u64),
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            return parse_bytes(text).map(Self::Bytes);
        };
        let percent = percent.trim_end().parse::<f64>().ok();
        percent
            .filter(|percent| (0.0..=100.0).contains(percent))
            .map(|percent| Self::Share(percent / 100.0))
            .ok_or_else(|| format!("`{text}` is not between 0% and 100%"))
    }
}

/// The document behind `-o json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) architecture: String,
    pub(crate) digest: String,
    /// Layers that have experts.
    pub(crate) n_layers: usize,
    pub(crate) n_experts: usize,
    pub(crate) top_k: usize,
    pub(crate) n_tokens: usize,
    pub(crate) n_sequences: usize,
    /// Of these, tokens of prompts.
    pub(crate) n_prompt_tokens: u64,
    /// What bytes are: `bytes`, or `experts` where no model says how large they are.
    pub(crate) unit: &'static str,
    /// Size of an expert and number of experts of that size.
    pub(crate) sizes: Vec<(usize, usize)>,
    pub(crate) total_bytes: u64,
    /// What a token reads without any cache.
    pub(crate) bytes_per_token: f64,
    pub(crate) results: Vec<Row>,
    pub(crate) predictors: Vec<PredictorRow>,
}

/// One policy with one budget.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// A policy; `belady` for the bound, `ahead-N` for a router that knows N tokens.
    pub(crate) policy: String,
    /// Of all experts, 0 to 1.
    pub(crate) share: f64,
    pub(crate) budget_bytes: u64,
    pub(crate) n_slots: usize,
    pub(crate) decode: Side,
    pub(crate) prompt: Side,
    evictions: u64,
    refused: u64,
    /// Decoding: hit rate over that of the bound.
    of_bound: f64,
}

/// Decoding, or prompts.
#[derive(Debug, Serialize)]
pub(crate) struct Side {
    pub(crate) hit_rate: f64,
    pub(crate) bytes_read_per_token: f64,
    lookups: u64,
    hits: u64,
    bytes_read: u64,
}

impl From<&Tally> for Side {
    fn from(tally: &Tally) -> Self {
        Self {
            hit_rate: tally.hit_rate(),
            bytes_read_per_token: tally.bytes_per_token(),
            lookups: tally.lookups,
            hits: tally.hits,
            bytes_read: tally.bytes_read,
        }
    }
}

/// How good a way of guessing is.
#[derive(Debug, Serialize)]
pub(crate) struct PredictorRow {
    pub(crate) predictor: &'static str,
    /// Share of the picks.
    pub(crate) overlap: f64,
    /// Share of the tokens whose picks in a layer were all guessed.
    pub(crate) whole_sets: f64,
    /// `overlap` of every layer.
    pub(crate) layers: Vec<f64>,
}

impl From<&Score> for PredictorRow {
    fn from(score: &Score) -> Self {
        let overall = score.overall();
        Self {
            predictor: score.name,
            overlap: overall.overlap(),
            whole_sets: overall.whole_sets(),
            layers: score.layers.iter().map(|layer| layer.overlap()).collect(),
        }
    }
}

/// Replays and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let mut reader = TraceReader::open(&args.trace)?;
    let meta = reader.meta().clone();
    let (layers, recording) = recording(&args.trace, &mut reader)?;
    let sizes = sizes(app, args, (&meta, &layers))?;
    let passing = Passing {
        n_prompt: args.prompt,
        chunk: args.batch_size as usize,
    };
    let replay = Replay::new(&recording, &sizes, passing);
    let results = results(app, args, &replay, sizes.total())?;
    let nothing = replay.bound(0);
    let (decode, prompt) = (nothing.decode, nothing.prompt);
    let report = Report {
        architecture: meta.architecture,
        digest: meta.digest,
        n_layers: layers.len(),
        n_experts: meta.n_experts,
        top_k: meta.top_k,
        n_tokens: recording.n_tokens(),
        n_sequences: recording.sequences().len(),
        n_prompt_tokens: prompt.n_tokens,
        unit: if args.checkpoint.is_given() {
            "bytes"
        } else {
            "experts"
        },
        sizes: sizes.sizes().to_vec(),
        total_bytes: sizes.total(),
        bytes_per_token: match decode.n_tokens {
            0 => prompt.bytes_per_token(),
            _ => decode.bytes_per_token(),
        },
        results,
        predictors: predictors(app, &recording)?,
    };
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&trace_replay_text::text(&report))?,
    }
    out.finish()
}

/// Picks of one layer and sequence.
#[derive(Default)]
struct Picks {
    experts: Vec<u16>,
    ends: Vec<usize>,
}

impl Picks {
    fn tokens(&self) -> Vec<&[u16]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends);
        ranges
            .map(|(start, &end)| &self.experts[start..end])
            .collect()
    }
}

/// Reads the whole trace: the decoder layers that are in it, and their picks.
fn recording(path: &Path, reader: &mut TraceReader) -> Result<(Vec<usize>, Recording)> {
    let mut sequences: BTreeMap<u32, BTreeMap<usize, Picks>> = BTreeMap::new();
    let shown = path.display();
    while let Some(block) = reader.next_block()? {
        for row in block.rows() {
            let layers = sequences.entry(row.seq).or_default();
            let picks = layers.entry(usize::from(row.layer)).or_default();
            if row.pos as usize != picks.ends.len() {
                let message = format!(
                    "{shown}: sequence {} goes on at position {} in layer {}, and {} was to come",
                    row.seq,
                    row.pos,
                    row.layer,
                    picks.ends.len()
                );
                return Err(Failure::new(message)
                    .hint("a replay needs all tokens in order: record it again")
                    .into());
            }
            picks.experts.extend_from_slice(row.experts);
            picks.ends.push(picks.experts.len());
        }
    }
    let mut layers: Vec<usize> = sequences
        .values()
        .flat_map(|one| one.keys().copied())
        .collect();
    layers.sort_unstable();
    layers.dedup();
    let mut recording = Recording::new(layers.len(), reader.meta().n_experts);
    for (seq, picks) in &sequences {
        let tokens: Vec<_> = picks.values().map(Picks::tokens).collect();
        if !recording.push_sequence(&tokens) {
            let message = format!("{shown}: not all layers have all tokens of sequence {seq}");
            return Err(Failure::new(message).hint("record it again").into());
        }
    }
    if recording.n_tokens() == 0 {
        return Err(Failure::new(format!("{shown} has no tokens")).into());
    }
    Ok((layers, recording))
}

/// The sizes of the recorded experts: those of the model that was named, or 1 each.
fn sizes(app: &App, args: &Args, (meta, layers): (&TraceMeta, &[usize])) -> Result<ExpertSizes> {
    let shape = (layers.len(), meta.n_experts);
    if !args.checkpoint.is_given() {
        if args
            .budgets
            .iter()
            .any(|one| matches!(one, Budget::Bytes(_)))
        {
            return Err(
                Failure::usage("a budget in bytes needs the sizes of the experts")
                    .hint("pass -m MODEL, or a share such as 25%")
                    .into(),
            );
        }
        return Ok(ExpertSizes::new(shape.0, shape.1, |_| 1));
    }
    let checkpoint = args.checkpoint.open_outline(app)?;
    let config = checkpoint.config();
    let is_other = config.n_layers != meta.n_layers
        || config.moe.n_experts != meta.n_experts
        || !layers.iter().all(|&layer| config.is_moe_layer(layer));
    if is_other {
        let message = format!(
            "{} has {} layers x {} experts, and the trace is of a {} of {} x {}",
            checkpoint.origin(),
            config.n_layers,
            config.moe.n_experts,
            meta.architecture,
            meta.n_layers,
            meta.n_experts
        );
        return Err(Failure::usage(message)
            .hint("pass the model that was recorded, in any format, or leave -m out")
            .into());
    }
    let bytes = expert_bytes(&checkpoint);
    Ok(ExpertSizes::new(shape.0, shape.1, |id: ExpertId| {
        let layer = layers[usize::from(id.layer)];
        let n_bytes = bytes.get(&(layer, usize::from(id.expert)));
        n_bytes.copied().unwrap_or(0)
    }))
}

/// Bytes of every expert, by decoder layer and number, as stored.
fn expert_bytes(checkpoint: &Checkpoint) -> BTreeMap<(usize, usize), usize> {
    let mut bytes = BTreeMap::new();
    for (name, format, shape) in checkpoint.tensor_infos() {
        let place = name.strip_prefix("model.layers.").and_then(|rest| {
            let (layer, rest) = rest.split_once(".mlp.experts.")?;
            let (expert, _) = rest.split_once('.')?;
            Some((layer.parse().ok()?, expert.parse().ok()?))
        });
        if let Some(place) = place {
            let n_bytes = format.n_bytes(shape.iter().product());
            *bytes.entry(place).or_default() += n_bytes.unwrap_or(0);
        }
    }
    bytes
}

/// All policies with all budgets, the bound first.
fn results(app: &App, args: &Args, replay: &Replay<'_>, total: u64) -> Result<Vec<Row>> {
    let policies = if args.policies.is_empty() {
        PolicyKind::all().to_vec()
    } else {
        args.policies.clone()
    };
    let n_runs = (policies.len() + 1) * args.budgets.len();
    let progress = bar(&app.env, "replays", n_runs as u64);
    let mut rows = Vec::new();
    for budget in &args.budgets {
        let (share, n_bytes) = match *budget {
            Budget::Share(share) => (share, (share * total as f64) as u64),
            Budget::Bytes(n_bytes) => {
                let share = n_bytes as f64 / total.max(1) as f64;
                (share.min(1.0), n_bytes)
            }
        };
        let bound = replay.bound(n_bytes);
        let mut add = |policy: String, outcome: Outcome| {
            rows.push(Row {
                policy,
                share,
                budget_bytes: n_bytes,
                n_slots: outcome.n_slots,
                decode: Side::from(&outcome.decode),
                prompt: Side::from(&outcome.prompt),
                evictions: outcome.counts.evictions,
                refused: outcome.counts.refused,
                of_bound: outcome.decode.hits as f64 / bound.decode.hits.max(1) as f64,
            });
            progress.inc(1);
        };
        add("belady".to_owned(), bound);
        if let Some(n_tokens) = args.ahead {
            add(format!("ahead-{n_tokens}"), replay.ahead(n_bytes, n_tokens));
        }
        for &policy in &policies {
            app.interrupt.check()?;
            add(policy.to_string(), replay.run(policy, n_bytes));
        }
    }
    progress.finish_and_clear();
    Ok(rows)
}

/// How well each way of guessing does on the recording, token by token.
fn predictors(app: &App, recording: &Recording) -> Result<Vec<PredictorRow>> {
    let (n_layers, n_experts) = (recording.n_layers(), recording.n_experts());
    let predictors: Vec<Box<dyn Predictor>> = vec![
        Box::new(Previous::new(n_layers)),
        Box::new(Popularity::new(n_layers, n_experts, HALF_LIFE)),
        Box::new(EdgeMoe::new(n_layers, n_experts)),
    ];
    let mut board = Scoreboard::new(n_layers, predictors);
    for token in 0..recording.n_tokens() {
        app.interrupt.check()?;
        for layer in 0..n_layers {
            let at = u16::try_from(layer).context("too many layers")?;
            board.observe(at, recording.picks(layer, token));
        }
    }
    Ok(board.scores().iter().map(PredictorRow::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_shares_or_sizes() {
        assert_eq!("25%".parse(), Ok(Budget::Share(0.25)));
        assert_eq!(" 0.5 %".parse(), Ok(Budget::Share(0.005)));
        assert_eq!("2GiB".parse(), Ok(Budget::Bytes(2 << 30)));
        for bad in ["101%", "-1%", "x%", "%", "much", "nan%"] {
            assert!(bad.parse::<Budget>().is_err(), "{bad}");
        }
    }
}
