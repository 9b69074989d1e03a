//! `cadre trace replay`: what a cache of experts would have done with a recorded routing.

mod load;
mod report;
mod text;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};
use cadre_store::policies::HALF_LIFE;
use cadre_store::predictors::{EdgeMoe, Exact, Popularity, Predictor, Previous, Scoreboard};
use cadre_store::replay::{Outcome, Replay};
use cadre_store::{Passing, PolicyKind, Recording};
use cadre_trace::TraceReader;

use self::report::{AheadRow, PredictorRow, Report, Row, Side};
use crate::cli::App;
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
    /// What gives way in a full cache: duel, lru, lfu, lfru, edgemoe, layer-partition, random. By default all of them.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    policies: Vec<PolicyKind>,
    /// Tokens at the start of every sequence that are taken as a prompt, whose experts are read once per layer.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt: usize,
    /// Prompt tokens that go through the model together.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Experts that are read ahead per layer at most, in the last table. 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 2)]
    read_ahead: usize,
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

impl Budget {
    /// As a share of all, and in bytes.
    fn of(self, total: u64) -> (f64, u64) {
        match self {
            Self::Share(share) => (share, (share * total as f64) as u64),
            Self::Bytes(n_bytes) => {
                let share = n_bytes as f64 / total.max(1) as f64;
                (share.min(1.0), n_bytes)
            }
        }
    }
}

impl Args {
    /// The policies to replay; the default one first where none was chosen.
    fn policies(&self) -> Vec<PolicyKind> {
        if !self.policies.is_empty() {
            return self.policies.clone();
        }
        let mut policies = PolicyKind::all().to_vec();
        policies.sort_by_key(|&policy| policy != PolicyKind::default());
        policies
    }
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

/// Replays and prints.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let mut reader = TraceReader::open(&args.trace)?;
    let meta = reader.meta().clone();
    let (layers, recording) = load::recording(&args.trace, &mut reader)?;
    let sizes = load::sizes(app, args, (&meta, &layers))?;
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
        ahead_policy: args.policies().first().map_or("", |policy| policy.name()),
        read_ahead: args.read_ahead,
        ahead: ahead(app, args, (&replay, &recording), sizes.total())?,
    };
    let mut out = Out::new();
    match args.output {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&text::text(&report))?,
    }
    out.finish()
}

/// All policies with all budgets, the bound first.
fn results(app: &App, args: &Args, replay: &Replay<'_>, total: u64) -> Result<Vec<Row>> {
    let policies = args.policies();
    let n_runs = (policies.len() + 1) * args.budgets.len();
    let progress = bar(&app.env, "replays", n_runs as u64);
    let mut rows = Vec::new();
    for budget in &args.budgets {
        let (share, n_bytes) = budget.of(total);
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

/// The ways of guessing, by what they learn from picks alone.
fn guessing(recording: &Recording) -> Vec<Box<dyn Predictor>> {
    let (n_layers, n_experts) = (recording.n_layers(), recording.n_experts());
    vec![
        Box::new(Previous::new(n_layers)),
        Box::new(Popularity::new(n_layers, n_experts, HALF_LIFE)),
        Box::new(EdgeMoe::new(n_layers, n_experts)),
    ]
}

/// How well each does on the recording, token by token.
fn predictors(app: &App, recording: &Recording) -> Result<Vec<PredictorRow>> {
    let n_layers = recording.n_layers();
    let mut board = Scoreboard::new(n_layers, guessing(recording));
    for token in 0..recording.n_tokens() {
        app.interrupt.check()?;
        for layer in 0..n_layers {
            let at = u16::try_from(layer).context("too many layers")?;
            board.observe(at, recording.picks(layer, token));
        }
    }
    Ok(board.scores().iter().map(PredictorRow::from).collect())
}

/// What reading ahead would bring beside a cache under the first policy, and to a router that is known exactly.
fn ahead(
    app: &App,
    args: &Args,
    (replay, recording): (&Replay<'_>, &Recording),
    total: u64,
) -> Result<Vec<AheadRow>> {
    let mut rows = Vec::new();
    let policies = args.policies();
    let (Some(&policy), 1..) = (policies.first(), args.read_ahead) else {
        return Ok(rows);
    };
    for budget in &args.budgets {
        let (share, n_bytes) = budget.of(total);
        let mut exact = Exact::new(recording.n_layers());
        for layer in 0..recording.n_layers() {
            for token in 0..recording.n_tokens() {
                exact.give(layer as u16, recording.picks(layer, token));
            }
        }
        let mut all = guessing(recording);
        all.push(Box::new(exact));
        for mut predictor in all {
            app.interrupt.check()?;
            let (outcome, ahead) =
                replay.reading_ahead(policy, n_bytes, &mut *predictor, args.read_ahead);
            let misses = outcome.decode.lookups - outcome.decode.hits;
            rows.push(AheadRow {
                predictor: predictor.name(),
                share,
                misses_covered: ahead.n_useful as f64 / misses.max(1) as f64,
                more_bytes: ahead.bytes_wasted as f64 / outcome.decode.bytes_read.max(1) as f64,
                reads: ahead.n_reads,
                useful: ahead.n_useful,
                bytes_wasted: ahead.bytes_wasted,
            });
        }
    }
    Ok(rows)
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
