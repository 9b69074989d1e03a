//! `cadre plan steer`: finds the experts that tell two sets of prompts apart, and says what steering them does.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use cadre_checkpoint::Tokenizer;
use cadre_engine::{
    Logits, Model, NoObserver, Observer, RoutingEvent, Session, SessionOptions, Steering,
};
use cadre_routing::steer::Layers;
use cadre_trace::resonance::{Activation, Place, Ranked, control, rank, separation};
use clap::ValueEnum;
use serde::Serialize;

use crate::cli::App;
use crate::commands::serve::at_least_one;
use crate::commands::trace::write_file;
use crate::data;
use crate::failure::Failure;
use crate::model::ModelArgs;
use crate::output::{Format, Out, bar, note};

/// Positions whose logits are in memory at once.
const CHUNK: usize = 16;

/// Arguments of `cadre plan steer`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompts that show what is looked for: JSON lines with `text`, or plain text; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    positive: Vec<PathBuf>,
    /// Prompts that do not, as like the others as can be in everything else.
    #[arg(long, value_name = "FILE", required = true)]
    negative: Vec<PathBuf>,
    /// How experts are found: ftri, by how much more often the positive prompts pick them.
    #[arg(long, value_name = "METHOD", default_value = "ftri")]
    method: Method,
    /// How many experts of the whole model.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    experts: usize,
    /// What the steering does with them.
    #[arg(long, value_name = "RULE", default_value = "mute")]
    rule: Rule,
    /// Part of the prompts that experts are not chosen by, and that the result is tested on; the last ones of each set.
    #[arg(long, value_name = "PART", default_value_t = 0.25)]
    held_out: f64,
    /// Sets of random experts to compare with; each expert is of the same layer and picked about as often.
    #[arg(long, value_name = "N", default_value_t = 5)]
    controls: usize,
    /// Seed of the random experts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// File to write the steering to, for --steer of every command with a model.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Form of the report.
    #[arg(long, value_name = "FORM", default_value = "text")]
    report: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    /// Difference of mean activations (MoTE).
    Ftri,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Rule {
    /// Leave them out when they are picked; the other picks share the weight.
    Mute,
    /// Never pick them; the next best take their places.
    Mask,
    /// Always pick them.
    Force,
}

/// The document behind `--report json`.
#[derive(Debug, Serialize)]
struct Report {
    method: Method,
    rule: Rule,
    /// Prompts that experts were chosen by, positive and negative.
    prompts: [usize; 2],
    /// Prompts that they were tested on.
    held_out: [usize; 2],
    experts: Vec<Chosen>,
    chosen: Tested,
    /// The same of every set of random experts.
    random: Vec<Tested>,
}

#[derive(Debug, Serialize)]
struct Chosen {
    layer: usize,
    expert: u16,
    /// Mean share of the tokens that pick it, positive less negative.
    delta: f64,
    share: f64,
}

/// A set of experts on the prompts that were held out.
#[derive(Debug, Serialize)]
struct Tested {
    /// Chance that a positive prompt has more of these experts than a negative one; of random experts, that it has more
    /// or that it has fewer, whichever is larger.
    separation: f64,
    /// Mean nats by which steering changes the next token of positive prompts (Kullback-Leibler), and of negative ones.
    change: [f64; 2],
}

/// Finds, tests, writes.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    if !(0.0..1.0).contains(&args.held_out) || args.held_out == 0.0 {
        let message = format!(
            "--held-out {}: expected a part above 0, below 1",
            args.held_out
        );
        return Err(Failure::usage(message).into());
    }
    let loaded = args.model.load(app, &SessionOptions::default())?;
    let model = &*loaded.model;
    let layers = layers(model)?;
    let tokenizer = loaded.tokenizer()?;
    let positive = Prompts::read(&args.positive, (&tokenizer, model), args.held_out)?;
    let negative = Prompts::read(&args.negative, (&tokenizer, model), args.held_out)?;
    let _guard = app.interrupt.guard();
    let mut bench = Bench::new(app, model, [&positive, &negative], args.controls)?;
    let seen = [
        bench.activations(&positive.seen)?,
        bench.activations(&negative.seen)?,
    ];
    let other = [
        bench.activations(&positive.held_out)?,
        bench.activations(&negative.held_out)?,
    ];
    let ranked = rank(&layers, &seen[0], &seen[1]);
    let experts: Vec<Ranked> = ranked
        .iter()
        .filter(|one| one.delta > 0.0)
        .take(args.experts)
        .copied()
        .collect();
    if experts.is_empty() {
        let message = "no expert is picked more often by the positive prompts";
        let hint = "are the two sets the same? then there is nothing to find";
        return Err(Failure::new(message).hint(hint).into());
    }
    let places: Vec<Place> = experts.iter().map(|one| one.place).collect();
    let made = steering(args.rule, &places);
    let mut test = |places: &[Place]| -> Result<Tested> {
        let scores = |set: &[Activation]| set.iter().map(|one| one.score(places)).collect();
        let [positive_scores, negative_scores]: [Vec<f64>; 2] =
            [scores(&other[0]), scores(&other[1])];
        let steering = steering(args.rule, places);
        let change = [&positive.held_out, &negative.held_out];
        Ok(Tested {
            separation: separation(&positive_scores, &negative_scores).unwrap_or(0.5),
            change: [
                bench.change(change[0], &steering)?,
                bench.change(change[1], &steering)?,
            ],
        })
    };
    let chosen = test(&places)?;
    let controls =
        (0..args.controls as u64).map(|n| control(&ranked, &places, args.seed.wrapping_add(n)));
    let random = controls.map(|places| {
        let tested = test(&places)?;
        // Experts that the positive prompts pick less tell them apart as well.
        let separation = tested.separation.max(1.0 - tested.separation);
        Ok(Tested {
            separation,
            ..tested
        })
    });
    let random = random.collect::<Result<_>>()?;
    bench.progress.finish_and_clear();
    let made = model.info().steering.clone().and(&made);
    write_file(&args.output, &(serde_json::to_string_pretty(&made)? + "\n"))?;
    let report = Report {
        method: args.method,
        rule: args.rule,
        prompts: [positive.seen.len(), negative.seen.len()],
        held_out: [positive.held_out.len(), negative.held_out.len()],
        experts: experts.iter().map(Chosen::from).collect(),
        chosen,
        random,
    };
    let mut out = Out::new();
    match args.report {
        Format::Json => out.json(&report)?,
        Format::Text => out.write(&text(&report))?,
    }
    out.finish()?;
    note(&app.env, &format!("wrote {}", args.output.display()));
    Ok(())
}

impl From<&Ranked> for Chosen {
    fn from(one: &Ranked) -> Self {
        Self {
            layer: one.place.layer,
            expert: one.place.expert,
            delta: one.delta,
            share: one.share,
        }
    }
}

/// The layers with experts, and how many each has.
fn layers(model: &dyn Model) -> Result<Vec<(usize, usize)>> {
    let info = model.info();
    if info.moe_layers.is_empty() {
        return Err(Failure::new("the model has no layers with experts: nothing to steer").into());
    }
    let all = info.moe_layers.iter().zip(&info.experts_per_layer);
    Ok(all.map(|(layer, n)| (*layer, *n)).collect())
}

fn steering(rule: Rule, places: &[Place]) -> Steering {
    let mut steering = Steering::default();
    let experts = match rule {
        Rule::Mute => &mut steering.mute,
        Rule::Mask => &mut steering.mask,
        Rule::Force => &mut steering.force,
    };
    let mut sorted = places.to_vec();
    sorted.sort_unstable();
    for place in sorted {
        experts.add(Layers::Range(place.layer, place.layer), [place.expert]);
    }
    steering
}

/// The tokens of one set.
struct Prompts {
    seen: Vec<Vec<u32>>,
    held_out: Vec<Vec<u32>>,
}

impl Prompts {
    /// Every set needs a prompt to choose by and one to test on.
    fn read(
        paths: &[PathBuf],
        (tokenizer, model): (&Tokenizer, &dyn Model),
        part: f64,
    ) -> Result<Self> {
        let mut seen = Vec::new();
        let n_ctx = SessionOptions::default().context(model.info().max_context);
        for path in paths {
            for document in data::read(path)? {
                let mut tokens = tokenizer.encode(&document.text)?;
                tokens.truncate(n_ctx);
                seen.push(tokens);
            }
        }
        let shown = paths[0].display();
        if seen.len() < 2 {
            let message = format!("{shown} holds one prompt, and at least two are needed");
            let hint = "one to choose experts by and one to test them on; in a .jsonl file each line is one";
            return Err(Failure::new(message).hint(hint).into());
        }
        let n_held_out = ((seen.len() as f64 * part).round() as usize).clamp(1, seen.len() - 1);
        let held_out = seen.split_off(seen.len() - n_held_out);
        Ok(Self { seen, held_out })
    }
}

/// A model, and two sessions to compare in.
struct Bench<'a> {
    app: &'a App,
    model: &'a dyn Model,
    plain: Session,
    steered: Session,
    progress: indicatif::ProgressBar,
}

/// Adds up what a prompt activates.
#[derive(Default)]
struct Listener(Activation);

impl Observer for Listener {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        self.0.add(event.layer, event.routing);
    }
}

impl<'a> Bench<'a> {
    fn new(
        app: &'a App,
        model: &'a dyn Model,
        sets: [&Prompts; 2],
        n_controls: usize,
    ) -> Result<Self> {
        let all = sets
            .iter()
            .flat_map(|set| set.seen.iter().chain(&set.held_out));
        let n_ctx = all.clone().map(Vec::len).max();
        let options = SessionOptions {
            n_ctx,
            ..SessionOptions::default()
        };
        let held_out: usize = sets.iter().map(|set| set.held_out.len()).sum();
        let n_passes = all.count() + 2 * held_out * (1 + n_controls);
        Ok(Self {
            app,
            model,
            plain: model.session(&options)?,
            steered: model.session(&options)?,
            progress: bar(&app.env, "prompts", n_passes as u64),
        })
    }

    fn activations(&mut self, prompts: &[Vec<u32>]) -> Result<Vec<Activation>> {
        let mut all = Vec::with_capacity(prompts.len());
        for tokens in prompts {
            self.app.interrupt.check()?;
            self.plain.rewind(0);
            let mut listener = Listener::default();
            let session = &mut self.plain;
            self.model
                .forward(session, tokens, Logits::None, &mut listener)?;
            self.progress.inc(1);
            all.push(listener.0);
        }
        Ok(all)
    }

    /// Mean over all positions of `prompts` of the nats from the model's next token to the steered one's.
    fn change(&mut self, prompts: &[Vec<u32>], steering: &Steering) -> Result<f64> {
        let all = self.model.info().steering.clone().and(steering);
        self.model.steer(&mut self.steered, &all)?;
        let vocab = self.model.info().vocab_size;
        let (mut sum, mut n) = (0.0, 0u32);
        for tokens in prompts {
            self.plain.rewind(0);
            self.steered.rewind(0);
            for chunk in tokens.chunks(CHUNK) {
                self.app.interrupt.check()?;
                let (model, mut none) = (self.model, NoObserver);
                let plain = model.forward(&mut self.plain, chunk, Logits::All, &mut none)?;
                let steered = model.forward(&mut self.steered, chunk, Logits::All, &mut none)?;
                for (p, q) in plain.chunks(vocab).zip(steered.chunks(vocab)) {
                    sum += divergence(p, q);
                    n += 1;
                }
            }
            self.progress.inc(2);
        }
        Ok(sum / f64::from(n.max(1)))
    }
}

/// `sum p (ln p - ln q)` of the softmax of two rows of logits, in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|l| (f64::from(*l) - max).exp()).sum();
        max + sum.ln()
    };
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let ln_p = f64::from(*p) - of_p;
        ln_p.exp() * (ln_p - (f64::from(*q) - of_q))
    });
    // Rounding may leave two equal rows a hair below 0.
    terms.sum::<f64>().max(0.0)
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "layer  expert  more picked by  picked by");
    for Chosen {
        layer,
        expert,
        delta,
        share,
    } in &report.experts
    {
        let (delta, share) = (100.0 * delta, 100.0 * share);
        let _ = writeln!(
            text,
            "{layer:>5}  {expert:>6}  {delta:>12.1} %  {share:>7.1} %"
        );
    }
    let [a, b] = report.held_out;
    let _ = writeln!(
        text,
        "\non {a} positive and {b} negative prompts held out    tells apart  changes positive  negative"
    );
    let line = |name: &str, of: &dyn Fn(&Tested) -> f64| -> String {
        let n = report.random.len().max(1) as f64;
        let mean = report.random.iter().map(of).sum::<f64>() / n;
        let square = report.random.iter().map(|one| (of(one) - mean).powi(2));
        let deviation = (square.sum::<f64>() / n).sqrt();
        match name {
            "these" => format!("{:.3}", of(&report.chosen)),
            _ => format!("{mean:.3} +- {deviation:.3}"),
        }
    };
    for name in ["these", "random"] {
        if name == "random" && report.random.is_empty() {
            continue;
        }
        let separation = line(name, &|one| one.separation);
        let [positive, negative] = [0, 1].map(|set| line(name, &|one| one.change[set]));
        let _ = writeln!(
            text,
            "{name:<6} experts  {separation:>16}  {positive:>16}  {negative:>16}"
        );
    }
    text + "\nchanges: mean nats per token between what the model says and what it says steered\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_do_not_diverge_and_others_do() {
        let row = [0.5, 1.0, -3.0];
        assert_eq!(divergence(&row, &[1.5, 2.0, -2.0]), 0.0);
        // ln 2 against certainty of one of two.
        let nats = divergence(&[0.0, 0.0], &[0.0, -2.0]);
        let q = 1.0 / (1.0 + (-2.0f64).exp());
        let expected = 0.5 * (0.5 / q).ln() + 0.5 * (0.5 / (1.0 - q)).ln();
        assert!((nats - expected).abs() < 1e-9);
    }

    #[test]
    fn a_rule_says_the_experts_of_each_layer() {
        let places = [(2, 7), (0, 3), (2, 1)].map(|(layer, expert)| Place { layer, expert });
        let text = |rule| steering(rule, &places).to_string();
        assert_eq!(text(Rule::Mute), "mute-experts=0:3/2:1,7");
        assert_eq!(text(Rule::Mask), "mask-experts=0:3/2:1,7");
        assert_eq!(text(Rule::Force), "force-experts=0:3/2:1,7");
    }
}
